"""DAPO's dynamic sampling: which groups a step learns from, and how many batches of questions it has used up."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

import zs_fast.train
from zs_fast.config import RunConfig
from zs_fast.search.data import QuestionOrder
from zs_fast.types import Question

NUMBER = 3


def stub_run(rewards, make_trajectory, make_group, monkeypatch, *, questions: int = 40, **algorithm):
    """(a run that plays batches, the questions it asked for): question i is answered with the rewards rewards(i)."""
    config = RunConfig(algorithm={"name": "dapo"} | algorithm, train={"questions_per_step": NUMBER, "group_size": 2})
    data = [Question(id=f"q{i}", text="?", answers=("a",), source="test") for i in range(questions)]
    asked: list[list[str]] = []

    def play(player, batch, *, step, noise, on_progress, refill):
        asked.append([question.id for question in batch])
        return [
            make_group(
                [make_trajectory([1], [([2], [])], reward=r, question_id=question.id) for r in rewards(question.id)]
            )
            for question in batch
        ]

    monkeypatch.setattr(zs_fast.train, "play", play)
    run = SimpleNamespace(
        config=config,
        order=QuestionOrder(data, 0),
        batches_played=0,
        _progress=lambda *_: None,
        arena=SimpleNamespace(training_player=SimpleNamespace(pause=lambda: None, carried=lambda: [])),
    )
    return run, asked


def play(run):
    found = zs_fast.train._Run._play_batches(run, 1, 0.0, run.arena.training_player)
    return [g.question.id for g in found.groups], [g.question.id for g in found.chosen], found.batches_played


def test_dead_groups_make_room_for_those_of_further_batches(make_trajectory, make_group, monkeypatch):
    order = QuestionOrder([Question(id=f"q{i}", text="?", answers=("a",), source="test") for i in range(40)], 0)
    first, second = ([q.id for q in order.batch(n, NUMBER)] for n in (0, 1))
    dead = {first[0], first[2], second[1]}
    rewards = lambda name: (1.0, 1.0) if name in dead else (1.0, 0.0)  # noqa: E731
    run, asked = stub_run(rewards, make_trajectory, make_group, monkeypatch)
    played, chosen, batches = play(run)
    assert asked == [first, second], "two batches hold three groups with signal: no third"
    assert played == first + second and batches == 2
    assert chosen == [first[1], second[0], second[2]]
    run.batches_played = batches
    third = [q.id for q in order.batch(2, NUMBER)]
    assert play(run) == (third, third, 3), "the next step goes on behind them, and all live is one batch as it came"


def test_what_is_missing_is_filled_up_with_dead_groups(make_trajectory, make_group, monkeypatch):
    run, asked = stub_run(lambda name: (0.5, 0.5), make_trajectory, make_group, monkeypatch)
    played, chosen, batches = play(run)
    assert batches == len(asked) == 3 and len(played) == 3 * NUMBER, "the first batch and two more"
    assert chosen == played[:NUMBER]
    run, asked = stub_run(lambda name: (0.5, 0.5), make_trajectory, make_group, monkeypatch, max_resampled_batches=0)
    played, chosen, batches = play(run)
    assert (chosen, batches, len(asked)) == (played, 1, 1), "0 keeps all groups"


@pytest.mark.parametrize("questions", [3, 4, 5, 8])
def test_no_question_is_played_twice_in_a_step(make_trajectory, make_group, monkeypatch, questions):
    """A step's draws are a function of the question, so a second play would be the first one again."""
    run, asked = stub_run(
        lambda name: (0.5, 0.5), make_trajectory, make_group, monkeypatch, questions=questions, max_resampled_batches=4
    )
    played, _, batches = play(run)
    assert batches == 5
    assert set(Counter(played).values()) == {1} and len(played) == questions
    assert all(asked), "nothing is played of nothing"


def test_a_group_without_two_trainable_trajectories_has_no_signal(make_trajectory, make_group):
    def group(*rewards_and_keep):
        return make_group([make_trajectory([1], [([2], [])], reward=r, trainable=k) for r, k in rewards_and_keep])

    assert zs_fast.train.has_signal(group((1.0, True), (0.0, True)))
    assert not zs_fast.train.has_signal(group((1.0, True), (0.0, False)))
    assert not zs_fast.train.has_signal(group((1.0, True), (1.0, True), (0.0, False)))
