"""verl.trainer.ppo.core_algos: policy losses, value loss, KL penalties and aggregation on our ops.

B responses of T tokens. Aggregation is one weight per token (`_weights`), so that every mode is the same operation;
verl's constants (1e-8 in a token mean, dp_size, sizes of the whole batch) are in the weights.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating
from zs_kernels.compat._rows import boolean, constant
from zs_kernels.compat._verl_functional import entropy_from_logits
from zs_kernels.kl_estimates import kl_estimates
from zs_kernels.policy_loss import PolicyLoss, policy_loss
from zs_kernels.value_loss import value_loss

Losses = tuple[Tensor, dict[str, Any]]


def _nonzero(count: Tensor | float) -> Tensor | float:
    """A denominator; 1 for an empty mask, where verl divides 0 by 0."""
    return torch.where(count == 0, 1.0, count) if isinstance(count, Tensor) else (count or 1)


def _weights(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """[B, T] weight of each token's loss, at least float32."""
    weights = mask if mask.dtype in (torch.float32, torch.float64) else mask.float()
    if loss_agg_mode == "token-sum":
        return weights * dp_size
    if loss_agg_mode == "token-mean":
        if batch_num_tokens is None:
            if dp_size > 1:
                raise ValueError("(global) batch_num_tokens is required when dp_size > 1")
            batch_num_tokens = weights.sum()
        return weights / _nonzero(batch_num_tokens) * dp_size
    if loss_agg_mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}")
    lengths = weights.sum(dim=-1, keepdim=True)
    if global_batch_size is None:
        if dp_size > 1:
            raise ValueError("global_batch_size is required when dp_size > 1")
        global_batch_size = (lengths > 0).sum().to(weights.dtype)
    weights = torch.where(lengths > 0, weights, 0.0) / _nonzero(global_batch_size) * dp_size
    if loss_agg_mode == "seq-mean-token-mean":
        return weights / (lengths + 1e-8)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return weights / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return weights


def _promoted(*tensors: Tensor | None) -> torch.dtype:
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors if tensor is not None])


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """Scalar loss from losses [B, T] and a mask [B, T], which may weigh; 0 for an empty mask."""
    sizes = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    weights = _weights(loss_mask, loss_agg_mode, *sizes)
    wide = loss_mat if loss_mat.dtype == torch.float64 else loss_mat.float()
    loss = (torch.where(loss_mask.bool(), wide, 0.0) * weights).sum()
    return loss.to(_promoted(loss_mat, loss_mask))


def _clips(config: Any) -> tuple[float, float]:
    """(clip_low, clip_high) of an actor's configuration."""
    if config is None:
        raise AssertionError("config is needed: clip_ratio and global_batch_info are read from it")
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (config.clip_ratio if low is None else low), (config.clip_ratio if high is None else high)


def _policy(
    op: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    sizes: dict[str, Any],
    rollout_is_weights: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, PolicyLoss]:
    """(loss in verl's type, what the op found)."""
    require_floating(op, "log_prob", log_prob)
    require(log_prob.dim() == 2, op, "log_prob", "of shape [B, T]", log_prob)
    constant(op, old_log_prob=old_log_prob, advantages=advantages, rollout_is_weights=rollout_is_weights)
    found = policy_loss(
        log_prob,
        old_log_prob.expand(log_prob.shape),
        advantages.expand(log_prob.shape),
        _weights(response_mask, loss_agg_mode, **sizes),
        mask=response_mask != 0,
        importance_weights=None if rollout_is_weights is None else rollout_is_weights.expand(log_prob.shape),
        **settings,
    )
    dtype = _promoted(log_prob, old_log_prob, advantages, response_mask, rollout_is_weights)
    return found.loss.to(dtype), found


def _metrics(op: str, response_mask: Tensor, found: PolicyLoss, **sums: Tensor) -> dict[str, Any]:
    """Means over the unmasked tokens as Python numbers, read from the device at once; the mask is checked with them."""
    values = list(sums.values())
    if response_mask.dtype != torch.bool:
        values.append(((response_mask != 0) & (response_mask != 1)).sum().to(values[0].dtype))
    count, *numbers = torch.stack([found.token_count, *values]).tolist()
    if response_mask.dtype != torch.bool:
        strange = numbers.pop()
        require(not strange, op, "response_mask", "zeros and ones; weigh by rollout_is_weights", response_mask)
    return {f"actor/{name}": number / max(count, 1.0) for name, number in zip(sums, numbers, strict=True)}


