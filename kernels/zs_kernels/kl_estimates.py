"""Per-token estimates of KL(policy || reference) from the log-probabilities of sampled tokens.

    d  = ref_logprob - logprob
    k1 = -d,    k2 = d^2 / 2,    k3 = exp(d) - 1 - d  (>= 0),    abs = |d|

N = tokens, in nats. A trailing `+` (straight-through: `k1+`, `k3+`, `abs+`) keeps the value but has the gradient of an
unclamped k2, which is that of the reverse KL when the tokens were sampled from the policy.
Source: http://joschu.net/blog/kl-approx.html; gradients of the estimators: arXiv:2510.01555.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_mask
from zs_kernels._device import backend_of
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


def clamp_bounds(op: str, clamp: str, estimator: str, *, argument: str = "clamp") -> Bounds:
    """(bound on |d|, bound on |estimate|), None for no bound. Raises ValueError for an unknown name."""
    require(clamp in CLAMPS, op, argument, f"one of {', '.join(CLAMPS)}", clamp)
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


@triton.jit
def _kl_estimates_kernel(
    logprobs, ref_logprobs, mask, values, slopes, clamped_counts, count, bound, output_bound,
    KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, HAS_MASK: tl.constexpr, SLOPES: tl.constexpr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n = program * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    counted = inside
    if HAS_MASK:
        counted = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
    difference = tl.load(ref_logprobs + n, mask=counted, other=0.0).to(tl.float32)
    difference -= tl.load(logprobs + n, mask=counted, other=0.0).to(tl.float32)
    value, slope, clamped = kl_parts_kernel(
        tl.where(counted, difference, 0.0), bound, output_bound, KL, STRAIGHT_THROUGH
    )
    tl.store(values + n, value, mask=inside)
    if SLOPES:
        tl.store(slopes + n, tl.where(counted, slope, 0.0), mask=inside)
    if COUNT:
        tl.store(clamped_counts + program, tl.sum(tl.where(counted & clamped, 1.0, 0.0)))


def _kl_estimates_triton(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    estimator: str,
    clamp: str,
    want_slopes: bool,
    want_count: bool,
    *,
    block: int = 512,
) -> tuple[Tensor, Tensor, Tensor]:
    bound, output_bound = clamp_bounds("kl_estimates", clamp, estimator)
    logprobs, ref_logprobs = logprobs.reshape(-1).contiguous(), ref_logprobs.reshape(-1).contiguous()
    count, programs = logprobs.numel(), triton.cdiv(logprobs.numel(), block)
    values = torch.empty(count, dtype=torch.float32, device=logprobs.device)
    slopes = torch.empty(count if want_slopes else 0, dtype=torch.float32, device=logprobs.device)
    clamped = torch.empty(programs if want_count else 0, dtype=torch.float32, device=logprobs.device)
    _kl_estimates_kernel[(programs,)](
        logprobs, ref_logprobs, logprobs if mask is None else mask.reshape(-1).contiguous(), values, slopes, clamped,
        count, math.inf if bound is None else bound, math.inf if output_bound is None else output_bound,
        KL=kl_code(estimator), STRAIGHT_THROUGH=estimator.endswith("+"), HAS_MASK=mask is not None,
        SLOPES=want_slopes, COUNT=want_count, BLOCK=block,
    )  # fmt: skip
    return values, slopes, clamped.sum()


def _kl_estimates_native(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str, clamp: str, want_slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = (math.inf if bound is None else bound for bound in clamp_bounds("kl_estimates", clamp, estimator))
    return torch.ops.zs_native.kl_terms(
        *(x.reshape(-1).float().contiguous() for x in (logprobs, ref_logprobs)),
        None if mask is None else mask.reshape(-1).contiguous(),
        kl_code(estimator), estimator.endswith("+"), *bounds, want_slopes,
    )  # fmt: skip


@torch.library.custom_op("zs_kernels::kl_estimates", mutates_args=())
def _kl_estimates_op(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    estimator: str,
    clamp: str,
    want_slopes: bool,
    want_count: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, derivative by logprob or [0], number of clamped estimates [], 0 where not wanted)."""
    shape = logprobs.shape
    backend = backend_of(logprobs, ref_logprobs, mask)
    if backend == "native":
        values, slopes, clamped = _kl_estimates_native(logprobs, ref_logprobs, mask, estimator, clamp, want_slopes)
    elif backend == "triton" and logprobs.numel():
        values, slopes, clamped = _kl_estimates_triton(
            logprobs, ref_logprobs, mask, estimator, clamp, want_slopes, want_count
        )
    else:
        dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
        difference = ref_logprobs.to(dtype) - logprobs.to(dtype)
        if mask is not None:  # a masked slot may hold anything
            difference = torch.where(mask, difference, 0.0)
        values, slopes, where = kl_parts_reference(difference, estimator, clamp)
        slopes = slopes if mask is None else torch.where(mask, slopes, 0.0)
        slopes, clamped = slopes if want_slopes else values.new_empty(0), where.sum(dtype=dtype)
    return values.reshape(shape), slopes.reshape(shape) if want_slopes else slopes, clamped


