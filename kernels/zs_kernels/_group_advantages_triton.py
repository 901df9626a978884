"""Triton kernels of zs_kernels.group_advantages: no sorting, no atomics, no look at the device from the host.

One program for each group reads all S trajectories and keeps its own: S * G reads that the cache serves, 4 million for
4096 trajectories in 1024 groups. Sums are float32 with a corrected mean: the first mean is off by a few roundings of
the rewards, the distances from it are exact for rewards close to it, and their own mean is taken off once more. So the
error is a few float32 roundings of the spread, not of the rewards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zs_kernels._triton import tl, triton

BLOCK = 512
FIRST_WHITENING_MODE = 5


@triton.jit
def _sum_sequences_kernel(  # type: ignore[no-untyped-def]
    rewards, mask, cu_seqlens, sums, counts, PER_TOKEN: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """sums, counts [S] float32: the unmasked rewards of each sequence, and how many there are."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.float32)
    for k in range(0, tl.cdiv(end - begin, BLOCK)):
        n = begin + k * BLOCK + tl.arange(0, BLOCK)
        counted = n < end
        if HAS_MASK:
            counted = counted & (tl.load(mask + n, mask=n < end, other=0) != 0)
        number += counted.to(tl.float32)
        if PER_TOKEN:
            total += tl.load(rewards + n, mask=counted, other=0.0).to(tl.float32)
    tl.store(counts + sequence, tl.sum(number))
    if PER_TOKEN:
        tl.store(sums + sequence, tl.sum(total))


@triton.jit
def _spread_kernel(  # type: ignore[no-untyped-def]
    per_sequence, mask, cu_seqlens, out, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """Each unmasked token gets its sequence's number, the others 0."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    number = tl.load(per_sequence + sequence)
    for k in range(0, tl.cdiv(end - begin, BLOCK)):
        n = begin + k * BLOCK + tl.arange(0, BLOCK)
        counted = n < end
        if HAS_MASK:
            counted = counted & (tl.load(mask + n, mask=n < end, other=0) != 0)
        tl.store(out + n, tl.where(counted, number, 0.0), mask=n < end)


@triton.jit
def _members(rewards, groups, valid, s, S, group, ALL: tl.constexpr, HAS_VALID: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rewards at `s`, whether they belong to the group (ALL: to any), and whether they count."""
    own = s < S
    if not ALL:
        own = own & (tl.load(groups + s, mask=own, other=-1) == group)
    counted = own
    if HAS_VALID:
        counted = own & (tl.load(valid + s, mask=own, other=0) != 0)
    return tl.load(rewards + s, mask=counted, other=0.0).to(tl.float32), own, counted


@triton.jit
def _centre_and_spread(  # type: ignore[no-untyped-def]
    rewards, groups, valid, S, group, ALL: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr
):
    """count, first mean, its correction, squared distances from their sum, and whether all are equal."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    strange = tl.zeros([BLOCK], tl.float32)  # minimum and maximum may drop a NaN
    for first in range(0, S, BLOCK):
        reward, _, counted = _members(rewards, groups, valid, first + lane, S, group, ALL, HAS_VALID)
        total += reward
        number += counted.to(tl.float32)
        lowest = tl.minimum(lowest, tl.where(counted, reward, float("inf")))
        highest = tl.maximum(highest, tl.where(counted, reward, float("-inf")))
        strange += (reward != reward).to(tl.float32)
    count = tl.sum(number)
    mean = tl.sum(total) / tl.maximum(count, 1.0)
    equal = (tl.min(lowest) == tl.max(highest)) & (tl.sum(strange) == 0.0)
    apart = tl.zeros([BLOCK], tl.float32)
    for first in range(0, S, BLOCK):
        reward, _, counted = _members(rewards, groups, valid, first + lane, S, group, ALL, HAS_VALID)
        apart += tl.where(counted, reward - mean, 0.0)
    correction = tl.sum(apart) / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, S, BLOCK):
        reward, _, counted = _members(rewards, groups, valid, first + lane, S, group, ALL, HAS_VALID)
        centred = tl.where(counted, reward - mean - correction, 0.0)
        squares += centred * centred
    return count, mean, correction, tl.sum(squares), equal


@triton.jit
def _group_kernel(  # type: ignore[no-untyped-def]
    rewards, groups, valid, advantages, means, stds, dead_flags, statistics, S, eps, ddof,
    MODE: tl.constexpr, KEEP_SINGLETONS: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """MODE: a place in group_advantages.MODES. reinforce++ leaves r in `advantages`, its baseline form r - mean."""
    group = tl.program_id(0)
    count, mean, correction, squares, equal = _centre_and_spread(
        rewards, groups, valid, S, group, False, HAS_VALID, BLOCK
    )
    std = tl.sqrt(squares / tl.maximum(count - ddof, 1.0))
    dead = (count < 2.0) | equal
    if KEEP_SINGLETONS:
        single = count == 1.0
        mean = tl.where(single, 0.0, mean)
        correction = tl.where(single, 0.0, correction)
        std = tl.where(single, 1.0, std)
        dead = dead & (count != 1.0)
    std = tl.where(dead, 0.0, std)
    tl.store(means + group, mean + correction)
    tl.store(stds + group, std)
    tl.store(dead_flags + group, dead.to(tl.int8))
    scale = 1.0
    if MODE == 0:
        scale = 1.0 / (std + eps)
    if MODE == 2:
        scale = tl.where(count > 1.0, count / tl.maximum(count - 1.0, 1.0), 1.0)
    if MODE == 3:
        all_count, all_mean, all_correction, all_squares, _ = _centre_and_spread(
            rewards, groups, valid, S, group, True, HAS_VALID, BLOCK
        )
        scale = 1.0 / (tl.sqrt(all_squares / tl.maximum(all_count - ddof, 1.0)) + eps)
        if group == 0:
            tl.store(statistics, all_count.to(tl.float64))
            tl.store(statistics + 1, all_mean.to(tl.float64) + all_correction.to(tl.float64))
            tl.store(statistics + 2, all_squares.to(tl.float64))
    for first in range(0, S, BLOCK):
        s = first + tl.arange(0, BLOCK)
        reward, own, counted = _members(rewards, groups, valid, s, S, group, False, HAS_VALID)
        advantage = reward
        if (MODE != 4) & (MODE != 5):
            advantage = tl.where(dead, 0.0, (reward - mean - correction) * scale)
        tl.store(advantages + s, tl.where(counted, advantage, 0.0), mask=own)


@triton.jit
def _whiten_sequences_kernel(  # type: ignore[no-untyped-def]
    numbers, valid, weights, advantages, statistics, S, eps, ddof,
    HAS_VALID: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every program takes the weighted moments of all S numbers, in float64, and whitens BLOCK of them."""
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.float64)
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, S, BLOCK):
        number, weight, _ = _weighted(numbers, valid, weights, first + lane, S, HAS_VALID, HAS_WEIGHTS)
        counts += weight
        sums += tl.where(weight > 0.0, weight * number, 0.0)
    count = tl.sum(counts)
    mean = tl.sum(sums) / tl.maximum(count, 1.0)
    apart = tl.zeros([BLOCK], tl.float64)
    for first in range(0, S, BLOCK):
        number, weight, _ = _weighted(numbers, valid, weights, first + lane, S, HAS_VALID, HAS_WEIGHTS)
        apart += tl.where(weight > 0.0, weight * (number - mean) * (number - mean), 0.0)
    squares = tl.sum(apart)
    s = tl.program_id(0) * BLOCK + lane
    number, _, counted = _weighted(numbers, valid, weights, s, S, HAS_VALID, HAS_WEIGHTS)
    whitened = (number - mean) / tl.sqrt(squares / tl.maximum(count - ddof, 1.0) + eps)
    tl.store(advantages + s, tl.where(counted, whitened, 0.0).to(tl.float32), mask=s < S)
    if tl.program_id(0) == 0:
        tl.store(statistics, count)
        tl.store(statistics + 1, mean)
        tl.store(statistics + 2, squares)


