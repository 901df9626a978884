"""GRPO's and RLOO's advantages and GRPO's losses against the code inside TRL's trainers, which is run as it stands.

Losses: 1e-5 relative to the loss (TRL sums tokens in another order and has exp(d) - d - 1 where we have expm1(d) - d),
gradients 1e-5 relative to the largest. Each normaliser is pinned to a number worked out by hand as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from zs_kernels.compat import trl
from zs_kernels.testing import seeded

B, T = 5, 6
MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
)


class Accelerator:
    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x


def their_loss(
    trl_grpo, logps, entropies, inputs, *, training=True, accumulation=1, steps_per_generation=1, **settings
):
    """(loss, metrics) of GRPOTrainer._compute_loss for given log-probs, in place of a model's."""
    values = {
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "loss_type": "dapo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "entropy_coef": 0.0,
        "max_completion_length": None,
    } | settings
    args = SimpleNamespace(
        use_bias_correction_kl=False, delta=settings.get("delta"), steps_per_generation=steps_per_generation
    )
    ratio = inputs.get("importance_sampling_ratio")
    stub = SimpleNamespace(
        **values,
        args=args,
        model=SimpleNamespace(training=training),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        use_vllm=ratio is not None,
        vllm_importance_sampling_correction=ratio is not None,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=values["entropy_coef"] != 0.0,
        current_gradient_accumulation_steps=accumulation,
        _metrics={mode: defaultdict(list) for mode in ("train", "eval")},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, entropies, None),
    )
    empty = torch.zeros(B, 0, dtype=torch.long)
    given = {"prompt_ids": empty, "prompt_mask": empty, "completion_ids": MASK, "completion_mask": MASK} | inputs
    return trl_grpo.GRPOTrainer._compute_loss(stub, None, given), stub._metrics["train" if training else "eval"]


def case(loss_type, *, level="token", on_policy=False, beta=0.0, delta=None, ratio=None, entropy_coef=0.0, seed=0):
    old = -seeded(B, T, seed=seed + 1).abs() - 0.1
    logps = (old + 0.4 * seeded(B, T, seed=seed + 2)).requires_grad_()
    inputs = {"advantages": seeded(B, seed=seed + 3), "num_items_in_batch": MASK.sum() + 9.0}
    if not on_policy:
        inputs["old_per_token_logps"] = old
    if beta:
        inputs["ref_per_token_logps"] = old + 0.3 * seeded(B, T, seed=seed + 4)
    if ratio is not None:
        shape = (B, T) if ratio == "token" else (B, 1)
        inputs["importance_sampling_ratio"] = (0.3 * seeded(*shape, seed=seed + 5)).exp()
    entropies = seeded(B, T, seed=seed + 6).abs().requires_grad_()
    settings = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": beta,
        "delta": delta,
        "epsilon_high": 1.3 if loss_type == "cispo" else 0.28,
        "entropy_coef": entropy_coef,
        "max_completion_length": 11,
    }
    return logps, entropies, inputs, settings


def our_loss(logps, entropies, inputs, *, accumulation=1, steps_per_generation=1, **settings):
    return trl.grpo_loss(
        logps,
        inputs.get("old_per_token_logps"),
        inputs["advantages"],
        MASK,
        ref_per_token_logps=inputs.get("ref_per_token_logps"),
        importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
        entropies=entropies,
        num_items_in_batch=inputs["num_items_in_batch"],
        gradient_accumulation_steps=accumulation,
        steps_per_generation=steps_per_generation,
        **settings,
    )


