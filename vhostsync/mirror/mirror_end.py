# SPDX-License-Identifier: Apache-2.0
"""The end of a mirror: the operator cancels it, or the backend ends. What the destination is worth from then
on is in the record before any flush is confirmed without it (docs/durability.md, section 5)."""

from typing import Final

import anyio
import anyio.lowlevel
import structlog

from vhostsync.engine.engine import Engine
from vhostsync.errors import EngineError, MirrorError, StateRecordError, VhostsyncError
from vhostsync.mirror.catch_up import CatchUp
from vhostsync.mirror.group_cut import CUT_S
from vhostsync.mirror.mirror_course import Course
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.peer import look_in_time
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.mirror.record_writer import outdated
from vhostsync.mirror.roles import Roles
from vhostsync.record.heartbeat import AHEAD_NS, LANDING_NS

log = structlog.get_logger(__name__)

SEEN_OFF_S: Final = 2.0
OWN_CHANGES_S: Final = (AHEAD_NS + LANDING_NS) / 1e9 + 0.02
"""After a crash, what has changed the disk until so long after it was let go of is taken for the mirror's: by
its ctime, which is some milliseconds behind."""
GROUP_S: Final = 2 * CUT_S
"""A loss waits for the group for so long at most, and for another one before it."""


class MirrorEnd:
    """`left_equal`: after `detach`, both disks hold the same, durably."""

    def __init__(
        self, engine: Engine, roles: Roles, keeper: RecordKeeper, course: Course, catch_up: CatchUp
    ) -> None:
        self.left_equal = False
        self._engine = engine
        self._roles = roles
        self._keeper = keeper
        self._course = course
        self._catch_up = catch_up

    # ---- a command ---------------------------------------------------------------------

    async def cancel(self, *, force: bool) -> None:
        """With the mirror's turn. MirrorError."""
        if self._course.state is MirrorState.PASSTHROUGH and self._keeper.record.wanted is None:
            raise MirrorError("there is no mirror to cancel")
        if self._course.state is MirrorState.STEADY and not force:
            try:
                await self._engine.mirror_drain()
            except EngineError as error:
                raise MirrorError(
                    f"the destination could not be brought up to date ({error}); mirror-cancel --force lets "
                    f"go without that"
                ) from error
        with self._catch_up.held():
            if not force:
                await self._catch_up.drained()
            await anyio.lowlevel.checkpoint()  # the last moment at which this can be given up
            with anyio.CancelScope(shield=True):
                await self._let_go(for_good=True)
                if not force:
                    await self.see_it_off()

    async def _let_go(self, *, for_good: bool) -> None:
        """`for_good`: a restart does not resume the mirror."""
        group = self._keeper.group
        if group.joined and self._course.state is MirrorState.STEADY:
            await group.leave()
            await self._keeper.wait_recorded(GROUP_S)
        # First the record: after the stop, flushes are confirmed without the destination.
        async with self._keeper.lock:
            record = self._keeper.record
            if for_good:
                record = record.with_wanted(None)
            if self._course.state is MirrorState.STEADY:
                record = outdated(record)
            if record != self._keeper.record:
                await self._keeper.write(record)
            if self._course.state is not MirrorState.PASSTHROUGH:
                self._roles.fence()
                await self._engine.mirror_stop()

    async def see_it_off(self) -> None:
        """Whoever changes the destination after the command has returned is to be noticed. Where it does not
        close, or cannot be looked at, in time, nobody could tell such a change from the mirror's own."""
        peer, place = self._roles.peer, self._roles.peer.place
        with anyio.move_on_after(SEEN_OFF_S) as closing:
            await self._course.wait_unfenced()
        if closing.cancelled_caught or not await look_in_time(peer, SEEN_OFF_S):
            if peer.give_up(place):
                await self._disbelieve_bitmap()
        elif self._keeper.bitmap is not None:
            await anyio.sleep(OWN_CHANGES_S)

    async def _disbelieve_bitmap(self) -> None:
        """A restart after a crash would take all changes for the mirror's, until the disk was closed."""
        async with self._keeper.lock:
            record = self._keeper.record
            if record.bitmap is not None:
                why = "a restart would believe what the dirty bitmap says of the disk that was let go of"
                await self._keeper.write_back(record.with_bitmap(None), why)

    # ---- the end of the backend ----------------------------------------------------------

    async def detach(self, *, force: bool) -> None:
        """No frontend is attached: leave a destination, worth what the record says. Errors are logged."""
        if self._course.state is MirrorState.STEADY and not force:
            try:
                await self._engine.mirror_drain()
                self.left_equal = await self._holds_the_same()
            except EngineError as error:
                log.error("the destination could not be brought up to date", error=str(error))
        elif not force:
            with self._catch_up.held():
                await self._catch_up.drained()
        await self._keeper.wait_recorded(GROUP_S)  # a loss: no end hides it
        try:
            await self._keeper.record_doubt()
        except StateRecordError as error:
            log.error("the state record does not have what is in doubt", error=str(error))

    async def _holds_the_same(self) -> bool:
        """Both disks, where nobody writes to them any more and the destination was flushed."""
        now, record = await self._engine.snapshot(), self._keeper.record
        spoilt = now.doubt or now.spared or now.unreadable or record.different_since is not None
        steady = self._course.state is MirrorState.STEADY
        return steady and not spoilt and not self._engine.requests_left

    async def abandon(self) -> None:
        """The end shall not wait for the destination any longer: what waits for it goes on without."""
        if self._course.state in (MirrorState.STEADY, MirrorState.SYNCING, MirrorState.AHEAD):
            try:
                await self._let_go(for_good=False)
            except VhostsyncError as error:
                log.error("the destination could not be let go", error=str(error))
