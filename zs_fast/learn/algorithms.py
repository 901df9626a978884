"""How rewards become advantages: one pure function per algorithm, and the table of them.

An algorithm sees the whole step and gives every loss token its advantage. Trajectories that are not trainable take
part in nothing. Statistics over the step (whitening) are those of all ranks together; groups never span ranks.
S trajectories, G groups, N tokens, R a trajectory's reward.

    reinforce              A = R                                                       arXiv:2505.04588
    grpo                   A = (R - mean of group) / (unbiased std of group + eps)     arXiv:2402.03300, section 4.1
    dr_grpo                A = R - mean of group                                       arXiv:2503.20783
    rloo                   A = R - mean of the others in the group                     arXiv:2402.14740
    ppo                    A = whitened over tokens (generalised advantage estimate)   arXiv:1707.06347, 1506.02438
    reinforce++            A = whitened over tokens (R - sum of KL from here on)       arXiv:2501.03262
    reinforce++-baseline   A = whitened over tokens (R - mean of group)                arXiv:2501.03262, section 3.3

DAPO, GSPO and CISPO take GRPO's advantages; what else makes them is in config.ALGORITHM_DEFAULTS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from zs_fast.config import AlgorithmConfig
from zs_fast.learn.batch import PackedBatch, ScoredBatch, TrainBatch
from zs_fast.system.distributed import all_reduce_sums
from zs_fast.types import Group, StopReason
from zs_kernels import gae, group_advantages, kl_estimates

WHITENING_EPS = 1e-8
"""Added to the variance before its root, as verl does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    """What an algorithm gives."""

    advantages: Tensor
    """[N] float32, on the batch's device; whatever stands outside the loss tokens is not used"""
    dead_groups: Tensor
    """[G] bool, on the CPU; True where a group's rewards give no gradient"""
    returns: Tensor | None = None
    """[N] float32, what a critic's values are trained to; None without one"""


Algorithm = Callable[[ScoredBatch, Tensor, AlgorithmConfig], Credit]
"""(batch, KL penalty of each token [N] in units of reward, config) -> credit"""


def reinforce(scored: ScoredBatch, penalty: Tensor, config: AlgorithmConfig) -> Credit:
    """The raw reward, without a baseline: ZeroSearch's default. A group is dead when no trainable trajectory of it has
    a reward other than 0."""
    batch = scored.packed
    rewards = torch.where(batch.trainable, _sequence_rewards(batch, penalty), 0.0)
    signals = torch.zeros(batch.num_groups, dtype=torch.int64).index_add(0, batch.group, (rewards != 0).long())
    return Credit(advantages=_at_tokens(batch, rewards), dead_groups=signals == 0)


def grpo(scored: ScoredBatch, penalty: Tensor, config: AlgorithmConfig) -> Credit:
    """Against the trainable trajectories of its own group, in units of their spread. A group is dead, with advantages
    of exactly 0, when it has fewer than two trainable trajectories or their rewards are all equal."""
    return _against_group(scored.packed, penalty, config, "grpo")


def dr_grpo(scored: ScoredBatch, penalty: Tensor, config: AlgorithmConfig) -> Credit:
    """Against the group's mean, not divided by its spread, so that easy and hard questions weigh alike."""
    return _against_group(scored.packed, penalty, config, "dr_grpo")


def rloo(scored: ScoredBatch, penalty: Tensor, config: AlgorithmConfig) -> Credit:
    """Against the mean of the other trajectories of the group."""
    return _against_group(scored.packed, penalty, config, "rloo")


def reinforce_plus_plus(scored: ScoredBatch, penalty: Tensor, config: AlgorithmConfig) -> Credit:
    """Each token's own return, the reward at the trajectory's end and the KL penalty from the token on, whitened over
    all loss tokens of the step. The baseline is the step's mean: no group is dead that has a trainable trajectory."""
    batch = scored.packed
    zeros = torch.zeros(batch.num_tokens, device=batch.inputs.device)
    returns, _ = _estimate(batch, penalty, zeros, gamma=1.0, lam=1.0, mask=batch.loss_mask)
    return Credit(advantages=_whitened(batch, returns, batch.loss_mask), dead_groups=_untrainable_groups(batch))


