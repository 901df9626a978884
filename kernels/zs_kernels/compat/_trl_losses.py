"""Advantages and losses as TRL's GRPO and RLOO trainers write them out, B completions of T tokens, G per prompt.

    grpo      mean_b [ sum_t m l / max(sum_t m, 1) ] / accumulation
    bnpo      sum m l / max(sum m, 1) / accumulation
    dr_grpo   sum m l / (B * max_completion_length) / accumulation
    luspo     sum m l / B / accumulation
    dapo, cispo   sum m l / (num_items_in_batch / processes * accumulation / steps_per_generation)

l is the token's loss with beta times the k3 estimate of the KL in it, m the mask. Sources: arXiv:2402.03300 (grpo),
2503.20783 (dr_grpo), 2503.14476 (dapo), 2506.13585 (cispo), 2507.18071 (sequence-level ratios), 2402.14740 (rloo).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zs_kernels._check import require, require_floating
from zs_kernels.compat._rows import boolean, constant, sequence_log_ratio
from zs_kernels.group_advantages import group_advantages
from zs_kernels.kl_estimates import kl_estimates
from zs_kernels.policy_loss import policy_loss
from zs_kernels.reductions import masked_mean, masked_var

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo")
NOT_HERE = ("sapo", "vespo")
STD_EPS = 1e-4


class GrpoLoss(NamedTuple):
    """The loss to minimise, and means over the unmasked tokens (float32 scalars without gradient)."""

    loss: Tensor
    kl: Tensor
    """0 with beta 0."""
    clip_low: Tensor
    """Share of tokens whose ratio is below 1 - epsilon_low, with a negative advantage."""
    clip_high: Tensor
    """Share of tokens whose ratio is above 1 + epsilon_high, with a positive advantage. Both are 0 for cispo."""


def _groups(rewards: Tensor, num_generations: int) -> tuple[Tensor, int]:
    op = "grpo_advantages"
    whole = num_generations > 0 and rewards.shape[0] % num_generations == 0
    require(whole, op, "num_generations", f"a divisor of the {rewards.shape[0]} completions", num_generations)
    number = rewards.shape[0] // num_generations
    return torch.arange(number, device=rewards.device).repeat_interleave(num_generations), number


def _over_std(values: Tensor, valid: Tensor) -> Tensor:
    """(values - mean) / (std + 1e-4) over the valid ones; 0 elsewhere, and for fewer than two."""
    std = masked_var(values, valid).sqrt()
    scaled = (values - masked_mean(values, valid)) / (std + STD_EPS)
    return torch.where(valid & (valid.sum() > 1), scaled, 0.0)


@torch.no_grad()
def grpo_advantages(
    rewards_per_func: Tensor,
    num_generations: int,
    *,
    reward_weights: Tensor | None = None,
    scale_rewards: str = "group",
    multi_objective_aggregation: str = "sum_then_normalize",
) -> Tensor:
    """Advantages [S] float32 of GRPOTrainer from rewards [S, F] of F functions, num_generations in a row per prompt.

    NaN is a reward that a function did not give; a completion without any gets 0 and is left out of its group. Where a
    group's rewards are all equal the advantage is exactly 0 (TRL's is rounding noise over 1e-4). scale_rewards: group,
    batch or none; multi_objective_aggregation: sum_then_normalize or normalize_then_sum.
    """
    op = "grpo_advantages"
    require_floating(op, "rewards_per_func", rewards_per_func)
    require(rewards_per_func.dim() == 2, op, "rewards_per_func", "of shape [S, F]", rewards_per_func)
    require(scale_rewards in ("group", "batch", "none"), op, "scale_rewards", "group, batch or none", scale_rewards)
    modes = ("sum_then_normalize", "normalize_then_sum")
    require(
        multi_objective_aggregation in modes,
        op,
        "multi_objective_aggregation",
        f"one of {', '.join(modes)}",
        multi_objective_aggregation,
    )
    groups, number = _groups(rewards_per_func, num_generations)
    weights = torch.ones_like(rewards_per_func[0]) if reward_weights is None else reward_weights
    given = ~rewards_per_func.isnan()
    valid = given.any(dim=1)
    if multi_objective_aggregation == "normalize_then_sum":
        columns = [
            group_advantages(column, groups, number, valid=has, eps=STD_EPS).advantages
            for column, has in zip(rewards_per_func.unbind(1), given.unbind(1), strict=True)
        ]
        return _over_std((torch.stack(columns, dim=1) * weights).sum(dim=1), valid)
    rewards = (rewards_per_func * weights).nansum(dim=1)
    if scale_rewards == "group":
        return group_advantages(rewards, groups, number, valid=valid, eps=STD_EPS).advantages
    centred = group_advantages(rewards, groups, number, mode="dr_grpo", valid=valid).advantages
    if scale_rewards == "none":
        return centred
    scaled = centred / (masked_var(rewards, valid).sqrt() + STD_EPS)
    return torch.where(valid.sum() > 1, scaled, 0.0)


@torch.no_grad()
def rloo_advantages(rewards: Tensor, num_generations: int, *, normalize_advantages: bool = False) -> Tensor:
    """Advantages [S] float32 of RLOOTrainer: each reward less the mean of the others of its prompt.

    rewards: [S], the KL penalty already in them; NaN is left out and gets 0, as does the only one of its prompt.
    """
    require_floating("rloo_advantages", "rewards", rewards)
    groups, number = _groups(rewards, num_generations)
    valid = ~rewards.isnan()
    advantages = group_advantages(rewards, groups, number, mode="rloo", valid=valid).advantages
    if not normalize_advantages:
        return advantages
    several = (valid.view(number, num_generations).sum(dim=1) > 1)[groups]
    return _over_std(advantages, valid & several)


def _aggregation(
    mask: Tensor,
    loss_type: str,
    accumulation: float,
    max_completion_length: int | None,
    num_items_in_batch: Tensor | float | None,
    num_processes: int,
    steps_per_generation: int | None,
) -> Tensor:
    """[B, T] weight of each token's loss."""
    op = "grpo_loss"
    counted, rows = mask.float(), mask.shape[0]
    if loss_type in ("dapo", "cispo"):
        require(num_items_in_batch is not None, op, "num_items_in_batch", f"given for {loss_type}", None)
        number = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device).clamp(min=1.0)
        share = accumulation / (accumulation if steps_per_generation is None else steps_per_generation)
        return counted / (number / num_processes * share)
    if loss_type == "bnpo":
        return counted / (counted.sum().clamp(min=1.0) * accumulation)
    if loss_type == "grpo":
        return counted / (counted.sum(dim=1, keepdim=True).clamp(min=1.0) * rows * accumulation)
    if loss_type == "dr_grpo":
        require(max_completion_length is not None, op, "max_completion_length", "given for dr_grpo", None)
        return counted / (rows * max_completion_length * accumulation)
    return counted / (rows * accumulation)


