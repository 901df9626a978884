"""Numbers of a step's trajectories, checked against sums done by hand."""

from __future__ import annotations

import math
import random

import pytest

from zs_fast.system.rollout_metrics import rollout_metrics
from zs_fast.types import (
    Action,
    Answer,
    Completion,
    FinishReason,
    Group,
    Invalid,
    Question,
    Role,
    Scores,
    Search,
    SearchMode,
    SearchRequest,
    SearchResult,
    StopReason,
    Trajectory,
    Turn,
)


def make_turn(
    question: Question, action: Action, tokens: int, observation_tokens: int = 0, searched: bool = False
) -> Turn:
    completion = Completion(
        request_id=0, role=Role.POLICY, token_ids=(1,) * tokens, logprobs=(), finish_reason=FinishReason.STOP
    )
    request = SearchRequest(step=1, question=question, sample=0, turn=0, query="q", noise_probability=0.0)
    search = SearchResult(request=request, documents=("d",), mode=SearchMode.USEFUL) if searched else None
    return Turn(completion=completion, action=action, observation_ids=(2,) * observation_tokens, search=search)


def make_trajectory(question: Question, turns: list[Turn], stop: StopReason, f1: float, **kwargs: object) -> Trajectory:
    scores = Scores(f1=f1, exact_match=float(f1 == 1), cover_match=float(f1 > 0))
    return Trajectory(
        question=question,
        sample=0,
        prompt_ids=(0,) * 10,
        turns=tuple(turns),
        stop_reason=stop,
        scores=scores,
        reward=f1,
        **kwargs,  # type: ignore[arg-type]
    )


def example() -> list[Group]:
    nq = Question(id="nq_1", text="?", answers=("a",), source="nq")
    hotpot = Question(id="h_1", text="?", answers=("a",), source="hotpotqa")
    searched = make_turn(nq, Search("q"), 6, 20, searched=True)
    good = make_trajectory(nq, [searched, make_turn(nq, Answer("a"), 4)], StopReason.ANSWER, 1.0)
    bad = make_trajectory(
        nq, [make_turn(nq, Invalid("no_action"), 5, 7), make_turn(nq, Answer("b"), 4)], StopReason.ANSWER, 0.0
    )
    cut = make_trajectory(hotpot, [make_turn(hotpot, Invalid("no_action"), 9)], StopReason.LENGTH_LIMIT, 0.0)
    half = make_trajectory(hotpot, [make_turn(hotpot, Answer("a b"), 3)], StopReason.ANSWER, 0.5)
    failed = make_trajectory(
        hotpot, [make_turn(hotpot, Search("q"), 2, searched=True)], StopReason.SEARCH_FAILED, 0.0, trainable=False
    )
    return [Group(question=nq, trajectories=(good, bad)), Group(question=hotpot, trajectories=(cut, half, failed))]


def test_every_number_by_hand() -> None:
    assert rollout_metrics(example()) == {
        "reward/mean": 1.5 / 4,
        "reward/std": math.sqrt((0.625**2 + 0.375**2 + 0.375**2 + 0.125**2) / 4),
        "reward/f1": 1.5 / 4,
        "reward/exact_match": 0.25,
        "reward/cover_match": 0.5,
        "group/zero_variance_share": 0.0,
        "trajectory/searches": 2 / 5,
        "trajectory/turns": 7 / 5,
        "trajectory/action_tokens": 33 / 5,
        "trajectory/observation_tokens": 27 / 5,
        "trajectory/tokens": 110 / 5,
        "trajectory/well_formed_share": 2 / 5,
        "trajectory/untrainable_share": 1 / 5,
        "action/invalid_share": 2 / 7,
        "stop/answer": 3 / 5,
        "stop/turn_limit": 0.0,
        "stop/length_limit": 1 / 5,
        "stop/context_limit": 0.0,
        "stop/search_failed": 1 / 5,
        "source/hotpotqa/reward": 0.25,
        "source/hotpotqa/f1": 0.25,
        "source/hotpotqa/exact_match": 0.0,
        "source/hotpotqa/cover_match": 0.5,
        "source/hotpotqa/trajectories": 2.0,
        "source/nq/reward": 0.5,
        "source/nq/f1": 0.5,
        "source/nq/exact_match": 0.5,
        "source/nq/cover_match": 0.5,
        "source/nq/trajectories": 2.0,
    }


def test_every_stop_reason_has_its_share_and_they_sum_to_one() -> None:
    metrics = rollout_metrics(example())
    shares = [metrics[f"stop/{reason}"] for reason in StopReason]
    assert sum(shares) == pytest.approx(1)


def test_order_does_not_show_in_any_bit() -> None:
    groups = example()
    draws = random.Random(0)
    question = groups[0].question
    turn = make_turn(question, Answer("a"), 1)
    groups += [
        Group(question=question, trajectories=(make_trajectory(question, [turn], StopReason.ANSWER, draws.random()),))
        for _ in range(200)
    ]
    expected = rollout_metrics(groups)
    for _ in range(5):
        draws.shuffle(groups)
        assert rollout_metrics(groups) == expected


def test_nothing_that_counts_leaves_the_reward_out_rather_than_nan() -> None:
    assert rollout_metrics([]) == {}
    failed = example()[1].trajectories[2]
    metrics = rollout_metrics([Group(question=failed.question, trajectories=(failed,))])
    assert "reward/mean" not in metrics and metrics["stop/search_failed"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_failed_search_does_not_make_a_flat_group_uneven() -> None:
    cut, _, failed = example()[1].trajectories
    question = cut.question
    flat = Group(question=question, trajectories=(cut, cut, failed))
    assert rollout_metrics([flat, example()[0]])["group/zero_variance_share"] == 0.5
