# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT: the first one ends in order, a second one without waiting for the destination.

Python notes a signal and calls its handler when the interpreter comes to it. One that arrives between the
interpreter's last look and the event loop's sleep wakes nobody, and so does one that another thread has
received. So no handler does anything here: the number is written into a pipe at the moment of the signal, by
the interpreter's own handler in C, and the event loop waits for that. Not anyio's receiver: where that one
ends, there is a moment in which a signal kills.
"""

import os
import signal
from typing import Final, Protocol

import anyio
import anyio.abc
import structlog

log = structlog.get_logger(__name__)

ENDING: Final = (signal.SIGTERM, signal.SIGINT)


class Ending(Protocol):
    """What a signal ends (daemon.py)."""

    @property
    def stopping(self) -> bool: ...
    def stop(self, *, force: bool = False) -> None: ...


async def watch_signals(
    backend: Ending, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Until the second one came, or cancelled; more are ignored, also while the last words are written."""
    come, noted = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    former = signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
    for each in ENDING:
        signal.signal(each, _nothing)
    try:
        task_status.started()
        forced = False
        while not forced:  # no longer: a flood of signals would keep everybody else from ending
            await anyio.wait_readable(come)
            for number in os.read(come, 2):
                if number in ENDING:
                    forced = backend.stopping
                    log.info("stopping", signal=signal.Signals(number).name)
                    backend.stop(force=forced)
    finally:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        signal.set_wakeup_fd(former)
        os.close(noted)
        os.close(come)


def _nothing(_number: int, _frame: object) -> None:
    """Or the interpreter would not note the signal."""
