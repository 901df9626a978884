from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zs_kernels import policy_loss


def one(log_ratio: float, advantage: float, **options) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """(loss, derivative by the log-probability) of one token of weight 1."""
    logprob = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    result = policy_loss(logprob, old, advantages, torch.ones(1, dtype=torch.float64), **options)
    result.loss.backward()
    return float(result.loss.detach()), float(logprob.grad)


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.0, 2.0, -2.0, -2.0),  # on policy: the gradient of REINFORCE, -A
        (1.1, 2.0, -2.2, -2.2),  # inside the clip
        (1.5, 2.0, -2.4, 0.0),  # above it, and the advantage would push further: cut at 1.2
        (0.5, 2.0, -1.0, -1.0),  # below it, but pulling back: not cut
        (0.5, -2.0, 1.6, 0.0),  # below it, and pushing further: cut at 0.8
        (1.5, -2.0, 3.0, 3.0),  # above it, but pulling back: not cut
    ],
)
def test_hand_values(ratio: float, advantage: float, loss: float, slope: float) -> None:
    assert one(math.log(ratio), advantage) == pytest.approx((loss, slope))


def test_separate_bounds_and_dual_clip() -> None:
    assert one(math.log(1.25), 1.0, clip_high=0.28) == pytest.approx((-1.25, -1.25))
    assert one(math.log(1.25), 1.0, clip_high=0.2) == pytest.approx((-1.2, 0.0))
    assert one(math.log(5.0), -1.0, dual_clip=3.0) == pytest.approx((3.0, 0.0))
    assert one(math.log(2.0), -1.0, dual_clip=3.0) == pytest.approx((2.0, 2.0))


def random_batch(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    logprobs = -torch.rand(count, generator=generator, dtype=torch.float64) * 3
    old = logprobs + 0.3 * torch.randn(count, generator=generator, dtype=torch.float64)
    advantages = torch.randn(count, generator=generator, dtype=torch.float64)
    return logprobs, old, advantages, torch.rand(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 7, 129])
def test_equals_the_formula(count: int) -> None:
    logprobs, old, advantages, weights = random_batch(count)
    result = policy_loss(logprobs, old, advantages, weights, clip_low=0.1, clip_high=0.3)
    ratio = (logprobs - old).exp()
    expected = [
        -w * min(r * a, min(max(r, 0.9), 1.3) * a)
        for r, a, w in zip(ratio.tolist(), advantages.tolist(), weights.tolist(), strict=True)
    ]
    assert float(result.loss) == pytest.approx(math.fsum(expected), rel=1e-12)
    assert float(result.ratio_sum) == pytest.approx(float(ratio.sum()), rel=1e-12)
    assert float(result.clipped_low) == int(((ratio < 0.9) & (advantages < 0)).sum())
    assert float(result.clipped_high) == int(((ratio > 1.3) & (advantages > 0)).sum())


def test_masked_tokens_count_nowhere_even_when_they_hold_nan() -> None:
    logprobs, old, advantages, weights = random_batch(9)
    mask = torch.arange(9) % 2 == 0
    nan = float("nan")
    poisoned = [torch.where(mask, column, nan) for column in (logprobs, old, advantages, weights)]
    poisoned[0].requires_grad_()
    result = policy_loss(*poisoned, mask=mask)
    alone = policy_loss(logprobs[mask], old[mask], advantages[mask], weights[mask])
    for got, expected in zip(result, alone, strict=True):
        torch.testing.assert_close(got.detach(), expected)
    result.loss.backward()
    assert (poisoned[0].grad[~mask] == 0).all() and torch.isfinite(poisoned[0].grad).all()


def test_a_huge_ratio_stays_finite_and_the_gradient_goes_to_the_policy_alone() -> None:
    assert math.isfinite(one(500.0, -1.0)[0])
    logprobs, old, advantages, weights = (column.requires_grad_() for column in random_batch(4))
    policy_loss(logprobs, old, advantages, weights).loss.backward()
    assert logprobs.grad is not None
    assert old.grad is None and advantages.grad is None and weights.grad is None


def test_no_tokens_give_loss_zero() -> None:
    empty = torch.zeros(0)
    assert float(policy_loss(empty, empty, empty, empty).loss) == 0.0


@pytest.mark.parametrize(
    "change, word",
    [
        ({"advantages": torch.zeros(2)}, "'advantages'"),
        ({"clip_low": -0.1}, "'clip_low'"),
        ({"dual_clip": 1.0}, "dual"),
    ],
)
def test_wrong_arguments_are_named(change: dict, word: str) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "weights")
    columns = [change.get(name, torch.zeros(3)) for name in names]
    with pytest.raises(ValueError, match=word):
        policy_loss(*columns, **{name: value for name, value in change.items() if name not in names})
