"""Advantages of trajectories against their own group.

    grpo     A_s = (r_s - mean_g) / (std_g + eps)
    dr_grpo  A_s = r_s - mean_g
    rloo     A_s = n_g / (n_g - 1) * (r_s - mean_g)           (= r_s minus the mean of the others)

S = trajectories, G = groups; mean and std over the valid trajectories of group g (n_g of them), std with `ddof` taken
off the count (1: unbiased). Centred sums in float64. A group with fewer than two valid trajectories, or whose valid
rewards are all equal, is dead: its advantages are exactly 0.
Source: arXiv:2402.03300 section 4.1; arXiv:2503.20783; arXiv:2402.14740.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_index, require_mask, require_positive

MODES = ("grpo", "dr_grpo", "rloo")


class GroupAdvantages(NamedTuple):
    advantages: Tensor
    """[S] float32, 0 where not valid"""
    mean: Tensor
    """[G] float32, 0 for a group without valid trajectories"""
    std: Tensor
    """[G] float32, 0 for a dead group"""
    dead: Tensor
    """[G] bool"""


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    num_groups: int,
    *,
    mode: str = "grpo",
    valid: Tensor | None = None,
    eps: float = 1e-6,
    ddof: int = 1,
) -> GroupAdvantages:
    """Advantage of each trajectory and its group's statistics.

    rewards: [S] floating point. groups: [S] int64/int32 in [0, num_groups), in any order. valid: [S] bool; a False
    trajectory is left out of its group's statistics and gets 0, even where its reward is NaN. No gradient.
    """
    op = "group_advantages"
    require_floating(op, "rewards", rewards)
    require(rewards.dim() == 1, op, "rewards", "of shape [S]", rewards)
    require_index(op, "groups", groups, tuple(rewards.shape), num_groups, device=rewards.device, mask=None)
    require(mode in MODES, op, "mode", f"one of {', '.join(MODES)}", mode)
    require_mask(op, "valid", valid, tuple(rewards.shape), rewards.device)
    require_positive(op, "eps", eps)
    require(ddof in (0, 1), op, "ddof", "0 or 1", ddof)
    groups = groups.long()
    counted = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    r = torch.where(counted, rewards.detach().double(), 0.0)
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
    if mode == "grpo":
        advantages = centred / (std[groups] + eps)
    elif mode == "dr_grpo":
        advantages = centred
    else:
        advantages = centred * (count / (count - 1.0).clamp(min=1.0))[groups]
    advantages = torch.where(dead[groups], 0.0, advantages)
    return GroupAdvantages(advantages=advantages.float(), mean=mean.float(), std=std.float(), dead=dead)
