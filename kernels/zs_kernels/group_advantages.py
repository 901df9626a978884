"""Advantages of trajectories against their own group or against the whole batch.

    grpo                   A_s = (r_s - mean_g) / (std_g + eps)
    dr_grpo                A_s = r_s - mean_g
    rloo (leave_one_out)   A_s = n_g / (n_g - 1) * (r_s - mean_g)        = r_s minus the mean of the others
    batch_std              A_s = (r_s - mean_g) / (std over the batch's rewards + eps)
    reinforce              A_s = r_s
    reinforce++            A_s = (r_s - mean) / sqrt(variance + eps), both over the batch
    reinforce++-baseline   A_s = (c_s - mean) / sqrt(variance + eps), both over the batch's c_s = r_s - mean_g

S = trajectories, G = groups, N = tokens; mean_g and std_g over the valid trajectories of group g (n_g of them), every
spread with `ddof` taken off the count (1: unbiased). A group with fewer than two valid trajectories, or whose valid
rewards are all equal, is dead: r_s - mean_g is exactly 0 there, and so are the advantages of the first four modes.
With tokens, the batch statistics of the last two weigh a trajectory by its unmasked tokens; and where reinforce++ is
given a reward for each token, what is whitened is each token's return, the sum of its own and all later rewards.

Backends: the reference and C++ sum in float64; Triton in float32 with corrected means (_group_advantages_triton.py),
in up to four launches without a look at the device.
Source: arXiv:2402.03300 section 4.1; arXiv:2503.20783; arXiv:2402.14740; arXiv:2501.03262 section 3.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import (
    require,
    require_floating,
    require_index,
    require_integers,
    require_mask,
    require_number,
    require_positive,
    require_tensor,
)
from zs_kernels._device import backend_of
from zs_kernels._group_advantages_triton import _group_advantages_triton
from zs_kernels.gae import check_bounds, number_of_sequences, row_bounds, whiten_advantages

OP = "group_advantages"
MODES = ("grpo", "dr_grpo", "rloo", "batch_std", "reinforce", "reinforce++", "reinforce++-baseline")
"""In the order that the kernels count."""
MODE_OF = {mode: mode for mode in MODES} | {"leave_one_out": "rloo"}
WHITENING_MODES = MODES[5:]


class GroupAdvantages(NamedTuple):
    advantages: Tensor
    """[S] float32, 0 where not valid"""
    mean: Tensor
    """[G] float32, 0 for a group without valid trajectories"""
    std: Tensor
    """[G] float32, 0 for a dead group"""
    dead: Tensor
    """[G] bool"""
    tokens: Tensor | None = None
    """[N] or [S, T] float32: the trajectory's advantage at each unmasked token, 0 at the others; None without tokens"""
    statistics: Tensor | None = None
    """[3] float64 in the modes that divide by a batch spread: count, mean and sum of squared distances from it"""


def group_ids(labels: Iterable[Hashable]) -> tuple[Tensor, int]:
    """([S] int32, G): labels of any kind (prompt ids, verl's uid strings) numbered in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    ids = [numbers.setdefault(label, len(numbers)) for label in labels]
    return torch.tensor(ids, dtype=torch.int32), len(numbers)


def group_advantages_reference(
    rewards: Tensor,
    groups: Tensor,
    num_groups: int,
    *,
    mode: str = "grpo",
    valid: Tensor | None = None,
    eps: float = 1e-6,
    ddof: int = 1,
    keep_singletons: bool = False,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op means, for one reward per trajectory: advantages, mean, std (float64), dead, statistics.

    weights: [S], what each trajectory weighs in the statistics of the last two modes.
    """
    groups = groups.long()
    counted = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    r = torch.where(counted, rewards.double(), 0.0)
    zeros = r.new_zeros(num_groups)
    count = zeros.index_add(0, groups, counted.double())
    mean = zeros.index_add(0, groups, r) / count.clamp(min=1.0)
    centred = torch.where(counted, r - mean[groups], 0.0)
    variance = zeros.index_add(0, groups, centred * centred) / (count - ddof).clamp(min=1.0)
    lowest = torch.full_like(zeros, torch.inf).scatter_reduce(0, groups, r.masked_fill(~counted, torch.inf), "amin")
    highest = torch.full_like(zeros, -torch.inf).scatter_reduce(0, groups, r.masked_fill(~counted, -torch.inf), "amax")
    # Compared exactly: equal rewards may leave a tiny non-zero variance behind, which must not become a signal.
    dead = (count < 2) | (lowest == highest)
    std = torch.where(dead, 0.0, variance.sqrt())
    if keep_singletons:
        single = count == 1
        mean, std, dead = torch.where(single, 0.0, mean), torch.where(single, 1.0, std), dead & ~single
        centred = torch.where(single[groups], r, centred)
    centred = torch.where(dead[groups], 0.0, centred)
    statistics = r.new_zeros(3)
    if mode == "grpo":
        advantages = centred / (std[groups] + eps)
    elif mode == "rloo":
        advantages = centred * torch.where(count > 1, count / (count - 1.0).clamp(min=1.0), 1.0)[groups]
    elif mode == "batch_std":
        statistics = _weighted_statistics(r, counted.double())
        advantages = centred / (_std(statistics, ddof) + eps)
    elif mode in WHITENING_MODES:
        numbers = r if mode == "reinforce++" else centred
        statistics = _weighted_statistics(numbers, counted.double() if weights is None else counted * weights.double())
        advantages = (numbers - statistics[1]) / (_std(statistics, ddof).square() + eps).sqrt()
    else:
        advantages = centred if mode == "dr_grpo" else r
    return torch.where(counted, advantages, 0.0), mean, std, dead, statistics


