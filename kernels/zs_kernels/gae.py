"""Generalised advantage estimation over packed sequences, observation tokens transparent.

    delta[n]     = rewards[n] + gamma * values[next(n)] - values[n]
    advantage[n] = delta[n] + gamma * lam * advantage[next(n)]
    returns[n]   = advantage[n] + values[n]

next(n) is the next token of the same sequence whose mask is True; past the last one, value and advantage are 0. So a
masked token (a retrieved document, the prompt) carries both through unchanged, as verl does, and neither its value nor
its reward is read: NaN may stand there. Its own advantage and return are 0.
N = packed tokens, S = sequences. Sums run in float64, from the last token to the first; results are float32.
Source: arXiv:1506.02438, equations 11 and 16.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zs_kernels._device import runs_native


def gae_reference(
    rewards_N: Tensor, values_N: Tensor, mask_N: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """What the op means, one token at a time. Slow on purpose: the fast path answers to it."""
    rewards, values = rewards_N.double(), values_N.double()
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    mask, bounds = mask_N.tolist(), cu_seqlens.tolist()
    for begin, end in pairwise(bounds):
        next_value = advantage = rewards.new_zeros(())
        for n in range(end - 1, begin - 1, -1):
            if mask[n]:
                delta = rewards[n] + gamma * next_value - values[n]
                advantage = delta + gamma * lam * advantage
                next_value = values[n]
                advantages[n] = advantage
                returns[n] = advantage + values[n]
    return advantages.float(), returns.float()


@torch.no_grad()
def gae(
    rewards_N: Tensor, values_N: Tensor, mask_N: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [N] float32, without gradient.

    rewards_N, values_N: [N] floating point; mask_N: [N] bool, True on the tokens the policy wrote; cu_seqlens: [S + 1]
    integer bounds of the sequences, from 0 to N. Raises ValueError or TypeError naming the argument.
    """
    check(rewards_N, values_N, mask_N, cu_seqlens, gamma, lam)
    if not runs_native(rewards_N, values_N, mask_N, cu_seqlens):
        return gae_reference(rewards_N, values_N, mask_N, cu_seqlens, gamma=gamma, lam=lam)
    advantages, returns = torch.ops.zs_kernels.gae(
        rewards_N.float(), values_N.float(), mask_N, cu_seqlens.long(), gamma, lam
    )
    return advantages, returns


def check(rewards_N: Tensor, values_N: Tensor, mask_N: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> None:
    """Everything the compiled loop relies on, checked before it runs."""
    N = rewards_N.numel()
    for name, tensor in (("rewards_N", rewards_N), ("values_N", values_N), ("mask_N", mask_N)):
        if tensor.shape != (N,):
            raise ValueError(f"gae: {name} has shape {tuple(tensor.shape)}, expected ({N},) like rewards_N, packed")
        if tensor.device != rewards_N.device:
            raise ValueError(f"gae: {name} is on {tensor.device}, rewards_N on {rewards_N.device}; put both on one")
    for name, tensor in (("rewards_N", rewards_N), ("values_N", values_N)):
        if not tensor.is_floating_point():
            raise TypeError(f"gae: {name} is {tensor.dtype}, expected a floating point type")
    if mask_N.dtype != torch.bool:
        raise TypeError(f"gae: mask_N is {mask_N.dtype}, expected torch.bool; pass mask != 0")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise TypeError(
            f"gae: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, expected [S + 1] int32 or int64"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != N or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"gae: cu_seqlens must rise from 0 to {N}, got {bounds[:4]} ... {bounds[-1]}")
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"gae: {name} is {value}, expected a number in [0, 1]")