def reinforce_plus_plus_baseline(scored: ScoredBatch, penalty: Tensor, config: AlgorithmConfig) -> Credit:
    """Against the group's mean, then whitened over all loss tokens of the step."""
    credit = _against_group(scored.packed, penalty, config, "dr_grpo")
    batch = scored.packed
    return replace(credit, advantages=_whitened(batch, credit.advantages, batch.loss_mask))


def ppo(scored: ScoredBatch, penalty: Tensor, config: AlgorithmConfig) -> Credit:
    """Against the critic's values; documents and prompts are transparent: between two tokens that the policy wrote
    stands nothing. No group is dead that has a trainable trajectory."""
    if scored.old_values is None:
        raise ValueError("algorithm.name = 'ppo' takes the critic's values; score(...) the batch with roles.critic")
    batch = scored.packed
    tokens = batch.response_mask() if config.legacy == "zerosearch" else batch.loss_mask
    estimate = partial(_estimate, batch, penalty, scored.old_values, gamma=config.gamma, mask=tokens)
    advantages, returns = estimate(lam=config.gae_lambda)
    if config.critic_gae_lambda is not None:
        _, returns = estimate(lam=config.critic_gae_lambda)
    whitened = _whitened(batch, advantages, tokens)
    return Credit(advantages=whitened, returns=returns, dead_groups=_untrainable_groups(batch))


ALGORITHMS: Mapping[str, Algorithm] = {
    "reinforce": reinforce,
    "grpo": grpo,
    "ppo": ppo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++-baseline": reinforce_plus_plus_baseline,
    "rloo": rloo,
    "dr_grpo": dr_grpo,
    "dapo": grpo,
    "gspo": grpo,
    "cispo": grpo,
}


def credit(scored: ScoredBatch, config: AlgorithmConfig, *, kl_coefficient: float | None = None) -> TrainBatch:
    """The scored batch with each loss token's advantage, by the algorithm that `config` names.

    kl_coefficient: the present one where it is steered; by default the one of `config`.
    """
    packed = scored.packed
    for reason, trainable in zip(packed.stop_reasons, packed.trainable.tolist(), strict=True):
        if trainable and reason in config.mask_stop_reasons:
            raise ValueError(
                f"a trajectory that ended with {reason.value} is trainable, but algorithm.mask_stop_reasons names that "
                "reason; give the same reasons to pack(mask=...)"
            )
    coefficient = config.kl_coefficient if kl_coefficient is None else kl_coefficient
    shaped = replace(scored, packed=replace(packed, rewards=packed.rewards - overlong_penalty(packed, config)))
    given = ALGORITHMS[config.name](shaped, _kl_penalty(scored, config, coefficient), config)
    advantages = torch.where(packed.loss_mask, given.advantages, 0.0)
    return TrainBatch(
        scored=scored,
        advantages=advantages,
        sequence_advantages=_mean_of_sequences(packed, advantages),
        dead_groups=given.dead_groups,
        returns=given.returns,
        kl_coefficient=coefficient,
    )


def has_signal(group: Group, mask_stop_reasons: Collection[StopReason | str] = ()) -> bool:
    """Do the rewards of the group's trainable trajectories differ? arXiv:2503.14476, section 3.2, keeps such alone."""
    rewards = {t.reward for t in group.trajectories if t.trainable and t.stop_reason not in mask_stop_reasons}
    return len(rewards) > 1


def overlong_penalty(batch: PackedBatch, config: AlgorithmConfig) -> Tensor:
    """[S] float64: 0 up to overlong_limit written tokens, then linearly up to 1 over overlong_buffer tokens.

    arXiv:2503.14476, equation 13, with L_max = overlong_limit + overlong_buffer.
    """
    if not config.overlong_limit:
        return torch.zeros_like(batch.rewards)
    written = torch.tensor(batch.loss_offsets).diff().double()
    return ((written - config.overlong_limit) / config.overlong_buffer).clamp(0.0, 1.0)


