# SPDX-License-Identifier: Apache-2.0
"""Lets the destination catch up after the guest was pulled ahead of it (c_shim/mirror/pull_ahead.c).

While the mirror is ahead, the destination holds a moment of the source and could take its place. From the
first region that is copied on it holds no such moment. So before the engine is told to begin, the state
record must say durably that the destination is inconsistent. The engine decides how soon it may begin: it
waits longer each time that the destination could not keep up.

Whoever needs the destination as that moment (mirror-cancel, the end of the backend) holds this back.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio
import structlog

from vhostsync.engine.engine import Engine
from vhostsync.engine.engine_event import EngineEvent, EventKind
from vhostsync.engine.snapshot import State
from vhostsync.errors import EngineError, StateRecordError
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.record.state_record import Worth

log = structlog.get_logger(__name__)

RETRY_S: Final = 1.0
TOO_EARLY: Final = (errno.EAGAIN, errno.EBUSY, errno.ENOTCONN)


class CatchUp:
    """`run` must run as long as it is used."""

    def __init__(self, engine: Engine, keeper: RecordKeeper) -> None:
        self._engine = engine
        self._keeper = keeper
        self._ahead = False
        self._due_s: float | None = None  # on the event loop's clock; None: the log is not drained
        self._holders = 0
        self._changed = anyio.Event()
        engine.on_event(self._on_event)

    def _on_event(self, event: EngineEvent) -> None:
        if event.kind is EventKind.STATE:
            self._ahead, self._due_s = event.value == State.AHEAD, None
        elif event.kind is EventKind.AHEAD_DRAINED:
            self._due_s = anyio.current_time() + event.value / 1e9
            log.info("the destination holds what was in the log", catches_up_in_s=round(event.value / 1e9, 3))
        else:
            return
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The destination stays what it is, but for a catch-up that has begun."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self._wake()

    @property
    def is_held(self) -> bool:
        return self._holders > 0

    async def drained(self) -> None:
        """Until the destination holds durably what was in the log, or the mirror is not ahead any more."""
        while self._ahead and self._due_s is None:
            await self._changed.wait()

    async def _begin(self) -> None:
        """StateRecordError, EngineError."""
        async with self._keeper.lock:
            if not self._ahead or self.is_held:
                return
            if (await self._engine.snapshot()).record_pending:
                raise EngineError.from_errno("catching up before the state record is written", errno.EBUSY)
            if self._keeper.record.peer_worth is not Worth.INCONSISTENT:
                await self._keeper.write(self._keeper.record.with_worth(Worth.INCONSISTENT))
            await self._engine.catch_up()

    async def run(self) -> None:
        """Catch up whenever it is time, until cancelled."""
        while True:
            changed = self._changed
            if not self._ahead or self._due_s is None or self.is_held:
                await changed.wait()
                continue
            if (left_s := self._due_s - anyio.current_time()) > 0:
                with anyio.move_on_after(left_s):
                    await changed.wait()
                continue
            try:
                await self._begin()
                continue
            except StateRecordError as error:
                log.error("the mirror stays ahead until the state record can be written", error=str(error))
            except EngineError as error:
                if error.errno not in TOO_EARLY:
                    raise
                log.debug("too early to catch up", error=str(error))
            with anyio.move_on_after(RETRY_S):
                await changed.wait()
