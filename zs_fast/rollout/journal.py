"""Replies that were paid for, kept so that an interrupted step can be played again without asking twice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

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

    def lookup(self, key: JournalKey, context_ids: Sequence[int]) -> Completion | None:
        """The reply kept under this key, if it was sampled from exactly these ids."""
        ...

    def record(self, key: JournalKey, context_ids: Sequence[int], completion: Completion) -> None: ...

    def record_end(self, key: JournalKey) -> None:
        """The trajectory of this key is over: its replies are all there."""
        ...

    def lookup_search(self, key: JournalKey, request: SearchRequest) -> SearchResult | None:
        """The result kept under this key, if it answers an equal request."""
        ...

    def record_search(self, key: JournalKey, result: SearchResult) -> None: ...

    def searches(self) -> list[SearchResult]:
        """All results kept, for a search backend that lets others share them."""
        ...


class StepJournal(Journal, Protocol):
    """A journal of many rollouts and evaluations, each in a scope of its own."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Within the block, replies are looked for and kept under this name; afterwards they are on the disk."""
        ...

    def outcome(self) -> Any:
        """What `keep_outcome` kept in the open scope, or None."""
        ...

    def keep_outcome(self, value: Any) -> None:
        """Keep a plain JSON value: what all replies of the open scope came to."""
        ...

    def forget(self, *, rollouts: int, evaluations: int) -> None:
        """Remove the scopes of rollouts and evaluations up to these steps: a checkpoint holds what came of them."""
        ...


class NullJournal:
    """Remembers nothing."""

    def lookup(self, key: JournalKey, context_ids: Sequence[int]) -> Completion | None:
        return None

    def record(self, key: JournalKey, context_ids: Sequence[int], completion: Completion) -> None:
        pass

    def record_end(self, key: JournalKey) -> None:
        pass

    def lookup_search(self, key: JournalKey, request: SearchRequest) -> SearchResult | None:
        return None

    def record_search(self, key: JournalKey, result: SearchResult) -> None:
        pass

    def searches(self) -> list[SearchResult]:
        return []

    def scope(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def outcome(self) -> Any:
        return None

    def keep_outcome(self, value: Any) -> None:
        pass

    def forget(self, *, rollouts: int, evaluations: int) -> None:
        pass
