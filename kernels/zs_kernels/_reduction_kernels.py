"""Triton kernels of reductions.py: whole tensors in two launches, rows in one."""

from __future__ import annotations

import torch
from torch import Tensor

from zs_kernels._triton import tl, triton

BLOCK = 1024
PROGRAMS = 512
"""Largest number of partial results of a whole tensor: every program of the second launch merges them all."""


@triton.jit
def _block_moments(values, mask, at, inside):
    """(n, sum, M2) of one block."""
    counted = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    x = tl.load(values + at, mask=counted, other=0.0).to(tl.float32)
    count = tl.sum(tl.where(counted, 1.0, 0.0))
    total = tl.sum(x)
    distance = tl.where(counted, x - total / tl.maximum(count, 1.0), 0.0)
    return count, total, tl.sum(distance * distance)


@triton.jit
def _range_moments(values, mask, base, begin, end, BLOCK: tl.constexpr):
    """(n, sum, M2) of entries base + [begin, end), block after block, merged as by Chan, Golub and LeVeque."""
    count, total, squares = 0.0, 0.0, 0.0
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        more, more_total, more_squares = _block_moments(values, mask, base + at, at < end)
        distance = more_total / tl.maximum(more, 1.0) - total / tl.maximum(count, 1.0)
        both = count + more
        squares += more_squares + distance * distance * count * more / tl.maximum(both, 1.0)
        count = both
        total += more_total
    return count, total, squares


@triton.jit
def _store_statistics(out, count, total, squares, WIDTH: tl.constexpr):
    tl.store(out, count)
    tl.store(out + 1, total / tl.maximum(count, 1.0))
    tl.store(out + 2, squares)
    if WIDTH == 4:
        tl.store(out + 3, total)


@triton.jit
def _partial_statistics_kernel(values, mask, partials, count, span, BLOCK: tl.constexpr):
    """partials[p] = (n, mean, M2, sum) of the entries [p * span, (p + 1) * span); also rows of length `span`."""
    program = tl.program_id(0).to(tl.int64)
    base = program * span
    length = tl.minimum(span, count - base)
    n, total, squares = _range_moments(values, mask, base, 0, length, BLOCK)
    _store_statistics(partials + program * 4, n, total, squares, 4)


@triton.jit
def _merged_moments(partials, parts, width, PARTS: tl.constexpr):
    """(n, sum, M2) of all parts, from rows (n, mean, M2, ...) of `width` numbers, parts <= PARTS."""
    part = tl.arange(0, PARTS)
    here = part < parts
    n = tl.load(partials + part * width, mask=here, other=0.0)
    mean = tl.load(partials + part * width + 1, mask=here, other=0.0)
    squares = tl.load(partials + part * width + 2, mask=here, other=0.0)
    count, total = tl.sum(n), tl.sum(n * mean)
    distance = mean - total / tl.maximum(count, 1.0)
    return count, total, tl.sum(squares + n * distance * distance)


@triton.jit
def _merge_kernel(partials, out, parts, PARTS: tl.constexpr):
    count, total, squares = _merged_moments(partials, parts, 4, PARTS)
    part = tl.arange(0, PARTS)
    sums = tl.load(partials + part * 4 + 3, mask=part < parts, other=0.0)
    _store_statistics(out, count, total, squares, 3)
    tl.store(out + 3, tl.sum(sums))


@triton.jit
def _scale_kernel(count, total, squares, eps, FLOOR: tl.constexpr, DDOF: tl.constexpr, EMPTY: tl.constexpr):
    """(mean, scale) as scale_of in reductions.py."""
    mean = total / tl.maximum(count, 1.0)
    variance = squares / tl.maximum(count - DDOF, 1.0)
    bounded = tl.maximum(variance, eps) if FLOOR else variance + eps
    scale = tl.where(variance != variance, variance, 1.0 / tl.sqrt(bounded))
    few = count < 2.0
    if EMPTY == 1:  # identity
        mean = tl.where(few, 0.0, mean)
        scale = tl.where(few, 1.0, scale)
    elif EMPTY == 2:  # nan
        scale = tl.where(few, float("nan"), scale)
    else:
        scale = tl.where(few, 0.0, scale)
    return mean, scale


