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
from zs_kernels.compat._verl_functional import masked_whiten, require_two
from zs_kernels.gae import gae, gae_with_statistics, whiten_advantages
from zs_kernels.group_advantages import group_advantages, group_ids


def _checked(op: str, rewards: Tensor, response_mask: Tensor, argument: str = "token_level_rewards") -> Tensor:
    """The mask as bool."""
    require_floating(op, argument, rewards)
    require(rewards.dim() == 2, op, argument, "of shape [B, T]", rewards)
    same = tuple(response_mask.shape) == tuple(rewards.shape)
    require(same, op, "response_mask", f"of shape {list(rewards.shape)}", response_mask)
    return boolean(op, "response_mask", response_mask)


def _carried(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: a masked position has what the next unmasked one has, 0 behind the last."""
    length = advantages.shape[1]
    if length == 0:
        return advantages
    position = torch.where(mask, torch.arange(length, device=mask.device), length)
    following = position.flip(1).cummin(dim=1).values.flip(1)
    return torch.nn.functional.pad(advantages, (0, 1)).gather(1, following)


def _returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sums of the unmasked rewards from each unmasked token on: the advantage against values of 0."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=float(gamma))[0]


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
    found = gae_with_statistics(token_level_rewards, values, mask, gamma=float(gamma), lam=float(lam))
    require_two(found.statistics[0])
    raw = _carried(found.advantages, mask)
    dtype = torch.promote_types(torch.promote_types(token_level_rewards.dtype, values.dtype), response_mask.dtype)
    return whiten_advantages(raw, None, found.statistics).to(dtype), (raw + values).to(dtype)


def _ids(op: str, index: Any, rewards: Tensor) -> tuple[Tensor, int]:
    """(group of each response [B], number of groups) from labels."""
    ids, number = group_ids(index.tolist() if hasattr(index, "tolist") else index)
    require(len(ids) == rewards.shape[0], op, "index", f"{rewards.shape[0]} labels", len(ids))
    return ids.to(rewards.device), number


def _grouped(
    op: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    mode: str,
    *,
    epsilon: float = 1e-6,
    keep_singletons: bool = True,
) -> tuple[Tensor, Tensor]:
    """(score of each response [B], its advantage), in the type of the rewards."""
    _checked(op, token_level_rewards, response_mask)
    scores = token_level_rewards.sum(dim=-1)
    groups = _ids(op, index, token_level_rewards)
    found = group_advantages(scores, *groups, mode=mode, eps=epsilon, keep_singletons=keep_singletons)
    return scores, found.advantages.to(scores.dtype)


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
    return _spread(_grouped(op, token_level_rewards, response_mask, index, mode, epsilon=epsilon)[1], response_mask)


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
    return _spread(_grouped(op, token_level_rewards, response_mask, index, "rloo")[1], response_mask)


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
    _, advantages = _grouped(op, token_level_rewards, response_mask, index, "rloo", keep_singletons=False)
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
    _, advantages = _grouped(op, token_level_rewards, response_mask, index, "dr_grpo")
    spread, _ = _spread(advantages, response_mask)
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
    returns = _returns(token_level_rewards, mask, config.gamma).to(token_level_rewards.dtype)
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
    returns = _carried(_returns(token_level_rewards, mask, 1.0), mask).to(token_level_rewards.dtype)
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
    ids, number = _ids(op, index, token_level_rewards)
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
    scores, advantages = _grouped(op, token_level_rewards, response_mask, index, "dr_grpo")
    scale = scores.shape[0] / torch.count_nonzero(scores).clamp(min=1)
    return _spread(scale * advantages / f_norm, response_mask)
