"""An asyncio loop in a thread of its own: what waits for servers runs there, and its user never does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any


class BackgroundLoop:
    """`start` what may take long, `wait_for` what may not, and `close` in the end."""

    def __init__(self, name: str) -> None:
        self.fault: BaseException | None = None
        """What ended something that was started and should never raise: its answer would be waited for for ever."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        future.add_done_callback(self._note_fault)
        return future

    def wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Give up what is under way, run `last`, and end the thread. A second call does nothing."""
        if self.is_closed:
            return
        self.wait_for(_give_up(last))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def is_closed(self) -> bool:
        return self._loop.is_closed()

    def _note_fault(self, future: Future[None]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self.fault = future.exception()


async def _give_up(last: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if last is not None:
        await last()
