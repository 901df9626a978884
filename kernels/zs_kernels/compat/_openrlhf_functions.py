"""openrlhf.models.utils and the advantages of its experience maker on our ops: B responses of T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating
from zs_kernels.compat._rows import boolean, shaped_logprobs
from zs_kernels.gae import gae
from zs_kernels.group_advantages import group_advantages
from zs_kernels.kl_estimates import kl_estimates

KL_IMPORTANCE_CAP = 10.0
GROUP_ESTIMATORS = {"rloo": "rloo", "reinforce_baseline": "dr_grpo", "dr_grpo": "dr_grpo", "group_norm": "grpo"}


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """[...] from logits [..., V] and labels [...], in the type of the logits.

    A temperature other than 1 divides the logits in place, as OpenRLHF does: an entropy taken from them afterwards is
    that of the same policy.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    return shaped_logprobs("log_probs_from_logits", logits, labels).logprobs.to(logits.dtype)


def compute_entropy(logits: Tensor) -> Tensor:
    """[...] from logits [..., V], in their type."""
    return shaped_logprobs("compute_entropy", logits, None, entropy=True).entropy.to(logits.dtype)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """k1, k2 or k3 of each token, float32, bounded to +-10.

    unbiased_gradient: under the same value, the gradient of k2 times the importance weight (at most 10) of the policy
    over log_probs_old, where given.
    """
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"Unknown kl_estimator: {kl_estimator}")
    log_probs, base = log_probs.float(), log_probs_base.float()
    value = kl_estimates(log_probs, base, estimator=kl_estimator, clamp="openrlhf")
    if not unbiased_gradient:
        return value
    surrogate = kl_estimates(log_probs, base, estimator="k2")
    if log_probs_old is not None:
        surrogate = surrogate * (log_probs - log_probs_old.float()).exp().clamp(max=KL_IMPORTANCE_CAP).detach()
    return value.detach() + surrogate - surrogate.detach()


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Sum of mask * tensor over the sum of the mask; the plain mean for None, 0 for an empty mask."""
    if mask is None:
        return tensor.mean(dim=dim)
    chosen = torch.where(mask.bool(), _wide(tensor), 0.0) * mask
    total, count = (chosen.sum(), mask.sum()) if dim is None else (chosen.sum(dim=dim), mask.sum(dim=dim))
    mean = total / torch.where(count == 0, 1, count)
    dtype = torch.promote_types(tensor.dtype, mask.dtype)
    return mean.to(dtype if dtype.is_floating_point else torch.float32)


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """(tensor - mean) / sqrt(max(biased variance, eps)) along `dim`, 0 where masked."""
    values = torch.where(mask.bool(), _wide(tensor), 0.0)
    count = mask.sum(dim=dim, keepdim=True).clamp(min=1)
    centred = (values - (values * mask).sum(dim=dim, keepdim=True) / count) * mask
    variance = (centred * centred).sum(dim=dim, keepdim=True) / count
    normal = centred * variance.clamp(min=eps).rsqrt()
    return normal.to(torch.promote_types(tensor.dtype, mask.dtype))


def _selected(op: str, action_mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    if action_mask is None:
        return list(tensors)
    chosen = boolean(op, "action_mask", action_mask)
    return [torch.where(chosen, tensor, 0.0) for tensor in tensors]


@torch.no_grad()
def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [B, T]: masked values and rewards count as 0, masked tokens as steps in time."""
    op = "get_advantages_and_returns"
    require_floating(op, "values", values)
    require_floating(op, "rewards", rewards, shape=tuple(values.shape))
    values, rewards = _selected(op, action_mask, values, rewards)
    advantages = gae(rewards, values, None, gamma=gamma, lam=lambd)[0].to(
        torch.promote_types(values.dtype, rewards.dtype)
    )
    return advantages, advantages + values


@torch.no_grad()
def get_cumulative_returns(rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """Discounted sums [B, T] of the rewards from each token on, masked ones counting as 0."""
    op = "get_cumulative_returns"
    require_floating(op, "rewards", rewards)
    (rewards,) = _selected(op, action_mask, rewards)
    return gae(rewards, torch.zeros_like(rewards), None, gamma=gamma)[0].to(rewards.dtype)


@torch.no_grad()
def group_rewards(rewards: Tensor, estimator: str) -> Tensor:
    """Rewards [P, n] of n samples of each prompt after the baseline of OpenRLHF's `advantage.estimator`.

    rloo: less the mean of the others; reinforce_baseline, dr_grpo: less the mean; group_norm: that over the unbiased
    deviation + 1e-9; flash_reinforce: less the mean of all. 0 where a prompt has one sample, or equal rewards (not for
    flash_reinforce).
    """
    op = "group_rewards"
    require_floating(op, "rewards", rewards)
    require(rewards.dim() == 2, op, "rewards", "of shape [P, n]", rewards)
    known = estimator == "flash_reinforce" or estimator in GROUP_ESTIMATORS
    require(known, op, "estimator", f"flash_reinforce or one of {', '.join(GROUP_ESTIMATORS)}", estimator)
    if estimator == "flash_reinforce":
        return rewards - rewards.mean()
    prompts, samples = rewards.shape
    groups = torch.arange(prompts, device=rewards.device).repeat_interleave(samples)
    found = group_advantages(rewards.reshape(-1), groups, prompts, mode=GROUP_ESTIMATORS[estimator], eps=1e-9)
    return found.advantages.view(prompts, samples).to(rewards.dtype)
