"""zs_kernels.compat.openrlhf against OpenRLHF 0.11.2: models/utils.py and models/loss.py as they stand, and the
formulas of its experience maker (which cannot be imported without flash-attn, deepspeed and Ray) written out here.

Tolerances: 2e-6 relative for sums (theirs divide the sum, ours weigh each token), gradients 2e-6 relative to the
largest; k1 and k2 bit for bit; k3 as far as exp(d) - d - 1 and expm1(d) - d agree.
"""

from __future__ import annotations

import math

import pytest
import torch

from zs_kernels.compat import openrlhf as ours
from zs_kernels.testing import assert_no_worse_than_torch, seeded

B, T = 5, 8
SIZES = ({}, {"dp_size": 4, "batch_num_tokens": 77.0, "global_batch_size": 9.0})
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 2**-9}


def mask(dtype=torch.float32):
    chosen = seeded(B, T, seed=3) > -0.3
    chosen[1], chosen[2] = False, True
    return chosen.to(dtype)


def close(found, expected, **keywords):
    torch.testing.assert_close(found, expected, **({"rtol": 2e-6, "atol": 1e-7} | keywords))


def tokens(spread=0.4):
    old = -seeded(B, T, seed=1).abs() - 0.05
    return (old + spread * seeded(B, T, seed=2)).requires_grad_(), old, seeded(B, T, seed=4)


def compare(found, expected, leaf):
    """Tuples of a loss with gradient and numbers without, or None."""
    assert abs(expected[0].item()) > 1e-3, "a loss of 0 would compare nothing"
    close(found[0], expected[0])
    gradient, expected_gradient = (torch.autograd.grad(x[0], leaf)[0] for x in (found, expected))
    close(gradient, expected_gradient, atol=2e-6 * float(expected_gradient.abs().max()))
    assert [x is None for x in found] == [x is None for x in expected]
    for a, b in zip(found[1:], expected[1:], strict=True):
        if b is not None:
            close(a, b.detach())


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy_from_logits(openrlhf, dtype, temperature):
    labels = torch.randint(0, 33, (2, 5), generator=torch.Generator().manual_seed(1))
    logits = seeded(2, 5, 33, seed=2, scale=4.0).to(dtype)
    upstream = seeded(2, 5, seed=3)
    entropy = openrlhf.utils.compute_entropy._torchdynamo_orig_callable
    for name, theirs in (("log_probs_from_logits", openrlhf.utils.log_probs_from_logits), ("compute_entropy", entropy)):
        results = []
        for function, to in ((getattr(ours, name), dtype), (theirs, dtype), (theirs, torch.float64)):
            leaf = logits.to(to).requires_grad_()
            copy = leaf * 1  # a temperature divides in place, which a leaf forbids
            value = function(copy, labels, temperature) if "log_probs" in name else function(copy)
            results.append((value, torch.autograd.grad((value.double() * upstream).sum(), leaf)[0]))
        assert results[0][0].dtype == results[1][0].dtype
        for columns in zip(*results, strict=True):
            assert_no_worse_than_torch(*columns, floor=FLOOR[dtype], name=name)


