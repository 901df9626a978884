from __future__ import annotations

import math

import pytest
import torch

from zs_kernels import kl_estimates


def columns(seed: int = 0, count: int = 101) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return draw[0].requires_grad_(), draw[1]


@pytest.mark.parametrize(
    "estimator, formula, slope",
    [
        ("k1", lambda d: -d, lambda d: torch.ones_like(d)),
        ("k2", lambda d: d * d / 2, lambda d: -d),
        ("k3", lambda d: d.exp() - 1 - d, lambda d: 1 - d.exp()),
        ("k1+", lambda d: -d, lambda d: -d),
        ("k3+", lambda d: d.exp() - 1 - d, lambda d: -d),
    ],
)
def test_values_and_gradients(estimator: str, formula, slope) -> None:  # type: ignore[no-untyped-def]
    logprobs, ref_logprobs = columns()
    d = ref_logprobs - logprobs.detach()
    upstream = torch.randn(d.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    value = kl_estimates(logprobs, ref_logprobs, estimator=estimator)
    torch.testing.assert_close(value.detach(), formula(d))
    (value * upstream).sum().backward()
    torch.testing.assert_close(logprobs.grad, upstream * slope(d))


def test_k3_is_precise_where_the_models_nearly_agree() -> None:
    difference = 1e-4
    value = kl_estimates(torch.tensor([-1.0]), torch.tensor([-1.0]) + difference)
    got = float(torch.tensor([-1.0]) + difference) + 1.0  # the difference that float32 holds
    assert float(value) == pytest.approx(got**2 / 2, rel=1e-2)
    assert float(value) > 0


def test_added_k3_pulls_the_policy_towards_the_reference() -> None:
    """A step down the gradient raises the log-probability of a token that the reference likes more, and the reverse."""
    logprobs = torch.tensor([-2.0, -1.0], requires_grad=True)
    kl_estimates(logprobs, torch.tensor([-1.0, -2.0])).sum().backward()
    step = -logprobs.grad
    assert step[0] > 0 > step[1]


@pytest.mark.parametrize(
    "clamp, log_ratio, expected",
    [("verl", 30.0, 10.0), ("verl", -30.0, 10.0), ("zerosearch", -30.0, 10.0), ("none", 3.0, math.exp(3.0) - 4.0)],
)
def test_clamps_bound_the_estimate(clamp: str, log_ratio: float, expected: float) -> None:
    value = kl_estimates(torch.tensor([0.0]), torch.tensor([log_ratio]), clamp=clamp)
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_masked_tokens_are_zero_with_zero_gradient() -> None:
    logprobs = torch.tensor([float("nan"), -1.0, -float("inf")], requires_grad=True)
    mask = torch.tensor([False, True, False])
    value = kl_estimates(logprobs, torch.tensor([1.0, -2.0, float("inf")]), mask=mask)
    value.sum().backward()
    assert value[~mask].tolist() == [0.0, 0.0] and logprobs.grad[~mask].tolist() == [0.0, 0.0]
    assert value[1] > 0


@pytest.mark.parametrize(
    "change, word", [({"estimator": "k4"}, "'estimator'"), ({"clamp": "nobody"}, "'clamp'"), ({}, "'ref_logprobs'")]
)
def test_wrong_arguments_are_named(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        kl_estimates(torch.zeros(3), torch.zeros(3 if change else 4), **change)