def _log_ratio_sum(log_prob: Tensor, old_log_prob: Tensor, response_mask: Tensor) -> Tensor:
    """Sum of old_log_prob - log_prob over the unmasked tokens."""
    return torch.where(response_mask != 0, (old_log_prob - log_prob).detach(), 0.0).sum()


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Losses:
    """PPO's clipped loss with dual clip (config.clip_ratio_c, 3 by default); log ratios bounded to +-20."""
    op = "compute_policy_loss_vanilla"
    low, high = _clips(config)
    bound = config.get("clip_ratio_c", 3.0)
    tensors = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config.global_batch_info)
    loss, found = _policy(op, *tensors, rollout_is_weights, clip_low=low, clip_high=high, dual_clip=bound)
    metrics = _metrics(
        op,
        response_mask,
        found,
        pg_clipfrac=found.clipped_low + found.clipped_high,
        ppo_kl=-found.log_ratio_sum,
        pg_clipfrac_lower=found.clipped_dual,
    )
    return loss, metrics


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """verl's older spelling of the vanilla loss: (loss, clip fraction, KL estimate k1, dual-clip fraction)."""
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    require(low is not None and high is not None, "compute_policy_loss", "cliprange", "given", cliprange)
    tensors = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, {})
    loss, found = _policy("compute_policy_loss", *tensors, clip_low=low, clip_high=high, dual_clip=clip_ratio_c)
    count = found.token_count.clamp(min=1.0)
    clipped = (found.clipped_low + found.clipped_high) / count
    return loss, clipped, -found.log_ratio_sum / count, found.clipped_dual / count


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Losses:
    """GSPO: each token's ratio is its sequence's (log ratio at most 10), its derivative the token's own."""
    op = "compute_policy_loss_gspo"
    low, high = _clips(config)
    rows, length = log_prob.shape
    bounds = torch.arange(0, rows * length + 1, max(length, 1), device=log_prob.device)
    tensors = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config.global_batch_info)
    settings = {"form": "gspo", "cu_seqlens": bounds, "min_log_ratio": -math.inf, "max_log_ratio": 10.0}
    loss, found = _policy(op, *tensors, rollout_is_weights, clip_low=low, clip_high=high, **settings)
    kl = _log_ratio_sum(log_prob, old_log_prob, response_mask)
    metrics = _metrics(op, response_mask, found, pg_clipfrac=found.clipped_low + found.clipped_high, ppo_kl=kl)
    return loss, metrics | {"actor/pg_clipfrac_lower": 0.0}


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Losses:
    """CISPO: the clipped ratio, without gradient, times the log-probability."""
    op = "compute_policy_loss_cispo"
    low, high = _clips(config)
    tensors = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config.global_batch_info)
    loss, found = _policy(op, *tensors, rollout_is_weights, form="cispo", clip_low=low, clip_high=high)
    clipped = found.clipped_low + found.clipped_high
    metrics = _metrics(op, response_mask, found, pg_clipfrac=clipped, ppo_kl=-found.log_ratio_sum)
    return loss, metrics | {"actor/pg_clipfrac_lower": 0.0}


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Losses:
    """REINFORCE on the advantages; old_log_prob is not read, and there are no metrics."""
    op = "compute_policy_loss_gpg"
    if config is None:
        raise AssertionError("config is needed: global_batch_info is read from it")
    tensors = (log_prob.detach(), log_prob, advantages, response_mask, loss_agg_mode, config.global_batch_info)
    loss, found = _policy(op, *tensors, rollout_is_weights, form="reinforce")
    _metrics(op, response_mask, found, tokens=found.token_count)
    return loss, {}


def compute_policy_loss_reinforce(
    rollout_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Losses:
    """REINFORCE, with importance weights towards the rollout's policy where given."""
    op = "compute_policy_loss_reinforce"
    if config is None:
        raise AssertionError("config is needed: global_batch_info is read from it")
    tensors = (rollout_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config.global_batch_info)
    loss, found = _policy(op, *tensors, rollout_is_weights, form="reinforce")
    return loss, _metrics(op, response_mask, found, ppo_kl=_log_ratio_sum(log_prob, rollout_log_prob, response_mask))


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(half the larger of the plain and the clipped square error, share of tokens where the clipped one is larger)."""
    op = "compute_value_loss"
    constant(op, returns=returns, values=values)
    sizes = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    weights = _weights(response_mask, loss_agg_mode, *sizes)
    mask = boolean(op, "response_mask", response_mask)
    found = value_loss(vpreds, values, returns, weights, clip_range=cliprange_value, mask=mask)
    dtype = _promoted(vpreds, returns, values, response_mask)
    return found.loss.to(dtype), found.clipped / found.token_count.clamp(min=1.0)


def compute_entropy_loss(logits: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean") -> Tensor:
    """Aggregated entropy of logits [B, T, V]."""
    return agg_loss(entropy_from_logits(logits), response_mask, loss_agg_mode)


_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """KL estimate of each token: kl (k1), abs, mse (k2), low_var_kl (k3); `+`: the gradient of k2 under their value."""
    name = kl_penalty.removesuffix("+")
    if name not in _ESTIMATORS:
        raise NotImplementedError(
            f"kl_penalty: {kl_penalty!r} is not one of {', '.join(_ESTIMATORS)}, alone or with '+'; the KL over the "
            "whole vocabulary is zs_kernels.linear_kl"
        )
    estimator = _ESTIMATORS[name] + ("+" if kl_penalty.endswith("+") else "")
    return kl_estimates(logprob, ref_logprob, estimator=estimator, clamp="verl").to(_promoted(logprob, ref_logprob))
