"""What a step's trajectories say in numbers: a pure function of them, summed exactly, whatever their order."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from zs_fast.types import Answer, Group, Invalid, StopReason, Trajectory


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the step, by metric name; empty for no groups.

    `reward/*` and `source/*` are over trajectories that count (`trainable`): a failed search says nothing about the
    policy. They are left out when there is none. All shares and token counts are over every trajectory.

    reward/mean, reward/std (population), reward/f1, reward/exact_match, reward/cover_match
    group/zero_variance_share        groups whose rewards are all equal, which teach a group-relative algorithm nothing
    trajectory/searches, trajectory/turns, trajectory/action_tokens, trajectory/observation_tokens, trajectory/tokens
    stop/<reason>                    share of trajectories, for every StopReason
    action/invalid_share             of all turns
    trajectory/well_formed_share     ended with an answer, and no turn was invalid
    trajectory/untrainable_share
    source/<source>/{reward,f1,exact_match,cover_match,trajectories}
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    if not trajectories:
        return {}
    metrics: dict[str, float] = {}
    counted = [trajectory for trajectory in trajectories if trajectory.trainable]
    if counted:
        rewards = [trajectory.reward for trajectory in counted]
        mean = _mean(rewards)
        metrics["reward/mean"] = mean
        metrics["reward/std"] = math.sqrt(_mean((reward - mean) ** 2 for reward in rewards))
        metrics["reward/f1"] = _mean(trajectory.scores.f1 for trajectory in counted)
        metrics["reward/exact_match"] = _mean(trajectory.scores.exact_match for trajectory in counted)
        metrics["reward/cover_match"] = _mean(trajectory.scores.cover_match for trajectory in counted)
    metrics["group/zero_variance_share"] = _mean(float(_is_flat(group)) for group in groups)
    metrics["trajectory/searches"] = _mean(trajectory.num_searches for trajectory in trajectories)
    metrics["trajectory/turns"] = _mean(len(trajectory.turns) for trajectory in trajectories)
    metrics["trajectory/action_tokens"] = _mean(trajectory.num_action_tokens for trajectory in trajectories)
    metrics["trajectory/observation_tokens"] = _mean(trajectory.num_observation_tokens for trajectory in trajectories)
    metrics["trajectory/tokens"] = _mean(trajectory.num_tokens for trajectory in trajectories)
    metrics["trajectory/well_formed_share"] = _mean(float(_is_well_formed(trajectory)) for trajectory in trajectories)
    metrics["trajectory/untrainable_share"] = _mean(float(not trajectory.trainable) for trajectory in trajectories)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    if turns:
        metrics["action/invalid_share"] = _mean(float(isinstance(turn.action, Invalid)) for turn in turns)
    for reason in StopReason:
        metrics[f"stop/{reason}"] = _mean(float(trajectory.stop_reason is reason) for trajectory in trajectories)
    return metrics | _source_metrics(counted)


def staleness_metrics(groups: Sequence[Group], *, version: int, max_staleness: int) -> dict[str, float]:
    """How old the weights were that wrote a step's tokens, against those before its update (`version`).

    staleness/mean           in updates, over the policy's tokens
    staleness/share_<n>      share of tokens of age n, for 0 .. max_staleness
    staleness/mixed_share    trajectories whose turns are of several versions
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    tokens = dict.fromkeys(range(max_staleness + 1), 0)
    for trajectory in trajectories:
        for turn in trajectory.turns:
            tokens[version - turn.completion.policy_version] += len(turn.completion.token_ids)
    total = sum(tokens.values())
    if not total:
        return {}
    mixed = [len({turn.completion.policy_version for turn in t.turns}) > 1 for t in trajectories]
    return {
        "staleness/mean": sum(age * count for age, count in tokens.items()) / total,
        **{f"staleness/share_{age}": count / total for age, count in tokens.items()},
        "staleness/mixed_share": _mean(map(float, mixed)),
    }


def _source_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    by_source: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        by_source[trajectory.question.source].append(trajectory)
    metrics: dict[str, float] = {}
    for source in sorted(by_source):
        own = by_source[source]
        metrics[f"source/{source}/reward"] = _mean(trajectory.reward for trajectory in own)
        metrics[f"source/{source}/f1"] = _mean(trajectory.scores.f1 for trajectory in own)
        metrics[f"source/{source}/exact_match"] = _mean(trajectory.scores.exact_match for trajectory in own)
        metrics[f"source/{source}/cover_match"] = _mean(trajectory.scores.cover_match for trajectory in own)
        metrics[f"source/{source}/trajectories"] = float(len(own))
    return metrics


def _is_flat(group: Group) -> bool:
    return len({trajectory.reward for trajectory in group.trajectories if trajectory.trainable}) <= 1


def _is_well_formed(trajectory: Trajectory) -> bool:
    actions = [turn.action for turn in trajectory.turns]
    return (
        trajectory.stop_reason is StopReason.ANSWER
        and isinstance(actions[-1], Answer)
        and not any(isinstance(action, Invalid) for action in actions)
    )


def _mean(values: Iterable[float]) -> float:
    """The correctly rounded sum, so that neither the order nor the number of processes shows in it."""
    listed = list(values)
    return math.fsum(listed) / len(listed)
