"""Who answers the searches: the one shape that a simulator and a real retriever share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from zs_fast.types import Completion, SearchRequest, SearchResult


class SearchBackend(Protocol):
    """Takes searches at any time and gives their results in any order, each with the request it belongs to."""

    def submit(self, request: SearchRequest) -> None:
        """Start a search. Returns at once; any number may be under way."""
        ...

    def deliver(self, completion: Completion) -> None:
        """Hand over a completion that the engine finished for this backend; one without a model never gets any."""
        ...

    def cancel(self) -> None:
        """Give up all searches under way, and forget replies kept for others: no result of theirs comes any more."""
        ...

    def recall(self, results: Sequence[SearchResult]) -> None:
        """Results that an interrupted rollout had got already, for a backend whose searches may share them."""
        ...

    def poll(self) -> list[SearchResult]:
        """The searches finished since the last call, maybe none. Each submitted request comes back exactly once."""
        ...
