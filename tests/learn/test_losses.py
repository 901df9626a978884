from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from zs_fast.config import ALGORITHM_DEFAULTS, AlgorithmConfig, TrainConfig
from zs_fast.errors import EngineError
from zs_fast.learn.algorithms import credit
from zs_fast.learn.critic import Critic
from zs_fast.learn.losses import MiniBatchSize, micro_batch_loss, token_weights
from zs_fast.learn.pack import pack
from zs_fast.learn.policy import logprobs_at_loss_tokens
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.testing import tiny_model


def make_roles() -> Roles:
    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
    return Roles(policy=tiny_model(seed=0, **shape), reference=tiny_model(seed=1, **shape), temperature=1.0)


WEIGHTS = {  # of trajectories that wrote two tokens and one token; 16 is the most one may write
    "token-mean": [1 / 3, 1 / 3, 1 / 3],
    "token-sum": [1, 1, 1],
    "seq-mean-token-sum": [1 / 2, 1 / 2, 1 / 2],
    "seq-mean-token-mean": [1 / 4, 1 / 4, 1 / 2],
    "seq-mean-token-sum-norm": [1 / 32, 1 / 32, 1 / 32],
}


@pytest.mark.parametrize("aggregation", sorted(WEIGHTS))
def test_weights_by_hand(make_trajectory, make_group, aggregation: str) -> None:  # type: ignore[no-untyped-def]
    silent = make_trajectory([1], [([9], [])], trainable=False)
    group = make_group([make_trajectory([1], [([3], [5]), ([6], [])]), silent, make_trajectory([1], [([2], [])])])
    packed = pack([group], token_budget=1)
    size = MiniBatchSize(loss_tokens=3, sequences=2, longest=16)
    found = torch.cat([token_weights(micro, size, aggregation) for micro in packed.micro_batches(1)])
    assert found.tolist() == pytest.approx(WEIGHTS[aggregation])


WITHOUT_CRITIC = sorted(set(ALGORITHM_DEFAULTS) - {"ppo"})


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_no_algorithm_depends_on_the_micro_batch_size(make_groups, name: str) -> None:  # type: ignore[no-untyped-def]
    algorithm = AlgorithmConfig(name=name, kl_coefficient=0.05, entropy_coefficient=0.01)
    roles = make_roles()
    packed = pack(make_groups(2, 3), token_budget=10_000)
    batch = credit(score(packed, roles, old_logprobs=True), algorithm)
    size = MiniBatchSize(loss_tokens=packed.num_loss_tokens, sequences=6, longest=16)
    gradients = []
    for budget in (1, 10_000):
        roles.policy.model.zero_grad()
        for micro in packed.micro_batches(budget):
            micro_batch_loss(roles.policy.model, micro, batch, algorithm, size, temperature=1.0)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in roles.policy.model.parameters()]))
    assert float((gradients[0] - gradients[1]).norm()) <= 1e-6 * float(gradients[1].norm())
    assert float(gradients[1].norm()) > 0


@pytest.mark.parametrize("name", sorted(ALGORITHM_DEFAULTS))
def test_every_algorithm_moves_probability_to_the_better_answer(make_trajectory, make_group, name: str) -> None:  # type: ignore[no-untyped-def]
    good = make_trajectory([1, 2], [([30, 31], [])], reward=1.0)
    bad = make_trajectory([1, 2], [([40, 41], [])], reward=0.0)
    groups = [make_group([good, bad])]
    roles = make_roles()
    algorithm = AlgorithmConfig(name=name, kl_coefficient=0.0)
    if name == "ppo":
        roles = replace(roles, critic=Critic(tiny_model(seed=2, hidden_size=16, layers=1, heads=2, kv_heads=1)))
    updater = Updater(roles, TrainConfig(learning_rate=1e-3), algorithm, total_steps=5, longest=2)
    before = roles.logprobs("policy", pack(groups, token_budget=99))
    for _ in range(5):
        packed = pack(groups, token_budget=99)
        updater.update(credit(score(packed, roles, old_logprobs=updater.needs_old_logprobs), algorithm))
    moved = (roles.logprobs("policy", packed) - before)[packed.loss_index]
    assert moved[:2].sum() > moved[2:].sum() + 0.01


