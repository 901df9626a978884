"""Clipped squared error of a value function (PPO) over tokens, with its derivative and metrics in one pass.

    error_n = value_n - return_n
    clipped_error_n = clip(value_n, old_value_n - clip_range, old_value_n + clip_range) - return_n
    loss = sum_n weight_n max(error_n^2, clipped_error_n^2) / 2

N = tokens; the weights carry the aggregation, as for policy_loss. Where the clipped error is the larger one, the value
has already moved by clip_range towards the return, and its gradient is 0.
Source: arXiv:1707.06347 (its published code), arXiv:2005.12729 section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_mask, require_positive
from zs_kernels._device import backend_of
from zs_kernels._policy_backends import COLUMNS, flat_or_scalar, fold_partials, token_spans
from zs_kernels._triton import tl, triton

METRICS = ("token_count", "clipped", "value_sum", "return_sum", "error_sum", "squared_error_sum")
"""Sums over unmasked tokens: 1, 1 where the clipped error is the larger one, value, return, error, squared error."""


def value_terms_reference(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    clip_range: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], its derivative by value, metrics [6]) in torch; old_values None: not clipped."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32

    def read(given: Tensor) -> Tensor:  # a masked slot may hold anything
        given = given.detach().to(dtype)
        return given if mask is None else torch.where(mask, given, 0.0)

    values, returns, weights = read(values), read(returns), read(weights)
    error = values - returns
    square, clipped = error * error, torch.zeros_like(error, dtype=torch.bool)
    larger = square
    if old_values is not None and clip_range is not None:
        old_values = read(old_values)
        clipped_error = values.clamp(old_values - clip_range, old_values + clip_range) - returns
        clipped = clipped_error * clipped_error > square
        larger = torch.where(clipped, clipped_error * clipped_error, square)
    counted = torch.ones_like(error) if mask is None else mask.to(dtype)
    sums = (counted, clipped.to(dtype) * counted, values, returns, error, square)
    loss = (weights * (0.5 * larger)).sum()
    return loss, weights * torch.where(clipped, 0.0, error), torch.stack([part.sum() for part in sums])


@triton.jit
def _value_terms_kernel(
    values, old_values, returns, weights, mask, grad_values, partials, count, span, weight_stride, clip_range,
    CLIP: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tokens [p * span, (p + 1) * span): their derivatives, and one row of `partials`."""
    program = tl.program_id(0).to(tl.int64)
    losses, ones, clips, value_sum, targets, errors, squares = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, span, BLOCK):
        n = program * span + start + tl.arange(0, BLOCK)
        inside = n < count
        counted = inside
        if HAS_MASK:
            counted = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
        value = tl.load(values + n, mask=counted, other=0.0).to(tl.float32)
        target = tl.load(returns + n, mask=counted, other=0.0).to(tl.float32)
        weight = tl.load(weights + n * weight_stride, mask=counted, other=0.0).to(tl.float32)
        error = value - target
        square = error * error
        larger, slope = square, error
        if CLIP:
            old = tl.load(old_values + n, mask=counted, other=0.0).to(tl.float32)
            low, high = old - clip_range, old + clip_range
            within = tl.where(value < low, low, tl.where(value > high, high, value)) - target
            clipped = within * within > square
            larger = tl.where(clipped, within * within, square)
            slope = tl.where(clipped, 0.0, error)
            clips += tl.sum(tl.where(clipped & counted, 1.0, 0.0))
        tl.store(grad_values + n, weight * slope, mask=inside)
        losses += tl.sum(weight * (0.5 * larger))
        ones += tl.sum(tl.where(counted, 1.0, 0.0))
        value_sum += tl.sum(value)
        targets += tl.sum(target)
        errors += tl.sum(error)
        squares += tl.sum(square)
    row = partials + program * COLUMNS
    tl.store(row, losses)
    tl.store(row + 1, ones)
    tl.store(row + 2, clips)
    tl.store(row + 3, value_sum)
    tl.store(row + 4, targets)
    tl.store(row + 5, errors)
    tl.store(row + 6, squares)


