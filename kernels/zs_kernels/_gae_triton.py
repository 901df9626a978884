"""Triton kernels of zs_kernels.gae: a backward scan over each packed sequence, and whitening.

With u[n] = values[n] + lam * advantage[n] the recurrence has one variable,

    u[n]         = values[n] + lam * (rewards[n] - values[n]) + gamma * lam * u[next(n)],   u past the end = bootstrap
    advantage[n] = rewards[n] - values[n] + gamma * u[next(n)]

and every token is a map u -> decay * u + sum. Maps compose associatively, and a transparent token's is the identity.
One program scans one sequence in blocks, or one chunk of it where sequences are few and their greatest length is known.
Everything is summed in an order that depends on the lengths alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zs_kernels._triton import tl, triton

BLOCK = 1024
SMALLEST_BLOCK = 32
FEW_SEQUENCES = 264
"""Two programs for each processor of an H100: fewer sequences than that are split where they are long."""
MERGED_AT_ONCE = 4096
"""Partial statistics that every program of the whitening launch still adds up for itself."""


@triton.jit
def _then(decay_a, sum_a, decay_b, sum_b):  # type: ignore[no-untyped-def]
    return decay_b * decay_a, decay_b * sum_a + sum_b


@triton.jit
def _token_maps(  # type: ignore[no-untyped-def]
    rewards, values, mask, lane, here, gamma, lam,
    CARRY: tl.constexpr, CLASSIC: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """decay and sum of each token's u -> decay * u + sum, `lane` tokens before the pointers; the identity elsewhere."""
    counted = here
    if HAS_MASK:
        counted = here & (tl.load(mask - lane, mask=here, other=0) != 0)
    read = here if CLASSIC else counted
    stepped = counted if CARRY else here
    reward = tl.load(rewards - lane, mask=read, other=0.0).to(tl.float32)
    value = tl.load(values - lane, mask=read, other=0.0).to(tl.float32)
    return tl.where(stepped, gamma * lam, 1.0), tl.where(stepped, value + lam * (reward - value), 0.0)


@triton.jit
def _last(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0))


@triton.jit
def _chunk_maps_kernel(  # type: ignore[no-untyped-def]
    rewards, values, mask, cu_seqlens, gammas, lams, maps, gamma, lam, chunks, chunk_tokens,
    CARRY: tl.constexpr, CLASSIC: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GAMMAS: tl.constexpr,
    HAS_LAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """maps [S * chunks, 2]: what each chunk of a sequence, the last one first, does to u."""
    program = tl.program_id(0)
    sequence, chunk = program // chunks, program % chunks
    if HAS_GAMMAS:
        gamma = tl.load(gammas + sequence).to(tl.float32)
    if HAS_LAMS:
        lam = tl.load(lams + sequence).to(tl.float32)
    top = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - chunk.to(tl.int64) * chunk_tokens
    bottom = tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), top - chunk_tokens)
    decay = 1.0
    total = 0.0
    lane = tl.arange(0, BLOCK)
    for k in range(0, tl.cdiv(tl.maximum(top - bottom, 0), BLOCK)):
        n = top - 1 - k * BLOCK  # of lane 0: the others are before it
        here = lane <= n - bottom
        decays, sums = _token_maps(
            rewards + n, values + n, mask + n if HAS_MASK else mask, lane, here, gamma, lam, CARRY, CLASSIC, HAS_MASK
        )
        decays, sums = tl.associative_scan((decays, sums), 0, _then)
        block_decay = _last(decays, BLOCK)
        total = block_decay * total + _last(sums, BLOCK)
        decay = block_decay * decay
    tl.store(maps + 2 * program, decay)
    tl.store(maps + 2 * program + 1, total)