def test_a_temperature_divides_the_logits_in_place_as_theirs_does(openrlhf):
    for where in (ours, openrlhf.utils):
        logits = torch.tensor([[2.0, 4.0]])
        where.log_probs_from_logits(logits, torch.tensor([0]), 0.5)
        assert logits.tolist() == [[4.0, 8.0]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("spread", [0.3, 15.0], ids=["near", "far"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("with_old", [False, True])
def test_approximate_kl(openrlhf, estimator, spread, unbiased, with_old):
    base, old = seeded(B, T, seed=1), seeded(B, T, seed=5)
    results = []
    for where in (ours, openrlhf.utils):
        log_probs = (base + spread * seeded(B, T, seed=2)).requires_grad_()
        value = where.compute_approx_kl(log_probs, base, old if with_old else None, estimator, unbiased)
        results.append((value, torch.autograd.grad((value * seeded(B, T, seed=3)).sum(), log_probs)[0]))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype == torch.float32 and found.isfinite().all()
        if estimator == "k3" or unbiased:
            close(found, expected, rtol=1e-6, atol=3e-7)
        else:
            assert torch.equal(found, expected)


def test_kl_in_bfloat16_is_float32(openrlhf):
    log_probs, base = seeded(B, T, seed=1).bfloat16(), seeded(B, T, seed=2).bfloat16()
    found, expected = (where.compute_approx_kl(log_probs, base) for where in (ours, openrlhf.utils))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_an_unknown_estimator_raises_as_theirs(openrlhf):
    for where in (ours, openrlhf.utils):
        with pytest.raises(ValueError, match="Unknown kl_estimator: k4"):
            where.compute_approx_kl(torch.zeros(2), torch.zeros(2), kl_estimator="k4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_masked_statistics(openrlhf, dtype):
    values, chosen = seeded(B, T, seed=1), mask(dtype)
    chosen[1, 0] = 1  # their mean of nothing is NaN
    for dim in (None, 0, 1, -1):
        if dim != 0:
            found, expected = (where.masked_mean(values, chosen, dim) for where in (ours, openrlhf.utils))
            assert found.dtype == expected.dtype
            close(found, expected)
    close(ours.masked_mean(values, None, 1), openrlhf.utils.masked_mean(values, None, 1))
    for dim in (0, 1):
        found, expected = (where.masked_normalize(values, chosen, dim) for where in (ours, openrlhf.utils))
        close(found, expected, atol=1e-6)


def test_the_mean_of_nothing_is_0_where_theirs_is_not_a_number(openrlhf):
    values = seeded(2, 3, seed=1)
    assert openrlhf.utils.masked_mean(values, torch.zeros(2, 3)).isnan()
    assert ours.masked_mean(values, torch.zeros(2, 3)) == 0
    assert ours.masked_mean(values, torch.tensor([[1, 1, 1], [0, 0, 0]]), 1).isfinite().all()
    assert ours.aggregate_loss(values, torch.zeros(2, 3)) == 0
    assert ours.PolicyLoss()(values, values, values, torch.zeros(2, 3))[0] == 0


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=["own sizes", "the whole batch's"])
def test_aggregation(openrlhf, token_level, sizes):
    losses = seeded(B, T, seed=1)
    for chosen in (mask(), mask() * seeded(B, T, seed=2).abs()):
        found, expected = (
            where.aggregate_loss(losses, chosen, token_level, **sizes) for where in (ours, openrlhf.loss)
        )
        close(found, expected)


def test_normalisers_by_hand():
    """Losses 1, 2, (3) and 4, 5, 6: five tokens; means of two sequences 1.5 and 5; the third is empty."""
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    chosen = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert ours.aggregate_loss(losses, chosen).item() == pytest.approx(18 / 5)
    assert ours.aggregate_loss(losses, chosen, token_level_loss=False).item() == pytest.approx((1.5 + 5) / 2)
    loss, *_ = ours.PolicyLoss()(losses, losses, -losses, chosen, dp_size=2, batch_num_tokens=9.0)
    assert loss.item() == pytest.approx(18 / 9 * 2)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=["own sizes", "the whole batch's"])
def test_policy_loss(openrlhf, kind, dual_clip, token_level, sizes):
    log_probs, old, advantages = tokens()
    made = {"clip_eps_high": 0.28, "dual_clip": dual_clip, "token_level_loss": token_level, "policy_loss_type": kind}
    results = [where.PolicyLoss(**made)(log_probs, old, advantages, mask(), **sizes) for where in (ours, openrlhf.loss)]
    compare(*results, log_probs)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_ratios_far_out(openrlhf, dual_clip):
    log_probs, old, advantages = tokens(spread=25.0)
    results = [
        where.PolicyLoss(dual_clip=dual_clip)(log_probs, old, advantages, mask()) for where in (ours, openrlhf.loss)
    ]
    compare(*results, log_probs)


CORRECTIONS = {
    "token ratio mask": ("token", "mask", "ratio", (0.8, 1.2)),
    "token ratio clip": ("token", "clip", "ratio", (0.8, 1.2)),
    "sequence ratio": ("seq", "mask", "ratio", (0.9, 1.1)),
    "token kl": ("token", "mask", "binary_kl", (0.0, 0.01)),
    "sequence kl": ("seq", "mask", "binary_kl", (0.0, 0.02)),
    "token tv": ("token", "mask", "tv", (0.0, 0.05)),
    "sequence tv": ("seq", "mask", "tv", (0.0, 0.08)),
}


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_corrections_towards_the_rollout(openrlhf, correction):
    log_probs, old, advantages = tokens()
    chosen = mask()
    chosen[1, 0] = 1  # a sequence without tokens is NaN in theirs
    rollout = old + 0.3 * seeded(B, T, seed=7)
    names = ("is_correction_level", "is_correction_mode", "is_correction_gating", "is_correction_threshold")
    made = dict(zip(names, CORRECTIONS[correction], strict=True))
    results = [where.PolicyLoss(**made)(log_probs, old, advantages, chosen, rollout) for where in (ours, openrlhf.loss)]
    compare(*results, log_probs)
    assert 0 < results[1][4] < 1, "some are filtered, and some are not"


def test_gspo_against_the_rollout(openrlhf):
    log_probs, old, advantages = tokens()
    rollout = old + 0.3 * seeded(B, T, seed=7)
    made = {"policy_loss_type": "gspo", "is_correction_level": "token"}
    results = [where.PolicyLoss(**made)(log_probs, old, advantages, mask(), rollout) for where in (ours, openrlhf.loss)]
    compare(*results, log_probs)


def test_garbage_in_masked_slots():
    log_probs, old, advantages = tokens()
    chosen = mask()
    rollout = old + 0.3 * seeded(B, T, seed=7)
    for made in ({}, {"policy_loss_type": "gspo"}, {"is_correction_level": "seq"}):
        clean = ours.PolicyLoss(**made)(log_probs, old, advantages, chosen, rollout)
        dirty = log_probs.detach().masked_fill(chosen == 0, torch.nan).requires_grad_()
        garbage = [x.masked_fill(chosen == 0, torch.inf) for x in (old, advantages, rollout)]
        found = ours.PolicyLoss(**made)(dirty, garbage[0], garbage[1], chosen, garbage[2])
        assert [None if x is None else x.item() for x in found] == [None if x is None else x.item() for x in clean]
        assert torch.autograd.grad(found[0], dirty)[0].isfinite().all()


@pytest.mark.parametrize(
    "keywords",
    [
        {"dual_clip": 0.9},
        {"is_correction_level": "word"},
        {"is_correction_mode": "drop"},
        {"is_correction_gating": "kl"},
        {"is_correction_mode": "clip", "is_correction_level": "seq"},
        {"is_correction_mode": "clip", "is_correction_gating": "tv", "is_correction_level": "token"},
        {"is_correction_gating": "tv", "is_correction_level": "token"},
    ],
    ids=str,
)
def test_settings_are_refused_as_theirs_are(openrlhf, keywords):
    with pytest.raises((ValueError, AssertionError)) as theirs:
        openrlhf.loss.PolicyLoss(**keywords)
    with pytest.raises(theirs.type):
        ours.PolicyLoss(**keywords)


def test_what_the_forward_pass_cannot_take(openrlhf):
    log_probs, old, advantages = tokens()
    for where in (ours, openrlhf.loss):
        with pytest.raises(ValueError, match="Invalid policy loss type: pg"):
            where.PolicyLoss(policy_loss_type="pg")(log_probs, old, advantages, mask())
    with pytest.raises(ValueError, match="'action_mask' must be zeros and ones"):
        ours.PolicyLoss()(log_probs, old, advantages, mask() * 0.5)
    with pytest.raises(ValueError, match="'rollout_log_probs' must be given"):
        ours.PolicyLoss(is_correction_level="token")(log_probs, old, advantages, mask())
    with pytest.raises(ValueError, match="'old_log_probs' must not ask for a gradient"):
        ours.PolicyLoss()(log_probs, log_probs, advantages, mask())


@pytest.mark.parametrize("clip", [None, 0.05, 0.5])
@pytest.mark.parametrize("token_level", [True, False])
def test_value_loss(openrlhf, clip, token_level):
    old, returns = seeded(B, T, seed=1), seeded(B, T, seed=2)
    values = (old + 0.3 * seeded(B, T, seed=3)).requires_grad_()
    sizes = {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 7.0}
    results = [
        (where.ValueLoss(clip, token_level)(values, old, returns, mask(), **sizes),) for where in (ours, openrlhf.loss)
    ]
    compare(*results, values)


def their_gae(values, rewards, action_mask, gamma, lam):
    """OpenRLHF's loop: masked values and rewards are zeroed, and a masked token is a step like any other."""
    values, rewards = values * action_mask, rewards * action_mask
    advantages = torch.zeros_like(values)
    later, next_value = torch.zeros(len(values)), torch.zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        later = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * later
        advantages[:, t], next_value = later, values[:, t]
    return advantages, advantages + values


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.9, 0.0)])
def test_gae(gamma, lam):
    values, rewards, chosen = seeded(B, T, seed=1), seeded(B, T, seed=2), mask()
    found = ours.get_advantages_and_returns(values, rewards, chosen, gamma, lam)
    for a, b in zip(found, their_gae(values, rewards, chosen, gamma, lam), strict=True):
        assert a.dtype == b.dtype and not a.requires_grad
        close(a, b, rtol=1e-5, atol=2e-6)
    for a, b in zip(
        ours.get_advantages_and_returns(values, rewards, None, gamma, lam),
        their_gae(values, rewards, torch.ones(B, T), gamma, lam),
        strict=True,
    ):
        close(a, b, rtol=1e-5, atol=2e-6)


