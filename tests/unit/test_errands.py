# SPDX-License-Identifier: Apache-2.0
"""What is opened in a thread that nobody may wait for any more: it is never lost, and never left open."""

from __future__ import annotations

import threading
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from vhostsync.host.errands import bring_in_time, bring_unless_cancelled

WAIT_S = 30.0


class Opened:
    """What takes its time until it is let go."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go_on, self.begun, self.undone = threading.Event(), threading.Event(), threading.Event()
        self._error = error
        self.undone_in: int | None = None

    def open(self) -> str:
        self.begun.set()
        assert self.go_on.wait(WAIT_S)
        if self._error is not None:
            raise self._error
        return "it"

    def undo(self, what: str) -> None:
        assert what == "it"
        self.undone_in = threading.get_ident()
        self.undone.set()


def test_what_is_in_time_is_handed_over() -> None:
    opened = Opened()
    opened.go_on.set()
    before = len(list(Path("/proc/self/task").iterdir()))
    assert bring_in_time(opened.open, opened.undo, WAIT_S) == "it"
    assert len(list(Path("/proc/self/task").iterdir())) <= before, "no thread is left"
    assert not opened.undone.is_set()


def test_what_comes_late_is_undone() -> None:
    opened = Opened()
    with pytest.raises(TimeoutError):
        bring_in_time(opened.open, opened.undo, 0.05)
    opened.go_on.set()
    assert opened.undone.wait(WAIT_S)
    assert opened.undone_in != threading.get_ident()


@pytest.mark.parametrize("error", [TimeoutError("its own"), OSError("no")])
def test_its_own_error_is_told(error: Exception) -> None:
    opened = Opened(error)
    opened.go_on.set()
    with pytest.raises(type(error), match=str(error)):
        bring_in_time(opened.open, opened.undo, WAIT_S)


def test_an_error_that_comes_late_is_nobodys() -> None:
    opened = Opened(OSError("late"))
    with pytest.raises(TimeoutError):
        bring_in_time(opened.open, opened.undo, 0.05)
    opened.go_on.set()


@pytest.mark.anyio
async def test_who_is_cancelled_does_not_wait_for_it_and_it_is_undone() -> None:
    opened = Opened()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bring_unless_cancelled, opened.open, opened.undo)
        assert await anyio.to_thread.run_sync(opened.begun.wait, WAIT_S)
        with anyio.fail_after(WAIT_S / 2):
            tasks.cancel_scope.cancel()
    assert not opened.undone.is_set()
    opened.go_on.set()
    assert await anyio.to_thread.run_sync(opened.undone.wait, WAIT_S)


@pytest.mark.anyio
async def test_what_came_just_before_the_cancellation_is_undone_too() -> None:
    opened = Opened()
    opened.go_on.set()
    done = threading.Event()

    def open_it() -> str:
        done.set()
        return opened.open()

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bring_unless_cancelled, open_it, opened.undo)
            await anyio.lowlevel.checkpoint()
            assert done.wait(WAIT_S)  # the loop stands still meanwhile: it hears of neither
            while threading.active_count() > 1 and any(
                each.name == "vhostsync-errand" for each in threading.enumerate()
            ):
                pass
            scope.cancel()
    assert await anyio.to_thread.run_sync(opened.undone.wait, WAIT_S)


@pytest.mark.anyio
async def test_an_error_reaches_who_waits() -> None:
    opened = Opened(OSError("no"))
    opened.go_on.set()
    with pytest.raises(OSError, match="no"):
        await bring_unless_cancelled(opened.open, opened.undo)
