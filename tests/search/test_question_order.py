"""The order of questions: every question once per epoch, resumable by the step alone, never twice in a batch."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zs_fast.errors import ConfigError, DataError
from zs_fast.search.data import QuestionOrder
from zs_fast.types import Question

PINNED = [["s:5", "s:4", "s:0", "s:3"], ["s:2", "s:1", "s:0", "s:3"], ["s:1", "s:4", "s:2", "s:5"]]
EXAMPLES = int(os.environ.get("ZS_HYPOTHESIS_EXAMPLES", "30"))


def make_questions(count: int) -> list[Question]:
    return [Question(id=f"s:{number}", text=f"q{number}?", answers=("a",), source="s") for number in range(count)]


def ids(order: QuestionOrder, steps: int, size: int) -> list[list[str]]:
    return [[question.id for question in order.batch(step, size)] for step in range(steps)]


sizes = st.integers(1, 40).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count)))


@settings(max_examples=min(EXAMPLES, 500), deadline=None)
@given(count_and_size=sizes, seed=st.integers(0, 2**31), steps=st.integers(1, 60))
def test_every_epoch_plays_every_question_once(count_and_size: tuple[int, int], seed: int, steps: int) -> None:
    count, size = count_and_size
    batches = ids(QuestionOrder(make_questions(count), seed), steps, size)
    assert all(len(set(batch)) == len(batch) == size for batch in batches)
    played = [id_ for batch in batches for id_ in batch]
    for start in range(0, len(played), count):
        epoch = played[start : start + count]
        assert len(set(epoch)) == len(epoch)


@settings(max_examples=min(EXAMPLES, 500), deadline=None)
@given(count_and_size=sizes, seed=st.integers(0, 2**31), step=st.integers(0, 3000))
def test_a_step_needs_no_other_step(count_and_size: tuple[int, int], seed: int, step: int) -> None:
    """Resumed at any step, after any other steps, and with the file's rows in another order: the same batch."""
    count, size = count_and_size
    questions = make_questions(count)
    fresh = QuestionOrder(questions, seed).batch(step, size)
    used = QuestionOrder(random.Random(0).sample(questions, count), seed)
    for other in (step + 1, 0, step // 2, step):
        batch = used.batch(other, size)
    assert batch == fresh


@pytest.mark.parametrize(("count", "size"), [(24, 8), (25, 8), (10, 7), (9, 8), (8, 8), (13, 1), (200, 64)])
def test_resume_at_every_step(count: int, size: int) -> None:
    """A 3-epoch run stopped before any step goes on with the same batches: none skipped, none doubled."""
    questions = make_questions(count)
    steps = -(-3 * count // size)
    whole = ids(QuestionOrder(questions, 5), steps, size)
    for start in range(steps):
        resumed = QuestionOrder(questions, 5)
        assert [[question.id for question in resumed.batch(step, size)] for step in range(start, steps)] == whole[
            start:
        ]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    questions = make_questions(50)
    first, second = ids(QuestionOrder(questions, 0), 2, 50)
    (other,) = ids(QuestionOrder(questions, 1), 1, 50)
    in_file = [question.id for question in questions]
    assert sorted(first) == sorted(second) == sorted(other) == sorted(in_file)
    assert len({tuple(first), tuple(second), tuple(other), tuple(in_file)}) == 4


def test_the_shuffle_favours_no_place() -> None:
    """Over 2,000 seeds each of 5 questions comes first about equally often (four standard deviations)."""
    questions = make_questions(5)
    firsts = [QuestionOrder(questions, seed).batch(0, 1)[0].id for seed in range(2000)]
    assert all(400 - 72 < firsts.count(question.id) < 400 + 72 for question in questions)


def test_the_order_is_the_same_on_every_machine() -> None:
    """Pinned: a change here would break the resume of runs in progress."""
    assert ids(QuestionOrder(make_questions(6), 0), 3, 4) == PINNED


def test_no_global_generator_is_read_or_moved() -> None:
    random.seed(1)
    before = random.getstate()
    first = ids(QuestionOrder(make_questions(20), 0), 5, 6)
    assert random.getstate() == before
    random.seed(2)
    assert ids(QuestionOrder(make_questions(20), 0), 5, 6) == first


@pytest.mark.parametrize("size", [0, -1, 4])
def test_a_batch_that_cannot_be_filled_says_so(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"questions_per_step is {size}, but the data holds 3 questions"):
        QuestionOrder(make_questions(3), 0).batch(0, size)


def test_questions_must_be_there_and_differ() -> None:
    with pytest.raises(DataError, match="0 questions"):
        QuestionOrder([], 0)
    with pytest.raises(DataError, match="'s:1' is not unique"):
        QuestionOrder([*make_questions(3), make_questions(2)[1]], 0)
