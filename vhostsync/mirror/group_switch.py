# SPDX-License-Identifier: Apache-2.0
"""The steps of a switch of several disks at once, as a coordinator takes them on this one: prepare, close,
carry out, open; or all as it was.

The coordinator takes each step on all disks before the next one. What can fail comes before `open`: until
then the guest is held, both disks hold the same, and the exchange is undone by another one. So all are
switched or none is, unless the coordinator or a backend ends in the very moment in which gates are opened.

For that the mirror is kept through the exchange, so the old disk has to work. Where it is not to be kept, it
is let go of before the gate opens, and gets nothing that the guest writes afterwards.
"""

import errno
import time
from typing import Final

import anyio
import structlog

from vhostsync.engine.engine import Engine
from vhostsync.errors import EngineError
from vhostsync.mirror.mirror_status import Opened, SwitchPlan
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.mirror.record_writer import outdated
from vhostsync.mirror.roles import Roles
from vhostsync.mirror.switch_steps import SwitchSteps
from vhostsync.record.record_store import Mark

log = structlog.get_logger(__name__)

BACK_TRIES: Final = 100
BACK_RETRY_S: Final = 0.01


class GroupSwitchSteps(SwitchSteps):
    """With `carry_out` and `open` in place of `exchange`."""

    def __init__(self, engine: Engine, roles: Roles, keeper: RecordKeeper, plan: SwitchPlan) -> None:
        super().__init__(engine, keeper, plan)
        self._roles = roles
        self._former = keeper.record
        self._exchanged = False  # and the gate is closed still
        self.result: Opened | None = None

    async def prepare(self) -> None:
        """As of SwitchSteps."""
        record = self._keeper.switched(keep_mirror=True)
        if not self._plan.keep_mirror:
            record = outdated(record).with_wanted(None)
        self._prepared = await self._keeper.prepare_switch(record)

    async def carry_out(self) -> None:
        """Promises: the disks are exchanged; a restart serves the new one. The guest is held still, and both
        disks hold the same. Undone by `leave`. StateRecordError, EngineError: they are not
        exchanged."""
        assert self._closed
        mark = self._prepared.mark if self._prepared is not None else None
        with anyio.CancelScope(shield=True):
            if self._prepared is not None and mark is None:
                self._renamed = True
                await self._keeper.change_to(self._prepared)
            await self._engine.exchange_and_hold(mark, accept_different=self._plan.accept_different)
            self._exchanged = True

    async def open(self) -> Opened:
        """Promises: the guest goes on, on the new disk. Not undone but by another switch."""
        assert self._exchanged
        with anyio.CancelScope(shield=True):
            if not self._plan.keep_mirror:
                # What was announced calls the old disk outdated, durably: flushes may go on without it.
                self._roles.fence()
                await self._engine.mirror_stop()
            pause_ns = await self._engine.ungate()
            opened_ns = time.monotonic_ns()
            self._closed = self._exchanged = False
        destination = self._roles.destination
        name = destination.name if destination is not None else None
        self.result = Opened(pause_ns // 1000, opened_ns, self._roles.source.name, name)
        return self.result

    async def leave(self) -> None:
        """The end: what was opened is settled, and all else taken back."""
        with anyio.CancelScope(shield=True):
            if self._exchanged and not await self._exchange_back():
                await self.open()
            if self.result is not None:
                await self._keeper.settle_switch(self._prepared)
            else:
                await self.take_back()

    async def _exchange_back(self) -> bool:
        """False: that cannot be, for the old disk is lost by now; the guest has to go on, on the new one."""
        mark = self._prepared.mark if self._prepared is not None else None
        unmarked = Mark(mark.memory, 0) if mark is not None else None
        former = self._former.with_difference(self._keeper.different_since)
        for _ in range(BACK_TRIES):
            self._keeper.expect_exchange(former)
            try:
                await self._engine.exchange_and_hold(unmarked, accept_different=True)
            except EngineError as error:
                self._keeper.expect_exchange(None)
                if error.errno != errno.EBUSY:
                    log.error("the disks cannot be exchanged back; the guest goes on", error=str(error))
                    return False
                await anyio.sleep(BACK_RETRY_S)  # a flush is under way behind the gate
            else:
                self._exchanged = False
                return True
        log.error("the disks cannot be exchanged back, since a flush does not end; the guest goes on")
        return False
