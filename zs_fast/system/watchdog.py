"""A phase that shows no sign of life for too long ends the process, with the stack of every thread on record."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODE = 8
GRACE_S = 60.0
"""After the limit: the interpreter itself may hang, so that a second, lower watch ends the process."""


class Watchdog:
    """Watches `phase` blocks. `limit_s` 0 never ends anything. `end` is what ends the process, for tests."""

    def __init__(self, limit_s: float, stacks: Path, *, end: Callable[[int], object] = os._exit) -> None:
        self.limit_s, self.stacks = limit_s, Path(stacks)
        self._end = end
        self._deadline = float("inf")
        self._phase = ""
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block must end, or `beat` be called, within the limit, again and again."""
        if not self.limit_s:
            yield
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        self._phase = name
        self.beat()
        try:
            yield
        finally:
            self._phase = ""
            self._deadline = float("inf")
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """A sign of life; nothing outside a phase."""
        if self._phase:
            self._deadline = time.monotonic() + self.limit_s
            faulthandler.dump_traceback_later(self.limit_s + GRACE_S, exit=True, file=sys.__stderr__)

    def close(self) -> None:
        self._wake.set()

    def _watch(self) -> None:
        while not self._wake.wait(min(1.0, self.limit_s / 4)):
            if time.monotonic() > self._deadline:
                self._give_up()
                return

    def _give_up(self) -> None:
        with self.stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"zs-fast: the phase {self._phase} showed no sign of life for {self.limit_s:.0f} s "
            f"(train.phase_timeout_s). Every thread's stack is in {self.stacks}; --resume goes on from the newest "
            "checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        self._end(EXIT_CODE)
