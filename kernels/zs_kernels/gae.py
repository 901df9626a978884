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

from zs_kernels._check import require, require_floating, require_mask, require_tensor
from zs_kernels._device import backend_of


def gae_reference(
    rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """What the op means, one token at a time. Slow on purpose: the fast path answers to it."""
    rewards, values = rewards.double(), values.double()
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    written = mask.tolist()
    for begin, end in pairwise(cu_seqlens.tolist()):
        next_value = advantage = rewards.new_zeros(())
        for n in range(end - 1, begin - 1, -1):
            if written[n]:
                delta = rewards[n] + gamma * next_value - values[n]
                advantage = delta + gamma * lam * advantage
                next_value = values[n]
                advantages[n] = advantage
                returns[n] = advantage + values[n]
    return advantages.float(), returns.float()


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [N] float32, without gradient.

    rewards, values: [N] floating point; mask: [N] bool, True on the tokens the policy wrote; cu_seqlens: [S + 1]
    integer bounds of the sequences, from 0 to N. Raises ValueError or TypeError naming the argument.
    """
    check(rewards, values, mask, cu_seqlens, gamma, lam)
    if backend_of(rewards, values, mask, cu_seqlens) != "native":
        return gae_reference(rewards, values, mask, cu_seqlens, gamma=gamma, lam=lam)
    advantages, returns, _ = torch.ops.zs_native.gae(rewards.float(), values.float(), mask, cu_seqlens.long(), gamma, lam)
    return advantages, returns


def check(rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> None:
    """Everything the compiled loop relies on, checked before it runs."""
    require_floating("gae", "rewards", rewards)
    require(rewards.dim() == 1, "gae", "rewards", "packed, of shape [N]", rewards)
    require_floating("gae", "values", values, shape=tuple(rewards.shape))
    require(values.device == rewards.device, "gae", "values", f"on {rewards.device} like rewards", values)
    require_mask("gae", "mask", mask, tuple(rewards.shape), rewards.device)
    require_tensor("gae", "cu_seqlens", cu_seqlens)
    good = cu_seqlens.dtype in (torch.int64, torch.int32) and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0
    require(good, "gae", "cu_seqlens", "an int64 or int32 tensor of shape [S + 1]", cu_seqlens)
    bounds = cu_seqlens.tolist()
    rising = bounds[0] == 0 and bounds[-1] == rewards.numel() and all(a <= b for a, b in pairwise(bounds))
    require(rising, "gae", "cu_seqlens", f"bounds that rise from 0 to {rewards.numel()}", bounds)
    require(0.0 <= gamma <= 1.0, "gae", "gamma", "a number in [0, 1]", gamma)
    require(0.0 <= lam <= 1.0, "gae", "lam", "a number in [0, 1]", lam)
