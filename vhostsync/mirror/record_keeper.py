# SPDX-License-Identifier: Apache-2.0
"""Keeps the state record true to what the engine reports (docs/durability.md, section 5):

* once the engine reports `steady`, it says up to date (late is safe, early would not be);
* when the engine lost a steady destination, or the guest got ahead of one, the engine holds every flush until
  the record says "outdated";
* when the dirty bitmap cannot be written, writes that need it are held until the record names none;
* ranges in doubt (rule 5) are in it soon after the engine has reported the failed write, and out of it within
  about a second after the guest has healed them. In between, a crash forgets a doubt, or leaves one too many;
* what a verification has found is in it soon after.

Events of one kind are taken one by one, in their order; one kind waits for no other. How it is written, by
whom and when, and what a switch does with it: record_writer.py.
"""

import errno
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Final

import anyio
import anyio.to_thread
import structlog

from vhostsync import events
from vhostsync.engine.engine import Engine
from vhostsync.engine.engine_event import EngineEvent, EventKind, Reason
from vhostsync.engine.snapshot import State
from vhostsync.errors import EngineError, StateRecordError, SupersededError, VhostsyncError
from vhostsync.events import EventHub
from vhostsync.host.errands import bring_in_time
from vhostsync.mirror.bad_ranges import why_no_copy
from vhostsync.mirror.claims import Claims
from vhostsync.mirror.destination import Place, look_again
from vhostsync.mirror.group_cut import GroupCut
from vhostsync.mirror.peer import look_in_time
from vhostsync.mirror.record_writer import RecordWriter, outdated
from vhostsync.mirror.roles import Roles
from vhostsync.mirror.under_way import CLOSED, UnderWay
from vhostsync.record.bitmap import BitmapFile
from vhostsync.record.record_store import RecordStore
from vhostsync.record.state_record import StateRecord, Worth, timestamp
from vhostsync.storage.identity import DiskIdentity, same
from vhostsync.storage.kinds import kind_of

log = structlog.get_logger(__name__)

RETRY_S: Final = 1.0
LOOK_S: Final = 30.0
"""At a destination that was lost, and has answered since."""
END_LOOK_S: Final = 2.0
"""At the end, at each disk here. One that hangs keeps nobody from ending; it is no clean end then."""

_TO_RECORD: Final = (EventKind.DEGRADED, EventKind.BITMAP_FAILED)


