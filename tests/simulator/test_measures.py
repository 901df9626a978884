"""The numbers about documents, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from zs_fast.simulator.measures import distinct_bigrams, mean, measure, share, table
from zs_fast.types import Question, SearchMode, SearchRequest, SearchResult

USEFUL, NOISY, REAL = SearchMode.USEFUL, SearchMode.NOISY, SearchMode.REAL
EMMA = Question(id="q", text="who wrote emma?", answers=("Jane Austen",), source="s")


def result(mode: SearchMode, *documents: str, malformed: bool = False) -> SearchResult:
    request = SearchRequest(step=0, question=EMMA, sample=0, turn=0, query="emma", noise_probability=0.0)
    return SearchResult(request=request, documents=documents, mode=mode, malformed=malformed, failed=not documents)


def test_wilson_intervals_as_published() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        value = share([True] * hits + [False] * (count - hits))
        assert value.value == hits / count
        assert (value.low, value.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert math.isnan(share([]).value)


def test_bootstrap_intervals_hold_the_mean_and_shrink() -> None:
    small, large = mean([0.0, 1.0] * 10), mean([0.0, 1.0] * 1000)
    assert small.value == large.value == 0.5
    assert small.low < large.low < 0.5 < large.high < small.high
    assert mean([0.3]) == mean([0.3, 0.3]) and mean([0.3]).low == mean([0.3]).high == pytest.approx(0.3)


def test_distinct_bigrams() -> None:
    assert distinct_bigrams(["red green blue"]) == 1.0
    assert distinct_bigrams(["red green", "red green"]) == 0.5
    assert distinct_bigrams(["red"]) == 1.0, "one word has no pairs, and repeats none"


def test_every_measure_by_hand() -> None:
    results = {
        USEFUL: [result(USEFUL, "Jane Austen wrote Emma", "Emma"), result(USEFUL, "Emma", malformed=True)],
        NOISY: [result(NOISY, "Cork"), result(NOISY)],
        REAL: [result(REAL, "Emma, by Jane Austen"), result(REAL, "Cork")],
    }
    found = measure(results, {USEFUL: [1.0, 0.0]})
    useful, noisy = found[USEFUL], found[NOISY]
    assert useful["contains_answer"].value == 0.5 and noisy["contains_answer"].value == 0.0
    assert found[REAL]["contains_answer"].value == 0.5
    assert useful["well_formed"].value == 0.5 and noisy["well_formed"].value == 0.5
    assert useful["failed"].value == 0.0 and noisy["failed"].value == 0.5
    assert useful["document_words"].value == 2.0 and noisy["document_words"].value == 1.0
    assert useful["distinct_documents"].value == pytest.approx(1 / 3), "Emma twice"
    # word F1 with the document of the same search: 2 * 3 / (4 + 4), 2 * 1 / (1 + 4), 0
    assert useful["similarity"].value == pytest.approx((0.75 + 0.4 + 0.0) / 3)
    assert useful["reader_f1"].value == 0.5 and "reader_f1" not in noisy
    assert "well_formed" not in found[REAL] and "similarity" not in found[REAL]


def test_the_table_has_a_column_per_mode_and_no_row_without_numbers() -> None:
    results = {mode: [result(mode, "Jane Austen")] for mode in (USEFUL, NOISY, REAL)}
    lines = table(measure(results, {})).splitlines()
    assert lines[0].split() == ["useful", "noisy", "real"]
    assert lines[1].startswith("contains_answer") and "1.000 (0.207 to 1.000)" in lines[1]
    assert not any(line.startswith("reader_f1") for line in lines)
