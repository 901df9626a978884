"""The engine: the only rollout type that the training loop knows. Token ids in, token ids out.

One engine serves several roles. `add` many requests, `step` until their completions fall out, in any order; a request
may be added between any two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from zs_fast.types import Completion, Role, Sampling


class Engine(Protocol):
    """What samples. `step` must return in bounded time; a remote engine waits at most 50 ms in it."""

    def add(
        self, request_id: int, prompt_ids: list[int], sampling: Sampling, *, role: Role, cache_salt: str | None = None
    ) -> None:
        """Queue a request. `(role, request_id)` is unique among unfinished requests.

        `prompt_ids` is the whole context. Where it extends the context of the last finished request with the same
        `(role, cache_salt)`, the KV of the shared prefix is reused: a trajectory passes its own salt every turn, so
        no token is prefilled twice. Raises EngineError if the prompt is empty or can't fit.
        """
        ...

    def step(self) -> list[Completion]:
        """Advance all roles by one token each (or one prefill); what finished since the last call, maybe nothing."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Requests added whose completion `step` has not returned yet."""
        ...

    def end(self, role: Role, cache_salt: str) -> None:
        """The trajectory is over: the KV kept under this salt may be dropped."""
        ...

    def abort(self, role: Role, request_ids: Collection[int]) -> None:
        """Drop unfinished requests of `role`: their completions never come. Ids that are not unfinished are ignored."""
        ...

    def publish(self, version: int) -> None:
        """The weights behind the roles changed: later completions carry `version`; stale KV is never used."""
        ...

    def release_kv(self) -> int:
        """Give the KV memory back; the number of bytes freed. Only while no request is unfinished."""
        ...

    def acquire_kv(self) -> None:
        """Take the KV memory again after `release_kv`."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counts of one role since the engine was made."""

    prefill_tokens: int = 0
    """Prompt tokens computed, those computed again after an eviction or a weight update included (by vLLM: those
    of finished requests, and no others)."""
    decode_tokens: int = 0
    """Tokens sampled."""
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were still there."""
    recomputed_tokens: int = 0
    """Of `prefill_tokens`, those computed before whose keys and values had to go: their slot went to another request,
    or weights changed under a running one. Not counted by vLLM."""
    evictions: int = 0
    """Kept contexts that lost their slot to a waiting request; vLLM evicts blocks, and counts none."""
    steps: int = 0
    """Forwards that the role had a part in."""


class StepCounts:
    """What an engine's counts of all roles rose by since the last look, for timings.jsonl."""

    NAMES = ("prefill_tokens", "reused_tokens", "recomputed_tokens", "evictions")

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._seen = self._totals()

    def take(self) -> dict[str, float]:
        """rollout/<name> for each of NAMES, policy and simulator together."""
        now = self._totals()
        risen = {f"rollout/{name}": float(now[name] - self._seen[name]) for name in self.NAMES}
        self._seen = now
        return risen

    def _totals(self) -> dict[str, int]:
        stats = self._engine.stats().values()
        return {name: sum(getattr(one, name) for one in stats) for name in self.NAMES}


class LocalEngine(Engine, Protocol):
    """An engine whose models are in this process, over the memory that the trainer updates."""

    def module(self, role: Role) -> Any:
        """The trainer's module for `role`, a transformers PreTrainedModel: an in-place change of it is sampled next."""
        ...

    def served(self, role: Role) -> Mapping[str, Any]:
        """The tensors that `role` is sampled with at this moment, by the names they have in `module(role)`."""
        ...

    def before_use(self, role: Role, call: Callable[[], None]) -> None:
        """Call this whenever a request of `role` is added: the role's weights may be elsewhere until then."""
        ...

    def stats(self) -> dict[Role, EngineStats]:
        """Counts per role since the engine was made."""
        ...

    def copies(self, role: Role) -> bool:
        """Has the engine weights of its own for `role`, which `copy_weights` writes?"""
        ...

    def copy_weights(self, role: Role) -> int:
        """Write the values of `module(role)` into the engine's own weights; the bytes written."""
        ...

    def choices(self) -> list[str]:
        """A line each on how memory is held, where there was something to choose."""
        ...
