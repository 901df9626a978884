"""Products of 16-bit matrices by way of float32 copies, for processors that multiply those faster.

x86 processors with AVX-512 BF16 alone do no more 16-bit than float32 operations per cycle, AMD's apart, and torch's
16-bit products are tuned less: on an Intel Xeon without AMX an output head's run at half the rate of float32 ones. So
slices of the vocabulary are copied to float32, small enough to stay in the cache, and multiplied there. Inputs are the
same numbers, sums are float32 as before, and each result is rounded once: it is as exact, and takes a slice's memory.

N = rows, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SLICE_ROWS = 1024
"""Vocabulary rows that are copied to float32 at a time."""
FEW_ROWS = 64
"""With fewer rows of hidden states a product takes no longer than reading the head: copies would only add to that."""
CPU_FACTS = Path("/proc/cpuinfo")


def pay(rows: Tensor) -> bool:
    """Whether products of these rows [N, ...] are made faster by float32 copies."""
    narrow = rows.dtype in (torch.bfloat16, torch.float16)
    return narrow and rows.device.type == "cpu" and rows.shape[0] >= FEW_ROWS and prefers_float32(rows.dtype)


@functools.cache
def prefers_float32(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies float32 matrices faster than those of a 16-bit type.

    True for x86 without a unit for that type: AMX, or for bfloat16 AMD's AVX-512. Elsewhere nothing was measured.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if dtype == torch.float16:
        return not _has("_is_amx_fp16_supported")
    if _has("_is_amx_tile_supported"):
        return False
    return not (_has("_is_avx512_bf16_supported") and _is_amd())


def _has(name: str) -> bool:
    test = getattr(torch.cpu, name, None)
    return bool(test and test())


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in CPU_FACTS.read_text(errors="replace")[:4096]
    except OSError:  # no Linux: AVX-512 BF16 is then taken for a fast one
        return True


def multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [N, V] <- hidden [N, H] @ weight [V, H].T, rounded once to the type of `out`."""
    wide = hidden.float()
    copied, product = _scratch(weight, SLICE_ROWS), wide.new_empty(hidden.shape[0], min(SLICE_ROWS, weight.shape[0]))
    for start in range(0, weight.shape[0], SLICE_ROWS):
        part = slice(start, min(start + SLICE_ROWS, weight.shape[0]))
        factor = copied[: part.stop - start].copy_(weight[part])
        if out.dtype == torch.float32:
            torch.mm(wide, factor.T, out=out[:, part])
        else:
            out[:, part] = torch.mm(wide, factor.T, out=product[:, : part.stop - start])


def multiply_gradient(
    dlogits: Tensor,
    weight: Tensor,
    hidden: Tensor,
    *,
    grad_hidden: Tensor | None,
    add_to_weight: Callable[[slice, Tensor], None] | None,
) -> None:
    """The products of logits' gradient [N, V] with both factors, one slice of the vocabulary after the other.

    grad_hidden [N, H] <- dlogits @ weight, rounded once. `add_to_weight(part, product)` is given each
    dlogits[:, part].T @ hidden in float32, in memory that the next slice uses again.
    """
    rows, vocabulary = dlogits.shape
    step = min(SLICE_ROWS, vocabulary)
    gradient = torch.empty(rows, step, dtype=torch.float32)
    total = None if grad_hidden is None else torch.zeros(grad_hidden.shape, dtype=torch.float32)
    factor = None if total is None else _scratch(weight, step)
    product = None if add_to_weight is None else torch.empty(step, hidden.shape[1], dtype=torch.float32)
    wide = None if add_to_weight is None else hidden.float()
    for start in range(0, vocabulary, step):
        part = slice(start, min(start + step, vocabulary))
        count = part.stop - start
        here = gradient[:, :count].copy_(dlogits[:, part])
        if total is not None and factor is not None:
            total.addmm_(here, factor[:count].copy_(weight[part]))
        if add_to_weight is not None and product is not None and wide is not None:
            add_to_weight(part, torch.mm(here.T, wide, out=product[:count]))
    if grad_hidden is not None and total is not None:
        grad_hidden.copy_(total)


def _scratch(weight: Tensor, rows: int) -> Tensor:
    return torch.empty(min(rows, weight.shape[0]), weight.shape[1], dtype=torch.float32)
