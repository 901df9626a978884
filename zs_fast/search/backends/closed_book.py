"""Search that finds nothing: what a policy scores with it, it knows by heart."""

from __future__ import annotations

from zs_fast.search.backends.in_process import InProcessSearch
from zs_fast.types import SearchMode, SearchResult


class ClosedBook(InProcessSearch):
    """A search backend whose every result holds no documents, and is not a failure."""

    def poll(self) -> list[SearchResult]:
        return [SearchResult(request=request, documents=(), mode=SearchMode.REAL) for request in self._take_waiting()]