def _weighted_statistics(numbers: Tensor, weights: Tensor) -> Tensor:
    numbers = torch.where(weights > 0, numbers, 0.0)
    total = weights.sum()
    mean = (weights * numbers).sum() / total.clamp(min=1.0)
    return torch.stack([total, mean, (weights * (numbers - mean).square()).sum()])


def _std(statistics: Tensor, ddof: int) -> Tensor:
    return (statistics[2] / (statistics[0] - ddof).clamp(min=1.0)).sqrt()


def _reference(
    rewards: Tensor,
    groups: Tensor,
    num_groups: int,
    mode: str,
    valid: Tensor | None,
    eps: float,
    ddof: int,
    keep_singletons: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_tokens: int,
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    S, weights, unmasked = groups.numel(), None, None
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        sequence = torch.repeat_interleave(
            torch.arange(S, device=groups.device), lengths.to(groups.device), output_size=num_tokens
        )
        unmasked = torch.ones_like(sequence, dtype=torch.bool) if mask is None else mask
        sums = torch.zeros(S, dtype=torch.float64, device=groups.device)
        weights = sums.index_add(0, sequence, unmasked.double())
        if per_token:
            rewards = sums.index_add(0, sequence, torch.where(unmasked, rewards.double(), 0.0))
    advantages, mean, std, dead, statistics = group_advantages_reference(
        rewards, groups, num_groups, mode=mode, valid=valid, eps=eps, ddof=ddof, keep_singletons=keep_singletons,
        weights=weights,
    )  # fmt: skip
    advantages = advantages.float()
    tokens = advantages.new_empty(0)
    if unmasked is not None:
        tokens = torch.where(unmasked, advantages[sequence], 0.0)
    return advantages, mean.float(), std.float(), dead, statistics, tokens


@torch.library.custom_op("zs_kernels::group_advantages", mutates_args=())
def _group_advantages_op(
    rewards: Tensor,
    groups: Tensor,
    num_groups: int,
    mode: str,
    valid: Tensor | None,
    eps: float,
    ddof: int,
    keep_singletons: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_tokens: int,
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """advantages [S], mean [G], std [G], dead [G], statistics [3] float64, tokens [N] ([0] without cu_seqlens)."""
    require_index(OP, "groups", groups, tuple(groups.shape), num_groups, device=groups.device, mask=None)
    if cu_seqlens is not None:
        check_bounds(OP, cu_seqlens, num_tokens)
    backend = backend_of(rewards, groups, valid, mask, cu_seqlens)
    if backend == "reference":
        return _reference(
            rewards,
            groups,
            num_groups,
            mode,
            valid,
            eps,
            ddof,
            keep_singletons,
            mask,
            cu_seqlens,
            num_tokens,
            per_token,
        )
    rest = (valid, eps, ddof, keep_singletons, mask)
    if backend == "triton":
        return _group_advantages_triton(
            rewards, groups, num_groups, MODES.index(mode), *rest, cu_seqlens, num_tokens, per_token
        )
    bounds = None if cu_seqlens is None else cu_seqlens.long()
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.zs_native.group_advantages(
        rewards.float(), groups.long(), num_groups, MODES.index(mode), *rest, bounds, num_tokens, per_token
    )
    return found


@_group_advantages_op.register_fake
def _(rewards, groups, num_groups, mode, valid, eps, ddof, keep_singletons, mask, cu_seqlens, num_tokens, per_token):  # type: ignore[no-untyped-def]
    def made(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return rewards.new_empty(size, dtype=dtype)

    tokens = made(0 if cu_seqlens is None else num_tokens)
    return (
        made(groups.numel()), made(num_groups), made(num_groups), made(num_groups, torch.bool),
        made(3, torch.float64), tokens,
    )  # fmt: skip


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    num_groups: int,
    *,
    mode: str = "grpo",
    valid: Tensor | None = None,
    eps: float | None = None,
    ddof: int = 1,
    keep_singletons: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    per_token: bool = False,
) -> GroupAdvantages:
    """Advantage of each trajectory, its group's statistics and, on request, the advantage at each token.

    rewards: floating point, [S] (one for each trajectory), [S, T] (one for each token of padded rows) or, with
    `per_token`, [N] (one for each packed token); those of tokens are summed over the unmasked ones.
    groups: [S] int64/int32 in [0, num_groups), in any order; see group_ids for labels. valid: [S] bool; a False
    trajectory is left out of all statistics and gets 0, even where its reward is NaN.
    mask: bool, True on the tokens the policy wrote (None: all); [S, T], or [N] with cu_seqlens [S + 1] int64/int32, the
    bounds of packed sequences. Either asks for `tokens` in the result.
    eps: None is 1e-6 beside a standard deviation (verl; TRL has 1e-4, OpenRLHF 1e-9) and 1e-8 beside a variance, in
    the last two modes. ddof: 0 or 1. keep_singletons: a group of one has mean 0 and standard deviation 1, as in verl,
    and is not dead. No gradient. Group numbers and bounds are read on the CPU, or with ZS_KERNELS_CHECKED=1.
    Raises ValueError, TypeError or IndexError that names the argument.
    """
    require_floating(OP, "rewards", rewards)
    packed = cu_seqlens is not None
    require(rewards.dim() == 1 or (rewards.dim() == 2 and not packed), OP, "rewards", "[S], [S, T] or [N]", rewards)
    require(packed or not per_token, OP, "per_token", "given with cu_seqlens only", per_token)
    require_tensor(OP, "groups", groups)
    require_number(OP, "num_groups", num_groups, low=0, integer=True)
    S = rewards.shape[0] if cu_seqlens is None else number_of_sequences(OP, cu_seqlens, rewards.device)
    require_integers(OP, "groups", groups, (S,), device=rewards.device)
    require_mask(OP, "valid", valid, (S,), rewards.device)
    require(mode in MODE_OF, OP, "mode", f"one of {', '.join(MODE_OF)}", mode)
    mode = MODE_OF[mode]
    eps = (1e-8 if mode in WHITENING_MODES else 1e-6) if eps is None else eps
    require_positive(OP, "eps", eps)
    require_number(OP, "ddof", ddof, low=0, high=1, integer=True)
    token_shape = _token_shape(rewards, mask, cu_seqlens, S, per_token)
    summed = per_token or rewards.dim() == 2
    max_seqlen = 0
    if token_shape and not packed:
        max_seqlen = token_shape[1]
        cu_seqlens = row_bounds(S, max_seqlen, rewards.device)
    flat_mask = None if mask is None else mask.flatten()
    rewards = rewards.detach().flatten()
    num_tokens = 0 if cu_seqlens is None else (rewards if flat_mask is None else flat_mask).numel()
    ids = (groups, num_groups)
    tokens = (flat_mask, cu_seqlens, num_tokens, summed)
    returns_of_tokens = mode == "reinforce++" and summed
    advantages, mean, std, dead, statistics, spread = torch.ops.zs_kernels.group_advantages(
        rewards, *ids, "reinforce" if returns_of_tokens else mode, valid, eps, ddof, keep_singletons, *tokens
    )
    if returns_of_tokens:
        assert cu_seqlens is not None
        spread, statistics = _whitened_returns(rewards, valid, flat_mask, cu_seqlens, max_seqlen, ids, eps, ddof)
        advantages = whiten_advantages(advantages, valid, statistics, ddof=ddof, eps=eps)
    has_statistics = mode == "batch_std" or mode in WHITENING_MODES
    return GroupAdvantages(
        advantages=advantages,
        mean=mean,
        std=std,
        dead=dead,
        tokens=None if cu_seqlens is None else spread.view(token_shape),
        statistics=statistics if has_statistics else None,
    )


def _token_shape(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, S: int, per_token: bool
) -> tuple[int, ...]:
    """Shape of `tokens`, after a look at the arguments that set it; () where there are none."""
    if rewards.dim() == 2 or per_token:
        require_mask(OP, "mask", mask, tuple(rewards.shape), rewards.device)
        return tuple(rewards.shape)
    require(cu_seqlens is None or rewards.shape[0] == S, OP, "rewards", "of shape [S] (or set per_token)", rewards)
    if mask is None:
        require(cu_seqlens is None, OP, "mask", "given with cu_seqlens, unless rewards are per token", mask)
        return ()
    require_tensor(OP, "mask", mask)
    good = mask.dim() == 1 if cu_seqlens is not None else mask.dim() == 2 and mask.shape[0] == S
    require(good, OP, "mask", "of shape [S, T], or [N] with cu_seqlens", mask)
    require_mask(OP, "mask", mask, tuple(mask.shape), rewards.device)
    return tuple(mask.shape)


def _whitened_returns(
    rewards: Tensor,
    valid: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    ids: tuple[Tensor, int],
    eps: float,
    ddof: int,
) -> tuple[Tensor, Tensor]:
    """[N] returns of the tokens of valid trajectories, whitened together, and their statistics."""
    if valid is not None:
        spread = torch.ops.zs_kernels.group_advantages(
            valid.float(), *ids, "reinforce", valid, 1.0, 0, False, mask, cu_seqlens, rewards.numel(), False
        )[-1]
        mask = spread > 0.0
    # A return is the advantage against values of 0.
    whitened, _, statistics = torch.ops.zs_kernels.gae(
        rewards, torch.zeros_like(rewards), mask, cu_seqlens, None, None, None, 1.0, 1.0, "carry", max_seqlen,
        True, True, ddof, eps, True,
    )  # fmt: skip
    return whitened, statistics
