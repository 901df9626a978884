"""Mean, variance and whitening over the unmasked entries of a tensor, finite for 0 and 1 entries.

    n = sum m,   mean = sum m x / n,   M2 = sum m (x - mean)^2
    masked_var    = M2 / (n - ddof)
    masked_whiten = (x - mean) / sqrt(var + eps)         (+ mean when shift_mean is False)

Any shape, or along one dimension `dim`; in float32 (float64 for float64 inputs), centred before squaring. Masked
entries may hold anything, NaN included: they are selected away, never multiplied by 0. The statistics (n, mean, M2) are
there for themselves, with a merge, so that every rank of a data-parallel run can whiten by those of the whole batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_mask, require_positive
from zs_kernels._device import backend_of
from zs_kernels._reduction_kernels import masked_statistics_triton, masked_whiten_triton

EMPTY = ("zero", "identity", "nan", "raise")


class Preset(NamedTuple):
    """How a framework whitens. floor: eps is the least variance instead of being added to it. fill_masked: masked
    entries become 0; without it the formula runs over them too."""

    ddof: int
    eps: float
    floor: bool
    fill_masked: bool
    mean_eps: float


PRESETS = {
    "zs": Preset(ddof=1, eps=1e-8, floor=False, fill_masked=True, mean_eps=0.0),
    "verl": Preset(ddof=1, eps=1e-8, floor=False, fill_masked=False, mean_eps=1e-8),
    "trl": Preset(ddof=1, eps=1e-8, floor=False, fill_masked=False, mean_eps=0.0),
    "openrlhf": Preset(ddof=0, eps=1e-8, floor=True, fill_masked=False, mean_eps=0.0),
    "nemo": Preset(ddof=0, eps=1e-8, floor=True, fill_masked=False, mean_eps=1e-8),
}
"""Framework -> its numbers. What it does with 0 or 1 entries (verl raises, TRL gives NaN) is asked for by `empty`."""


def masked_statistics_reference(values: Tensor, mask: Tensor) -> Tensor:
    """[R, 4] from values, mask [R, C]: n, mean (0 without entries), M2, sum."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    values, counted = torch.where(mask, values.to(dtype), 0.0), mask.to(dtype)
    count, total = counted.sum(1), values.sum(1)
    mean = total / count.clamp(min=1.0)
    distance = torch.where(mask, values - mean[:, None], 0.0)
    return torch.stack([count, mean, (distance * distance).sum(1), total], dim=1)


@torch.library.custom_op("zs_kernels::masked_statistics", mutates_args=())
def _statistics_op(values: Tensor, mask: Tensor) -> Tensor:
    """[R, 4] from values, mask [R, C], as masked_statistics_reference."""
    backend = backend_of(values, mask)
    if backend == "native":
        return torch.ops.zs_native.masked_statistics(values.float().contiguous(), mask.contiguous())
    if backend == "triton" and values.numel():
        return masked_statistics_triton(values, mask)
    return masked_statistics_reference(values, mask)


@_statistics_op.register_fake
def _(values: Tensor, mask: Tensor) -> Tensor:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.new_empty((values.shape[0], 4), dtype=dtype)


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _statistics_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    values, mask, statistics = ctx.saved_tensors
    count, mean = statistics[:, :1].clamp(min=1.0), statistics[:, 1:2]
    grad = grad.to(statistics.dtype)
    slope = grad[:, 1:2] / count + grad[:, 3:] + 2.0 * grad[:, 2:3] * (values.to(statistics.dtype) - mean)
    return torch.where(mask, slope, 0.0).to(values.dtype), None


_statistics_op.register_autograd(_statistics_backward, setup_context=_save_statistics)