def test_cumulative_returns():
    rewards, chosen = seeded(B, T, seed=2), mask()
    expected = their_gae(torch.zeros(B, T), rewards * chosen, torch.ones(B, T), 0.9, 1.0)[0]
    close(ours.get_cumulative_returns(rewards, chosen, 0.9), expected, rtol=1e-5, atol=2e-6)
    by_hand = ours.get_cumulative_returns(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[1, 0, 1]]), 0.5)
    assert by_hand.tolist() == [[1.5, 1.0, 2.0]]


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_baseline", "dr_grpo", "group_norm", "flash_reinforce"])
def test_group_rewards(estimator):
    rewards = seeded(3, 4, seed=1)
    mean = rewards.mean(-1, keepdim=True)
    expected = {
        "rloo": rewards - (rewards.sum(-1, keepdim=True) - rewards) / 3,
        "reinforce_baseline": rewards - mean,
        "dr_grpo": rewards - mean,
        "group_norm": (rewards - mean) / (rewards.std(-1, keepdim=True) + 1e-9),
        "flash_reinforce": rewards - rewards.mean(),
    }[estimator]
    close(ours.group_rewards(rewards, estimator), expected, rtol=1e-5, atol=1e-6)


def test_group_rewards_by_hand():
    found = ours.group_rewards(torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]]), "group_norm")
    unit = 0.5 / math.sqrt(1 / 3)
    assert found[0].tolist() == pytest.approx([unit, -unit, -unit, unit]) and not found[1].any()
    with pytest.raises(ValueError, match="'estimator' must be flash_reinforce or one of"):
        ours.group_rewards(torch.ones(2, 2), "gae")
