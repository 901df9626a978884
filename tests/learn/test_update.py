from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from zs_fast.config import AlgorithmConfig, TrainConfig
from zs_fast.errors import CheckpointUnusableError, ConfigError
from zs_fast.learn.algorithms import credit
from zs_fast.learn.batch import PackedBatch, TrainBatch
from zs_fast.learn.losses import MiniBatchSize, micro_batch_loss
from zs_fast.learn.optimizer import Optimizer, Schedule
from zs_fast.learn.pack import pack
from zs_fast.learn.policy import logprobs_at_loss_tokens
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.models.load import LoadedModel
from zs_fast.testing import tiny_model
from zs_fast.types import Group

GRPO = AlgorithmConfig(kl_coefficient=0.1, entropy_coefficient=0.01)
NO_KL = AlgorithmConfig(kl_coefficient=0.0)


def small(seed: int = 0, **options) -> LoadedModel:  # type: ignore[no-untyped-def]
    return tiny_model(seed=seed, hidden_size=16, layers=1, heads=2, kv_heads=1, **options)


def make_roles(*, reference: bool = True) -> Roles:
    """The reference is the policy with weights off by some percent, so that no KL estimate is clamped."""
    policy, frozen = small(0), small(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in frozen.model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    return Roles(policy=policy, reference=frozen if reference else None, temperature=1.0)


def make_batch(groups: list[Group], roles: Roles, algorithm: AlgorithmConfig, token_budget: int = 10_000) -> TrainBatch:
    return credit(score(pack(groups, token_budget=token_budget), roles), algorithm)


def whole(packed: PackedBatch) -> MiniBatchSize:
    written = sum(b > a for a, b in pairwise(packed.loss_offsets))
    return MiniBatchSize(loss_tokens=packed.num_loss_tokens, sequences=written, longest=16)


def gradients(roles: Roles, batch: TrainBatch, algorithm: AlgorithmConfig, token_budget: int) -> list[Tensor]:
    """Gradient of every weight, summed over micro batches of `token_budget` tokens."""
    packed, model = batch.scored.packed, roles.policy.model
    model.zero_grad()
    for micro in packed.micro_batches(token_budget):
        micro_batch_loss(model, micro, batch, algorithm, whole(packed), temperature=1.0)[0].backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def weights(roles: Roles) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in roles.policy.model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_micro_batch_size_does_not_change_the_gradient(make_groups) -> None:  # type: ignore[no-untyped-def]
    """One trajectory, about four, and all at once: equal to 1e-6 of each gradient's norm, in float32."""
    roles = make_roles()
    batch = make_batch(make_groups(3, 4), roles, GRPO)
    mean_length = batch.scored.packed.num_tokens // 12
    all_at_once = gradients(roles, batch, GRPO, 10_000)
    for token_budget in (1, 4 * mean_length):
        for got, expected in zip(gradients(roles, batch, GRPO, token_budget), all_at_once, strict=True):
            assert float((got - expected).norm()) <= 1e-6 * float(expected.norm())


def test_loss_is_the_mean_over_the_tokens_of_the_whole_mini_batch(make_groups) -> None:  # type: ignore[no-untyped-def]
    """Pinned to an independent sum over tokens, so that an error common to all micro-batch sizes would show."""
    roles = make_roles()
    batch = make_batch(make_groups(2, 3), roles, GRPO)
    packed = batch.scored.packed
    (micro,) = packed.micro_batches(10_000)
    scored = logprobs_at_loss_tokens(roles.policy.model, micro, temperature=1.0, entropy=True)
    loss, _ = micro_batch_loss(roles.policy.model, micro, batch, GRPO, whole(packed), temperature=1.0)
    expected = 0.0
    rows = zip(packed.loss_index.tolist(), scored.logprobs.tolist(), scored.entropy.tolist(), strict=True)
    for n, logprob, entropy in rows:
        d = float(batch.scored.ref_logprobs[n]) - logprob
        expected += -float(batch.advantages[n]) + 0.1 * (math.exp(d) - 1 - d) - 0.01 * entropy
    assert float(loss.detach()) == pytest.approx(expected / packed.num_loss_tokens, rel=1e-4)


def test_a_short_last_mini_batch_counts_its_own_tokens(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    """Two mini batches of very different length: each is a mean over its own tokens, none is scaled down."""
    long = make_group([make_trajectory([1, 2], [([5] * 40, [])], reward=1.0)] * 2)
    short = make_group([make_trajectory([1, 2], [([7, 8], [])], reward=1.0)])
    algorithm = AlgorithmConfig(name="reinforce", kl_coefficient=0.0)
    train = TrainConfig(mini_batches=2, learning_rate=1e-12, weight_decay=0.0, max_grad_norm=1e9)
    together = make_roles(reference=False)
    both = Updater(together, train, algorithm, total_steps=1).update(make_batch([long, short], together, algorithm))
    norms = []
    for group in (long, short):
        roles = make_roles(reference=False)
        one = Updater(roles, train.model_copy(update={"mini_batches": 1}), algorithm, total_steps=1)
        norms.append(one.update(make_batch([group], roles, algorithm)).values["grad_norm"])
    assert both.values["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)


def test_the_kl_term_pulls_towards_the_reference(make_groups) -> None:  # type: ignore[no-untyped-def]
    """With no reward signal at all, steps on the loss bring the policy's KL to the reference down."""
    algorithm = AlgorithmConfig(name="grpo", kl_coefficient=1.0)
    roles = make_roles()
    updater = Updater(roles, TrainConfig(learning_rate=1e-2, weight_decay=0.0), algorithm, total_steps=20)
    kls = []
    for _ in range(20):
        batch = make_batch(make_groups(2, 2), roles, algorithm)
        flat = replace(batch, advantages=torch.zeros_like(batch.advantages))
        values = updater.update(flat).values
        kls.append(values["kl/reference"])
        assert values["loss/kl"] == pytest.approx(kls[-1]) and values["loss/policy"] == 0.0
    assert kls[-1] < 0.8 * kls[0]


def test_reward_raises_rewarded_tokens_over_unrewarded_ones(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    good = make_trajectory([1, 2], [([30, 31], [])], reward=1.0)
    bad = make_trajectory([1, 2], [([40, 41], [])], reward=0.0)
    groups = [make_group([good, bad])]
    roles = make_roles(reference=False)
    updater = Updater(roles, TrainConfig(learning_rate=1e-3), NO_KL, total_steps=5)
    before = roles.logprobs("policy", pack(groups, token_budget=99))
    for _ in range(5):
        updater.update(make_batch(groups, roles, NO_KL))
    packed = pack(groups, token_budget=99)
    change = (roles.logprobs("policy", packed) - before)[packed.loss_mask]
    assert change[:2].sum() > 0 > change[2:].sum()


def test_one_update_has_ratio_one_without_a_scoring_pass(make_groups) -> None:  # type: ignore[no-untyped-def]
    roles = make_roles(reference=False)
    batch = make_batch(make_groups(), roles, NO_KL)
    assert batch.scored.old_logprobs is None
    values = Updater(roles, TrainConfig(), NO_KL, total_steps=1).update(batch).values
    assert values["ratio/mean"] == 1.0
    assert values["ratio/clipped_low_share"] == values["ratio/clipped_high_share"] == 0.0


def test_several_updates_measure_the_ratio_against_the_first_weights(make_groups) -> None:  # type: ignore[no-untyped-def]
    roles = make_roles(reference=False)
    train = TrainConfig(mini_batches=2, epochs=2, learning_rate=3e-2, max_grad_norm=1e9)
    updater = Updater(roles, train, NO_KL, total_steps=1)
    values = updater.update(make_batch(make_groups(4, 3), roles, NO_KL)).values
    assert values["update/optimizer_steps"] == 4.0 and updater.state()["optimizer_steps"] == 4
    assert values["ratio/mean"] != 1.0
    assert values["ratio/clipped_low_share"] + values["ratio/clipped_high_share"] > 0.0


def test_sampler_mismatch_is_the_mean_absolute_difference(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    told = make_trajectory([1, 2], [([3, 4], [])], reward=1.0, logprob=-2.5)
    untold = make_trajectory([1, 2], [([3, 4], [])], logprob=None)
    roles = make_roles(reference=False)
    batch = make_batch([make_group([told, untold])], roles, NO_KL)
    truth = roles.logprobs("policy", batch.scored.packed)[batch.scored.packed.loss_mask][:2]
    values = Updater(roles, TrainConfig(), NO_KL, total_steps=1).update(batch).values
    assert values["logprobs/rollout_mismatch"] == pytest.approx(float((truth + 2.5).abs().mean()), rel=1e-5)


@pytest.mark.parametrize("poison", ["advantage", "weight"])
def test_a_non_finite_step_leaves_weights_and_moments_alone(make_groups, poison: str) -> None:  # type: ignore[no-untyped-def]
    roles = make_roles(reference=False)
    updater = Updater(roles, TrainConfig(learning_rate=1e-2), NO_KL, total_steps=9)
    updater.update(make_batch(make_groups(), roles, NO_KL))
    batch = make_batch(make_groups(), roles, NO_KL)
    if poison == "advantage":
        batch.advantages[batch.scored.packed.loss_index[0]] = float("inf")
    else:
        with torch.no_grad():
            next(iter(roles.policy.model.parameters()))[:, 0] = float("nan")
    before = weights(roles), {name: t.clone() for name, t in updater.state_tensors().items()}
    values = updater.update(batch).values
    for a, b in zip(weights(roles), before[0], strict=True):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
    assert all(torch.equal(t, before[1][name]) for name, t in updater.state_tensors().items())
    assert values["update/nonfinite_losses"] == 1.0 and values["update/optimizer_steps"] == 0.0
    assert updater.state() == {"optimizer_steps": 2, "skipped_steps": 1}
    assert all(math.isfinite(value) for value in values.values())


def test_batches_without_anything_to_learn_are_finite_and_move_nothing(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    failed = make_trajectory([1, 2], [([3], [])], trainable=False)
    silent = make_trajectory([1, 2], [])
    for groups in ([], [make_group([failed, failed])], [make_group([silent])]):
        roles = make_roles()
        before = weights(roles)
        values = (
            Updater(roles, TrainConfig(weight_decay=0.5), GRPO, total_steps=1)
            .update(make_batch(groups, roles, GRPO))
            .values
        )
        assert same(weights(roles), before)
        assert values["update/empty_steps"] == 1.0
        assert all(math.isfinite(value) for value in values.values())


def test_dead_groups_give_a_zero_gradient_without_the_kl(make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    group = make_group([make_trajectory([1, 2], [([3, 4], [])], reward=0.3) for _ in range(3)])
    roles = make_roles(reference=False)
    values = Updater(roles, TrainConfig(), NO_KL, total_steps=1).update(make_batch([group], roles, NO_KL)).values
    assert values["grad_norm"] == 0.0 and values["dead_group_share"] == 1.0


def test_the_same_inputs_give_the_same_bits(make_groups) -> None:  # type: ignore[no-untyped-def]
    runs = []
    for _ in range(2):
        roles = make_roles()
        updater = Updater(roles, TrainConfig(mini_batches=2, learning_rate=1e-2), GRPO, total_steps=3)
        values = [updater.update(make_batch(make_groups(seed=s), roles, GRPO, 60)).values for s in range(3)]
        runs.append((values, weights(roles)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_bit_exact(make_groups, dtype: str) -> None:  # type: ignore[no-untyped-def]
    """Three steps in one go, and two, a save through safetensors, a load into new objects, and one more."""
    train = TrainConfig(learning_rate=1e-2, warmup_steps=2, final_learning_rate_fraction=0.1)

    def start() -> tuple[Roles, Updater]:
        roles = Roles(policy=small(0, dtype=dtype), reference=small(1, dtype=dtype), temperature=1.0)
        return roles, Updater(roles, train, GRPO, total_steps=3)

    def step(roles: Roles, updater: Updater, seed: int) -> dict[str, float]:
        return dict(updater.update(make_batch(make_groups(seed=seed), roles, GRPO)).values)

    roles, updater = start()
    for seed in range(2):
        step(roles, updater, seed)
    state, tensors = dict(updater.state()), load(save(updater.state_tensors()))
    saved_weights = copy.deepcopy(roles.policy.model.state_dict())
    straight = step(roles, updater, 2)

    resumed, other = start()
    resumed.policy.model.load_state_dict(saved_weights)
    other.load_state_tensors(tensors)
    other.load_state(state)
    assert step(resumed, other, 2) == straight
    assert same(weights(resumed), weights(roles))
    assert all(torch.equal(t, other.state_tensors()[name]) for name, t in updater.state_tensors().items())


def test_states_of_another_model_are_refused() -> None:
    updater = Updater(make_roles(reference=False), TrainConfig(), NO_KL, total_steps=1)
    name = "adamw.m.model.embed_tokens.weight"
    with pytest.raises(CheckpointUnusableError, match=r"'adamw\.m\.other'"):
        updater.load_state_tensors({"adamw.m.other": torch.zeros(3)})
    with pytest.raises(CheckpointUnusableError, match=r"lacks '(step|v)'"):
        updater.load_state_tensors({name: torch.zeros(259, 16)})
    with pytest.raises(CheckpointUnusableError, match=r"shape \[3\]"):
        parts = {name.replace(".m.", ".step."): torch.zeros(()), name.replace(".m.", ".v."): torch.zeros(259, 16)}
        updater.load_state_tensors({name: torch.zeros(3)} | parts)
    with pytest.raises(CheckpointUnusableError, match="optimizer_steps"):
        updater.load_state({"skipped_steps": 0})


def test_a_kl_term_needs_a_reference() -> None:
    with pytest.raises(ConfigError, match=r"kl_coefficient is 0.1.*set algorithm.kl_coefficient = 0"):
        Updater(make_roles(reference=False), TrainConfig(), GRPO, total_steps=1)


def test_schedule_by_hand() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=2, total_steps=6, final_fraction=0.25)
    assert [schedule.at(step) for step in range(7)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.25])
    flat = Schedule(peak=2.0, warmup_steps=0, total_steps=3, final_fraction=1.0)
    assert [flat.at(step) for step in range(3)] == [2.0, 2.0, 2.0]
    assert Schedule(peak=1.0, warmup_steps=0, total_steps=1, final_fraction=0.0).at(0) == 1.0


def make_optimizer(model: torch.nn.Module, *, weight_decay: float = 0.0, max_grad_norm: float = 1.0) -> Optimizer:
    schedule = Schedule(peak=0.1, warmup_steps=0, total_steps=100, final_fraction=1.0)
    return Optimizer(
        model, schedule, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, max_grad_norm=max_grad_norm
    )


def test_gradients_are_clipped_to_the_norm_and_never_scaled_up() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = make_optimizer(model)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert float(optimizer.clip_gradients()) == pytest.approx(5.0)
    assert model.weight.grad.tolist()[0] == pytest.approx([0.6, 0.0]) and model.bias.grad.tolist() == pytest.approx(
        [0.8]
    )
    model.weight.grad, model.bias.grad = torch.tensor([[0.3, 0.0]]), torch.tensor([0.4])
    assert float(optimizer.clip_gradients()) == pytest.approx(0.5)
    assert model.bias.grad.tolist() == pytest.approx([0.4])


def test_weight_decay_shrinks_matrices_only() -> None:
    model = torch.nn.Linear(3, 3)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = make_optimizer(model, weight_decay=0.5)
    model.weight.grad, model.bias.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias.detach(), before[1])


def test_bfloat16_weights_take_steps_below_their_resolution() -> None:
    """80 steps of 1e-4 on a weight of 1: each is lost in bfloat16 (spacing 1/128), together they are not."""
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    schedule = Schedule(peak=1e-4, warmup_steps=0, total_steps=100, final_fraction=1.0)
    optimizer = Optimizer(model, schedule, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    for _ in range(80):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.clip_gradients()
        optimizer.step()
    assert float(optimizer.state_tensors()["master.weight"]) == pytest.approx(1 - 80 * 1e-4, abs=1e-5)
    assert float(model.weight.detach()) < 1.0


def test_at_a_learning_rate_of_1e_6_plain_bfloat16_adamw_changes_nothing_and_ours_does_as_float32_would() -> None:
    """100 steps on weights of usual sizes, 0.002 to 0.1: neighbours in bfloat16 lie 1.5e-5 apart or more there.

    Masters equal torch's AdamW on float32 weights to 1e-9 (a step is 1e-6); the weights are those, rounded once.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=generator) * 0.03
    start = (start.sign() * start.abs().clamp(min=2**-9, max=0.1)).bfloat16()
    ours, plain, exact = (torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(3))
    for model in (ours, plain, exact):
        model.weight = torch.nn.Parameter(start.clone())
    exact.float()
    schedule = Schedule(peak=1e-6, warmup_steps=0, total_steps=100, final_fraction=1.0)
    optimizer = Optimizer(ours, schedule, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, max_grad_norm=1e9)
    rivals = [torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01) for model in (plain, exact)]
    for _ in range(100):
        gradient = (torch.randn(64, 64, generator=generator) + start.sign()).bfloat16()
        (ours.weight * gradient).sum().backward()
        optimizer.clip_gradients()
        optimizer.step()
        for model, rival in zip((plain, exact), rivals, strict=True):
            model.weight.grad = gradient.to(model.weight.dtype)
            rival.step()
    assert torch.equal(plain.weight, start), "every step is lost"
    master = optimizer.state_tensors()["master.weight"]
    assert (master - exact.weight.detach()).abs().max() <= 1e-9
    assert torch.equal(ours.weight, master.bfloat16())
    assert (ours.weight != start).float().mean() > 0.25