def scale_of(statistics: Tensor, eps: float, floor: bool, ddof: int, empty: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, scale, offset), each [R], such that (x - mean) * scale whitens and + offset keeps the mean."""
    count, mean, squares = statistics[:, 0], statistics[:, 1], statistics[:, 2]
    variance = squares / (count - ddof).clamp(min=1.0)
    scale = torch.rsqrt(variance.clamp(min=eps) if floor else variance + eps)
    few = count < 2.0
    if empty == "identity":
        kept = torch.where(few, 0.0, mean)
        return kept, torch.where(few, 1.0, scale), kept
    return mean, torch.where(few, float("nan") if empty == "nan" else 0.0, scale), mean


@torch.library.custom_op("zs_kernels::masked_whiten", mutates_args=())
def _whiten_op(
    values: Tensor,
    mask: Tensor,
    statistics: Tensor | None,
    eps: float,
    floor: bool,
    ddof: int,
    shift_mean: bool,
    fill_masked: bool,
    masked_value: float,
    empty: str,
) -> tuple[Tensor, Tensor]:
    """(whitened [R, C], statistics [R, 3] used) from values, mask [R, C] and, where given, statistics [R, 3]."""
    backend = backend_of(values, mask, statistics)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if backend == "triton" and values.numel():
        out, used = masked_whiten_triton(
            values, mask, statistics, eps, floor, ddof, shift_mean, fill_masked, masked_value, EMPTY.index(empty)
        )
    else:
        if statistics is not None:
            used = statistics.to(dtype, copy=True)
        elif backend == "native":
            values, mask = values.float().contiguous(), mask.contiguous()
            used = torch.ops.zs_native.masked_statistics(values, mask)[:, :3].contiguous()
        else:
            used = masked_statistics_reference(values, mask)[:, :3].contiguous()
        mean, scale, offset = scale_of(used, eps, floor, ddof, empty)
        if backend == "native":
            out = torch.ops.zs_native.masked_whiten(
                values.float().contiguous(), mask.contiguous(), mean.contiguous(), scale, offset.contiguous(),
                shift_mean, fill_masked, masked_value,
            )  # fmt: skip
        else:
            out = (values.to(dtype) - mean[:, None]) * scale[:, None]
            out = out if shift_mean else out + offset[:, None]
            out = torch.where(mask, out, masked_value) if fill_masked else out
    if empty == "raise":
        fewest = float(used[:, 0].amin()) if used.shape[0] else 2.0
        require(fewest >= 2.0, "masked_whiten", "mask", "True for at least 2 entries (empty='raise')", int(fewest))
    return out, used


@_whiten_op.register_fake
def _(values: Tensor, mask: Tensor, statistics: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    out = values.new_empty(values.shape, dtype=dtype)
    return out, out.new_empty((values.shape[0], 3))


def _save_whiten(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, mask, given = inputs[:3]
    ctx.save_for_backward(values, mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.given, ctx.rest = given is not None, inputs[3:]


def _whiten_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    values, mask, statistics = ctx.saved_tensors
    eps, floor, ddof, shift_mean, fill_masked, _, empty = ctx.rest
    mean, scale, _ = (part[:, None] for part in scale_of(statistics, eps, floor, ddof, empty))
    if fill_masked:
        grad = torch.where(mask, grad, 0.0)
    slope = grad * scale
    if not ctx.given:  # through mean and variance, which depend on unmasked entries alone
        count = statistics[:, :1].clamp(min=1.0)
        kept = statistics[:, :1] >= 2.0 if empty == "identity" else torch.ones_like(count, dtype=torch.bool)
        distance = values.to(scale.dtype) - mean
        if fill_masked:
            distance = torch.where(mask, distance, 0.0)
        total, along = grad.sum(1, keepdim=True), (grad * distance).sum(1, keepdim=True)
        by_variance = -0.5 * scale**3
        degrees = (statistics[:, :1] - ddof).clamp(min=1.0)
        if floor:
            by_variance = torch.where(statistics[:, 2:3] / degrees > eps, by_variance, 0.0)
        through = -scale * total / count + along * by_variance * 2.0 * distance / degrees
        if not shift_mean:
            through = through + total / count
        slope = slope + torch.where(mask & kept, through, 0.0)
    return slope.to(values.dtype), *[None] * 9


_whiten_op.register_autograd(_whiten_backward, setup_context=_save_whiten)


def _rows(op: str, values: Tensor, mask: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """values and mask as [R, C]: one row of everything, or one row for each place outside `dim`."""
    require_floating(op, "values", values)
    require_mask(op, "mask", mask, tuple(values.shape), values.device)
    if dim is None:
        return values.reshape(1, -1), mask.reshape(1, -1)
    require(-values.dim() <= dim < values.dim(), op, "dim", f"a dimension of {values.dim()}", dim)
    return values.movedim(dim, -1)[None].flatten(0, -2), mask.movedim(dim, -1)[None].flatten(0, -2)


def _outside(values: Tensor, dim: int | None) -> tuple[int, ...]:
    """The shape of one result for each place outside `dim`; () for None."""
    if dim is None:
        return ()
    shape = list(values.shape)
    del shape[dim]
    return tuple(shape)


def masked_statistics(values: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """(n, mean, M2) of the entries where `mask` (bool, same shape) is True: [3], or [..., 3] along `dim`.

    Gradients flow to `values`. Those of several ranks, stacked, are merged by `merge_statistics`.
    """
    statistics = _statistics_op(*_rows("masked_statistics", values, mask, dim))
    return statistics[:, :3].reshape(*_outside(values, dim), 3)


def merge_statistics(stacked: Tensor) -> Tensor:
    """(n, mean, M2) [..., 3] of all entries together from those of R parts, [R, ..., 3]; one order, no cancellation."""
    require_floating("merge_statistics", "stacked", stacked)
    good = stacked.dim() >= 2 and stacked.shape[-1] == 3
    require(good, "merge_statistics", "stacked", "of shape [R, ..., 3]", stacked)
    count, mean, squares = stacked.unbind(-1)
    total = count.sum(0)
    merged = (count * mean).sum(0) / total.clamp(min=1.0)
    distance = mean - merged
    return torch.stack([total, merged, (squares + count * distance * distance).sum(0)], dim=-1)


def masked_sum(values: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Sum over entries where `mask` (bool, same shape) is True; a scalar, or along `dim`."""
    return _statistics_op(*_rows("masked_sum", values, mask, dim))[:, 3].reshape(_outside(values, dim))