@triton.jit
def _gae_kernel(  # type: ignore[no-untyped-def]
    rewards, values, mask, cu_seqlens, gammas, lams, bootstrap, maps, advantages, returns, moments,
    gamma, lam, chunks, chunk_tokens,
    CARRY: tl.constexpr, CLASSIC: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GAMMAS: tl.constexpr,
    HAS_LAMS: tl.constexpr, HAS_BOOTSTRAP: tl.constexpr, SPLIT: tl.constexpr, STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk (SPLIT) or all of one sequence. moments [S * chunks, 3]: count, mean, squares of what it wrote.

    Loads run backwards instead of the scan: tl.associative_scan(reverse=True) has given wrong results (triton #4362).
    """
    program = tl.program_id(0)
    sequence, chunk = program // chunks, program % chunks
    if HAS_GAMMAS:
        gamma = tl.load(gammas + sequence).to(tl.float32)
    if HAS_LAMS:
        lam = tl.load(lams + sequence).to(tl.float32)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    top = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    bottom = begin
    u = 0.0
    if HAS_BOOTSTRAP:
        u = tl.load(bootstrap + sequence).to(tl.float32)
    if SPLIT:
        for done in range(0, chunk):
            at = maps + 2 * (sequence * chunks + done)
            u = tl.load(at) * u + tl.load(at + 1)
        top = top - chunk.to(tl.int64) * chunk_tokens
        bottom = tl.maximum(begin, top - chunk_tokens)
    count = 0.0
    mean = 0.0
    squares = 0.0
    lane = tl.arange(0, BLOCK)
    for k in range(0, tl.cdiv(tl.maximum(top - bottom, 0), BLOCK)):
        n = top - 1 - k * BLOCK  # of lane 0: the others are before it
        here = lane <= n - bottom
        # The maps of the tokens one further on, so that the scan gives each token the u behind it, not its own.
        behind = here & (lane + k > 0)
        decays, sums = _token_maps(
            rewards + n + 1, values + n + 1, mask + n + 1 if HAS_MASK else mask, lane, behind, gamma, lam,
            CARRY, CLASSIC, HAS_MASK,
        )  # fmt: skip
        decays, sums = tl.associative_scan((decays, sums), 0, _then)
        us = decays * u + sums
        counted = here
        if HAS_MASK:
            counted = here & (tl.load(mask + n - lane, mask=here, other=0) != 0)
        value = tl.load(values + n - lane, mask=counted, other=0.0).to(tl.float32)
        reward = tl.load(rewards + n - lane, mask=counted, other=0.0).to(tl.float32)
        advantage = tl.where(counted, reward - value + gamma * us, 0.0)
        tl.store(advantages + n - lane, advantage, mask=here)
        tl.store(returns + n - lane, tl.where(counted, advantage + value, 0.0), mask=here)
        u = _last(us, BLOCK)
        if STATISTICS:
            block_count = tl.sum(counted.to(tl.float32))
            block_mean = tl.sum(advantage) / tl.maximum(block_count, 1.0)
            apart = tl.where(counted, advantage - block_mean, 0.0)
            total = tl.maximum(count + block_count, 1.0)
            shift = block_mean - mean
            squares += tl.sum(apart * apart) + shift * shift * (count * (block_count / total))
            mean += shift * (block_count / total)
            count += block_count
    if STATISTICS:
        tl.store(moments + 3 * program, count)
        tl.store(moments + 3 * program + 1, mean)
        tl.store(moments + 3 * program + 2, squares)


@triton.jit
def _merged(moments, parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Count, mean and squares of all parts in float64, in an order that depends on their number alone."""
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.float64)
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, BLOCK):
        at, here = moments + 3 * (first + lane), first + lane < parts
        count = tl.load(at, mask=here, other=0.0).to(tl.float64)
        counts += count
        sums += count * tl.load(at + 1, mask=here, other=0.0).to(tl.float64)
    count = tl.sum(counts)
    mean = tl.sum(sums) / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, BLOCK):
        at, here = moments + 3 * (first + lane), first + lane < parts
        apart = tl.load(at + 1, mask=here, other=0.0).to(tl.float64) - mean
        squares += tl.load(at + 2, mask=here, other=0.0).to(tl.float64)
        squares += tl.load(at, mask=here, other=0.0).to(tl.float64) * apart * apart
    return count, mean, tl.sum(squares)


