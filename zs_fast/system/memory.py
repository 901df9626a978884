"""Who holds the machine when, for how long, and how much memory that took.

The only file that frees caches, hands KV memory back or moves tensors out between phases.
"""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch

from zs_fast.system.offload import Copies, Movable


class Phase(StrEnum):
    """What a step is doing."""

    ROLLOUT = "rollout"
    SCORE = "score"
    UPDATE = "update"
    SYNC = "sync"


class KvHolder(Protocol):
    """The part of an engine that can give its KV memory back."""

    def release_kv(self) -> int: ...

    def acquire_kv(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Offload:
    """Tensors that are in main memory during some phases."""

    movable: Movable
    away: frozenset[Phase]


OPTIMIZER_AWAY = frozenset({Phase.SYNC, Phase.ROLLOUT})
"""Out from the end of the update, in again while the next batch is scored."""
SIMULATOR_AWAY = frozenset({Phase.SCORE, Phase.UPDATE, Phase.SYNC})
"""In again while the policy writes its first turns."""


class Memory:
    """Measures phases, and gives memory from one phase to the next where asked to.

    `empty_cache`: return the allocator's unused blocks to the card after each phase (CUDA only).
    `engine`: its KV memory is handed back while another phase than ROLLOUT runs.
    `offloads`: what leaves the device in some phases, through `copies`. Copies start at the edge between two phases and
    run on beside what follows; whoever reads the tensors first orders them (`Movable.need`).
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        empty_cache: bool = False,
        engine: KvHolder | None = None,
        offloads: Sequence[Offload] = (),
        copies: Copies | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._empty_cache = empty_cache
        self._engine = engine
        self._offloads, self._copies = tuple(offloads), copies
        self._kv_is_released = False
        self._current: Phase | None = None
        self._last: Phase | None = None
        self._timings: dict[str, float] = {}
        self.watch: Callable[[Phase, float, float], None] | None = None
        """Is told of each phase that ends: its start and end, by time.perf_counter."""

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Time the block as this phase. Phases don't nest; one that occurs twice in a step adds up.

        Also when the block raises, what was measured is kept.
        """
        assert self._current is None, f"phase {phase} starts inside phase {self._current}"
        self._hand_over(phase)
        self._current = phase
        self._reset_peaks()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._finish_computing()
            ended = time.perf_counter()
            self._add(f"{phase}/seconds", ended - wall)
            self._add(f"{phase}/cpu_seconds", time.process_time() - cpu)
            self._raise_to(f"{phase}/peak_rss_bytes", peak_rss_bytes())
            if self.device.type == "cuda":
                self._raise_to(f"{phase}/peak_cuda_bytes", torch.cuda.max_memory_allocated(self.device))
                if self._empty_cache:
                    torch.cuda.empty_cache()
            self._last, self._current = phase, None
            if self.watch is not None:
                self.watch(phase, wall, ended)

    def take(self) -> dict[str, float]:
        """The timings since the last call, for timings.jsonl.

        <phase>/seconds          wall clock
        <phase>/cpu_seconds      processor time of all threads of this process
        <phase>/peak_rss_bytes   most main memory held during the phase (where the kernel can't reset its mark, as on
                                 macOS, since the start of the process)
        <phase>/peak_cuda_bytes  most bytes in tensors on the card during the phase
        edge/<a>_to_<b>/...      where memory changed hands between two phases: seconds that held the run up,
                                 released_bytes (0 where it was taken again) and, of tensors that come back from main
                                 memory, fetched_bytes
        """
        timings, self._timings = self._timings, {}
        return timings

    def _hand_over(self, phase: Phase) -> None:
        """First what leaves, then what comes; a cache is mapped again once what left has made room."""
        started = time.perf_counter()
        changes = self._kv_changes(phase)
        sent = sum(one.movable.send() for one in self._offloads if phase in one.away)
        released = self._change_kv() if changes else 0
        fetched = sum(one.movable.fetch() for one in self._offloads if phase not in one.away)
        if not (changes or sent or fetched):
            return
        edge = f"edge/{self._last or 'start'}_to_{phase}"
        self._add(f"{edge}/seconds", time.perf_counter() - started)
        self._add(f"{edge}/released_bytes", float(released + sent))
        if self._offloads:
            self._add(f"{edge}/fetched_bytes", float(fetched))

    def _kv_changes(self, phase: Phase) -> bool:
        return self._engine is not None and (phase is not Phase.ROLLOUT) != self._kv_is_released

    def _change_kv(self) -> int:
        """Give the KV memory back, or take it again; the bytes that came free."""
        assert self._engine is not None
        released = 0
        if self._kv_is_released:
            if self._copies is not None:
                self._copies.wait()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # an engine's own pool can't take what torch keeps for later
            self._engine.acquire_kv()
        else:
            released = self._engine.release_kv()
            self._add("kv_released_bytes", float(released))
        self._kv_is_released = not self._kv_is_released
        return released

    def _finish_computing(self) -> None:
        """Wait for what the phase has told the device, and not for copies that run beside it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _reset_peaks(self) -> None:
        reset_peak_rss()
        if self.device.type == "cuda":
            self._finish_computing()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _add(self, name: str, value: float) -> None:
        self._timings[name] = self._timings.get(name, 0.0) + value

    def _raise_to(self, name: str, value: float) -> None:
        self._timings[name] = max(self._timings.get(name, 0.0), float(value))


def wake_kv_cache(allocator: Any) -> None:
    """Map vLLM's key-value cache again, in a pool that was told to unmap it; nothing else of the pool is touched."""
    allocator.wake_up(tags=["kv_cache"])


def return_freed_memory() -> bool:
    """Give main memory that was freed inside the process back to the system; False where there is no way to (no glibc).

    Worth it once, after a model has moved elsewhere: freed tensors of a few megabytes otherwise stay resident.
    """
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):
        return False


def peak_rss_bytes() -> int:
    """Most main memory this process held since `reset_peak_rss`, or since its start where that has no effect."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc here; the portable count below serves
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Start a new peak; False where the system can't."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as marks:
            marks.write("5")
    except OSError:
        return False
    return True
