# SPDX-License-Identifier: Apache-2.0
"""The steps in which the destinations of several disks are let go as copies of one instant: prepare, close,
carry out, open; or all as it was.

The coordinator takes each step on all disks before the next one. With the gates of all closed each
destination holds all that its guest's disk does (M = G), and stays so: they are copies of one instant. None
is let go before all of them hold that durably (`carry_out`), and none of the guest's requests is taken up
before its own destination was let go.

The record calls the destination outdated before the gate closes: that is too modest until it is let go, and
spares the guest a wait for the record's disk. It wants the mirror until that was let go, for a kill before
that has ended nothing; and no more before that is told, for a restart would mirror to the copy again.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from vhostsync.engine.engine import Engine
from vhostsync.errors import MirrorError, StateRecordError
from vhostsync.mirror.bad_ranges import why_no_copy
from vhostsync.mirror.disk_names import DiskNames
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import Opened
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.mirror.record_writer import outdated
from vhostsync.mirror.roles import Roles
from vhostsync.mirror.switch_steps import close_gate


class SnapshotSteps:
    """To be used with the turn of the mirror and the lock of the record, from before `prepare` to after
    `leave`, which ends each attempt."""

    def __init__(
        self, engine: Engine, roles: Roles, keeper: RecordKeeper, max_pause_ms: float, cut: str | None
    ) -> None:
        self._engine = engine
        self._roles = roles
        self._keeper = keeper
        self._max_pause_ms = max_pause_ms
        self._cut = cut
        self._former = keeper.record
        self._prepared = self._closed = False
        self.result: Opened | None = None

    async def prepare(self) -> None:
        """Promises: the record calls the destination outdated. Undone by `leave`. StateRecordError."""
        self._prepared = True
        await self._keeper.write(outdated(self._former))

    async def close(self) -> bool:
        """As of SwitchSteps."""
        self._closed = await close_gate(self._engine, int(self._max_pause_ms * 1000))
        return self._closed

    async def carry_out(self) -> None:
        """Promises: the destination holds durably all that the guest's disk does, and the guest is held
        still. EngineError."""
        assert self._closed
        await self._engine.mirror_drain()

    async def open(self) -> Opened:
        """Promises: the destination is let go, then the guest goes on. Not undone. Told after `leave`."""
        with anyio.CancelScope(shield=True):
            destination = self._roles.destination_path
            self._roles.fence()
            await self._engine.mirror_stop()
            pause_ns = await self._engine.ungate()
            opened_ns = time.monotonic_ns()
        self.result = Opened(pause_ns // 1000, opened_ns, self._roles.source.name, destination)
        return self.result

    async def leave(self) -> None:
        """The end: unless the destination was let go, all is taken back. The guest goes on first: until the
        record follows it is too modest, and its disk may hang. StateRecordError: it was let go, and a restart
        would mirror to it again."""
        if not self._prepared:
            return
        with anyio.CancelScope(shield=True):
            if self.result is not None:
                await self._record_let_go()
                return
            try:
                if self._closed:
                    await self._engine.ungate()
            finally:
                await self._keeper.write_back(self._former, "the record calls the mirror outdated still")

    async def _record_let_go(self) -> None:
        unwanted = self._keeper.record.with_wanted(None)
        if self._cut is not None:
            unwanted = unwanted.with_cut(self._cut)
        if not await self._keeper.write_back(unwanted, "a restart would mirror to the copy again"):
            raise StateRecordError(
                f"the destination is let go of, but until the state record can be written a restart would "
                f"mirror to it again: {self._keeper.write_error}"
            )


@asynccontextmanager
async def snapshot_steps(
    engine: Engine, roles: Roles, keeper: RecordKeeper, names: DiskNames, state: MirrorState,
    max_pause_ms: float, cut: str | None,
) -> AsyncIterator[SnapshotSteps]:
    """One attempt, with the record's lock. MirrorError, EngineError."""
    await _refuse_unless_possible(engine, keeper, state)
    await engine.mirror_drain()
    if (why := await names.why_not_found(roles.destination)) is not None:
        raise MirrorError(why)
    async with keeper.lock:
        steps = SnapshotSteps(engine, roles, keeper, max_pause_ms, cut)
        try:
            yield steps
        finally:
            await steps.leave()


async def _refuse_unless_possible(engine: Engine, keeper: RecordKeeper, state: MirrorState) -> None:
    """MirrorError where the destination is no copy of the guest's disk."""
    if state is not MirrorState.STEADY:
        raise MirrorError(
            f"a snapshot needs the mirror in the steady state, and it is {state}; start it and wait until it "
            f"is steady (mirror start --wait)"
        )
    if (why := await why_no_copy(engine, keeper.different_since)) is not None:
        raise MirrorError(why)
