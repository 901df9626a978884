"""What search backends share that ask no model and answer at the next `poll`."""

from __future__ import annotations

from collections.abc import Sequence

from zs_fast.types import Completion, SearchRequest, SearchResult


class InProcessSearch:
    """Keeps the searches that wait. A backend of this kind says in `poll` what they find."""

    def __init__(self) -> None:
        self._waiting: list[SearchRequest] = []

    def submit(self, request: SearchRequest) -> None:
        self._waiting.append(request)

    def deliver(self, completion: Completion) -> None:
        raise AssertionError(
            f"{type(self).__name__} asks no model, yet a completion of role {completion.role} came back"
        )

    def cancel(self) -> None:
        self._waiting = []

    def recall(self, results: Sequence[SearchResult]) -> None:
        pass

    def _take_waiting(self) -> list[SearchRequest]:
        requests, self._waiting = self._waiting, []
        return requests
