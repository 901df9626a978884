"""Search that finds nothing: what a policy scores with it, it knows by heart."""

from __future__ import annotations

from collections.abc import Sequence

from zs_fast.types import Completion, SearchMode, SearchRequest, SearchResult


class ClosedBook:
    """A search backend whose every result holds no documents, and is not a failure."""

    def __init__(self) -> None:
        self._waiting: list[SearchRequest] = []

    def submit(self, request: SearchRequest) -> None:
        self._waiting.append(request)

    def deliver(self, completion: Completion) -> None:
        raise AssertionError(f"a closed book asks no model, yet a completion of role {completion.role} came back")

    def cancel(self) -> None:
        self._waiting = []

    def recall(self, results: Sequence[SearchResult]) -> None:
        pass

    def poll(self) -> list[SearchResult]:
        requests, self._waiting = self._waiting, []
        return [SearchResult(request=request, documents=(), mode=SearchMode.REAL) for request in requests]