@triton.jit
def _statistics_kernel(moments, statistics, parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    count, mean, squares = _merged(moments, parts, BLOCK)
    tl.store(statistics, count)
    tl.store(statistics + 1, mean)
    tl.store(statistics + 2, squares)


@triton.jit
def _whiten_kernel(  # type: ignore[no-untyped-def]
    values, mask, moments, statistics, out, N, parts, ddof, eps,
    SHIFT_MEAN: tl.constexpr, MERGE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
    MERGE_BLOCK: tl.constexpr,
):  # fmt: skip
    """out may be values. MERGE: statistics are an output, made of the moments of the parts."""
    program = tl.program_id(0)
    if MERGE:
        count, mean, squares = _merged(moments, parts, MERGE_BLOCK)
        if program == 0:
            tl.store(statistics, count)
            tl.store(statistics + 1, mean)
            tl.store(statistics + 2, squares)
    else:
        count = tl.load(statistics)
        mean = tl.load(statistics + 1)
        squares = tl.load(statistics + 2)
    scale = (1.0 / tl.sqrt(squares / tl.maximum(count - ddof, 1.0) + eps)).to(tl.float32)
    # The mean in two float32 parts: rounded to one it would be off by as much as close advantages differ.
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    n = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = n < N
    if HAS_MASK:
        counted = counted & (tl.load(mask + n, mask=n < N, other=0) != 0)
    whitened = ((tl.load(values + n, mask=counted, other=0.0).to(tl.float32) - high) - low) * scale
    if not SHIFT_MEAN:
        whitened += high
    tl.store(out + n, tl.where(counted, whitened, 0.0), mask=n < N)


def _mask_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _gae_triton(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    gammas: Tensor | None,
    lams: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    mode: str,
    max_seqlen: int,
    *,
    statistics: bool,
    block: int | None = None,
    chunk_blocks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """advantages and returns [N], moments of the parts [parts, 3] float32 (or [0, 3])."""
    block = block or min(BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(max_seqlen or rewards.numel())))
    S, device = cu_seqlens.numel() - 1, rewards.device
    rewards, values, cu_seqlens = rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous()
    advantages = torch.empty(rewards.numel(), dtype=torch.float32, device=device)
    returns = torch.empty_like(advantages)
    blocks = triton.cdiv(max_seqlen, block)
    if chunk_blocks is None and 0 < S < FEW_SEQUENCES:
        chunk_blocks = triton.cdiv(blocks, min(triton.cdiv(2 * FEW_SEQUENCES, S), max(1, blocks // 2)))
    chunks = max(1, triton.cdiv(blocks, chunk_blocks)) if chunk_blocks else 1
    moments = torch.empty((S * chunks if statistics else 0, 3), dtype=torch.float32, device=device)
    if S == 0:
        return advantages, returns, moments
    given = (rewards, values, _mask_bytes(mask), cu_seqlens, gammas, lams)
    flags = {
        "CARRY": mode == "carry",
        "CLASSIC": mode == "classic",
        "HAS_MASK": mask is not None,
        "HAS_GAMMAS": gammas is not None,
        "HAS_LAMS": lams is not None,
    }
    chunk_tokens = (chunk_blocks or 1) * block
    maps = torch.empty((S * chunks if chunks > 1 else 0, 2), dtype=torch.float32, device=device)
    if chunks > 1:
        _chunk_maps_kernel[(S * chunks,)](
            *given, maps, gamma, lam, chunks, chunk_tokens, **flags, BLOCK=block, num_warps=4
        )
    _gae_kernel[(S * chunks,)](
        *given, bootstrap, maps, advantages, returns, moments, gamma, lam, chunks, chunk_tokens,
        **flags, HAS_BOOTSTRAP=bootstrap is not None, SPLIT=chunks > 1, STATISTICS=statistics, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return advantages, returns, moments


def _statistics_triton(moments: Tensor) -> Tensor:
    statistics = torch.empty(3, dtype=torch.float64, device=moments.device)
    _statistics_kernel[(1,)](moments, statistics, moments.shape[0], BLOCK=1024, num_warps=4)
    return statistics


def _whiten_triton(
    values: Tensor,
    mask: Tensor | None,
    statistics: Tensor,
    out: Tensor,
    *,
    moments: Tensor | None,
    ddof: int,
    eps: float,
    shift_mean: bool,
    block: int = 2048,
) -> None:
    """out <- whitened values; statistics are written where `moments` are given."""
    N = values.numel()
    _whiten_kernel[(max(1, triton.cdiv(N, block)),)](
        values.contiguous(), _mask_bytes(mask), moments, statistics, out, N,
        0 if moments is None else moments.shape[0], ddof, eps, SHIFT_MEAN=shift_mean, MERGE=moments is not None,
        HAS_MASK=mask is not None, BLOCK=block, MERGE_BLOCK=1024, num_warps=4,
    )  # fmt: skip