@triton.jit
def _whiten_range(
    values, mask, out, base, begin, end, mean, scale, masked_value,
    SHIFT: tl.constexpr, FILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        x = tl.load(values + base + at, mask=inside, other=0.0).to(tl.float32)
        whitened = (x - mean) * scale
        if not SHIFT:
            whitened += mean
        if FILL:
            counted = tl.load(mask + base + at, mask=inside, other=0) != 0
            whitened = tl.where(counted, whitened, masked_value)
        tl.store(out + base + at, whitened, mask=inside)


@triton.jit
def _whiten_all_kernel(
    values, mask, partials, out, used, count, span, parts, part_width, eps, masked_value,
    FLOOR: tl.constexpr, DDOF: tl.constexpr, EMPTY: tl.constexpr, SHIFT: tl.constexpr, FILL: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Entries [p * span, (p + 1) * span) by the merged statistics of all parts; program 0 writes those."""
    program = tl.program_id(0).to(tl.int64)
    n, total, squares = _merged_moments(partials, parts, part_width, PARTS)
    if program == 0:
        _store_statistics(used, n, total, squares, 3)
    mean, scale = _scale_kernel(n, total, squares, eps, FLOOR, DDOF, EMPTY)
    base = program * span
    length = tl.minimum(span, count - base)
    _whiten_range(values, mask, out, base, 0, length, mean, scale, masked_value, SHIFT, FILL, BLOCK)


@triton.jit
def _whiten_rows_kernel(
    values, mask, statistics, out, used, columns, eps, masked_value,
    GIVEN: tl.constexpr, FLOOR: tl.constexpr, DDOF: tl.constexpr, EMPTY: tl.constexpr, SHIFT: tl.constexpr,
    FILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: its statistics (or those given), then its entries, which are still in the cache."""
    row = tl.program_id(0).to(tl.int64)
    base = row * columns
    if GIVEN:
        n = tl.load(statistics + row * 3)
        total = n * tl.load(statistics + row * 3 + 1)
        squares = tl.load(statistics + row * 3 + 2)
    else:
        n, total, squares = _range_moments(values, mask, base, 0, columns, BLOCK)
    _store_statistics(used + row * 3, n, total, squares, 3)
    mean, scale = _scale_kernel(n, total, squares, eps, FLOOR, DDOF, EMPTY)
    _whiten_range(values, mask, out, base, 0, columns, mean, scale, masked_value, SHIFT, FILL, BLOCK)


def _spans(count: int, block: int) -> tuple[int, int]:
    """(programs, entries of each): at most PROGRAMS, each a whole number of blocks."""
    blocks = triton.cdiv(count, block)
    span = triton.cdiv(blocks, PROGRAMS) * block
    return triton.cdiv(count, span), span


def masked_statistics_triton(values: Tensor, mask: Tensor, *, block: int = BLOCK) -> Tensor:
    """[R, 4] from values, mask [R, C], R and C above 0."""
    rows, columns = values.shape
    values, mask = values.contiguous(), mask.contiguous()
    programs, span = (rows, columns) if rows > 1 else _spans(columns, block)
    partials = torch.empty(programs, 4, dtype=torch.float32, device=values.device)
    _partial_statistics_kernel[(programs,)](values, mask, partials, rows * columns, span, BLOCK=block)
    if rows > 1:
        return partials
    out = torch.empty(1, 4, dtype=torch.float32, device=values.device)
    _merge_kernel[(1,)](partials, out, programs, PARTS=PROGRAMS)
    return out


def masked_whiten_triton(
    values: Tensor,
    mask: Tensor,
    statistics: Tensor | None,
    eps: float,
    floor: bool,
    ddof: int,
    shift_mean: bool,
    fill_masked: bool,
    masked_value: float,
    empty: int,
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """(whitened [R, C], statistics [R, 3] used) from values, mask [R, C], R and C above 0."""
    rows, columns = values.shape
    values, mask = values.contiguous(), mask.contiguous()
    given = None if statistics is None else statistics.float().contiguous()
    out = torch.empty(rows, columns, dtype=torch.float32, device=values.device)
    used = torch.empty(rows, 3, dtype=torch.float32, device=values.device)
    constants = {
        "FLOOR": floor, "DDOF": ddof, "EMPTY": empty, "SHIFT": shift_mean, "FILL": fill_masked, "BLOCK": block,
    }  # fmt: skip
    if rows > 1:
        _whiten_rows_kernel[(rows,)](
            values, mask, values if given is None else given, out, used, columns, eps, masked_value,
            GIVEN=given is not None, **constants,
        )  # fmt: skip
        return out, used
    programs, span = _spans(columns, block)
    parts = given
    if parts is None:
        parts = torch.empty(programs, 4, dtype=torch.float32, device=values.device)
        _partial_statistics_kernel[(programs,)](values, mask, parts, columns, span, BLOCK=block)
    _whiten_all_kernel[(programs,)](
        values, mask, parts, out, used, columns, span, parts.shape[0], parts.shape[1], eps, masked_value,
        PARTS=PROGRAMS, **constants,
    )  # fmt: skip
    return out, used
