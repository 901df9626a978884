"""BM25 over passages, and the search that finds nothing: files read or refused, and every query answered."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from zs_fast.config import Bm25Config
from zs_fast.errors import DataError
from zs_fast.search.backends.bm25 import Bm25Index, Bm25Search
from zs_fast.search.backends.closed_book import ClosedBook
from zs_fast.search.backends.passages import Passage, load_passages, split_contents
from zs_fast.types import Question, SearchMode, SearchRequest

QUESTION = Question(id="q", text="who wrote emma?", answers=("Jane Austen",), source="s")
PASSAGES = ["Emma: a novel by Jane Austen", "Dracula: a novel by Bram Stoker", "Cork is a city in Ireland", "a"]


def request(query: str, turn: int = 0) -> SearchRequest:
    return SearchRequest(step=1, question=QUESTION, sample=0, turn=turn, query=query, noise_probability=0.0)


def test_both_forms_of_rows_are_read(tmp_path: Path) -> None:
    rows = (
        '{"id": 1, "title": "Emma", "text": "a novel"}\n\n'
        '{"contents": "\\"Emma\\"\\na novel"}\n{"text": "Emma is a novel", "title": "Emma"}\n'
    )
    (tmp_path / "plain.jsonl").write_text(rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    expected = ["Emma: a novel", "Emma: a novel", "Emma is a novel"]
    assert load_passages(str(tmp_path / "plain.jsonl")) == expected
    assert load_passages(str(tmp_path / "packed.jsonl.gz")) == expected


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2: not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2: expected a JSON object, got list"),
        ("a.jsonl", b'{"title": "x"}\n', "line 1: field 'text'"),
        ("a.jsonl", b'{"title": 3, "text": "x"}\n', "line 1: field 'title'"),
        ("a.jsonl", b"", "holds no passages"),
        ("a.jsonl", b'{"text": "\xff"}\n', "can't be read as UTF-8"),
        ("a.jsonl.gz", b"no gzip", "can't be read as UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "can't be read as UTF-8"),
    ],
)
def test_a_bad_corpus_is_one_error(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_passages(str(tmp_path / name))
    assert words in str(caught.value) and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("spec", ["/nowhere/corpus.jsonl", "~nobody-here/x", "x" * 5000, ""])
def test_a_corpus_that_is_not_there(spec: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_passages(spec)


def test_the_best_passages_come_first_and_the_answer_is_noticed() -> None:
    search = Bm25Search(PASSAGES, documents=2)
    search.submit(request("author of EMMA"))
    search.submit(request("novel by stoker", turn=1))
    first, second = search.poll()
    assert first.documents[0] == PASSAGES[0] and second.documents[0] == PASSAGES[1]
    assert first.contains_answer and first.mode is SearchMode.REAL and len(first.documents) == 2
    assert [result.request.turn for result in (first, second)] == [0, 1]
    assert search.poll() == []


@pytest.mark.parametrize("query", ["zzz unheard-of words", "!?", "\u65e5\u672c", "\x00"])
def test_a_query_that_matches_nothing_still_has_an_answer(query: str) -> None:
    search = Bm25Search(PASSAGES, documents=9)
    search.submit(request(query))
    (result,) = search.poll()
    assert result.documents == tuple(PASSAGES) and not result.failed, "ties go to the earlier passage"


def test_the_gold_answer_is_no_part_of_a_real_search(monkeypatch: pytest.MonkeyPatch) -> None:
    import bm25s

    seen: list[str] = []
    search = Bm25Search(PASSAGES, documents=1)
    real = bm25s.tokenize
    monkeypatch.setattr(bm25s, "tokenize", lambda texts, **options: seen.extend(texts) or real(texts, **options))
    search.submit(request("emma"))
    search.poll()
    assert seen == ["emma"]


def test_a_closed_book_answers_with_nothing_and_is_no_failure() -> None:
    search = ClosedBook()
    search.submit(request("emma"))
    (result,) = search.poll()
    assert result.documents == () and not result.failed and not result.contains_answer


def test_an_index_of_english_words_knows_stems_and_counts_titles() -> None:
    passages = [
        Passage(id="1", title="", text="Painters who were painting the sea"),
        Passage(id="2", title="Sea", text="Sea is wet"),
        Passage(id="3", title="Emma", text="a novel"),
    ]
    english = Bm25Index.over(passages, Bm25Config(analysis="english"))
    assert [position for position, _ in english.search(["the painted"], 1)[0]] == [0]
    assert [position for position, _ in english.search(["sea"], 1)[0]] == [1]
    assert english.search(["is the"], 2) == [[(0, 0.0), (1, 0.0)]], "stop words alone match nothing"
    words = Bm25Index.over(passages, Bm25Config())
    assert words.search(["painted"], 1)[0][0][1] == 0.0


def test_the_top_is_that_of_a_full_stable_sort() -> None:
    draws = random.Random(0)
    texts = [" ".join(draws.choices(["aa", "bb", "cc", "dd"], k=draws.randrange(1, 6))) for _ in range(200)]
    index = Bm25Index(texts)
    queries = [" ".join(draws.choices(["aa", "bb", "cc", "zz"], k=3)) for _ in range(50)]
    for query, found in zip(queries, index.search(queries, 7), strict=True):
        scores = index._index.get_scores(query.split())
        assert [position for position, _ in found] == list((-scores).argsort(kind="stable")[:7])
        assert [score for _, score in found] == sorted((float(score) for score in scores), reverse=True)[:7]
    assert index.search([], 7) == []


def test_contents_and_documents_are_two_forms_of_a_passage() -> None:
    passage = Passage(id="1", title="Emma", text="a novel")
    assert passage.contents == '"Emma"\na novel' and split_contents(passage.contents) == ("Emma", "a novel")
    assert split_contents("no title") == ("", "no title") and Passage(id="", title="", text="x").document == "x"
