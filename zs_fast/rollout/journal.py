"""Replies that were paid for, kept so that an interrupted step can be played again without asking twice."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from zs_fast.types import Completion, Role, SearchRequest, SearchResult


class JournalKey(NamedTuple):
    """What a reply was for. `sample` counts on over repeats of a question in one step."""

    step: int
    question_id: str
    sample: int
    turn: int
    role: Role


class Journal(Protocol):
    """Keeps replies already paid for, so that an interrupted step can be played again without asking twice."""

    def lookup(self, key: JournalKey) -> Completion | None: ...

    def record(self, key: JournalKey, completion: Completion) -> None: ...

    def lookup_search(self, key: JournalKey, request: SearchRequest) -> SearchResult | None: ...

    def record_search(self, key: JournalKey, result: SearchResult) -> None: ...


class NullJournal:
    """Remembers nothing."""

    def lookup(self, key: JournalKey) -> Completion | None:
        return None

    def record(self, key: JournalKey, completion: Completion) -> None:
        pass

    def lookup_search(self, key: JournalKey, request: SearchRequest) -> SearchResult | None:
        return None

    def record_search(self, key: JournalKey, result: SearchResult) -> None:
        pass
