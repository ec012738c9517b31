# SPDX-License-Identifier: Apache-2.0
"""A signal ends the backend, whenever it arrives and whoever receives it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from vhostsync.host.signals import ENDING, watch_signals

WAIT_S = 20.0


class Backend:
    def __init__(self) -> None:
        self.stops: list[bool] = []
        self.came = anyio.Event()

    @property
    def stopping(self) -> bool:
        return bool(self.stops)

    def stop(self, *, force: bool = False) -> None:
        self.stops.append(force)
        self.came.set()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    former = {each: signal.getsignal(each) for each in ENDING}
    yield
    for each, handler in former.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("number", ENDING)
def test_one_that_does_not_wake_the_interpreter_ends_it_too(number: signal.Signals) -> None:
    """Another thread receives it: the interpreter notes it, and the main thread sleeps on. So it is, too, of
    one that comes between the interpreter's last look and the event loop's sleep, which cannot be had at
    will."""

    async def scene() -> None:
        backend = Backend()
        async with anyio.create_task_group() as tasks:
            await tasks.start(watch_signals, backend)
            asleep = threading.Thread(target=kill_when_asleep)
            asleep.start()
            with anyio.fail_after(WAIT_S):
                await backend.came.wait()
            asleep.join()
            tasks.cancel_scope.cancel()
        assert backend.stops == [False]

    stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat")

    def kill_when_asleep() -> None:
        asleep = 0
        while asleep < 100:  # in a row: else it may only have waited for this thread
            asleep = asleep + 1 if ") S " in stat.read_text() else 0
            os.sched_yield()
        signal.pthread_kill(threading.get_ident(), number)

    anyio.run(scene)


def test_none_of_many_is_lost() -> None:
    """From another process, at any moment of the event loop."""

    async def one(to: int) -> None:
        backend = Backend()
        async with anyio.create_task_group() as tasks:
            await tasks.start(watch_signals, backend)
            os.write(to, b"x")
            with anyio.fail_after(WAIT_S):
                await backend.came.wait()
            assert backend.stops == [False]
            backend.came = anyio.Event()
            os.write(to, b"x")
            with anyio.fail_after(WAIT_S):
                await backend.came.wait()
            assert backend.stops == [False, True]

    async def scene() -> None:
        for _ in range(1000):
            await one(asked)

    told, asked = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(asked)
            while os.read(told, 1):
                os.kill(os.getppid(), signal.SIGTERM)
        finally:
            os._exit(0)
    os.close(told)
    try:
        anyio.run(scene)
    finally:
        os.close(asked)
        os.waitpid(child, 0)


def test_more_are_ignored_and_nothing_is_left_open() -> None:
    async def scene() -> None:
        backend = Backend()
        await anyio.to_thread.run_sync(int)  # anyio's own thread
        before = len(list(Path("/proc/self/fd").iterdir()))
        async with anyio.create_task_group() as tasks:
            await tasks.start(watch_signals, backend)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        assert backend.stops == [False, True]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert signal.set_wakeup_fd(-1) == -1

    anyio.run(scene)
