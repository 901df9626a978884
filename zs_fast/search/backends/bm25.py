"""Real search in process: BM25 over passages in memory. No server, no download, no gold answer ever seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bm25s
import numpy

from zs_fast.config import Bm25Config
from zs_fast.errors import PreflightError
from zs_fast.search.backends.in_process import InProcessSearch
from zs_fast.search.backends.passages import Passage
from zs_fast.search.reward import contains_answer
from zs_fast.types import SearchMode, SearchRequest, SearchResult


class Bm25Index:
    """Texts that can be searched by words: Lucene's BM25, exact and deterministic.

    Words are runs of two or more letters and digits in lower case; with `analysis = "english"` stop words are left out
    and the others cut to their stems. Ties go to the earlier text.
    """

    @classmethod
    def over(cls, passages: Sequence[Passage], settings: Bm25Config) -> Bm25Index:
        """An index of passages. With `analysis = "english"` the words of a title count beside those of the text, even
        where the text opens with its title: a passage's subject is what most questions name."""
        if settings.analysis == "english":
            return cls([f"{passage.title} {passage.text}" for passage in passages], settings)
        return cls([passage.document for passage in passages], settings)

    def __init__(self, texts: Sequence[str], settings: Bm25Config | None = None) -> None:
        settings = settings or Bm25Config()
        self._analysis: dict[str, Any] = {"stopwords": None}
        if settings.analysis == "english":
            self._analysis = {"stopwords": "en", "stemmer": _english_stemmer()}
        self._num_texts = len(texts)
        tokens = bm25s.tokenize(list(texts), show_progress=False, **self._analysis)
        self._index = bm25s.BM25(k1=settings.k1, b=settings.b)
        self._index.index(tokens, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """For each query the positions and scores of the `k` best texts, fewer where there are fewer texts.

        A query without words that count gets the first texts, with score 0.
        """
        if not queries:
            return []
        k = min(k, self._num_texts)
        asked = bm25s.tokenize(list(queries), show_progress=False, return_ids=False, **self._analysis)
        return [self._best(tokens, k) for tokens in asked]

    def _best(self, tokens: list[str], k: int) -> list[tuple[int, float]]:
        if not tokens:
            return [(position, 0.0) for position in range(k)]
        scores = self._index.get_scores(tokens)
        # Sorting what reaches the k-th best score is exact, and much less than sorting all.
        threshold = numpy.partition(scores, -k)[-k]
        positions = numpy.flatnonzero(scores >= threshold)
        ranked = positions[(-scores[positions]).argsort(kind="stable")[:k]]
        return [(int(position), float(scores[position])) for position in ranked]


class Bm25Search(InProcessSearch):
    """A search backend over the documents of a `Bm25Index`: every query is answered at the next `poll`.

    `passages` are what is shown, in the order of the index. Several backends may share one index.
    """

    def __init__(self, passages: Sequence[str], *, documents: int, index: Bm25Index | None = None) -> None:
        super().__init__()
        self._passages = passages
        self._documents = documents
        self._index = index or Bm25Index(passages)

    def poll(self) -> list[SearchResult]:
        """The top passages of every waiting query, best first; the first passages for a query without words."""
        requests = self._take_waiting()
        found = self._index.search([request.query for request in requests], self._documents)
        return [
            self._result(request, [position for position, _ in ranked])
            for request, ranked in zip(requests, found, strict=True)
        ]

    def _result(self, request: SearchRequest, ranked: Sequence[int]) -> SearchResult:
        documents = tuple(self._passages[position] for position in ranked)
        return SearchResult(
            request=request,
            documents=documents,
            mode=SearchMode.REAL,
            contains_answer=contains_answer(documents, request.question.answers),
        )


def _english_stemmer() -> Any:
    try:
        import Stemmer
    except ModuleNotFoundError as error:
        raise PreflightError(
            "bm25.analysis is 'english', whose stemmer is in the package PyStemmer, which is not installed: "
            "pip install PyStemmer. Or set bm25.analysis = 'words'."
        ) from error
    return Stemmer.Stemmer("english")
