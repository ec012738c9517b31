# SPDX-License-Identifier: Apache-2.0
"""What may never come back: calls to a file system that may wait for its server for ever. They are made in
threads that nobody has to wait for."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

from vhostsync.host import patience

THREADS_MAX: Final = 16
"""What is more than these waits for one of them to come back."""

T = TypeVar("T")


class Errands:
    """Daemon threads: the process does not wait for them at its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errands: deque[Callable[[], None]] = deque()
        self._running = 0

    def give(self, errand: Callable[[], None]) -> None:
        with self._lock:
            self._errands.append(errand)
            if self._running == THREADS_MAX:
                return
            self._running += 1
        try:
            threading.Thread(target=self._work, name="vhostsync-errand", daemon=True).start()
        except RuntimeError:  # the system has no more: the next one that comes takes up this errand, too
            with self._lock:
                self._running -= 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._errands:
                    self._running -= 1
                    return
                errand = self._errands.popleft()
            errand()

    async def answer(self, ask: Callable[[], T], patience_s: float) -> T:
        """What `ask` returns or raises. TimeoutError where that takes longer: what becomes of it then, nobody
        learns."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def tell(tell_it: Callable[[], None]) -> None:
            if not answer.done():
                tell_it()

        def work() -> None:
            try:
                found = ask()
                done: Callable[[], None] = lambda: answer.set_result(found)  # noqa: E731
            except Exception as error:
                failed = error
                done = lambda: answer.set_exception(failed)  # noqa: E731
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, done)

        self.give(work)
        with patience.fail_after(patience_s):
            return await answer
