"""openrlhf.models.loss on our ops: the aggregation, the policy's and the value's loss. B responses of T tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zs_kernels._check import require, require_floating
from zs_kernels.compat._openrlhf_functions import masked_mean
from zs_kernels.compat._rows import boolean, constant, sequence_log_ratio
from zs_kernels.policy_loss import policy_loss
from zs_kernels.value_loss import value_loss

Number = Tensor | float | None


def _weights(
    mask: Tensor, token_level_loss: bool, dp_size: int, batch_num_tokens: Number, global_batch_size: Number
) -> Tensor:
    """[B, T] weight of each token's loss; dp_size counts only beside a size of the whole batch, as in OpenRLHF."""
    weights = mask if mask.dtype in (torch.float32, torch.float64) else mask.float()
    if token_level_loss:
        if batch_num_tokens is not None:
            return weights / batch_num_tokens * dp_size
        total = weights.sum()
        return weights / torch.where(total == 0, 1.0, total)
    lengths = weights.sum(dim=-1, keepdim=True)
    weights = weights / (lengths + 1e-8)
    if global_batch_size is not None:
        return weights / global_batch_size * dp_size
    return weights / (lengths > 0).sum().clamp(min=1)


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor | None,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: Number = None,
    global_batch_size: Number = None,
) -> Tensor:
    """Scalar from losses [B, T]: the mean over tokens, or over sequences of their tokens; 0 for an empty mask."""
    mask = torch.ones_like(loss) if loss_mask is None else loss_mask
    weights = _weights(mask, token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    wide = loss if loss.dtype == torch.float64 else loss.float()
    total = (torch.where(mask.bool(), wide, 0.0) * weights).sum()
    return total.to(torch.promote_types(loss.dtype, mask.dtype))


class PolicyLoss(nn.Module):
    """openrlhf.models.PolicyLoss: PPO with dual clip, or GSPO, and its corrections towards the rollout's policy.

    The arguments, and the errors about them, are OpenRLHF's.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating, self.is_correction_threshold = is_correction_gating, is_correction_threshold
        if dual_clip is not None and dual_clip <= 1.0:
            raise AssertionError(f"dual_clip must be > 1.0, got {dual_clip}")
        op = "PolicyLoss"
        known = is_correction_level in ("off", "token", "seq")
        require(known, op, "is_correction_level", "off, token or seq", is_correction_level)
        require(is_correction_mode in ("mask", "clip"), op, "is_correction_mode", "mask or clip", is_correction_mode)
        known = is_correction_gating in ("ratio", "binary_kl", "tv")
        require(known, op, "is_correction_gating", "ratio, binary_kl or tv", is_correction_gating)
        possible = is_correction_mode == "mask" or (is_correction_level != "seq" and is_correction_gating == "ratio")
        require(possible, op, "is_correction_mode", "mask but for level token and gating ratio", is_correction_mode)
        one_sided = is_correction_gating == "ratio" or is_correction_level == "off" or is_correction_threshold[0] <= 0
        require(one_sided, op, "is_correction_threshold", "an upper bound only", tuple(is_correction_threshold))

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Number = None,
        global_batch_size: Number = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, share of clipped tokens, KL estimate k1, the rollout's KL or None, share filtered or None).

        All tensors [B, T]; the gradient flows to log_probs.
        """
        op = "PolicyLoss"
        require_floating(op, "log_probs", log_probs)
        constant(op, old_log_probs=old_log_probs, advantages=advantages, rollout_log_probs=rollout_log_probs)
        known = self.policy_loss_type in ("ppo", "gspo")
        if not known:
            raise ValueError(f"Invalid policy loss type: {self.policy_loss_type}")
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask
        valid = boolean(op, "action_mask", mask)
        logs, old, bound, importance, kl, filtered = log_probs, old_log_probs, 20.0, None, None, None
        if self.policy_loss_type == "gspo":
            against = old_log_probs if self.is_correction_level == "off" else rollout_log_probs
            logs = sequence_log_ratio(log_probs, against, valid)
            old, bound = torch.zeros_like(logs), math.inf
        elif self.is_correction_level != "off":
            importance, filtered = self._correction(old_log_probs, rollout_log_probs, valid)
            kl = masked_mean(rollout_log_probs - old_log_probs, valid)
        found = policy_loss(
            logs,
            old,
            advantages.expand(log_probs.shape),
            _weights(mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
            mask=valid,
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            importance_weights=importance,
            min_log_ratio=-bound,
            max_log_ratio=bound,
        )
        count = found.token_count.clamp(min=1.0)
        clipped = (found.clipped_low + found.clipped_high) / count
        policy_kl = masked_mean((old_log_probs - log_probs).detach(), valid)
        return found.loss.to(log_probs.dtype), clipped, policy_kl, kl, filtered

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor | None, valid: Tensor) -> tuple[Tensor, Tensor]:
        """(importance weight of each token [B, T], share of tokens or sequences that the gate stops)."""
        require(rollout is not None, "PolicyLoss", "rollout_log_probs", "given for the correction", rollout)
        low, high = self.is_correction_threshold
        per_sequence = self.is_correction_level == "seq"
        log_ratio = torch.where(valid, old - rollout, 0.0)
        if self.is_correction_gating == "ratio":
            gate = masked_mean(log_ratio, valid, dim=-1).unsqueeze(-1) if per_sequence else log_ratio
            gate = gate.exp()
        else:
            p, q = (torch.where(valid, x, 0.0).exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            binary = self.is_correction_gating == "binary_kl"
            gate = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log() if binary else (p - q).abs()
            gate = masked_mean(gate, valid, dim=-1).unsqueeze(-1) if per_sequence else gate
        outside = (gate < low) | (gate > high)
        if self.is_correction_mode == "clip":
            weights = gate.clamp(min=low, max=high)
        else:
            weights = torch.where(outside, 0.0, log_ratio.exp())
        share = outside.float().mean() if per_sequence else masked_mean(outside.float(), valid)
        return weights.expand(old.shape), share


class ValueLoss(nn.Module):
    """openrlhf.models.ValueLoss: half the square error, the larger of the plain and the clipped one with clip_eps."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Number = None,
        global_batch_size: Number = None,
    ) -> Tensor:
        """Scalar loss of values [B, T]; old_values are read with clip_eps alone."""
        op = "ValueLoss"
        constant(op, old_values=old_values, returns=returns)
        mask = torch.ones_like(values, dtype=torch.bool) if action_mask is None else action_mask
        weights = _weights(mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        valid = boolean(op, "action_mask", mask)
        old = None if self.clip_eps is None else old_values
        found = value_loss(values, old, returns, weights, clip_range=self.clip_eps, mask=valid)
        return found.loss.to(torch.promote_types(values.dtype, returns.dtype))
