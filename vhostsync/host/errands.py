# SPDX-License-Identifier: Apache-2.0
"""What may never come back: calls to a file system that may wait for its server for ever, to a name server,
to another host. They are made in threads that nobody has to wait for."""

import asyncio
import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import anyio

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


# ---- what leaves something open when nobody has waited for it ------------------------------


def bring_in_time(bring: Callable[[], T], undo: Callable[[T], None], timeout_s: float) -> T:
    """What `bring` returns or raises, in a thread of its own. TimeoutError where it takes longer: what it
    brings then is undone there. Blocks."""
    brought, thread = _bring(bring, undo)
    try:
        return brought.result(timeout_s)
    except TimeoutError:
        if not brought.cancel():
            return brought.result()  # it was just in time, or this was its own error
        raise
    finally:
        if not brought.cancelled():
            _await_end(thread)


async def bring_unless_cancelled(bring: Callable[[], T], undo: Callable[[T], None]) -> T:
    """The same for as long as it takes; who is cancelled does not wait for it."""
    brought, _ = _bring(bring, undo)
    try:
        return await asyncio.wrap_future(brought)
    except anyio.get_cancelled_exc_class():
        if not brought.cancel() and brought.exception() is None:
            in_thread(lambda: undo(brought.result()))
        raise


async def ask_unless_cancelled(ask: Callable[[], T]) -> T:
    """What `ask` returns or raises, for as long as it takes; who is cancelled does not wait for it. Nor does
    the process at its end, as it would for a thread of anyio's, abandoned or not."""
    return await bring_unless_cancelled(ask, lambda _: None)


def _await_end(thread: threading.Thread) -> None:
    """Of what the kernel has of it, too: whoever confines this process next is to find no other thread."""
    thread.join()
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        time.sleep(0.0005)


def _bring(bring: Callable[[], T], undo: Callable[[T], None]) -> "tuple[Future[T], threading.Thread]":
    """Who does not want it any more cancels the future; that it was too late for that, cancel() says."""
    brought: Future[T] = Future()

    def work() -> None:
        try:
            found = bring()
        except BaseException as error:
            with suppress(InvalidStateError):  # nobody waits for it any more
                brought.set_exception(error)
            return
        try:
            brought.set_result(found)
        except InvalidStateError:
            undo(found)

    return brought, in_thread(work)


def in_thread(work: Callable[[], None], name: str = "vhostsync-errand") -> threading.Thread:
    """The process does not wait for it at its end. OSError (EAGAIN) where the system has no more threads."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "no more threads are allowed") from error
    return thread