def test_gspo_has_the_ratio_of_the_whole_trajectory(make_groups) -> None:  # type: ignore[no-untyped-def]
    """exp(mean of log-ratios), clipped, times the advantage, mean over trajectories: arXiv:2507.18071, equation 5."""
    algorithm = AlgorithmConfig(name="gspo", clip_low=0.01, clip_high=0.01)
    roles = make_roles()
    packed = pack(make_groups(2, 3), token_budget=10_000)
    scored = score(packed, roles, old_logprobs=True)
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(packed.num_tokens, generator=generator)
    scored = type(scored)(packed=packed, old_logprobs=scored.old_logprobs + noise, ref_logprobs=scored.ref_logprobs)
    batch = credit(scored, algorithm)
    (micro,) = packed.micro_batches(10_000)
    size = MiniBatchSize(loss_tokens=packed.num_loss_tokens, sequences=6, longest=16)
    loss, sums = micro_batch_loss(roles.policy.model, micro, batch, algorithm, size, temperature=1.0)
    logprobs = logprobs_at_loss_tokens(roles.policy.model, micro, temperature=1.0).logprobs.detach()
    log_ratio = logprobs - scored.old_logprobs[packed.loss_index]
    expected, clipped = 0.0, 0
    for first, last, advantage in zip(
        micro.loss_cu_seqlens, micro.loss_cu_seqlens[1:], batch.sequence_advantages.tolist(), strict=False
    ):
        ratio = float(log_ratio[first:last].mean().exp())
        bounded = min(max(ratio, 0.99), 1.01)
        expected -= min(ratio * advantage, bounded * advantage) / 6
        clipped += ((ratio < 0.99 and advantage < 0) or (ratio > 1.01 and advantage > 0)) * (last - first)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(sums["clipped_low"] + sums["clipped_high"]) == clipped > 0


def test_a_steered_kl_coefficient_follows_its_target(make_groups) -> None:  # type: ignore[no-untyped-def]
    algorithm = AlgorithmConfig(kl_coefficient=0.1, kl_target=1e-6)
    roles = make_roles()
    updater = Updater(roles, TrainConfig(learning_rate=1e-6), algorithm, total_steps=3)
    packed = pack(make_groups(2, 3), token_budget=10_000)
    values = updater.update(credit(score(packed, roles), algorithm, kl_coefficient=updater.kl_coefficient)).values
    assert values["kl/coefficient"] == 0.1 and values["kl/reference"] > 2e-6
    assert updater.kl_coefficient == pytest.approx(0.102)  # far above the target: 2 % a step
    assert updater.state()["kl_coefficient"] == updater.kl_coefficient
    resumed = Updater(make_roles(), TrainConfig(), algorithm, total_steps=3)
    resumed.load_state(updater.state())
    assert resumed.kl_coefficient == updater.kl_coefficient


def test_a_correction_weighs_tokens_by_how_likely_the_trainer_finds_them(make_groups) -> None:  # type: ignore[no-untyped-def]
    """Sampler's log-probabilities twice too high or low: weights e^-d, cut at 2 or left out outside [0.5, 2]."""
    roles = make_roles()
    packed = pack(make_groups(2, 3), token_budget=10_000)
    scored = score(packed, roles, old_logprobs=True)
    shift = torch.zeros(packed.num_tokens)
    shift[packed.loss_index] = torch.linspace(-1.0, 1.0, packed.num_loss_tokens)
    packed = replace(packed, rollout_logprobs=scored.old_logprobs + shift)
    scored = replace(scored, packed=packed)
    size = MiniBatchSize(loss_tokens=packed.num_loss_tokens, sequences=6, longest=16)
    (micro,) = packed.micro_batches(10_000)
    rho = torch.exp(-shift[packed.loss_index])
    rules = {"truncate": rho.clamp(max=2.0), "mask": torch.where((rho >= 0.5) & (rho <= 2.0), rho, 0.0)}
    for mode, expected_weights in rules.items():
        algorithm = AlgorithmConfig(kl_coefficient=0.0, correction="token", correction_mode=mode)
        batch = credit(scored, algorithm)
        loss, sums = micro_batch_loss(roles.policy.model, micro, batch, algorithm, size, temperature=1.0)
        expected = -(expected_weights * batch.advantages[packed.loss_index]).sum() / packed.num_loss_tokens
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
        assert float(sums["mismatch"]) == pytest.approx(float(shift.abs().sum()), rel=1e-4)
        outside = (rho > 2.0) | ((rho < 0.5) & (mode == "mask"))
        assert float(sums["mismatch_outside"]) == float(outside.sum()) > 0
    assert Updater(roles, TrainConfig(), algorithm, total_steps=1).needs_old_logprobs


def test_the_samplers_own_logprobs_can_be_the_old_ones(make_groups, make_trajectory, make_group) -> None:  # type: ignore[no-untyped-def]
    algorithm = AlgorithmConfig(kl_coefficient=0.0, old_logprobs="sampler")
    updater = Updater(make_roles(), TrainConfig(mini_batches=2), algorithm, total_steps=1)
    packed = pack(make_groups(2, 3), token_budget=10_000)  # the sampler said -1 everywhere
    values = updater.update(credit(score(packed, updater.roles), algorithm)).values
    assert values["ratio/mean"] != 1.0 and not updater.needs_old_logprobs
    silent = make_group([make_trajectory([1], [([2], [])], reward=r, logprob=None) for r in (0.0, 1.0)])
    with pytest.raises(EngineError, match=r"algorithm\.old_logprobs"):
        updater.update(credit(score(pack([silent] * 2, token_budget=99), updater.roles), algorithm))
