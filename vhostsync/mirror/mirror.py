# SPDX-License-Identifier: Apache-2.0
"""The mirror's policy: attach a destination, let go of it, switch to it.

The engine (C) knows how to copy, replicate and flush; it reports what becomes of the destination. This file
decides what is allowed when, and what must be durably recorded before what (docs/durability.md, section 5).
Its rooms: `roles` (which disk is what), `record_keeper` (the record follows the engine), `switch`,
`catch_up`, `mirror_course` (what becomes of the mirror, and is told), `mirror_end` (cancelled, or left).
Before the first byte goes to a destination, the record says that it is inconsistent. One command at a time
(`turns`): a second one is refused, not queued.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Final

import anyio
import anyio.to_thread
import structlog

from vhostsync.confine.privileges import Reach
from vhostsync.engine.engine import Engine
from vhostsync.errors import EngineError, FenceError, MirrorError, StateRecordError, VhostsyncError
from vhostsync.events import EventHub
from vhostsync.host.errands import Errands, bring_unless_cancelled
from vhostsync.mirror.catch_up import CatchUp
from vhostsync.mirror.destination import (
    DESTINATION_LOCK_S,
    RESUMED_LOCK_S,
    Place,
    check_former,
    check_holds_nothing,
    discard,
    open_destination,
    put_mark_back,
    was_of_this_guest,
)
from vhostsync.mirror.disk_names import DiskNames
from vhostsync.mirror.fence import Fence, Means
from vhostsync.mirror.group_snapshot import SnapshotSteps, snapshot_steps
from vhostsync.mirror.group_switch import GroupSwitchSteps
from vhostsync.mirror.mirror_course import Course
from vhostsync.mirror.mirror_end import MirrorEnd
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import MirrorStatus, SwitchPlan, SwitchResult
from vhostsync.mirror.peer import NO_EARLIER_COPY
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.mirror.roles import Roles
from vhostsync.mirror.switch import Switch
from vhostsync.mirror.turns import Turns
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.bitmap import BitmapFile
from vhostsync.record.record_store import RecordStore
from vhostsync.record.state_record import GuestDisk, StateRecord, Wanted
from vhostsync.storage.disk import Disk
from vhostsync.storage.identity import DiskIdentity, same
from vhostsync.storage.kinds import is_named, kind_of

log = structlog.get_logger(__name__)

FENCE_WAIT_S: Final = 2.0
MARK_WAIT_S: Final = 5.0


class Mirror:
    """The mirror of one device. `run` must run as long as it is used."""

    def __init__(
        self,
        engine: Engine,
        source: Disk,
        hub: EventHub,
        store: RecordStore | None,
        record: StateRecord | None,
        bitmap: BitmapFile | None = None,
        peer_left: DiskIdentity | None = None,
        guest: GuestDisk | None = None,
        peer_until_ns: int | None = None,
        fence: Fence = Fence(),  # noqa: B008 frozen
        *,
        peer_equal: bool = False,
    ) -> None:
        self._engine = engine
        self._hub = hub
        self._roles = Roles(Place.of(source))
        record = record if record is not None else StateRecord.first(source.identity, guest)
        known = bitmap is not None and record.bitmap == bitmap.token
        if record.peer is not None and (known or peer_equal):
            self._roles.peer.known(record.peer, peer_left, peer_until_ns)
        self._read_only = source.read_only
        self._errands = Errands()
        self.reach = Reach()  # where destinations may lie
        self.turns = Turns()
        self._keeper = RecordKeeper(engine, self._roles, hub, store, record, bitmap, self._note_error)
        self.group_cut = self._keeper.group
        self._fence = fence
        self._course = Course(engine, self._roles, self._keeper, hub, self._waits_for)
        self._names = DiskNames()
        self._switch = Switch(engine, self._roles, self._keeper, hub, self._names)
        self._catch_up = CatchUp(engine, self._keeper)
        self._end = MirrorEnd(engine, self._roles, self._keeper, self._course, self._catch_up)

    @property
    def state(self) -> MirrorState:
        return self._course.state

    @property
    def source(self) -> Place:
        return self._roles.source

    @property
    def destination(self) -> Place | None:
        """The destination that is attached."""
        return self._roles.destination

    @property
    def source_path(self) -> str:
        """The disk that the guest is on."""
        return self._roles.source.name

    def source_is_named(self) -> bool:
        """Whether its name still leads to it. Blocks."""
        return is_named(self._roles.source.name, self._roles.source.identity)

    @property
    def destination_path(self) -> str | None:
        """The destination that is attached."""
        destination = self._roles.destination
        return destination.name if destination is not None else None

    @property
    def wanted(self) -> MirrorTarget | None:
        """What the last mirror-start that was obeyed has asked for, in this run or an earlier one, until
        somebody takes it back."""
        wanted = self._keeper.record.wanted
        if wanted is None:
            return None
        return MirrorTarget(wanted.path, False, wanted.cache, wanted.speed_bytes_per_s)

    @property
    def fenced(self) -> bool:
        """Requests to a former destination are not over: none can be attached yet (rule 8)."""
        return self._roles.fenced_path is not None

    @property
    def waits_for_hand(self) -> bool:
        """The mirror that is wanted cannot be attached again before the operator says that what a lost
        connection has left under way is over."""
        return self._waits_for() is Means.HAND

    def _waits_for(self) -> Means | None:
        wanted = self._keeper.record.wanted
        detached = self.state in (MirrorState.PASSTHROUGH, MirrorState.DEGRADED)
        if wanted is None or not detached or self.fenced or not self._keeper.is_unfenced(wanted.path):
            return None
        return self._fence.means

    @property
    def changed(self) -> anyio.Event:
        """Set at the next event of the engine."""
        return self._course.changed

    @property
    def bitmap(self) -> BitmapFile | None:
        return self._keeper.bitmap

    async def status(self) -> MirrorStatus:
        return await self._course.status()

    async def note_verified(self, *, different: bool | None) -> None:
        """What a verification has found: RecordKeeper.note_verified."""
        await self._keeper.note_verified(different=different)

    async def record_capacity(self, capacity_bytes: int) -> None:
        """What the guest is told of its disk, before it is told so. StateRecordError."""
        await self._keeper.record_capacity(capacity_bytes)

    def _note_error(self, error: str) -> None:
        self._course.last_error = error

    @property
    def epoch(self) -> int:
        return self._keeper.record.epoch

    async def run(self) -> None:
        """Keep the record true and report progress, until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._course.report_progress)
            tasks.start_soon(self._catch_up.run)
            await self._keeper.run()

    # ---- commands ------------------------------------------------------------------

    async def start(self, target: MirrorTarget) -> None:
        """Attach a destination and begin the copy: of what differs if it is the last one, as that was left;
        else of everything. MirrorError, DiskError, StateRecordError, EngineError:
        nothing was changed."""
        async with self.turns.take("mirror-start"):
            await self._start(target)

    async def resume(self) -> None:
        """Begin the mirror again that is wanted and not attached, but to no other disk than before: a name
        may mean another one by now. Errors as of `start`; query-mirror shows them."""
        await self.turns.free()
        target = self.wanted
        if target is None or self.state not in (MirrorState.PASSTHROUGH, MirrorState.DEGRADED):
            return
        try:
            if self.waits_for_hand:  # refused without the turn, which the operator's own start has to have
                await self._fence.make_certain(target.name)
            async with self.turns.take("resuming the mirror"):
                self._course.resuming = True
                await self._start(target, former=self._keeper.record.peer)
        except VhostsyncError as error:
            self._course.last_error = str(error)
            raise
        finally:
            self._course.resuming = False

    async def _start(self, target: MirrorTarget, former: DiskIdentity | None = None) -> None:
        if self.state in (MirrorState.SYNCING, MirrorState.STEADY, MirrorState.AHEAD):
            raise MirrorError(
                f"a mirror to {self._roles.destination_path} is {self.state} already; cancel it first"
            )
        if self._read_only:
            raise MirrorError("a disk that is served read-only has nothing to mirror")
        await anyio.to_thread.run_sync(self.reach.check, target.name)
        await self._await_fence()
        if former is not None and self.wanted is None:
            raise MirrorError("the mirror is not wanted any more")
        if self._keeper.is_unfenced(target.name) and not target.fenced:
            await self._fence.make_certain(target.name)
        disk, made = await self._open(target, DESTINATION_LOCK_S if former is None else RESUMED_LOCK_S)
        obeyed = False
        try:
            unfenced = await anyio.to_thread.run_sync(self._keeper.unfenced_as, disk.identity)
            self._check_fenced(unfenced, target)
            if former is not None:
                check_former(disk, former)
                await self._keeper.claims.check_unclaimed(disk.identity)
            elif not (target.create or target.force or await self._is_ours(disk.identity)):
                await anyio.to_thread.run_sync(check_holds_nothing, disk)
            await self._attach(disk, target, unfenced)
            obeyed = True
        finally:
            if not obeyed:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(discard, disk, made)

    async def _open(self, target: MirrorTarget, lock_timeout_s: float) -> tuple[Disk, object | None]:
        """`open_destination`, in a thread. Another host may keep it waiting for minutes: the end of the
        backend does not wait for that."""
        engine = self._engine.config
        open_it = partial(
            open_destination, target, self._roles.source, engine.capacity_bytes, engine.block_bytes,
            lock_timeout_s, self._keeper.record.disks,
        )  # fmt: skip
        if not kind_of(target.name).over_network:
            return await anyio.to_thread.run_sync(open_it)
        return await bring_unless_cancelled(open_it, lambda opened: discard(*opened))

    def _check_fenced(self, unfenced: list[DiskIdentity], target: MirrorTarget) -> None:
        """That it was made certain before by this name. FenceError."""
        names = [each.path for each in unfenced]
        if not names or target.fenced or target.name in names or self._fence.means is Means.LIMIT:
            return
        raise FenceError(
            f"requests of a lost connection may still be carried out at {target.name}, which was called "
            f"{names[0]} then; start the mirror to {names[0]} or, once they are certainly over, with --fenced"
        )

    async def _is_ours(self, disk: DiskIdentity) -> bool:
        """What it holds is this guest's. StateRecordError."""
        known = was_of_this_guest(self._keeper.record, disk)
        return known and await self._keeper.claims.claimed_by(disk) is None

    async def _await_fence(self) -> None:
        """A destination that was given up may still be written to by what it had under way (rule 8)."""
        with anyio.move_on_after(FENCE_WAIT_S):
            await self._course.wait_unfenced()
        if self._roles.fenced_path is not None:
            raise MirrorError(
                f"requests to the former destination {self._roles.fenced_path} are not over yet and could "
                f"still write there; wait until it has answered, or restart the backend"
            )
        await self._keeper.wait_recorded(FENCE_WAIT_S)
        if (await self._engine.snapshot()).record_pending:
            raise MirrorError(self._course.why_unrecorded())

    def _judge(self, disk: Disk) -> tuple[str | None, DiskIdentity, Disk]:
        """Why everything has to be copied; how it looks now; and the same disk, as it is recognised once it
        bears its mark. Blocks."""
        why_full, now = self._roles.peer.why_full(disk), disk.as_it_is()
        bitmap, peer = self._keeper.bitmap, self._keeper.record.peer
        if why_full == NO_EARLIER_COPY and bitmap and peer and same(peer, disk.identity):
            why_full = bitmap.changed or why_full
        return why_full, now, disk.with_mark(self._keeper.claims.mark_of(disk.identity))

    async def _attach(self, disk: Disk, target: MirrorTarget, fenced: list[DiskIdentity]) -> None:
        """It is done, or nothing was: once the record knows the destination, this is not cut off, for a
        restart goes by the record. `fenced`: the same disk by the names under which requests may have been
        under way there, which are over."""
        why_full, now, marked = await anyio.to_thread.run_sync(self._judge, disk)
        if self._course.resuming and why_full == NO_EARLIER_COPY:
            why_full = "what the last run's copy lacks is not known, for no --bitmap has kept it"
        full_copy_reason = "it was asked for" if target.full else why_full
        resync = full_copy_reason is None
        # A peer that is known and gets everything has not the content any more that the mirror has left.
        unknown = self._roles.peer.place is None and not self._roles.peer.forgotten
        as_left = not target.full and (resync or unknown)
        async with self._keeper.lock_for_good():
            former = self._keeper.record
            place = Place.of(marked)
            spare_doubt = as_left and former.peer_is(now)
            wanted = Wanted(target.name, target.cache, target.speed_bytes_per_s)
            record = former.with_peer(marked.identity, former.bitmap if resync else None)
            if not resync:
                record = record.with_difference(None)
            record = self._keeper.with_requests(record, place, fenced)
            await self._keeper.write(record.with_wanted(wanted))
            marked = await self._bearing_its_mark(marked)
            place = Place.of(marked)
            former_peer, self._course.last_error = self._roles.attach(place), None
            try:
                await self._engine.mirror_speed(target.speed_bytes_per_s)
                await self._engine.peer_differs(record.different_since is not None)
                await self._engine.mirror_start(marked, resync=resync, spare_doubt=spare_doubt)
            except EngineError:
                self._roles.destination, self._roles.peer = None, former_peer
                await anyio.to_thread.run_sync(put_mark_back, disk, place)
                await self._keeper.write(former)
                raise
            if not resync:
                await self._keeper.begin_bitmap(place)
            self._keeper.different_since = record.different_since
        self._course.full_copy_reason = full_copy_reason
        self._course.speed_bytes_per_s = target.speed_bytes_per_s
        log.info("copying", destination=place.name, everything_because=full_copy_reason)

    async def _bearing_its_mark(self, disk: Disk) -> Disk:
        """Before its first byte is overwritten: from there on a start must not miss what it is. Others wait
        for the record meanwhile, so not for ever: it has the mark, set or not."""
        try:
            marked = await self._errands.answer(disk.bear_mark, MARK_WAIT_S)
        except TimeoutError:
            log.warning("the destination has not taken its mark in time", destination=disk.name)
            return disk
        if marked.identity != disk.identity:
            try:
                await self._keeper.write(replace(self._keeper.record, peer=marked.identity))
            except StateRecordError as error:
                log.error("the record does not say which mark the destination bears", error=str(error))
        return marked

    async def cancel(self, *, force: bool) -> None:
        """Let go of the destination; in steady, unless forced, it becomes a copy of this moment first, and in
        ahead of the moment when the guest got ahead.
        MirrorError when there is none, or it could not be brought up to date."""
        async with self.turns.take("mirror-cancel"):
            await self._end.cancel(force=force)

    async def set_speed(self, bytes_per_s: int) -> None:
        """Limit the bulk copy, also when it is resumed; 0: no limit. MirrorError: there is none."""
        if self.wanted is None and self.state in (MirrorState.PASSTHROUGH, MirrorState.DEGRADED):
            raise MirrorError("there is no mirror whose copy could be limited; start one with --speed")
        async with self._keeper.lock:
            record = self._keeper.record
            if record.wanted is not None:
                wanted = replace(record.wanted, speed_bytes_per_s=bytes_per_s)
                await self._keeper.write(record.with_wanted(wanted))
        await self._engine.mirror_speed(bytes_per_s)
        self._course.speed_bytes_per_s = bytes_per_s

    # ---- the switch ------------------------------------------------------------------

    async def switch(
        self, *, deadline_s: float, max_pause_ms: float, keep_mirror: bool, accept_unreadable: bool = False,
        accept_different: bool = False,
    ) -> SwitchResult:
        """Move the guest to the destination. SwitchError: it is still on the source, and the mirror is as it
        was (or what the error says became of it)."""
        plan = SwitchPlan(max_pause_ms, keep_mirror, accept_unreadable, accept_different)
        async with self.turns.take("switch"):
            await self._switch.refuse_unless_possible(self.state, plan)
            return await self._switch.run(plan, deadline_s)

    @asynccontextmanager
    async def switch_in_steps(self, plan: SwitchPlan) -> AsyncIterator[GroupSwitchSteps]:
        """For a coordinator of several disks: one attempt, whose steps it takes. Nothing else commands the
        mirror meanwhile, and what was begun and not opened is taken back. SwitchError, EngineError."""
        async with self.turns.take("switch"):
            await self._switch.refuse_unless_possible(self.state, replace(plan, keep_mirror=True))
            async with self._switch.steps_in_group(plan) as steps:
                yield steps

    @asynccontextmanager
    async def snapshot_in_steps(self, max_pause_ms: float, cut: str | None) -> AsyncIterator[SnapshotSteps]:
        """The same for a snapshot, at whose end the destination is closed. MirrorError, EngineError."""
        async with self.turns.take("snapshot"):
            rooms = self._engine, self._roles, self._keeper, self._names
            async with snapshot_steps(*rooms, self.state, max_pause_ms, cut) as steps:
                yield steps
            await self._end.see_it_off()

    async def leave_source(self, deadline_s: float) -> SwitchResult | None:
        """The engine keeps back what the source has failed: switch, without a flush of either disk. None:
        another switch has done so meanwhile. VhostsyncError."""
        async with self.turns.take_first("a switch from a failed source"):
            return await self._switch.leave_source(deadline_s)

    # ---- the end of the backend ----------------------------------------------------------

    async def detach(self, *, force: bool) -> None:
        """No frontend is attached: leave a destination, worth what the record says. Errors are logged."""
        await self._end.detach(force=force)

    @property
    def left_equal(self) -> bool:
        """After `detach`: both disks hold the same, durably."""
        return self._end.left_equal

    async def abandon(self) -> None:
        """The end shall not wait for the destination any longer: what waits for it goes on without."""
        await self._end.abandon()

    def record_clean(self) -> None:
        """After the engine was closed: how both disks look, so that a later change is seen. Blocks."""
        if not self._read_only:
            self._keeper.write_clean_end()
