"""How rewards become advantages: one pure function per algorithm, and the table of them.

An algorithm sees the whole step and gives one advantage per trajectory; each of its loss tokens gets that advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zs_fast.config import AlgorithmConfig
from zs_fast.learn.batch import PackedBatch, ScoredBatch, TrainBatch
from zs_kernels import group_advantages

Algorithm = Callable[[PackedBatch, AlgorithmConfig], tuple[Tensor, Tensor]]
"""-> (advantages [S] float32, dead groups [G] bool)"""


def grpo(batch: PackedBatch, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Reward against the trainable trajectories of its own group: (r - mean) / (unbiased std + eps).

    A group is dead, with advantages of exactly 0, when it has fewer than two trainable trajectories or their rewards
    are all equal. arXiv:2402.03300, section 4.1.
    """
    result = group_advantages(
        batch.rewards, batch.group, batch.num_groups, mode="grpo", valid=batch.trainable, eps=config.advantage_eps
    )
    return result.advantages, result.dead


def reinforce(batch: PackedBatch, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """The raw reward, without a baseline: ZeroSearch's default (arXiv:2505.04588). A group is dead when no trainable
    trajectory of it has a reward other than 0."""
    advantages = torch.where(batch.trainable, batch.rewards, 0.0)
    signals = torch.zeros(batch.num_groups, dtype=torch.int64)
    signals = signals.index_add(0, batch.group, (advantages != 0).long())
    return advantages.float(), signals == 0


ALGORITHMS: Mapping[str, Algorithm] = {"grpo": grpo, "reinforce": reinforce}


def credit(scored: ScoredBatch, config: AlgorithmConfig) -> TrainBatch:
    """The scored batch with each loss token's advantage, by the algorithm that `config` names."""
    packed = scored.packed
    for reason, trainable in zip(packed.stop_reasons, packed.trainable.tolist(), strict=True):
        if trainable and reason in config.mask_stop_reasons:
            raise ValueError(
                f"a trajectory that ended with {reason.value} is trainable, but algorithm.mask_stop_reasons names that "
                "reason; give the same reasons to pack(mask=...)"
            )
    sequence_advantages, dead_groups = ALGORITHMS[config.name](packed, config)
    per_token = sequence_advantages.to(packed.inputs.device)[packed.sequence]
    return TrainBatch(
        scored=scored,
        advantages=torch.where(packed.loss_mask, per_token, 0.0),
        sequence_advantages=sequence_advantages,
        dead_groups=dead_groups,
    )
