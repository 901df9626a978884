"""verl's advantage estimators on our ops: B responses of T tokens, the reward of a response the sum of its tokens'.

Every function returns (advantages, returns), both [B, T], without gradient, as verl's of that name does. Group labels
(`index`) may be anything hashable: numpy strings, integers, a tensor of integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating
from zs_kernels.compat._rows import boolean
from zs_kernels.compat._verl_functional import masked_whiten
from zs_kernels.gae import gae
from zs_kernels.group_advantages import group_advantages


def _checked(op: str, rewards: Tensor, response_mask: Tensor, argument: str = "token_level_rewards") -> Tensor:
    """The mask as bool."""
    require_floating(op, argument, rewards)
    require(rewards.dim() == 2, op, argument, "of shape [B, T]", rewards)
    same = tuple(response_mask.shape) == tuple(rewards.shape)
    require(same, op, "response_mask", f"of shape {list(rewards.shape)}", response_mask)
    return boolean(op, "response_mask", response_mask)


def _packed_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Raw advantages [B, T] of padded rows; a masked position has that of the next unmasked one (0 behind the last)."""
    rows, length = rewards.shape
    bounds = torch.arange(0, rows * length + 1, max(length, 1), device=rewards.device)
    arguments = (rewards.reshape(-1), values.reshape(-1), mask.reshape(-1), bounds)
    advantages = gae(*arguments, gamma=float(gamma), lam=float(lam))[0].view(rows, length)
    if length == 0:
        return advantages
    position = torch.where(mask, torch.arange(length, device=mask.device), length)
    following = position.flip(1).cummin(dim=1).values.flip(1)
    return torch.nn.functional.pad(advantages, (0, 1)).gather(1, following)


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: Tensor | float,
    lam: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns from the raw ones; masked tokens carry value and advantage through.

    Masked positions hold what verl leaves there (the next token's advantage, whitened as well). Rewards and values of
    masked tokens are not read for the advantages. Raises ValueError for fewer than two unmasked tokens.
    """
    mask = _checked("compute_gae_advantage_return", token_level_rewards, response_mask)
    raw = _packed_gae(token_level_rewards, values, mask, gamma, lam)
    dtype = torch.promote_types(torch.promote_types(token_level_rewards.dtype, values.dtype), response_mask.dtype)
    return masked_whiten(raw, mask).to(dtype), (raw + values).to(dtype)


def group_ids(index: Any, device: torch.device) -> tuple[Tensor, int]:
    """(group of each response [B] int64, number of groups) from labels, in the order in which they first occur."""
    known: dict[Any, int] = {}
    labels = index.tolist() if hasattr(index, "tolist") else list(index)
    ids = [known.setdefault(label, len(known)) for label in labels]
    return torch.tensor(ids, dtype=torch.int64, device=device), len(known)


def _grouped(
    op: str, token_level_rewards: Tensor, response_mask: Tensor, index: Any, mode: str, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(score of each response [B], its advantage, whether it is the only one of its group)."""
    _checked(op, token_level_rewards, response_mask)
    scores = token_level_rewards.sum(dim=-1)
    ids, number = group_ids(index, scores.device)
    require(len(ids) == len(scores), op, "index", f"{len(scores)} labels", len(ids))
    found = group_advantages(scores, ids, number, mode=mode, eps=epsilon)
    alone = torch.bincount(ids, minlength=number)[ids] == 1
    return scores, found.advantages.to(scores.dtype), alone


def _spread(advantages: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    spread = advantages.unsqueeze(-1) * response_mask
    return spread, spread


@torch.no_grad()
def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """GRPO, or Dr.GRPO without the division. The only response of its group has mean 0 and deviation 1, as in verl.

    Where a group's scores are all equal the advantage is exactly 0 (verl's is rounding noise over epsilon).
    """
    op = "compute_grpo_outcome_advantage"
    mode = "grpo" if norm_adv_by_std_in_grpo else "dr_grpo"
    scores, advantages, alone = _grouped(op, token_level_rewards, response_mask, index, mode, epsilon)
    own = scores / (1.0 + epsilon) if norm_adv_by_std_in_grpo else scores
    return _spread(torch.where(alone, own, advantages), response_mask)


def compute_grpo_vectorized_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """The same as `compute_grpo_outcome_advantage`."""
    return compute_grpo_outcome_advantage(token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo)


@torch.no_grad()
def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The score less the mean of the group's others; the only response of its group keeps its score."""
    op = "compute_rloo_outcome_advantage"
    scores, advantages, alone = _grouped(op, token_level_rewards, response_mask, index, "rloo")
    return _spread(torch.where(alone, scores, advantages), response_mask)


@torch.no_grad()
def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """`compute_rloo_outcome_advantage`, but the only response of its group gets 0."""
    op = "compute_rloo_vectorized_outcome_advantage"
    _, advantages, _ = _grouped(op, token_level_rewards, response_mask, index, "rloo")
    return _spread(advantages, response_mask)


@torch.no_grad()
def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The score less its group's mean, whitened over the batch's tokens (arXiv:2501.03262)."""
    op = "compute_reinforce_plus_plus_baseline_outcome_advantage"
    scores, advantages, alone = _grouped(op, token_level_rewards, response_mask, index, "dr_grpo")
    spread, _ = _spread(torch.where(alone, scores, advantages), response_mask)
    whitened = masked_whiten(spread, response_mask) * response_mask
    return whitened, whitened


@torch.no_grad()
def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Discounted returns (config.gamma) that masked tokens carry through, and the same whitened."""
    mask = _checked("compute_reinforce_plus_plus_outcome_advantage", token_level_rewards, response_mask)
    if config is None:
        raise AssertionError("compute_reinforce_plus_plus_outcome_advantage: config.gamma is needed")
    raw = _packed_gae(token_level_rewards, torch.zeros_like(token_level_rewards), mask, config.gamma, 1.0)
    returns = torch.where(mask, raw, 0.0).to(token_level_rewards.dtype)
    return masked_whiten(returns, mask) * response_mask, returns


@torch.no_grad()
def compute_remax_outcome_advantage(
    token_level_rewards: Tensor,
    reward_baselines: Tensor,
    response_mask: Tensor,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Sum of the rewards from each token on, less the baseline of its response [B]."""
    mask = _checked("compute_remax_outcome_advantage", token_level_rewards, response_mask)
    returns = _packed_gae(token_level_rewards, torch.zeros_like(token_level_rewards), mask, 1.0, 1.0)
    returns = returns.to(token_level_rewards.dtype)
    return returns - reward_baselines.unsqueeze(-1) * response_mask, returns


@torch.no_grad()
def compute_opo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The score less the mean of its group weighted by length (arXiv:2505.23585)."""
    op = "compute_opo_outcome_advantage"
    _checked(op, token_level_rewards, response_mask)
    scores, lengths = token_level_rewards.sum(dim=-1), response_mask.sum(dim=-1).double()
    ids, number = group_ids(index, scores.device)
    require(len(ids) == len(scores), op, "index", f"{len(scores)} labels", len(ids))
    sums = lengths.new_zeros(2, number).index_add_(1, ids, torch.stack([lengths * scores, lengths]))
    baseline = (sums[0] / sums[1].clamp(min=1.0))[ids]
    alone = torch.bincount(ids, minlength=number)[ids] == 1
    return _spread(torch.where(alone, scores, (scores - baseline).to(scores.dtype)), response_mask)


@torch.no_grad()
def compute_gpg_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    f_norm: float = 1.0,
    alpha: float = 1.0,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The score less its group's mean, times responses / responses with a score other than 0, over f_norm.

    As in verl, `alpha` is not read.
    """
    op = "compute_gpg_outcome_advantage"
    scores, advantages, alone = _grouped(op, token_level_rewards, response_mask, index, "dr_grpo")
    scale = scores.shape[0] / torch.count_nonzero(scores).clamp(min=1)
    return _spread(scale * torch.where(alone, scores, advantages) / f_norm, response_mask)