def _value_terms_triton(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    clip_range: float | None,
    *,
    block: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(derivative [N], totals [7]: loss, then METRICS)."""
    values, returns = values.reshape(-1).contiguous(), returns.reshape(-1).contiguous()
    weights, weight_stride = flat_or_scalar(weights)
    count = values.numel()
    programs, span = token_spans(count, block)
    grad = torch.empty(count, dtype=torch.float32, device=values.device)
    totals = torch.empty(1 + len(METRICS), dtype=torch.float32, device=values.device)
    partials = torch.empty(programs, COLUMNS, dtype=torch.float32, device=values.device)
    _value_terms_kernel[(programs,)](
        values, values if old_values is None else old_values.reshape(-1).contiguous(), returns, weights,
        values if mask is None else mask.reshape(-1).contiguous(), grad, partials, count, span, weight_stride,
        0.0 if clip_range is None else clip_range, CLIP=old_values is not None, HAS_MASK=mask is not None,
        BLOCK=block, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
    fold_partials(partials, totals)
    return grad, totals


@torch.library.custom_op("zs_kernels::value_loss", mutates_args=())
def _value_loss_op(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    clip_range: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], derivative by value, metrics [6])."""
    backend = backend_of(values, old_values, returns, weights, mask)
    if backend == "native":
        weights, weight_step = flat_or_scalar(weights.float())
        dense = [None if x is None else x.reshape(-1).float().contiguous() for x in (values, old_values, returns)]
        flat_mask = None if mask is None else mask.reshape(-1).contiguous()
        grad, totals = torch.ops.zs_native.value_terms(*dense, weights, flat_mask, weight_step, clip_range or 0.0)
    elif backend == "triton" and values.numel():
        grad, totals = _value_terms_triton(values, old_values, returns, weights, mask, clip_range)
    else:
        return value_terms_reference(values, old_values, returns, weights, mask, clip_range)
    return totals[0].clone(), grad.reshape(values.shape), totals[1:].clone()


@_value_loss_op.register_fake
def _(values: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    grad = values.new_empty(values.shape, dtype=dtype)
    return grad.new_empty(()), grad, grad.new_empty(len(METRICS))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad, metrics = output
    ctx.save_for_backward(grad)
    ctx.mark_non_differentiable(grad, metrics)
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 6
    return (ctx.saved_tensors[0] * grad_loss).to(ctx.dtype), *[None] * 5


_value_loss_op.register_autograd(_backward, setup_context=_save)


class ValueLoss(NamedTuple):
    """The loss to minimise, and sums over unmasked tokens (scalars without gradient); METRICS says what each is."""

    loss: Tensor
    token_count: Tensor
    clipped: Tensor
    value_sum: Tensor
    return_sum: Tensor
    error_sum: Tensor
    squared_error_sum: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    *,
    clip_range: float | None = 0.5,
    mask: Tensor | None = None,
) -> ValueLoss:
    """Loss and metrics of tokens [N] (or any one shape); the gradient flows to `values` alone.

    old_values: the values at the time of sampling; None, like clip_range None, leaves the error unclipped. weights:
    each token's share in the loss. mask: bool; a False token counts nowhere, NaN included.
    Raises ValueError or TypeError naming the argument.
    """
    op = "value_loss"
    require_floating(op, "values", values)
    shape, device = tuple(values.shape), values.device
    given = {"old_values": old_values, "returns": returns, "weights": weights}
    for name, column in given.items():
        if column is not None or name != "old_values":
            require_floating(op, name, column, shape=shape)
            require(column.device == device, op, name, f"on {device} like values", column)
    require_mask(op, "mask", mask, shape, device)
    if clip_range is None or old_values is None:
        clip_range = old_values = None
    else:
        require_positive(op, "clip_range", clip_range)
        clip_range = float(clip_range)
    loss, _, metrics = _value_loss_op(values, old_values, returns, weights, mask, clip_range)
    return ValueLoss(loss, **dict(zip(METRICS, metrics.unbind(), strict=True)))