def _preset(op: str, name: str, empty: str) -> Preset:
    require(name in PRESETS, op, "preset", f"one of {', '.join(PRESETS)}", name)
    require(empty in EMPTY, op, "empty", f"one of {', '.join(EMPTY)}", empty)
    return PRESETS[name]


def _too_few(op: str, result: Tensor, count: Tensor, least: int, empty: str) -> Tensor:
    """`result` where there are `least` entries; what `empty` says where there are not."""
    if empty == "raise":
        enough, wanted = (count >= least).all(), f"True for at least {least} entries (empty='raise')"
        if torch.compiler.is_compiling():
            torch._assert_async(enough, f"{op}: argument 'mask' must be {wanted}")
        else:
            require(bool(enough), op, "mask", wanted, count)
    return torch.where(count >= least, result, float("nan") if empty == "nan" else 0.0)


def masked_mean(
    values: Tensor,
    mask: Tensor,
    *,
    dim: int | None = None,
    denominator: float | None = None,
    preset: str = "zs",
    empty: str = "zero",
) -> Tensor:
    """Mean over entries where `mask` is True; a scalar, or along `dim`.

    denominator: divide by this instead of the count; with the count of a whole mini batch, the results of its micro
    batches add up to the mini batch's mean. empty: the mean of no entry is 0 ("zero", "identity"), NaN or an error.
    """
    op = "masked_mean"
    eps = _preset(op, preset, empty).mean_eps
    if denominator is not None:
        require_positive(op, "denominator", denominator)
    statistics = _statistics_op(*_rows(op, values, mask, dim))
    count, total = statistics[:, 0], statistics[:, 3]
    if denominator is not None:
        result = total / (denominator + eps)
    else:
        result = _too_few(op, total / (count.clamp(min=1.0) + eps), count, 1, empty)
    return result.reshape(_outside(values, dim))


def masked_var(
    values: Tensor,
    mask: Tensor,
    *,
    dim: int | None = None,
    ddof: int | None = None,
    preset: str = "zs",
    empty: str = "zero",
) -> Tensor:
    """Variance over entries where `mask` is True: M2 / (n - ddof); ddof None: the preset's (zs: 1).

    empty: with fewer than ddof + 1 entries it is 0 ("zero", "identity"), NaN or an error.
    """
    op = "masked_var"
    ddof = _preset(op, preset, empty).ddof if ddof is None else ddof
    require(ddof in (0, 1), op, "ddof", "0 or 1", ddof)
    statistics = _statistics_op(*_rows(op, values, mask, dim))
    count = statistics[:, 0]
    variance = statistics[:, 2] / (count - ddof).clamp(min=1.0)
    return _too_few(op, variance, count, ddof + 1, empty).reshape(_outside(values, dim))


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    dim: int | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
    ddof: int = 1,
    masked_value: float | None = 0.0,
    preset: str | None = None,
    empty: str = "zero",
    statistics: Tensor | None = None,
) -> Tensor:
    """Values with mean 0 (their own mean with shift_mean=False) and variance 1 over the unmasked entries.

    masked_value: what masked entries become; None lets the formula run over them too, as verl does. preset: take eps,
    ddof and masked_value (and how eps is used) from PRESETS; the arguments of those names are then not looked at.
    empty: with fewer than 2 entries the result is 0 (plus the mean with shift_mean=False), the values as they are
    ("identity"), NaN, or a ValueError ("raise"; on a GPU that alone waits for the device). statistics: whiten by
    these (n, mean, M2) [3] or [..., 3] instead of the entries' own, without gradient through them.
    """
    op = "masked_whiten"
    chosen = _preset(op, preset or "zs", empty)
    if preset is None:
        require(ddof in (0, 1), op, "ddof", "0 or 1", ddof)
        require(eps >= 0.0, op, "eps", "at least 0", eps)
        chosen = Preset(ddof, float(eps), False, masked_value is not None, 0.0)
    fill = 0.0 if preset is not None or masked_value is None else float(masked_value)
    rows, row_mask = _rows(op, values, mask, dim)
    if statistics is not None:
        outside = (*_outside(values, dim), 3)
        require_floating(op, "statistics", statistics, shape=outside)
        statistics = statistics.detach().reshape(-1, 3)
    whitened, _ = _whiten_op(
        rows, row_mask, statistics, chosen.eps, chosen.floor, chosen.ddof, shift_mean, chosen.fill_masked, fill, empty
    )
    if dim is None:
        return whitened.reshape(values.shape)
    return whitened.reshape(values.movedim(dim, -1).shape).movedim(-1, dim)