class RecordKeeper(RecordWriter):
    """`run` must run as long as it is used. `failed` is told each error, as a sentence."""

    def __init__(
        self,
        engine: Engine,
        roles: Roles,
        hub: EventHub,
        store: RecordStore | None,
        record: StateRecord,
        bitmap: BitmapFile | None,
        failed: Callable[[str], None],
    ) -> None:
        super().__init__(store, record, failed)
        self.claims = Claims(store, lambda: self.record)
        self.bitmap = bitmap
        self.flushes_fail = False  # because the record that they need cannot be written
        self._engine = engine
        self._roles = roles
        self._hub = hub
        self.bitmap_failed = False  # there is one, and a restart will not find there what differs
        self._spared: tuple[tuple[int, int], ...] = ()  # when it was last looked for, so at the end
        self._state = State.PASSTHROUGH
        self._to_record: dict[EventKind, deque[EngineEvent]] = {kind: deque() for kind in _TO_RECORD}
        self._came = anyio.Event()
        self._outdating = 0  # losses that are not recorded yet
        self._outdated = anyio.Event()  # set when one is, or cannot be
        self._source_failed = anyio.Event()
        self._fence_clear = anyio.Event()
        self._under_way = UnderWay(roles)
        self.group = GroupCut(
            engine, lambda: self._state is State.STEADY, lambda: why_no_copy(engine, self.different_since),
            lambda: self.record.cut, failed,
        )  # fmt: skip
        self._steady = anyio.Event()
        self._verified = anyio.Event()
        engine.on_event(self._on_event)

    # ---- what else is written -----------------------------------------------------

    async def begin_bitmap(self, destination: Place) -> None:
        """The engine has marked that everything differs; once that is durable, the record may name it."""
        bitmap = self.bitmap
        if bitmap is None:
            return
        try:
            pair = (self._roles.source.identity, destination.identity)
            await anyio.to_thread.run_sync(bitmap.new_peer, pair)
            await self.write(self.record.with_bitmap(bitmap.token))
            self.bitmap_failed = False
        except (OSError, VhostsyncError) as error:
            # The record names none: a restart copies everything, and loses nothing.
            self.bitmap_failed = True
            log.error("the dirty bitmap is not used for this destination", error=str(error))

    async def record_capacity(self, capacity_bytes: int) -> None:
        """StateRecordError. Of a disk that never had another beside it, its size is taken at each start."""
        async with self.lock:
            guest = self.record.guest
            if guest is None:
                return
            record = self.record.with_guest(replace(guest, capacity_bytes=capacity_bytes))
            if record.at_stake:
                await self.write(record)
            else:
                self.record = record

    def write_clean_end(self) -> None:
        """After the engine was closed: how both disks look, so that a later change is seen. Blocks."""
        if self._store is None:
            return
        record = self._under_way.after_the_end(self.record, self._engine.unanswered)
        ended = self._at_clean_end(record) or record
        if ended == self.record:
            return
        try:
            self._store.change(ended)
        except StateRecordError as error:
            log.error("the state record could not note the clean end", error=str(error))

    def _at_clean_end(self, record: StateRecord) -> StateRecord | None:
        """None: a disk cannot be looked at, so the end is no clean one."""
        current, known, spared = _as_left(self._roles.source), record.peer, self._spared
        if current is None:
            return None
        peer, left = known, self._roles.peer.left
        if known is not None and self._roles.destination is not None:
            peer = _as_left(self._roles.destination)
            if peer is None:
                return None
        elif known is not None and left is not None and same(left, known):
            peer = left
        elif self._roles.peer.may_be_changed:
            spared = ()  # what is there may be somebody else's
        return record.detached(current, peer, spared)

    # ---- following the engine ----------------------------------------------------

    def _on_event(self, event: EngineEvent) -> None:
        if event.kind is EventKind.STATE:
            self._state = State(event.value)
            if self._state is State.STEADY:
                self._steady.set()
            if event.reason == Reason.SWITCH:
                # Here and not where the exchange is awaited: what the engine reports next (the loss of the
                # new destination, say) is to be recorded of the new roles.
                assert self._announced is not None
                self.record, self._announced = self._announced, None
                self.different_since = self.record.different_since
                if self.record.peer is None:
                    self._under_way.note_left(self._roles.source)
                self._roles.exchange(keep_mirror=self.record.peer is not None)
        elif event.kind is EventKind.IO_ERROR and event.role == "source":
            self._source_failed.set()
        elif event.kind in CLOSED:
            self._under_way.note_closed(event)
            self._fence_clear.set()
        if event.kind is EventKind.DEGRADED:
            self._outdating += 1
            self.group.note_lost(differed=event.differed)
        if event.kind in _TO_RECORD:
            self._to_record[event.kind].append(event)
            self._came.set()
            self._came = anyio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._write_late)
            tasks.start_soon(self._follow_doubt)
            tasks.start_soon(self._follow_fence, tasks)
            tasks.start_soon(self._follow_steady)
            tasks.start_soon(self._follow_verified)
            tasks.start_soon(self._follow, EventKind.BITMAP_FAILED, self._give_up_bitmap)
            await self._follow(EventKind.DEGRADED, self._record_outdated)

    async def _write_late(self) -> None:
        """The start has left a record for later, or it is unknown what has become of a change. Any other
        record that is written meanwhile does as well."""
        store = self._store
        while store is not None:
            try:
                async with self.lock:
                    if store.late:
                        await self.write(self.record)
                        log.info("the state record is written")
            except SupersededError as error:
                self._failed(str(error))
                log.error("the state record is left to somebody else", error=str(error))
                return
            except StateRecordError as error:
                self._failed(str(error))
                await anyio.sleep(RETRY_S)
                continue
            await self._unsettled.wait()
            self._unsettled = anyio.Event()

    async def _follow_fence(self, tasks: anyio.abc.TaskGroup) -> None:
        """Not in turn with the rest, which may wait for the record's disk: whoever changes the lost one
        meanwhile is to be noticed."""
        while True:
            await self._fence_clear.wait()
            self._fence_clear = anyio.Event()
            tasks.start_soon(look_in_time, self._roles.peer, LOOK_S)  # it keeps nobody waiting who hangs
            await self._until_written(self._record_answered, "a restart would want a fence without need")

    def is_unfenced(self, name: str) -> bool:
        """Requests of a lost connection may still be carried out at the disk that is called so."""
        return self._under_way.is_unfenced(self.record, name)

    def unfenced_as(self, identity: DiskIdentity) -> list[DiskIdentity]:
        """The same of a disk, however it is called: what it was then. May ask a name server. Blocks."""
        return self._under_way.unfenced_as(self.record, identity)

    def with_requests(self, record: StateRecord, place: Place, fenced: list[DiskIdentity]) -> StateRecord:
        """For the record to be written before the first request there; of `unfenced_as` all is over."""
        assert self.lock.locked()
        return self._under_way.with_requests(record, place, fenced)

    async def _record_answered(self) -> str | None:
        async with self.lock:
            record = self._under_way.without_answered(self.record)
            try:
                if record != self.record:
                    await self.write(record)
            except StateRecordError as error:
                return str(error)
            self._under_way.note_written(record)
            return None

    async def _follow_doubt(self) -> None:
        behind = False
        while True:
            if not behind and not self.record.doubt:
                await self._source_failed.wait()
            self._source_failed = anyio.Event()
            try:
                await self.record_doubt()
                behind = False
            except StateRecordError as error:
                if not behind:
                    self._failed(str(error))
                    log.error("a restart would forget what is in doubt", error=str(error))
                behind = True
            with anyio.move_on_after(RETRY_S):
                await self._source_failed.wait()

    async def record_doubt(self) -> None:
        """What is in doubt now. StateRecordError."""
        async with self.lock:
            now = await self._engine.snapshot()
            self._spared = now.spared
            record = self.record.with_doubt(now.doubt, now.spared)
            if record != self.record:
                await self.write(record)

    async def _follow(self, kind: EventKind, do: Callable[[EngineEvent], Awaitable[None]]) -> None:
        """For these the engine waits. Those of one kind in their order; one kind waits for no other, each of
        which may try again and again to write the record."""
        events = self._to_record[kind]
        while True:
            came = self._came
            while events:
                await do(events.popleft())
            if came is self._came:
                await came.wait()

    async def _follow_steady(self) -> None:
        """Nobody waits for this. Too modest a record loses no data, but may
        not stay so: nobody would go on from such a destination when the source is lost."""
        while True:
            await self._steady.wait()
            self._steady = anyio.Event()
            await self._until_written(
                self._record_up_to_date, "the state record still calls the destination inconsistent"
            )

    async def _until_written(self, write: Callable[[], Awaitable[str | None]], otherwise: str) -> None:
        """`write` says why not, or None."""
        told = False
        while (error := await write()) is not None:
            if not told:
                self._failed(error)
                log.error(otherwise, error=error)
            told = True
            await anyio.sleep(RETRY_S)

    async def note_verified(self, *, different: bool | None) -> None:
        """A verification has found so (None: nothing that lasts). What forbids a switch holds on return; the
        record follows."""
        if different and self.record.peer is not None:
            self.different_since = self.different_since or timestamp()
        elif different is not None:
            self.different_since = None
        await self._engine.peer_differs(self.different_since is not None)
        self._verified.set()

    async def _follow_verified(self) -> None:
        while True:
            await self._verified.wait()
            self._verified = anyio.Event()
            await self._until_written(
                self._record_verified, "a restart would forget what the verification has found"
            )

    async def _record_verified(self) -> str | None:
        async with self.lock:
            record = self.record.with_difference(self.different_since)
            try:
                if record != self.record:
                    await self.write(record)
            except StateRecordError as error:
                return str(error)
            return None

    async def _record_up_to_date(self) -> str | None:
        """Why not, or None. Much may have happened since: only what is steady now may be called so."""
        async with self.lock:
            if self._state is not State.STEADY or self.record.peer_worth is not Worth.INCONSISTENT:
                return None
            try:
                await self.write(self.record.with_worth(Worth.UP_TO_DATE))
            except StateRecordError as error:
                return str(error)
            return None

    async def wait_recorded(self, longest_s: float) -> None:
        """Until the engine waits for no record of a loss, or that cannot be written; no longer than this."""
        with anyio.move_on_after(longest_s):
            while self._outdating and not self.flushes_fail:
                await self._outdated.wait()

    async def _record_outdated(self, _: EngineEvent) -> None:
        """Until it is durable that the destination is outdated, flushes are held; while it cannot be made
        durable, they fail."""
        loss = await self.group.decide()
        while (error := await self._write_outdated(loss.cut)) is not None:
            self._failed(error)
            log.error("flushes fail until the state record can be written", error=error)
            await self._tell_engine(errno.EIO)
            await anyio.sleep(RETRY_S)
        loss.held = False
        await self._tell_engine(0)

    async def _write_outdated(self, cut: str | None) -> str | None:
        async with self.lock:
            record = outdated(self.record) if self.record.peer is not None else self.record
            try:
                if record.peer is not None:
                    await self.write(record if cut is None else record.with_cut(cut))
            except StateRecordError as error:
                return str(error)
            return None

    async def _tell_engine(self, error_number: int) -> None:
        self.flushes_fail = error_number != 0
        await self._engine.record_written(error_number)
        self._outdating -= error_number == 0
        self._outdated.set()
        self._outdated = anyio.Event()

    async def _give_up_bitmap(self, event: EngineEvent) -> None:
        """Writes that need it are held until a crash cannot make anybody believe it."""
        reason = str(EngineError.from_errno("writing the dirty bitmap", event.error))
        self._failed(reason)
        self.bitmap_failed = True
        log.error("going on without the dirty bitmap", error=reason)
        self._hub.publish(events.BITMAP_FAILED, {"error": reason})
        while True:
            try:
                async with self.lock:
                    await self.write(self.record.with_bitmap(None))
                    self.bitmap = None
                break
            except StateRecordError as error:
                log.error("writes wait until the state record can be written", error=str(error))
                await anyio.sleep(RETRY_S)
        await self._engine.bitmap_void()


def _as_left(place: Place) -> DiskIdentity | None:
    """How it looks at the end; None: it cannot be told. One over a network takes as long as its kind lets it,
    and is asked for no longer than that."""
    if kind_of(place.name).over_network:
        return look_again(place)
    try:
        return bring_in_time(partial(look_again, place), lambda _: None, END_LOOK_S)
    except (TimeoutError, OSError) as error:
        log.error("a disk cannot be looked at at the end", path=place.name, error=str(error) or "it hangs")
        return None