def _check_kind(loss_type: str, level: str) -> None:
    op = "grpo_loss"
    require(loss_type not in NOT_HERE, op, "loss_type", f"one of {LOSS_TYPES}; TRL's own trainer has it", loss_type)
    require(loss_type in LOSS_TYPES, op, "loss_type", f"one of {LOSS_TYPES}", loss_type)
    require(level in ("token", "sequence"), op, "importance_sampling_level", "token or sequence", level)
    token = level == "token" or loss_type != "cispo"
    require(token, op, "importance_sampling_level", "token for cispo; TRL's own trainer has the other", level)


def grpo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "dapo",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    ref_per_token_logps: Tensor | None = None,
    importance_sampling_level: str = "token",
    importance_sampling_ratio: Tensor | None = None,
    entropies: Tensor | None = None,
    entropy_coef: float = 0.0,
    max_completion_length: int | None = None,
    num_items_in_batch: Tensor | float | None = None,
    num_processes: int = 1,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int | None = None,
) -> GrpoLoss:
    """GRPOTrainer's loss of a micro batch, and metrics; the gradient flows to per_token_logps and entropies.

    per_token_logps, old_ (None: the first step on a batch), ref_: [B, T]; advantages: [B], [B, 1] or [B, T]; mask:
    [B, T], zeros and ones. importance_sampling_ratio: [B, T] or [B, 1], of vLLM's correction, multiplies the policy's
    term but not the KL's. cispo's epsilon_high is the cap of the ratio itself, as in TRL. steps_per_generation: None
    for as many as gradient_accumulation_steps. The losses "sapo" and "vespo" and `use_bias_correction_kl` are not
    here: the error says so.
    Raises ValueError or TypeError naming the argument.
    """
    op = "grpo_loss"
    require_floating(op, "per_token_logps", per_token_logps)
    require(per_token_logps.dim() == 2, op, "per_token_logps", "of shape [B, T]", per_token_logps)
    shape = per_token_logps.shape
    given = {"old_per_token_logps": old_per_token_logps, "ref_per_token_logps": ref_per_token_logps}
    constant(op, advantages=advantages, importance_sampling_ratio=importance_sampling_ratio, **given)
    require(beta == 0.0 or ref_per_token_logps is not None, op, "ref_per_token_logps", "given with beta", None)
    require(entropy_coef == 0.0 or entropies is not None, op, "entropies", "given with entropy_coef", None)
    _check_kind(loss_type, importance_sampling_level)
    per_sequence = importance_sampling_level == "sequence"
    require(tuple(mask.shape) == tuple(shape), op, "mask", f"of shape {list(shape)}", mask)
    valid = boolean(op, "mask", mask)
    accumulation = float(gradient_accumulation_steps)
    weights = _aggregation(
        valid, loss_type, accumulation, max_completion_length, num_items_in_batch, num_processes, steps_per_generation
    )
    old = per_token_logps.detach() if old_per_token_logps is None else old_per_token_logps
    logps = per_token_logps
    if per_sequence:
        logps, old = sequence_log_ratio(per_token_logps, old, valid), torch.zeros_like(per_token_logps)
    found = policy_loss(
        logps,
        old,
        (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand(shape),
        weights,
        mask=valid,
        form="cispo_cap" if loss_type == "cispo" else "ppo",
        clip_low=epsilon_low,
        clip_high=epsilon_high,
        ratio_cap=epsilon_high if loss_type == "cispo" else delta,
        importance_weights=None if importance_sampling_ratio is None else importance_sampling_ratio.expand(shape),
        ref_logprobs=None if per_sequence or beta == 0.0 else ref_per_token_logps,
        kl_coefficient=0.0 if per_sequence else beta,
        min_log_ratio=-math.inf,
        max_log_ratio=math.inf,
    )
    loss, kl_sum = found.loss, found.kl_sum
    if per_sequence and beta != 0.0:
        kl = kl_estimates(per_token_logps, ref_per_token_logps, mask=valid)
        loss, kl_sum = loss + beta * (weights * kl).sum(), kl.detach().sum()
    if entropy_coef != 0.0:
        loss = loss - entropy_coef / accumulation * masked_mean(entropies, valid)
    number = found.token_count.clamp(min=1.0)
    return GrpoLoss(loss, kl_sum / number, found.clipped_low / number, found.clipped_high / number)
