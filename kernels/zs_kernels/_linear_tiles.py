"""The head's product and the softmax's statistics in one Triton kernel: no logits in memory, float32 sums throughout.

A program holds BLOCK_M rows and one of S shares of the vocabulary. Per tile of BLOCK_N tokens it sums the product over
the hidden size, then merges the tile into the rows' running statistics. The shares' statistics [S, M, 5] are merged in
the order of the vocabulary, so that results do not depend on which program was faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zs_kernels._sweep_kernels import transformed_logits
from zs_kernels._triton import INTERPRETED, tl, triton
from zs_kernels.token_logprobs import Sweep, merge_partials

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
PROGRAMS = 528
"""Programs aimed at: 4 for each of an H100's multiprocessors. A fixed number, so that bits do not depend on the GPU."""


@triton.jit
def tiles_kernel(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    index,
    inverse_temperatures,
    inverse_temperature,
    bias,
    softcap,
    partials,
    M,
    V,
    H,
    row_blocks,
    share,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partials [S, M, 5] <- maximum, sum e, sum e z, sum e^2, chosen z, with e = exp(z - maximum), as sweep_partials
    gives them. Programs that share a part of the vocabulary are neighbours, so that its weights stay in the cache."""
    program = tl.program_id(0)
    block, part = program % row_blocks, program // row_blocks
    rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = rows < M
    depth = tl.arange(0, BLOCK_K)
    inverse = tl.zeros((BLOCK_M,), tl.float32) + inverse_temperature
    if PER_ROW:
        inverse = tl.load(inverse_temperatures + rows, mask=inside, other=1.0).to(tl.float32)
    scale = inverse * 1.4426950408889634
    chosen = tl.load(index + rows, mask=inside, other=-1)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    t = tl.zeros((BLOCK_M,), tl.float32)
    q = tl.zeros((BLOCK_M,), tl.float32)
    picked = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(part * share, tl.minimum(part * share + share, V), BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        known = tokens < V
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, H, BLOCK_K):
            there = start + depth < H
            x = tl.load(
                hidden + rows[:, None] * hidden_stride + (start + depth)[None, :],
                mask=inside[:, None] & there[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + tokens.to(tl.int64)[None, :] * weight_stride + (start + depth)[:, None],
                mask=known[None, :] & there[:, None],
                other=0.0,
            )
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            product = tl.dot(x, w, product, input_precision="ieee")
        offset = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_BIAS:
            offset = tl.load(bias + tokens, mask=known, other=0.0).to(tl.float32)
        z, _ = transformed_logits(product, offset[None, :], softcap, HAS_BIAS, HAS_SOFTCAP, True)
        z = tl.where(known[None, :], z, -float("inf"))
        picked += tl.sum(tl.where(tokens[None, :] == chosen[:, None], z, 0.0), axis=1)
        merged = tl.maximum(m, tl.max(z, axis=1))
        top = tl.where(merged == -float("inf"), 0.0, merged)
        fall = tl.where(m == -float("inf"), 0.0, (m - top) * scale)  # an empty past has s = t = q = 0
        shrink = tl.exp2(fall)
        d = (z - top[:, None]) * scale[:, None]
        e = tl.exp2(d)
        t = shrink * (t + fall * s) + tl.sum(e * tl.maximum(d, -16384.0), axis=1)  # 0 * finite, not 0 * -inf
        s = shrink * s + tl.sum(e, axis=1)
        q = shrink * shrink * q + tl.sum(e * e, axis=1)
        m = merged
    out = partials + (part.to(tl.int64) * M + rows) * 5
    top = m * inverse
    tl.store(out, top, mask=inside)
    tl.store(out + 1, s, mask=inside)
    tl.store(out + 2, t * 0.6931471805599453 + tl.where(s == 0.0, 0.0, top * s), mask=inside)
    tl.store(out + 3, q, mask=inside)
    tl.store(out + 4, picked * inverse, mask=inside)


def _tile_partials_triton(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    inverse: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    *,
    blocks: tuple[int, int, int] | None = None,
    programs: int = PROGRAMS,
) -> Tensor:
    """[S, M, 5] float32: see tiles_kernel. blocks: (BLOCK_M, BLOCK_N, BLOCK_K)."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, size = hidden.shape
    vocabulary = weight.shape[0]
    narrow = 64 if bias is not None or softcap else BLOCK_N  # what transforms the logits needs registers, too
    block_m, block_n, block_k = blocks or ((BLOCK_M, narrow, BLOCK_K) if size > 1 else (64, 64, 16))
    row_blocks, tiles = triton.cdiv(rows, block_m), triton.cdiv(vocabulary, block_n)
    shares = max(1, min(tiles, programs // max(1, row_blocks)))
    share = triton.cdiv(tiles, shares) * block_n
    shares = triton.cdiv(vocabulary, share)
    partials = torch.empty(shares, rows, 5, dtype=torch.float32, device=hidden.device)
    by_row = isinstance(inverse, Tensor)
    if rows == 0:
        return partials
    tiles_kernel[(row_blocks * shares,)](
        hidden,
        hidden.stride(0),
        weight,
        weight.stride(0),
        index,
        inverse if by_row else hidden,
        1.0 if by_row else inverse,
        hidden if bias is None else bias,
        softcap or 0.0,
        partials,
        rows,
        vocabulary,
        size,
        row_blocks,
        share,
        PER_ROW=by_row,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        UPCAST=INTERPRETED,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8,
        num_stages=3,
    )
    return partials


def tile_statistics(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    inverse: float | Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
) -> Sweep:
    """Statistics [M] of hidden [M, H] under weight [V, H], from exact float32 sums. inverse: 1 / temperature."""
    return merge_partials(_tile_partials_triton(hidden, weight, index, inverse, bias, softcap))
