"""Importance weights from the policy that sampled to the policy that is trained, truncated or masked.

    rho_n = exp(logprob_n - rollout_logprob_n)                            (level token)
    rho_n = exp(sum over the sequence), exp(mean over the sequence)       (levels sequence, geometric)
    truncate: weight = clip(rho, low, high);      mask: weight = rho where low <= rho <= high, else 0

Log ratios (for the level sequence: their sum) are bounded to +-20. Token level is biased but of low variance, sequence
level unbiased. Truncation: TIS; masking: MIS, at token level IcePop. Multiply the policy term by the weights
(`policy_loss(importance_weights=...)`); the KL and entropy terms don't take them.
Sources: arXiv:2505.24298, https://fengyao.notion.site/off-policy-rl, https://richardli.xyz/rl-collapse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating, require_mask
from zs_kernels._policy_backends import sequence_log_ratios
from zs_kernels.loss_weights import require_cu_seqlens

LEVELS = ("token", "sequence", "geometric")
BOUNDS = ("truncate", "mask")
MAX_LOG_RATIO = 20.0


class MismatchMetrics(NamedTuple):
    """How far the two policies are apart: sums over counted tokens (maximum, minimum), float32 scalars.

    With n = token_count: k1 estimate of KL(rollout || policy) = -log_ratio_sum / n, k3 = k3_sum / n, chi-square
    divergence = square_sum / n - 1 (token ratios); outside_count: tokens whose rho lies outside [low, high];
    effective sample share = weight_sum^2 / (n weight_square_sum), of the weights that are returned.
    """

    token_count: Tensor
    log_ratio_sum: Tensor
    absolute_sum: Tensor
    k3_sum: Tensor
    square_sum: Tensor
    outside_count: Tensor
    weight_sum: Tensor
    weight_square_sum: Tensor
    rho_max: Tensor
    rho_min: Tensor


class ImportanceWeights(NamedTuple):
    """weights: float32, 1 for tokens that aren't counted. kept: bool, rho lies in [low, high]; True if not counted."""

    weights: Tensor
    kept: Tensor
    metrics: MismatchMetrics


def _metrics(log_ratio: Tensor, rho: Tensor, weights: Tensor, kept: Tensor, counted: Tensor) -> MismatchMetrics:
    """log_ratio: per token, 0 where not counted."""
    ones, used = counted.to(rho.dtype), torch.where(counted, weights, 0.0)
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    largest = torch.cat([torch.where(counted, rho, 0.0).flatten(), rho.new_zeros(1)]).amax()
    smallest = torch.cat([torch.where(counted, rho, float("inf")).flatten(), rho.new_full((1,), float("inf"))]).amin()
    return MismatchMetrics(
        token_count=ones.sum(),
        log_ratio_sum=log_ratio.sum(),
        absolute_sum=log_ratio.abs().sum(),
        k3_sum=(torch.expm1(bounded) - bounded).sum(),
        square_sum=((2.0 * bounded).exp() * ones).sum(),
        outside_count=(counted & ~kept).to(rho.dtype).sum(),
        weight_sum=used.sum(),
        weight_square_sum=used.square().sum(),
        rho_max=largest,
        rho_min=smallest,
    )


@torch.no_grad()
def importance_weights(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: str = "token",
    bound: str = "truncate",
    low: float = 0.0,
    high: float = 2.0,
    normalize: bool = False,
) -> ImportanceWeights:
    """Weights of tokens [N] (or any one shape), without gradient.

    logprobs: of the policy at the time of the update (usually the old log-probabilities of its own scoring pass).
    rollout_logprobs: of the sampler; NaN where it gave none: such a token is not counted, like one whose mask (bool)
    is False. cu_seqlens: [S + 1] integer bounds of the sequences from 0 to N, for the levels sequence and geometric,
    where every token of a sequence has its rho. normalize: divide by the mean weight of counted tokens.
    Usual bounds: TIS high 2; MIS, IcePop low 0.5, high 5; geometric rejection 0.999 to 1.001 (use `kept`).
    Raises ValueError or TypeError naming the argument.
    """
    op = "importance_weights"
    require_floating(op, "logprobs", logprobs)
    shape, device = tuple(logprobs.shape), logprobs.device
    require_floating(op, "rollout_logprobs", rollout_logprobs, shape=shape)
    require_mask(op, "mask", mask, shape, device)
    require(level in LEVELS, op, "level", f"one of {', '.join(LEVELS)}", level)
    require(bound in BOUNDS, op, "bound", f"one of {', '.join(BOUNDS)}", bound)
    require(0.0 <= low < high, op, "low", "at least 0 and below high", low)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    counted = ~rollout_logprobs.isnan() if mask is None else mask & ~rollout_logprobs.isnan()
    log_ratio = torch.where(counted, logprobs.to(dtype) - rollout_logprobs.to(dtype), 0.0)
    exponent = log_ratio
    if level != "token":
        require(cu_seqlens is not None, op, "cu_seqlens", f"given for the level {level}", cu_seqlens)
        require_cu_seqlens(op, cu_seqlens, device)
        exponent = sequence_log_ratios(log_ratio, counted, cu_seqlens, level == "sequence")
    rho = exponent.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    kept = (rho >= low) & (rho <= high) | ~counted
    weights = rho.clamp(low, high) if bound == "truncate" else torch.where(kept, rho, 0.0)
    if normalize:
        total = torch.where(counted, weights, 0.0).sum()
        weights = weights * (counted.sum() / total.clamp(min=torch.finfo(dtype).tiny))
    metrics = _metrics(log_ratio, rho, weights, kept, counted)
    return ImportanceWeights(torch.where(counted, weights, 1.0), kept, metrics)
