"""Mean, variance and whitening over the unmasked entries of a tensor, finite for 0 and 1 entries.

    masked_mean   = sum m x / max(sum m, 1)
    masked_var    = sum m (x - mean)^2 / max(sum m - ddof, 1)
    masked_whiten = (x - mean) / sqrt(var + eps)         (+ mean when shift_mean is False)

Any shape, or along one dimension `dim`; sums in float32 (float64 for float64 inputs), centred before squaring.
Masked entries may hold anything, NaN included: they are selected away, never multiplied by 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_mask


def _prepared(op: str, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    require_floating(op, "values", values)
    require_mask(op, "mask", mask, tuple(values.shape), values.device)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.where(mask, values.to(dtype), 0.0), mask.to(dtype)


def masked_sum(values: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Sum over entries where `mask` (bool, same shape) is True; a scalar, or along `dim`."""
    selected, _ = _prepared("masked_sum", values, mask)
    return selected.sum() if dim is None else selected.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, *, dim: int | None = None, denominator: float | None = None) -> Tensor:
    """Mean over entries where `mask` is True, 0 where there are none.

    denominator: divide by this instead of the count; with the count of a whole mini batch, the results of its micro
    batches add up to the mini batch's mean.
    """
    selected, counted = _prepared("masked_mean", values, mask)
    total = selected.sum() if dim is None else selected.sum(dim)
    if denominator is not None:
        require(denominator > 0, "masked_mean", "denominator", "above 0", denominator)
        return total / denominator
    count = counted.sum() if dim is None else counted.sum(dim)
    return total / count.clamp(min=1.0)


def masked_var(values: Tensor, mask: Tensor, *, dim: int | None = None, ddof: int = 1) -> Tensor:
    """Variance over entries where `mask` is True; 0 for fewer than two."""
    require(ddof in (0, 1), "masked_var", "ddof", "0 or 1", ddof)
    selected, counted = _prepared("masked_var", values, mask)
    mean = masked_mean(values, mask, dim=dim)
    centred = torch.where(mask, selected - (mean if dim is None else mean.unsqueeze(dim)), 0.0)
    squares, count = centred * centred, counted
    total = squares.sum() if dim is None else squares.sum(dim)
    number = count.sum() if dim is None else count.sum(dim)
    return total / (number - ddof).clamp(min=1.0)


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    dim: int | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
    ddof: int = 1,
    masked_value: float | None = 0.0,
) -> Tensor:
    """Values with mean 0 (their own mean with shift_mean=False) and variance 1 over the unmasked entries.

    masked_value: what masked entries become; None lets the formula run over them too, as verl does.
    """
    op = "masked_whiten"
    require_floating(op, "values", values)
    mean, variance = masked_mean(values, mask, dim=dim), masked_var(values, mask, dim=dim, ddof=ddof)
    if dim is not None:
        mean, variance = mean.unsqueeze(dim), variance.unsqueeze(dim)
    base = values.to(mean.dtype)
    if masked_value is not None:  # a masked NaN would reach the statistics' gradient
        base = torch.where(mask, base, 0.0)
    whitened = (base - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return whitened if masked_value is None else torch.where(mask, whitened, masked_value)