@_kl_estimates_op.register_fake
def _(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    estimator: str,
    clamp: str,
    want_slopes: bool,
    want_count: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    values = logprobs.new_empty(logprobs.shape, dtype=dtype)
    return values, values.new_empty(logprobs.shape if want_slopes else (0,)), values.new_empty(())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, slopes, clamped = output
    ctx.save_for_backward(slopes)
    ctx.mark_non_differentiable(slopes, clamped)
    ctx.set_materialize_grads(False)
    ctx.dtypes, ctx.has_slopes = (inputs[0].dtype, inputs[1].dtype), inputs[5]


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    if not ctx.has_slopes:
        raise RuntimeError("zs_kernels::kl_estimates: call it with want_slopes=True to have gradients")
    by_logprobs = grad * ctx.saved_tensors[0]
    return (
        by_logprobs.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None,
        -by_logprobs.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None,
        *[None] * 5,
    )


_kl_estimates_op.register_autograd(_backward, setup_context=_save)


class KlEstimates(NamedTuple):
    """values: of the shape of the log-probabilities. clamped_count: how many of them a clamp changed, a scalar."""

    values: Tensor
    clamped_count: Tensor


@overload
def kl_estimates(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = ...,
    clamp: str = ...,
    mask: Tensor | None = ...,
    clamped_count: Literal[False] = ...,
) -> Tensor: ...
@overload
def kl_estimates(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = ...,
    clamp: str = ...,
    mask: Tensor | None = ...,
    clamped_count: Literal[True],
) -> KlEstimates: ...
def kl_estimates(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k3",
    clamp: str = "none",
    mask: Tensor | None = None,
    clamped_count: bool = False,
) -> Tensor | KlEstimates:
    """KL estimate of each token, of the shape of `logprobs`, float32 (float64 for float64 inputs).

    Gradients flow to `logprobs` and `ref_logprobs`. estimator: one of ESTIMATORS. clamp: one of CLAMPS.
    mask: bool; a False token gives 0 and gradient 0 whatever it holds, NaN included. clamped_count: return KlEstimates,
    with the number of clamped tokens. Raises ValueError or TypeError naming the argument.
    Adding coefficient * estimate to a loss that is minimised pulls the policy towards the reference.
    """
    op = "kl_estimates"
    require_floating(op, "logprobs", logprobs)
    require_floating(op, "ref_logprobs", ref_logprobs, shape=tuple(logprobs.shape))
    device = logprobs.device
    require(ref_logprobs.device == device, op, "ref_logprobs", f"on {device} like logprobs", ref_logprobs)
    require(estimator in ESTIMATORS, op, "estimator", f"one of {', '.join(ESTIMATORS)}", estimator)
    clamp_bounds(op, clamp, estimator)
    require_mask(op, "mask", mask, tuple(logprobs.shape), device)
    differentiable = torch.is_grad_enabled() and (logprobs.requires_grad or ref_logprobs.requires_grad)
    values, _, clamped = _kl_estimates_op(logprobs, ref_logprobs, mask, estimator, clamp, differentiable, clamped_count)
    return KlEstimates(values, clamped) if clamped_count else values
