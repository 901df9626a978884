"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 stop a run in order, what is finished saved first; a second one at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop. `zs-fast` exits with 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class OrderlyStop:
    """Signals are heeded where nothing is half done: in `allowed` blocks; elsewhere they wait for the next one."""

    def __init__(self) -> None:
        self._number = 0
        self._is_allowed = False

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Take over the signals for the length of the block. Only a process's main thread can: elsewhere, nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Raises Interrupted, at once where a signal came before."""
        self._is_allowed = True
        try:
            if self._number:
                raise Interrupted(self._number)
            yield
        finally:
            self._is_allowed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            os._exit(128 + number)
        self._number = number
        if self._is_allowed:
            raise Interrupted(number)


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process when the one that started it ends, however it ends."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended in between
        os._exit(128 + signal.SIGKILL)
