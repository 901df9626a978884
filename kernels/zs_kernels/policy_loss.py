"""Clipped policy-gradient loss (PPO) over tokens, with its metrics.

    ratio_n = exp(logprob_n - old_logprob_n)                                  (exponent bounded to +-20)
    loss_n  = max(-ratio_n A_n, -clip(ratio_n, 1 - clip_low, 1 + clip_high) A_n)
    loss_n  = min(loss_n, -dual_clip A_n)  where A_n < 0                      (only with dual_clip)
    loss    = sum_n weight_n loss_n

N = tokens. The weights carry the aggregation: mask / number of loss tokens of the mini batch is the token mean, so that
a sum over micro batches is exact whatever their size. With all ratios 1 the gradient is that of REINFORCE.
Source: arXiv:1707.06347; dual clip arXiv:1912.09729; separate bounds arXiv:2503.14476.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_mask, require_positive

MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """The loss to minimise, and sums over unmasked tokens (float32 scalars without gradient)."""

    loss: Tensor
    ratio_sum: Tensor
    clipped_low: Tensor
    """Number of tokens whose ratio is below 1 - clip_low where the clip is what counts (A < 0)."""
    clipped_high: Tensor
    """Number of tokens whose ratio is above 1 + clip_high where the clip is what counts (A > 0)."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
) -> PolicyLoss:
    """Loss and metrics of tokens [N]; the gradient flows to `logprobs` alone.

    weights: [N], each token's share in the loss. mask: [N] bool; a False token counts nowhere, NaN included.
    dual_clip: above 1; bounds the loss of a token with a negative advantage.
    """
    op = "policy_loss"
    require_floating(op, "logprobs", logprobs)
    shape = tuple(logprobs.shape)
    for name, value in (("old_logprobs", old_logprobs), ("advantages", advantages), ("weights", weights)):
        require_floating(op, name, value, shape=shape)
    require_mask(op, "mask", mask, shape, logprobs.device)
    require(clip_low >= 0.0, op, "clip_low", "at least 0", clip_low)
    require(clip_high >= 0.0, op, "clip_high", "at least 0", clip_high)
    if dual_clip is not None:
        require_positive(op, "dual_clip", dual_clip - 1.0)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    log_ratio = logprobs.to(dtype) - old_logprobs.detach().to(dtype)
    advantages, weights = advantages.detach().to(dtype), weights.detach().to(dtype)
    if mask is not None:  # select before exp: a masked slot may hold anything
        log_ratio = torch.where(mask, log_ratio, 0.0)
        advantages, weights = torch.where(mask, advantages, 0.0), torch.where(mask, weights, 0.0)
    ratio = torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    per_token = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        per_token = torch.where(advantages < 0, torch.minimum(per_token, -dual_clip * advantages), per_token)
    loss = (weights * per_token).sum()
    with torch.no_grad():
        counted = torch.ones_like(ratio) if mask is None else mask.to(dtype)
        low = ((ratio < 1.0 - clip_low) & (advantages < 0)).to(dtype)
        high = ((ratio > 1.0 + clip_high) & (advantages > 0)).to(dtype)
        return PolicyLoss(
            loss=loss,
            ratio_sum=(ratio * counted).sum(),
            clipped_low=(low * counted).sum(),
            clipped_high=(high * counted).sum(),
        )