def compare(trl_grpo, made, **steps):
    logps, entropies, inputs, settings = made
    theirs, metrics = their_loss(trl_grpo, logps, entropies, inputs, **settings, **steps)
    ours = our_loss(logps, entropies, inputs, **settings, **steps)
    assert abs(theirs.item()) > 1e-3, "a loss of 0 would compare nothing"
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-7)
    leaves = [logps, entropies] if settings["entropy_coef"] else [logps]
    for a, b in zip(torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        assert not a[MASK == 0].any()
    return ours, metrics


@pytest.mark.parametrize("loss_type", trl.LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("steps", [(1, 1), (3, 2)], ids=str)
def test_losses(trl_grpo, loss_type, beta, steps):
    ours, metrics = compare(trl_grpo, case(loss_type, beta=beta), accumulation=steps[0], steps_per_generation=steps[1])
    if loss_type != "cispo":
        assert metrics["clip_ratio/low_mean"][0] == pytest.approx(ours.clip_low.item())
        assert metrics["clip_ratio/high_mean"][0] == pytest.approx(ours.clip_high.item())
    if beta:
        assert metrics["kl"][0] == pytest.approx(ours.kl.item(), rel=1e-5) and metrics["kl"][0] > 0


@pytest.mark.parametrize("loss_type", [name for name in trl.LOSS_TYPES if name != "cispo"])
@pytest.mark.parametrize("ratio", [None, "token", "sequence"])
def test_sequence_level_ratios(trl_grpo, loss_type, ratio):
    compare(trl_grpo, case(loss_type, level="sequence", beta=0.2, ratio=ratio))


@pytest.mark.parametrize("loss_type", trl.LOSS_TYPES)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_importance_ratios_of_the_sampler(trl_grpo, loss_type, ratio):
    """They multiply the policy's term and not the KL's."""
    compare(trl_grpo, case(loss_type, beta=0.3, ratio=ratio))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("delta", [0.9, 1.5, 4.0])
def test_two_sided_clip(trl_grpo, loss_type, delta):
    compare(trl_grpo, case(loss_type, delta=delta))


@pytest.mark.parametrize("loss_type", trl.LOSS_TYPES)
def test_the_first_step_on_a_batch(trl_grpo, loss_type):
    compare(trl_grpo, case(loss_type, on_policy=True, beta=0.3))


@pytest.mark.parametrize("steps", [(1, 1), (4, 4)], ids=str)
def test_entropy_bonus(trl_grpo, steps):
    made = case("dapo", entropy_coef=0.2)
    compare(trl_grpo, made, accumulation=steps[0], steps_per_generation=steps[1])


def test_token_level_advantages(trl_grpo):
    made = case("dapo")
    made[2]["advantages"] = seeded(B, T, seed=9)
    compare(trl_grpo, made)


# With ratio 1 a token's loss is -A = -(row + 1); rows have 6, 2, 4, 0, 1 unmasked tokens, 13 in all.
BY_HAND = {
    "grpo": -(1 + 2 + 3 + 0 + 5) / 5,
    "bnpo": -(6 * 1 + 2 * 2 + 4 * 3 + 1 * 5) / 13,
    "dr_grpo": -(6 * 1 + 2 * 2 + 4 * 3 + 1 * 5) / (5 * 11),
    "luspo": -(6 * 1 + 2 * 2 + 4 * 3 + 1 * 5) / 5,
    "dapo": -(6 * 1 + 2 * 2 + 4 * 3 + 1 * 5) / 26,
}


@pytest.mark.parametrize("loss_type", BY_HAND)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_normalisers_by_hand(loss_type, accumulation):
    found = trl.grpo_loss(
        torch.full((B, T), -1.0),
        None,
        torch.arange(1.0, B + 1),
        MASK,
        loss_type=loss_type,
        max_completion_length=11,
        num_items_in_batch=26,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation if loss_type == "dapo" else None,
    )
    expected = BY_HAND[loss_type] / (1 if loss_type == "dapo" else accumulation)
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)


def test_dapos_normaliser_spans_the_generation_batch():
    """2 processes, 8 steps per generation of which 2 accumulate: 26 items / 2 * 2 / 8."""
    keywords = {"num_items_in_batch": 26, "num_processes": 2, "gradient_accumulation_steps": 2}
    found = trl.grpo_loss(torch.zeros(B, T), None, torch.ones(B), MASK, steps_per_generation=8, **keywords)
    assert found.loss.item() == pytest.approx(-13 / 3.25)


def test_beta_by_hand():
    """One token, ratio 1, advantage 0: the loss is beta (exp(d) - d - 1) with d = ln 2."""
    one = torch.zeros(1, 1)
    found = trl.grpo_loss(
        one, None, torch.zeros(1), one + 1, beta=0.5, loss_type="bnpo", ref_per_token_logps=one + math.log(2)
    )
    assert found.loss.item() == pytest.approx(0.5 * (1 - math.log(2)))


def test_garbage_in_masked_slots():
    logps, entropies, inputs, settings = case("dapo", beta=0.3, ratio="token", entropy_coef=0.1)
    for name in ("old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio"):
        inputs[name] = inputs[name].masked_fill(MASK == 0, torch.nan)
    clean = our_loss(logps, entropies, inputs, **settings).loss
    dirty = logps.detach().masked_fill(MASK == 0, torch.inf).requires_grad_()
    found = our_loss(dirty, entropies, inputs, **settings).loss
    assert found == clean and found.isfinite()
    assert torch.autograd.grad(found, dirty)[0].isfinite().all()


def test_nothing_but_masked_tokens():
    empty = torch.zeros(B, T)
    for loss_type in trl.LOSS_TYPES:
        keywords = {"max_completion_length": 3, "num_items_in_batch": 0, "loss_type": loss_type}
        assert trl.grpo_loss(empty, None, torch.ones(B), empty, epsilon_high=2.0, **keywords).loss == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"loss_type": "sapo"}, r"'loss_type' must be one of .*; TRL's own trainer has it, got str 'sapo'"),
        ({"loss_type": "ppo"}, "'loss_type' must be one of"),
        ({"importance_sampling_level": "word"}, "'importance_sampling_level' must be token or sequence"),
        ({"importance_sampling_level": "sequence", "loss_type": "cispo", "num_items_in_batch": 1}, "token for cispo"),
        ({"loss_type": "dr_grpo"}, "'max_completion_length' must be given for dr_grpo"),
        ({"loss_type": "dapo"}, "'num_items_in_batch' must be given for dapo"),
        ({"beta": 0.1}, "'ref_per_token_logps' must be given with beta"),
        ({"entropy_coef": 0.1}, "'entropies' must be given with entropy_coef"),
        ({"mask": torch.full((B, T), 0.5)}, "'mask' must be zeros and ones"),
        ({"mask": torch.ones(B, T + 1)}, r"'mask' must be of shape \[5, 6\]"),
        ({"advantages": torch.ones(B, requires_grad=True)}, r"'advantages' must not ask for a gradient.*detach"),
    ],
)
def test_what_cannot_be_expressed_says_so(keywords, message):
    arguments = {"advantages": torch.ones(B), "mask": MASK} | keywords
    with pytest.raises(ValueError, match=message):
        trl.grpo_loss(torch.zeros(B, T), None, arguments.pop("advantages"), arguments.pop("mask"), **arguments)


