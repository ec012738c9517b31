# SPDX-License-Identifier: Apache-2.0
"""Deadlines that count only the time for which this process ran.

A process that is stopped (SIGSTOP, a freezer, a debugger, a hypervisor) and goes on finds every deadline
passed, though nobody has kept it waiting. The data thread has a clock that stands still meanwhile
(c_shim/engine/engine.c); here a look every TICK_S finds the gap and moves the deadline. Timers are called
in the order of their times, so the look comes before the deadline that it moves, unless less than TICK_S of
that was left.

For what gives up for good. Whoever merely tries again, or tells an operator so, needs none of it.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio

TICK_S: Final = 0.1
GAP_S: Final = 0.25
"""Less is the scheduler's."""


class _Follower:
    def __init__(self, scope: anyio.CancelScope) -> None:
        self._scope = scope
        self._loop = asyncio.get_running_loop()
        self._look_later()

    def _look_later(self) -> None:
        self._due = self._loop.time() + TICK_S
        self._timer = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        late_s = self._loop.time() - self._due
        if late_s > GAP_S:
            self._scope.deadline += late_s
        self._look_later()

    def stop(self) -> None:
        self._timer.cancel()


@contextmanager
def fail_after(seconds: float) -> Iterator[anyio.CancelScope]:
    """anyio.fail_after, for time that was lived through."""
    with anyio.fail_after(seconds) as scope:
        follower = _Follower(scope)
        try:
            yield scope
        finally:
            follower.stop()
