"""What a profile is told while trajectories are played. Without a watcher nobody is told, and nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import NamedTuple, Protocol

from zs_fast.types import Role


class Wait(StrEnum):
    """What a trajectory waits for."""

    POLICY = "policy"
    SEARCH = "search"
    OTHERS = "others"
    """It is over, and the step's others are not."""


class Row(NamedTuple):
    """A request's part in a forward."""

    request_id: int
    prefill_tokens: int
    decodes: bool
    """Does the token sampled last go through the model?"""


class TrajectoryName(NamedTuple):
    """Unique among those that a player plays at once."""

    step: int
    question_id: str
    sample: int


class PlayWatcher(Protocol):
    """Told by a player."""

    def waits(self, trajectory: TrajectoryName, wait: Wait, *, turn: int, request_id: int | None = None) -> None:
        """From now on the trajectory waits for this; `request_id` is that of the policy's request."""
        ...


class EngineWatcher(Protocol):
    """Told by an engine that runs its forwards itself."""

    def added(self, role: Role, request_id: int, num_prompt_tokens: int) -> None: ...

    def forward(self, role: Role, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Entered around one forward and the sampling after it."""
        ...

    def finished(self, role: Role, request_id: int, num_tokens: int) -> None: ...
