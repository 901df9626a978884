"""Snippets of passages: whole sentences where they fit, and the answer always in sight."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zs_fast.search.reward import contains_answer
from zs_fast.simulator.snippets import snippet

PASSAGE = "Emma is a novel. It was written by Jane Austen in 1815. It was her fourth. Nobody was surprised by that."


def test_a_short_passage_stays_whole() -> None:
    assert snippet("one  two\nthree", 3) == "one two three"
    assert snippet(PASSAGE, 0) == PASSAGE


def test_without_an_answer_it_starts_at_the_beginning_and_ends_with_a_sentence() -> None:
    assert snippet(PASSAGE, 6) == "Emma is a novel."
    assert snippet(PASSAGE, 13) == "Emma is a novel. It was written by Jane Austen in 1815."
    assert snippet(PASSAGE, 3) == "Emma is a"


def test_it_starts_with_the_sentence_that_holds_the_answer() -> None:
    assert snippet(PASSAGE, 8, ("Jane Austen",)) == "It was written by Jane Austen in 1815."
    assert snippet(PASSAGE, 12, ("jane austen",)) == "It was written by Jane Austen in 1815. It was her fourth."


def test_an_answer_late_in_a_long_sentence_is_shown() -> None:
    words = [f"w{number}" for number in range(50)]
    words[40:42] = ["Jane", "Austen"]
    assert snippet(" ".join(words), 5, ("Jane Austen",)).split()[-2:] == ["Jane", "Austen"]


@given(
    st.lists(st.sampled_from(["Emma", "wrote", "a.", "The", "end!", "1815"]), max_size=40),
    st.integers(min_value=1, max_value=12),
    st.integers(min_value=0, max_value=39),
)
def test_never_longer_and_never_without_a_one_word_answer(words: list[str], size: int, place: int) -> None:
    words = [*words[:place], "Austen", *words[place:]]
    cut = snippet(" ".join(words), size, ("Austen",))
    assert 1 <= len(cut.split()) <= size
    assert contains_answer([cut], ("Austen",))