@triton.jit
def _weighted(numbers, valid, weights, s, S, HAS_VALID: tl.constexpr, HAS_WEIGHTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers and weights at `s` in float64, and which of them count."""
    counted = s < S
    if HAS_VALID:
        counted = counted & (tl.load(valid + s, mask=s < S, other=0) != 0)
    weight = counted.to(tl.float64)
    if HAS_WEIGHTS:
        weight = tl.load(weights + s, mask=counted, other=0.0).to(tl.float64)
    return tl.load(numbers + s, mask=counted, other=0.0).to(tl.float64), weight, counted


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.contiguous().view(torch.uint8)


def _group_advantages_triton(
    rewards: Tensor,
    groups: Tensor,
    num_groups: int,
    mode: int,
    valid: Tensor | None,
    eps: float,
    ddof: int,
    keep_singletons: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_tokens: int,
    per_token: bool,
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """advantages [S], mean, std [G] float32, dead [G] bool, statistics [3] float64, tokens [N] ([0]: no cu_seqlens)."""
    S, device = groups.numel(), rewards.device
    advantages = torch.empty(S, dtype=torch.float32, device=device)
    numbers, sums, counts = torch.empty((3, S), dtype=torch.float32, device=device).unbind()
    means, stds = (torch.empty(num_groups, dtype=torch.float32, device=device) for _ in range(2))
    dead = torch.empty(num_groups, dtype=torch.bool, device=device)
    statistics = torch.zeros(3, dtype=torch.float64, device=device)
    tokens = torch.empty(num_tokens if cu_seqlens is not None else 0, dtype=torch.float32, device=device)
    rewards, groups, valid_bytes, mask_bytes = rewards.contiguous(), groups.contiguous(), _bytes(valid), _bytes(mask)
    whitens = mode >= FIRST_WHITENING_MODE
    spread = cu_seqlens is not None and S > 0
    if spread:
        cu_seqlens = cu_seqlens.contiguous()
    if spread and (per_token or whitens):
        _sum_sequences_kernel[(S,)](
            rewards, mask_bytes, cu_seqlens, sums, counts, PER_TOKEN=per_token, HAS_MASK=mask is not None, BLOCK=block
        )
    if num_groups > 0:
        _group_kernel[(num_groups,)](
            sums if per_token else rewards, groups, valid_bytes, numbers if whitens else advantages, means, stds,
            dead.view(torch.int8), statistics, S, eps, ddof, MODE=mode, KEEP_SINGLETONS=keep_singletons,
            HAS_VALID=valid is not None, BLOCK=block,
        )  # fmt: skip
    if whitens and S > 0:
        _whiten_sequences_kernel[(triton.cdiv(S, block),)](
            numbers, valid_bytes, counts, advantages, statistics, S, eps, ddof,
            HAS_VALID=valid is not None, HAS_WEIGHTS=spread, BLOCK=block,
        )  # fmt: skip
    if spread:
        _spread_kernel[(S,)](advantages, mask_bytes, cu_seqlens, tokens, HAS_MASK=mask is not None, BLOCK=block)
    return advantages, means, stds, dead, statistics, tokens
