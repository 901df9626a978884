"""Search statistics on hand-counted cases."""

from __future__ import annotations

from zs_fast.search.statistics import search_statistics
from zs_fast.types import Question, SearchMode, SearchRequest, SearchResult

QUESTION = Question(id="nq:1", text="q?", answers=("a b",), source="nq")
REQUEST = SearchRequest(step=0, question=QUESTION, sample=0, turn=0, query="q", noise_probability=0.5)


def result(mode: SearchMode, *, found: bool = False, malformed: bool = False, failed: bool = False) -> SearchResult:
    return SearchResult(
        request=REQUEST,
        documents=() if failed else ("one", "two"),
        mode=mode,
        contains_answer=found,
        malformed=malformed,
        failed=failed,
        num_generated_tokens=0 if failed else 10,
    )


def test_shares_are_counted_per_mode_and_failures_apart() -> None:
    useful, noisy = SearchMode.USEFUL, SearchMode.NOISY
    results = [
        result(useful, found=True),
        result(useful, found=True, malformed=True),
        result(useful),
        result(useful, failed=True),
        result(noisy, found=True, malformed=True),
        result(noisy, malformed=True),
        result(noisy),
        result(noisy),
    ]
    assert search_statistics(results) == {
        "search/count": 8.0,
        "search/failed_share": 1 / 8,
        "search/noise_rate": 4 / 8,
        "search/malformed_share": 3 / 7,
        "search/documents": 2.0,
        "search/generated_tokens": 10.0,
        "search/useful_contains_answer": 2 / 3,
        "search/useful_malformed_share": 1 / 3,
        "search/noisy_contains_answer": 1 / 4,
        "search/noisy_malformed_share": 2 / 4,
    }


def test_no_search_has_a_count_and_no_shares() -> None:
    assert search_statistics([]) == {"search/count": 0.0}


def test_only_failed_searches_have_no_content_shares() -> None:
    assert search_statistics([result(SearchMode.NOISY, failed=True)] * 3) == {
        "search/count": 3.0,
        "search/failed_share": 1.0,
        "search/noise_rate": 1.0,
    }


def test_a_real_backend_has_no_noise_rate() -> None:
    statistics = search_statistics([result(SearchMode.REAL, found=True), result(SearchMode.REAL)])
    assert "search/noise_rate" not in statistics
    assert statistics["search/real_contains_answer"] == 0.5
    assert statistics["search/real_malformed_share"] == 0.0
    assert not [name for name in statistics if "useful" in name or "noisy" in name]


def test_order_has_no_part_in_it() -> None:
    results = [result(mode, found=found) for mode in SearchMode for found in (True, False, False)]
    assert search_statistics(results) == search_statistics(results[::-1])
