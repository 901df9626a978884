"""Launches of the row sweeps' Triton kernels: see _sweeps.py for what each gives, _sweep_kernels.py for how.

Block sizes come from a static table: nothing is tuned at run time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zs_kernels import _sweep_kernels as kernels
from zs_kernels._triton import triton

FEW_ROWS = 264
"""Two programs for each of 132 multiprocessors: below that, one program per row leaves a GPU idle."""
STATISTICS_BLOCK = 8192
GRADIENT_BLOCK = 4096
KEEP_BLOCK = 1024


def _dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def apart(out: Tensor) -> bool:
    """Whether each row is one piece of memory and no two overlap."""
    rows, columns = out.shape
    return (out.stride(0) >= columns or rows == 1) and (out.stride(1) == 1 or columns == 1)


def _block(columns: int, largest: int, flags: dict[str, Any]) -> tuple[int, int]:
    """(columns of a block, warps): a static table, 32 or fewer columns to a thread, 16 where they are transformed."""
    if flags["HAS_BIAS"] or flags["HAS_SOFTCAP"]:
        largest //= 2
    block = max(128, min(largest, triton.next_power_of_2(columns)))
    return block, max(1, min(8, block // 512))


def _arguments(
    logits: Tensor, inverse_temperature: float | Tensor, bias: Tensor | None, softcap: float | None, bias_first: bool
) -> tuple[list[Any], dict[str, Any]]:
    """What every kernel takes: temperatures, bias and softcap, and the flags that say which of them count."""
    per_row = isinstance(inverse_temperature, Tensor)
    values = [
        inverse_temperature.float().contiguous() if per_row else logits,
        1.0 if per_row else float(inverse_temperature),
        logits if bias is None else bias.contiguous(),
        float(softcap or 1.0),
    ]
    flags = {"PER_ROW": per_row, "HAS_BIAS": bias is not None, "HAS_SOFTCAP": bool(softcap), "BIAS_FIRST": bias_first}
    return values, flags


def statistics_triton(
    logits: Tensor,
    index: Tensor,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    entropy: bool,
    sum_squares: bool,
    bias_first: bool,
    keep: tuple[Tensor, Tensor] | None = None,
    largest_block: int = STATISTICS_BLOCK,
    few_rows: int = FEW_ROWS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, index = _dense_rows(logits), index.contiguous()
    rows, vocabulary = logits.shape
    values, flags = _arguments(logits, inverse_temperature, bias, softcap, bias_first)
    made = {"dtype": torch.float32, "device": logits.device}
    logprobs, logsumexp = torch.empty(rows, **made), torch.empty(rows, **made)
    entropies = torch.empty(rows if entropy else 0, **made)
    squares = torch.empty(rows if sum_squares else 0, **made)
    if rows == 0:
        return logprobs, logsumexp, entropies, squares
    block, warps = _block(vocabulary, largest_block if keep is None else KEEP_BLOCK, flags)
    blocks = triton.cdiv(vocabulary, block)
    flags["HAS_MASK"] = mask is not None
    mask = logits if mask is None else mask.contiguous()
    results = (logprobs, logsumexp, entropies, squares)
    wanted = {"ENTROPY": entropy, "SUM_SQUARES": sum_squares}
    if keep is None and rows < few_rows and blocks > 1:
        parts = torch.empty(rows, blocks, 4, **made)
        row = (logits, logits.stride(0), vocabulary)
        kernels.blocks_kernel[(rows * blocks,)](
            *row, blocks, mask, *values, parts, **flags, BLOCK=block, num_warps=warps
        )
        kernels.merge_kernel[(rows,)](
            parts, blocks, *row, index, mask, *values, *results, **flags, **wanted, num_warps=1
        )
        return results
    offsets, ids = (logits, logits) if keep is None else keep
    kernels.statistics_kernel[(rows,)](
        logits,
        logits.stride(0),
        vocabulary,
        index,
        mask,
        *values,
        offsets,
        ids,
        *results,
        **flags,
        **wanted,
        HAS_KEEP=keep is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return results


def gradient_triton(
    logits: Tensor,
    index: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    out: Tensor,
    bias_first: bool,
    keep: tuple[Tensor, Tensor] | None = None,
    largest_block: int = GRADIENT_BLOCK,
) -> None:
    logits = _dense_rows(logits)
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    target = out if apart(out) else out.contiguous()
    values, flags = _arguments(logits, inverse_temperature, bias, softcap, bias_first)
    has_entropy = grad_entropy is not None and entropy is not None
    block, warps = _block(vocabulary, largest_block if keep is None else KEEP_BLOCK, flags)
    blocks = 1 if keep is not None else triton.cdiv(vocabulary, block)
    offsets, ids = (logits, logits) if keep is None else keep
    kernels.gradient_kernel[(rows * blocks,)](
        logits,
        logits.stride(0),
        vocabulary,
        blocks,
        index.contiguous(),
        logits if mask is None else mask.contiguous(),
        *values,
        offsets,
        ids,
        grad_logprobs.contiguous(),
        grad_entropy.contiguous() if has_entropy else logits,
        logsumexp.contiguous(),
        entropy.contiguous() if has_entropy else logits,
        target,
        target.stride(0),
        **flags,
        HAS_MASK=mask is not None,
        HAS_KEEP=keep is not None,
        HAS_ENTROPY=has_entropy,
        BLOCK=block,
        num_warps=warps,
    )
    if target is not out:
        out.copy_(target)


def partials_triton(
    logits: Tensor,
    index: Tensor,
    inverse_temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    bias_first: bool,
    largest_block: int = STATISTICS_BLOCK,
) -> Tensor:
    logits = _dense_rows(logits)
    rows, vocabulary = logits.shape
    partials = torch.empty(rows, 5, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return partials
    values, flags = _arguments(logits, inverse_temperature, bias, softcap, bias_first)
    block, warps = _block(vocabulary, largest_block, flags)
    kernels.partials_kernel[(rows,)](
        logits,
        logits.stride(0),
        vocabulary,
        index.contiguous(),
        *values,
        partials,
        **flags,
        BLOCK=block,
        num_warps=warps,
    )
    return partials
