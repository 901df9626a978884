from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from zs_fast.types import (
    Answer,
    Completion,
    FinishReason,
    Group,
    Question,
    Role,
    Search,
    StopReason,
    Trajectory,
    Turn,
)

Segments = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(sampled ids, observation ids) of each turn"""

MakeTrajectory = Callable[..., Trajectory]
MakeGroup = Callable[..., Group]


@pytest.fixture
def make_trajectory() -> MakeTrajectory:
    def make(
        prompt: Sequence[int],
        turns: Segments,
        *,
        reward: float = 0.0,
        sample: int = 0,
        question_id: str = "q",
        trainable: bool = True,
        stop_reason: StopReason = StopReason.ANSWER,
        logprob: float | None = -1.0,
    ) -> Trajectory:
        played = []
        for number, (sampled, observed) in enumerate(turns):
            completion = Completion(
                request_id=number,
                role=Role.POLICY,
                token_ids=tuple(sampled),
                logprobs=() if logprob is None else tuple(logprob for _ in sampled),
                finish_reason=FinishReason.STOP,
            )
            action = Search("query") if observed else Answer("answer")
            played.append(Turn(completion=completion, action=action, observation_ids=tuple(observed)))
        return Trajectory(
            question=Question(id=question_id, text="?", answers=("a",), source="test"),
            sample=sample,
            prompt_ids=tuple(prompt),
            turns=tuple(played),
            stop_reason=stop_reason,
            reward=reward,
            trainable=trainable,
        )

    return make


@pytest.fixture
def make_group() -> MakeGroup:
    def make(trajectories: Sequence[Trajectory]) -> Group:
        return Group(question=trajectories[0].question, trajectories=tuple(trajectories))

    return make


@pytest.fixture
def make_groups(make_trajectory: MakeTrajectory, make_group: MakeGroup) -> Callable[..., list[Group]]:
    """Random groups of two-turn trajectories whose rewards differ inside each group."""
    import random

    def make(num_groups: int = 3, group_size: int = 4, *, vocabulary: int = 259, seed: int = 0) -> list[Group]:
        draws = random.Random(seed)

        def ids(low: int, high: int) -> list[int]:
            return [draws.randrange(vocabulary) for _ in range(draws.randint(low, high))]

        groups = []
        for number in range(num_groups):
            prompt = ids(3, 8)
            trajectories = [
                make_trajectory(
                    prompt,
                    [(ids(2, 9), ids(2, 9)), (ids(1, 9), [])],
                    reward=draws.random(),
                    sample=sample,
                    question_id=f"q{number}",
                )
                for sample in range(group_size)
            ]
            groups.append(make_group(trajectories))
        return groups

    return make