@pytest.fixture(scope="module")
def trainer(trl_grpo, tmp_path_factory):
    """A GRPOTrainer on a tiny model, whose `_calculate_rewards` a test replaces."""
    from datasets import Dataset

    from zs_fast.testing import byte_tokenizer, tiny_model

    tokenizer = byte_tokenizer(chat_template=False)
    model = tiny_model(tokenizer=tokenizer, hidden_size=16, layers=1).model
    model.config._attn_implementation = "eager"
    return tokenizer, model, Dataset.from_dict({"prompt": ["a", "b", "c"]}), tmp_path_factory.mktemp("trl")


NAN = math.nan
REWARDS = torch.tensor(
    [
        [1.0, 0.0], [0.0, 1.0], [0.5, 0.25], [1.0, 1.0],
        [NAN, NAN], [0.25, NAN], [1.0, 0.5], [NAN, 0.75],
        [NAN, NAN], [NAN, NAN], [NAN, NAN], [2.0, 1.0],
    ]
)  # fmt: skip


def their_advantages(trainer, kind, rewards, **settings):
    """What the trainer's `_generate_and_score_completions` makes of rewards [12, 2], 4 generations per prompt."""
    import trl as package

    tokenizer, model, data, folder = trainer
    config, made = {
        "grpo": (package.GRPOConfig, package.GRPOTrainer),
        "rloo": (package.RLOOConfig, package.RLOOTrainer),
    }[kind]
    functions = [lambda **k: None, lambda **k: None]
    for i, function in enumerate(functions):
        function.__name__ = f"reward_{i}"
    args = config(
        output_dir=str(folder), use_cpu=True, report_to="none", max_completion_length=2, num_generations=4,
        per_device_train_batch_size=12, seed=0, bf16=False, beta=0.0, **settings,
    )  # fmt: skip
    one = made(model=model, reward_funcs=functions, args=args, train_dataset=data, processing_class=tokenizer)
    one._calculate_rewards = lambda *a, **k: rewards.clone()
    prompts = [{"prompt": data[i // 4]["prompt"]} for i in range(12)]
    return one._generate_and_score_completions(prompts)["advantages"]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages(trainer, scale):
    theirs = their_advantages(trainer, "grpo", REWARDS, scale_rewards=scale, reward_weights=[1.0, 0.5])
    ours = trl.grpo_advantages(REWARDS, 4, reward_weights=torch.tensor([1.0, 0.5]), scale_rewards=scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.abs().max() > 0.1 and not ours[8:].any(), "the only one of its group gets nothing"


def test_grpo_advantages_normalised_before_the_sum(trainer):
    settings = {"multi_objective_aggregation": "normalize_then_sum"}
    theirs = their_advantages(trainer, "grpo", REWARDS, reward_weights=[1.0, 0.5], **settings)
    ours = trl.grpo_advantages(REWARDS, 4, reward_weights=torch.tensor([1.0, 0.5]), **settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_advantages(trainer, normalize):
    theirs = their_advantages(trainer, "rloo", REWARDS, normalize_advantages=normalize)
    rewards = REWARDS.nansum(dim=1).masked_fill(REWARDS.isnan().all(dim=1), NAN)
    ours = trl.rloo_advantages(rewards, 4, normalize_advantages=normalize)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_advantages_by_hand():
    """Rewards 1, 0, 0, 1: mean 0.5, unbiased deviation sqrt(1/3); leave-one-out means 1/3 and 2/3."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    grpo = trl.grpo_advantages(rewards[:, None], 4)
    assert grpo.tolist() == pytest.approx([a * 0.5 / (math.sqrt(1 / 3) + 1e-4) for a in (1, -1, -1, 1)])
    assert trl.rloo_advantages(rewards, 4).tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


def test_equal_rewards_are_no_signal():
    assert not trl.grpo_advantages(torch.full((6, 1), 0.1), 3).any()
    assert not trl.grpo_advantages(torch.full((1, 1), 0.1), 1, scale_rewards="batch").any()


def test_advantage_arguments_are_checked():
    for keywords, message in (
        ({"num_generations": 5}, "'num_generations' must be a divisor of the 12 completions"),
        ({"scale_rewards": "all"}, "'scale_rewards' must be group, batch or none"),
        ({"multi_objective_aggregation": "sum"}, "'multi_objective_aggregation' must be one of"),
    ):
        arguments = {"num_generations": 4} | keywords
        with pytest.raises(ValueError, match=message):
            trl.grpo_advantages(REWARDS, **arguments)
