"""BM25 over real passages: how often the top five hold an answer, against the figures measured when the data was made.

Data: `qa/*.test.jsonl.gz` and `corpus/*.jsonl.gz` under the folder that the environment variable ZS_FAST_DATA names
(default: shared/data beside the repository).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zs_fast.config import Bm25Config
from zs_fast.search.backends.bm25 import Bm25Index
from zs_fast.search.backends.passages import read_corpus
from zs_fast.search.data import load_questions
from zs_fast.search.reward import contains_answer, normalise

DATA = Path(os.environ.get("ZS_FAST_DATA") or Path(__file__).parents[3] / "shared" / "data")
SETTINGS = Bm25Config(analysis="english", k1=0.9, b=0.4)
RECALL = {
    "nq": 0.885,
    "triviaqa": 0.710,
    "popqa": 0.713,
    "hotpotqa": 0.771,
    "2wiki": 0.675,
    "musique": 0.404,
    "bamboogle": 0.262,
}
"""Share of questions with an answer in the top five: BM25 with k1 0.9, b 0.4, stop words left out, stems."""


@pytest.mark.full
@pytest.mark.parametrize("name", RECALL)
def test_recall_of_the_top_five(name: str) -> None:
    corpus, questions_file = DATA / "corpus" / f"{name}.jsonl.gz", DATA / "qa" / f"{name}.test.jsonl.gz"
    if not corpus.is_file():
        pytest.skip(f"no {corpus}: set ZS_FAST_DATA to the folder that holds corpus/ and qa/")
    questions = [
        question
        for question in load_questions(str(questions_file))
        if not all(normalise(answer) in ("yes", "no") for answer in question.answers)
    ]
    passages = read_corpus(str(corpus))
    index = Bm25Index.over(passages, SETTINGS)
    found = index.search([question.text for question in questions], 5)
    hits = sum(
        contains_answer([passages[position].document for position, _ in ranked], question.answers)
        for question, ranked in zip(questions, found, strict=True)
    )
    recall = hits / len(questions)
    print(f"{name}: {hits} of {len(questions)} = {recall:.3f}, expected {RECALL[name]:.3f}")
    assert recall == pytest.approx(RECALL[name], abs=0.01)