def _kl_penalty(scored: ScoredBatch, config: AlgorithmConfig, coefficient: float) -> Tensor:
    """[N] float32: what the KL to the reference takes off each loss token's reward; zeros with the KL in the loss."""
    packed = scored.packed
    if config.kl_in != "reward" or not coefficient:
        return torch.zeros(packed.num_tokens, device=packed.inputs.device)
    old = packed.rollout_logprobs if config.old_logprobs == "sampler" else scored.old_logprobs
    if old is None or scored.ref_logprobs is None:
        raise ValueError(
            "algorithm.kl_in = 'reward' takes the log-probabilities of policy and reference before the update; "
            "score(...) the batch with old_logprobs=True and a reference"
        )
    return coefficient * kl_estimates(
        old,
        scored.ref_logprobs,
        estimator=config.kl_estimator,
        clamp="verl",
        mask=packed.loss_mask,
    )


def _sequence_rewards(batch: PackedBatch, penalty: Tensor) -> Tensor:
    """[S] float64 on the CPU: reward less the trajectory's KL penalties."""
    sums = torch.zeros(batch.num_sequences, dtype=torch.float64, device=penalty.device)
    return batch.rewards - sums.index_add(0, batch.sequence, penalty.double()).cpu()


def _token_rewards(batch: PackedBatch, penalty: Tensor) -> Tensor:
    """[N] float32: less the KL penalty at every loss token, and the trajectory's reward at its last one."""
    rewards = -penalty
    ends = torch.tensor(batch.cu_seqlens[1:])
    written = torch.tensor(batch.cu_seqlens).diff() > 0  # a sequence is cut after its last loss token
    last = (ends[written] - 1).to(rewards.device)
    return rewards.index_add(0, last, batch.rewards[written].float().to(rewards.device))


def _estimate(
    batch: PackedBatch, penalty: Tensor, values: Tensor, *, gamma: float, lam: float, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [N] float32, of the token rewards against `values` [N], at the tokens of `mask`."""
    bounds = torch.tensor(batch.cu_seqlens, device=values.device)
    return gae(_token_rewards(batch, penalty), values, mask, bounds, gamma=gamma, lam=lam)


def _untrainable_groups(batch: PackedBatch) -> Tensor:
    """[G] bool: groups without a trainable trajectory."""
    trainable = torch.zeros(batch.num_groups, dtype=torch.int64)
    return trainable.index_add(0, batch.group, batch.trainable.long()) == 0


def _against_group(batch: PackedBatch, penalty: Tensor, config: AlgorithmConfig, mode: str) -> Credit:
    result = group_advantages(
        _sequence_rewards(batch, penalty),
        batch.group,
        batch.num_groups,
        mode=mode,
        valid=batch.trainable,
        eps=config.advantage_eps,
    )
    return Credit(advantages=_at_tokens(batch, result.advantages), dead_groups=result.dead)


def _at_tokens(batch: PackedBatch, per_sequence: Tensor) -> Tensor:
    """[N] float32 on the batch's device: each token has its trajectory's number."""
    return per_sequence.float().to(batch.inputs.device)[batch.sequence]


def _whitened(batch: PackedBatch, values: Tensor, mask: Tensor) -> Tensor:
    """[N] float32: mean 0 and unbiased variance 1 over the tokens of `mask` on all ranks; all 0 where they are all
    equal, and outside the loss tokens."""
    chosen = values[mask].double()
    totals = all_reduce_sums({"count": chosen.numel(), "sum": float(chosen.sum())})
    mean = totals["sum"] / max(totals["count"], 1.0)
    squares = all_reduce_sums({"squares": float((chosen - mean).square().sum())})["squares"]
    variance = squares / max(totals["count"] - 1.0, 1.0)
    whitened = (values.double() - mean) * (variance + WHITENING_EPS) ** -0.5
    return torch.where(batch.loss_mask, whitened, 0.0).float()


def _mean_of_sequences(batch: PackedBatch, advantages: Tensor) -> Tensor:
    """[S] float32 on the CPU: mean advantage of each trajectory's loss tokens, 0 for one without."""
    sums = torch.zeros(batch.num_sequences, dtype=torch.float64, device=advantages.device)
    sums = sums.index_add(0, batch.sequence, advantages.double()).cpu()
    written = torch.tensor(batch.loss_offsets).diff()
    return (sums / written.clamp(min=1)).float()
