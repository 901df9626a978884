"""Search by a function of somebody's own: queries in, documents out, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zs_fast.errors import SimulatorError
from zs_fast.search.backends.in_process import InProcessSearch
from zs_fast.search.reward import contains_answer
from zs_fast.types import SearchMode, SearchRequest, SearchResult

SearchFunction = Callable[[list[str], int], Sequence[Sequence[str]]]
"""(queries, documents per query) -> the documents of each query, best first."""


class FunctionSearch(InProcessSearch):
    """A search backend over `function`, which is called at `poll` with all queries that wait; play waits for it.

    It sees queries, never a question or its answers. Where it raises SimulatorError these searches have failed, as with
    any backend; every other error of its own ends the run, as does a result of another shape (SimulatorError).
    """

    def __init__(self, function: SearchFunction, *, documents: int, name: str = "function") -> None:
        super().__init__()
        self._function = function
        self._documents = documents
        self._name = name

    def poll(self) -> list[SearchResult]:
        """The documents of every waiting query, cut to the number asked for."""
        requests = self._take_waiting()
        if not requests:
            return []
        try:
            found = self._function([request.query for request in requests], self._documents)
        except SimulatorError as error:
            return [
                SearchResult(request=request, documents=(), mode=SearchMode.REAL, failed=True, error=str(error)[:500])
                for request in requests
            ]
        self._check(found, len(requests))
        return [self._result(request, documents) for request, documents in zip(requests, found, strict=True)]

    def _check(self, found: Any, number: int) -> None:
        is_whole = isinstance(found, list | tuple) and len(found) == number
        if is_whole and all(isinstance(one, list | tuple) for one in found):
            others = [document for documents in found for document in documents if not isinstance(document, str)]
            if not others:
                return
            what = f"a document of type {type(others[0]).__name__}"
        else:
            what = f"{type(found).__name__} of {len(found) if hasattr(found, '__len__') else 'no'} entries"
        raise SimulatorError(
            f"The search function {self._name} was given {number} queries and returned {what}. It has to return one "
            "list of documents (str) for each query."
        )

    def _result(self, request: SearchRequest, found: Sequence[str]) -> SearchResult:
        documents = tuple(found[: self._documents])
        return SearchResult(
            request=request,
            documents=documents,
            mode=SearchMode.REAL,
            contains_answer=contains_answer(documents, request.question.answers),
        )
