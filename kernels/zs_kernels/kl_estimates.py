"""Per-token estimates of KL(policy || reference) from the log-probabilities of sampled tokens.

    d  = ref_logprob - logprob
    k1 = -d,    k2 = d^2 / 2,    k3 = exp(d) - 1 - d  (>= 0),    abs = |d|

N = tokens, in nats. A trailing `+` (straight-through: `k1+`, `k3+`, `abs+`) keeps the value but has the gradient of an
unclamped k2, which is that of the reverse KL when the tokens were sampled from the policy.
Source: http://joschu.net/blog/kl-approx.html; gradients of the estimators: arXiv:2510.01555.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_mask
from zs_kernels._triton import tl, triton

ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")

Bounds = tuple[float | None, float | None]

CLAMPS: dict[str, dict[str, Bounds]] = {
    "none": {},
    "trl": {},
    "verl": {"k3": (20.0, 10.0)},
    "zerosearch": {"k3": (None, 10.0)},
    "openrlhf": dict.fromkeys(("k1", "k2", "k3", "abs"), (None, 10.0)),
    "nemo": dict.fromkeys(("k1", "k2", "k3", "abs"), (20.0, 10.0)),
}
"""Framework -> estimator -> (bound on |d| before the formula, bound on |estimate| after it); an estimator that is not
listed is not clamped there. A clamped token has gradient 0."""


def clamp_bounds(op: str, clamp: str, estimator: str) -> Bounds:
    """(bound on |d|, bound on |estimate|), None for no bound. Raises ValueError for an unknown name."""
    require(clamp in CLAMPS, op, "clamp", f"one of {', '.join(CLAMPS)}", clamp)
    return CLAMPS[clamp].get(estimator.removesuffix("+"), (None, None))


def kl_code(estimator: str) -> int:
    """The estimator's number in the kernels: 1 k1, 2 k2, 3 k3, 4 abs."""
    return {"k1": 1, "k2": 2, "k3": 3, "abs": 4}[estimator.removesuffix("+")]


def kl_parts_reference(difference: Tensor, estimator: str, clamp: str) -> tuple[Tensor, Tensor, Tensor]:
    """(estimate, its derivative by logprob, whether a clamp changed it) for d = `difference`."""
    bound, output_bound = clamp_bounds("kl_estimates", clamp, estimator)
    d = difference if bound is None else difference.clamp(-bound, bound)
    kind = estimator.removesuffix("+")
    if kind == "k1":
        value, slope = -d, torch.ones_like(d)
    elif kind == "k2":
        value, slope = 0.5 * d * d, -d
    elif kind == "k3":
        value, slope = torch.expm1(d) - d, -torch.expm1(d)
    else:
        value, slope = d.abs(), -d.sign()
    clamped = torch.zeros_like(d, dtype=torch.bool) if bound is None else difference.abs() > bound
    if output_bound is not None:
        clamped = clamped | (value.abs() > output_bound)
        value = value.clamp(-output_bound, output_bound)
    slope = -difference if estimator.endswith("+") else torch.where(clamped, 0.0, slope)
    return value, slope, clamped


@triton.jit
def kl_parts_kernel(difference, bound, output_bound, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """`kl_parts_reference` for a block (or one) of float32 differences; bounds may be infinite; KL: see kl_code."""
    clamped = tl.abs(difference) > bound
    d = tl.where(difference > bound, bound, difference)  # keeps NaN
    d = tl.where(difference < -bound, -bound, d)
    if KL == 1:
        value, slope = -d, 0.0 * d + 1.0
    elif KL == 2:
        value, slope = 0.5 * d * d, -d
    elif KL == 3:
        # exp(d) - 1 - d cancels near 0: there the series d^2 (1/2 + d/6 + ...), exact to the last bits for |d| < 1/2.
        series = 1.0 / 3628800.0 * d + 1.0 / 362880.0
        series = series * d + 1.0 / 40320.0
        series = series * d + 1.0 / 5040.0
        series = series * d + 1.0 / 720.0
        series = series * d + 1.0 / 120.0
        series = series * d + 1.0 / 24.0
        series = series * d + 1.0 / 6.0
        series = (series * d + 0.5) * d * d
        power = tl.exp(d)
        near = tl.abs(d) < 0.5
        value = tl.where(near, series, power - 1.0 - d)
        slope = tl.where(near, -(series + d), 1.0 - power)
    else:
        value = tl.abs(d)
        slope = tl.where(d > 0.0, -1.0, tl.where(d < 0.0, 1.0, -d))
    clamped = clamped | (tl.abs(value) > output_bound)
    value = tl.where(value > output_bound, output_bound, value)
    value = tl.where(value < -output_bound, -output_bound, value)
    slope = -difference if STRAIGHT_THROUGH else tl.where(clamped, 0.0, slope)
    return value, slope, clamped


def kl_estimates(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k3",
    clamp: str = "none",
    mask: Tensor | None = None,
) -> Tensor:
    """KL estimate of each token, of the shape of `logprobs`, float32 (float64 for float64 inputs).

    Gradients flow to `logprobs` and `ref_logprobs`. estimator: one of ESTIMATORS. clamp: one of CLAMPS.
    mask: bool; a False token gives 0 and gradient 0 whatever it holds, NaN included.
    Adding coefficient * estimate to a loss that is minimised pulls the policy towards the reference.
    """
    op = "kl_estimates"
    require_floating(op, "logprobs", logprobs)
    require_floating(op, "ref_logprobs", ref_logprobs, shape=tuple(logprobs.shape))
    require(estimator in ESTIMATORS, op, "estimator", f"one of {', '.join(ESTIMATORS)}", estimator)
    clamp_bounds(op, clamp, estimator)
    require_mask(op, "mask", mask, tuple(logprobs.shape), logprobs.device)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    d = ref_logprobs.to(dtype) - logprobs.to(dtype)
    if mask is not None:
        d = torch.where(mask, d, 0.0)
    value, slope, _ = kl_parts_reference(d.detach(), estimator, clamp)
    return value + slope.detach() * (d.detach() - d)
