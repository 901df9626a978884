"""Who holds the machine when, for how long, and how much memory that took.

The only file that frees caches or hands KV memory back between phases.
"""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Protocol

import torch


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


class Memory:
    """Measures phases, and on CUDA gives memory from one phase to the next where asked to.

    `empty_cache`: return the allocator's unused blocks to the card after each phase (CUDA only).
    `engine`: its KV memory is handed back while another phase than ROLLOUT runs.
    """

    def __init__(
        self, device: torch.device | str, *, empty_cache: bool = False, engine: KvHolder | None = None
    ) -> None:
        self.device = torch.device(device)
        self._empty_cache = empty_cache
        self._engine = engine
        self._kv_is_released = False
        self._current: Phase | None = None
        self._last: Phase | None = None
        self._timings: dict[str, float] = {}

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
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._add(f"{phase}/seconds", time.perf_counter() - wall)
            self._add(f"{phase}/cpu_seconds", time.process_time() - cpu)
            self._raise_to(f"{phase}/peak_rss_bytes", peak_rss_bytes())
            if self.device.type == "cuda":
                self._raise_to(f"{phase}/peak_cuda_bytes", torch.cuda.max_memory_allocated(self.device))
                if self._empty_cache:
                    torch.cuda.empty_cache()
            self._last, self._current = phase, None

    def take(self) -> dict[str, float]:
        """The timings since the last call, for timings.jsonl.

        <phase>/seconds          wall clock
        <phase>/cpu_seconds      processor time of all threads of this process
        <phase>/peak_rss_bytes   most main memory held during the phase (where the kernel can't reset its mark, as on
                                 macOS, since the start of the process)
        <phase>/peak_cuda_bytes  most bytes in tensors on the card during the phase
        edge/<a>_to_<b>/...      where memory changed hands between two phases: seconds, and released_bytes (0 where it
                                 was taken again)
        """
        timings, self._timings = self._timings, {}
        return timings

    def _hand_over(self, phase: Phase) -> None:
        if self._engine is None or (phase is not Phase.ROLLOUT) == self._kv_is_released:
            return
        started, released = time.perf_counter(), 0
        if self._kv_is_released:
            self._engine.acquire_kv()
        else:
            released = self._engine.release_kv()
            self._add("kv_released_bytes", float(released))
        self._kv_is_released = not self._kv_is_released
        edge = f"edge/{self._last or 'start'}_to_{phase}"
        self._add(f"{edge}/seconds", time.perf_counter() - started)
        self._add(f"{edge}/released_bytes", float(released))

    def _reset_peaks(self) -> None:
        reset_peak_rss()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
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
