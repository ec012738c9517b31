# SPDX-License-Identifier: Apache-2.0
"""The mirror's policy: attach a destination, let go of it, switch to it, and keep the state record true.

The engine (C) knows how to copy, replicate and flush; it reports what becomes of the destination. This file
decides what is allowed when, and what must be durably recorded before what (docs/durability.md, "Who is the
truth"):

* before the first byte goes to a destination, the record says that it is inconsistent;
* once the engine reports `steady`, it says up to date (late is safe, early would not be);
* when the engine lost a steady destination it holds every flush until the record says "outdated";
* when the guest gets ahead of a steady destination, the same; and before that catches up (catch_up.py), the
  record says "inconsistent" again;
* in a switch, the record names the new disk before the first request goes there.

One command at a time: a second one is refused, not queued.
"""

import errno
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import structlog

from vhostsync import events
from vhostsync.bad_ranges import BadRanges, rows
from vhostsync.bitmap import BitmapFile
from vhostsync.catch_up import CatchUp
from vhostsync.config import MirrorTarget
from vhostsync.destination import Place, look_again, open_destination
from vhostsync.disks import Disk
from vhostsync.engine import Engine, EngineEvent, EventKind, Reason
from vhostsync.errors import EngineError, MirrorError, StateRecordError, SwitchError, VhostsyncError
from vhostsync.events import EventHub
from vhostsync.mirror_state import REASONS, TRANSITIONS, MirrorState
from vhostsync.mirror_status import CopyRate, MirrorStatus, Switched, SwitchPlan, SwitchResult
from vhostsync.peer import Peer
from vhostsync.privileges import Reach
from vhostsync.snapshot import Snapshot, State
from vhostsync.state_record import DiskIdentity, Prepared, StateFile, StateRecord, Worth

log = structlog.get_logger(__name__)

PROGRESS_S: Final = 1.0
RECORD_RETRY_S: Final = 1.0
SWITCH_RETRY_S: Final = 0.05
FENCE_WAIT_S: Final = 2.0

_TO_RECORD: Final = (EventKind.STATE, EventKind.DEGRADED, EventKind.FENCE_CLEAR, EventKind.BITMAP_FAILED)


class Mirror:
    """The mirror of one device. `run` must run as long as it is used."""

    def __init__(
        self,
        engine: Engine,
        source: Disk,
        hub: EventHub,
        state_file: StateFile | None,
        record: StateRecord | None,
        bitmap: BitmapFile | None = None,
        peer_left: DiskIdentity | None = None,
    ) -> None:
        self.state = MirrorState.PASSTHROUGH
        self._engine = engine
        self._hub = hub
        self._source = Place.of(source)
        self._destination: Place | None = None
        self._last_target: MirrorTarget | None = None
        self._peer = Peer()
        self._full_copy_reason: str | None = None
        self._state_file = state_file
        self._record = record if record is not None else StateRecord.first(source.identity)
        self._bitmap = bitmap
        if bitmap is not None and self._record.peer is not None and self._record.bitmap == bitmap.token:
            self._peer.known(self._record.peer, peer_left)
        self._read_only = source.read_only
        self.reach = Reach()  # where destinations may lie
        self._busy: str | None = None
        self._record_lock = anyio.Lock()
        self._next_record: StateRecord | None = None  # what holds once the engine has exchanged the disks
        self._speed_bytes_per_s = 0
        self._rate = CopyRate()
        self._reason: str | None = None
        self._last_error: str | None = None
        self._fenced_path: Path | None = None
        self._changed = anyio.Event()
        self._to_record: deque[EngineEvent] = deque()
        engine.on_event(self._on_event)
        self._catch_up = CatchUp(engine, self._begin_catch_up)

    @property
    def source_path(self) -> Path:
        """The disk that the guest is on."""
        return self._source.path

    @property
    def destination_path(self) -> Path | None:
        """The destination that is attached."""
        return self._destination.path if self._destination is not None else None

    @property
    def last_target(self) -> MirrorTarget | None:
        """What the last mirror-start that was obeyed has named."""
        return self._last_target

    @property
    def fenced(self) -> bool:
        """Requests to a former destination are not over: none can be attached yet (rule 8)."""
        return self._fenced_path is not None

    @property
    def changed(self) -> anyio.Event:
        """Set at the next event of the engine."""
        return self._changed

    async def left(self, state: MirrorState) -> None:
        """Returns when the state is another one."""
        while self.state is state:
            await self._changed.wait()

    @property
    def bitmap(self) -> BitmapFile | None:
        return self._bitmap

    @property
    def epoch(self) -> int:
        return self._record.epoch

    # ---- what the engine reports ---------------------------------------------

    def _on_event(self, event: EngineEvent) -> None:
        if event.kind is EventKind.STATE:
            if event.reason == Reason.SWITCH:
                self._exchanged()
            self._enter(MirrorState(State(event.value).name.lower()), Reason(event.reason), event.error)
        elif event.kind is EventKind.IO_ERROR:
            self._note_io_error(event)
        elif event.kind is EventKind.FENCE_CLEAR:
            if self._fenced_path is not None:
                log.info("the last request of the former destination is over", path=str(self._fenced_path))
            self._fenced_path = None
        if event.kind in _TO_RECORD:
            self._to_record.append(event)
        self._wake()

    def _exchanged(self) -> None:
        """The engine has changed the disks' roles. Here and not where the exchange is awaited: what the
        engine reports next (the loss of the new destination, say) is to be seen in the new roles."""
        assert self._next_record is not None and self._destination is not None
        keep_mirror = self._next_record.peer is not None
        self._record, self._next_record = self._next_record, None
        self._source, self._destination = self._destination, self._source if keep_mirror else None
        if self._destination is not None:
            self._peer.attached(self._destination)
        else:
            self._peer.forget()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _note_io_error(self, event: EngineEvent) -> None:
        path = str(self._source.path if event.role == "source" else self._destination_path())
        name = EngineError.from_errno(f"{event.op} of {path} at byte {event.offset}", event.error)
        self._last_error = str(name)
        data = {
            "disk": event.role,
            "path": path,
            "operation": event.op,
            "offset": event.offset,
            "length": event.length,
            "error": str(name),
        }
        log.error("I/O error", **data)
        self._hub.publish(events.IO_ERROR, data)

    def _fence_destination(self) -> None:
        """The destination is given up; what it has under way may still be written there (rule 8)."""
        if self._destination is not None:
            self._fenced_path, self._destination = self._destination.path, None
            self._peer.detached()

    def _destination_path(self) -> Path | None:
        return self._destination.path if self._destination is not None else self._fenced_path

    def _enter(self, state: MirrorState, reason: Reason, error: int) -> None:
        former = self.state
        if state not in TRANSITIONS[former]:
            log.critical("a move between states that must not be", former=former, state=state)
        self.state = state
        self._reason = REASONS[reason]
        if error:
            self._last_error = str(EngineError.from_errno(REASONS[reason], error))
        if state is MirrorState.DEGRADED:
            self._fence_destination()
        say = log.warning if state in (MirrorState.DEGRADED, MirrorState.AHEAD) else log.info
        failure = self._last_error if error else None
        say("mirror", state=str(state), former=str(former), reason=self._reason, error=failure)
        self._hub.publish(
            events.MIRROR_STATE_CHANGE,
            {
                "state": str(state),
                "former": str(former),
                "reason": self._reason,
                "destination": str(self._destination_path()) if self._destination_path() else None,
                "error": failure,
            },
        )

    async def run(self) -> None:
        """Keep the record true and report progress, until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._report_progress)
            tasks.start_soon(self._catch_up.run)
            while True:
                changed = self._changed
                while self._to_record:
                    await self._record_change(self._to_record.popleft())
                await changed.wait()

    async def _record_change(self, event: EngineEvent) -> None:
        """The record follows the engine, which waits only where a steady destination was lost."""
        if event.kind is EventKind.FENCE_CLEAR:
            await anyio.to_thread.run_sync(self._peer.look)
        elif event.kind is EventKind.BITMAP_FAILED:
            await self._give_up_bitmap(event.error)
        elif event.kind is EventKind.DEGRADED:
            await self._record_outdated()
        elif event.value == State.STEADY and event.reason == Reason.COPY_DONE:
            async with self._record_lock:
                # Much may have happened since: only what is steady now may be called so.
                if self.state is MirrorState.STEADY and self._record.peer_worth is Worth.INCONSISTENT:
                    await self._record_up_to_date()

    async def _begin_catch_up(self) -> None:
        async with self._record_lock:
            if self.state is not MirrorState.AHEAD or self._catch_up.is_held:
                return
            if (await self._engine.snapshot()).record_pending:
                raise EngineError.from_errno("catching up before the state record is written", errno.EBUSY)
            if self._record.peer_worth is not Worth.INCONSISTENT:
                await self._write_record(self._record.with_worth(Worth.INCONSISTENT))
            await self._engine.catch_up()

    async def _record_up_to_date(self) -> None:
        try:
            await self._write_record(self._record.with_worth(Worth.UP_TO_DATE))
        except StateRecordError as error:
            # Too modest a record loses no data: the destination is worth more than it says.
            log.error("the state record still calls the destination inconsistent", error=str(error))

    async def _record_outdated(self) -> None:
        """Until it is durable that the destination is outdated, flushes are held; while it cannot be made
        durable, they fail."""
        while True:
            error_number = 0
            try:
                async with self._record_lock:
                    if self._record.peer is not None:
                        await self._write_record(self._record.with_worth(Worth.OUTDATED, _now()))
            except StateRecordError as error:
                error_number = errno.EIO
                self._last_error = str(error)
                log.error("flushes fail until the state record can be written", error=str(error))
            await self._engine.record_written(error_number)
            if not error_number:
                return
            await anyio.sleep(RECORD_RETRY_S)

    async def _give_up_bitmap(self, error_number: int) -> None:
        """Writes that need it are held until a crash cannot make anybody believe it."""
        self._last_error = str(EngineError.from_errno("writing the dirty bitmap", error_number))
        log.error("going on without the dirty bitmap", error=self._last_error)
        self._hub.publish(events.BITMAP_FAILED, {"error": self._last_error})
        while True:
            try:
                async with self._record_lock:
                    await self._write_record(self._record.with_bitmap(None))
                    self._bitmap = None
                break
            except StateRecordError as error:
                log.error("writes wait until the state record can be written", error=str(error))
                await anyio.sleep(RECORD_RETRY_S)
        await self._engine.bitmap_void()

    async def _write_record(self, record: StateRecord) -> None:
        """Under the lock, which also covers what the record was made of and what must follow it: two writers
        that each change what they have read would undo each other."""
        assert self._record_lock.locked()
        if self._state_file is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._state_file.write, record)
        self._record = record

    # ---- progress ----------------------------------------------------------------

    async def _report_progress(self) -> None:
        while True:
            while self.state is not MirrorState.SYNCING:
                await self._changed.wait()
            self._rate.clear()
            while self.state is MirrorState.SYNCING:
                status = await self.status()
                self._hub.publish(
                    events.MIRROR_PROGRESS,
                    {
                        "bytes-done": status.copy_bytes_done,
                        "bytes-total": status.copy_bytes_total,
                        "rate": round(status.copy_rate_bytes_per_s),
                        "remaining-s": status.copy_remaining_s,
                    },
                )
                changed = self._changed
                with anyio.move_on_after(PROGRESS_S):
                    await changed.wait()

    async def status(self) -> MirrorStatus:
        now = await self._engine.snapshot()
        if now.state is State.SYNCING:
            self._rate.add(anyio.current_time(), now.copy_bytes_done)
        return self._status(now)

    def _status(self, now: Snapshot) -> MirrorStatus:
        rate = self._rate.bytes_per_s() if now.state is State.SYNCING else 0.0
        left = now.copy_bytes_total - now.copy_bytes_done
        if now.state is not State.SYNCING:
            remaining_s = None
        else:
            remaining_s = math.ceil(left / rate * 10) / 10 if rate else None
        peer = self._record.peer
        return MirrorStatus(
            state=str(self.state),
            worth=self._worth(),
            source=str(self._source.path),
            destination=str(self._destination.path) if self._destination else (peer.path if peer else None),
            counts=asdict(now.counts),
            lag_bytes=now.lag_bytes,
            lag_writes=now.lag_writes,
            lag_ms=now.lag_ns / 1e6,
            copy_bytes_total=now.copy_bytes_total,
            copy_bytes_done=now.copy_bytes_done,
            copy_bytes_sparse=now.copy_bytes_sparse,
            differing_bytes=now.differing_bytes,
            bitmap=str(self._bitmap.path) if self._bitmap is not None else None,
            full_copy_reason=self._full_copy_reason,
            copy_rate_bytes_per_s=rate,
            copy_remaining_s=remaining_s,
            speed_bytes_per_s=self._speed_bytes_per_s,
            last_error=self._last_error,
            reason=self._reason,
            doubt=rows(now.doubt),
            outdated_since=self._record.outdated_since,
            unreadable=rows(now.unreadable),
            reads_from_destination=now.reads_from_destination,
            source_failovers=now.source_failovers,
        )

    def _worth(self) -> str | None:
        if self.state is MirrorState.STEADY:
            return Worth.UP_TO_DATE.value
        if self.state is MirrorState.SYNCING:
            return Worth.INCONSISTENT.value
        return self._record.peer_worth.value if self._record.peer_worth is not None else None

    # ---- commands ------------------------------------------------------------------

    @asynccontextmanager
    async def exclusive(self, name: str) -> AsyncIterator[None]:
        """One command at a time. MirrorError while another is under way."""
        if self._busy is not None:
            raise MirrorError(f"{name} has to wait: {self._busy} is under way; try again when it is over")
        self._busy = name
        try:
            yield
        finally:
            self._busy = None
            self._wake()

    async def start(self, target: MirrorTarget) -> None:
        """Attach a destination and begin the copy: of what differs if it is the last one, as that was left;
        else of everything. MirrorError, DiskError, StateRecordError, EngineError:
        nothing was changed."""
        async with self.exclusive("mirror-start"):
            if self.state in (MirrorState.SYNCING, MirrorState.STEADY, MirrorState.AHEAD):
                raise MirrorError(
                    f"a mirror to {self._destination_path()} is {self.state} already; cancel it first"
                )
            if self._read_only:
                raise MirrorError("a disk that is served read-only has nothing to mirror")
            await anyio.to_thread.run_sync(self.reach.check, target.path)
            await self._await_fence()
            engine = self._engine.config
            disk = await anyio.to_thread.run_sync(
                open_destination, target, self._source.path, engine.capacity_bytes, engine.block_bytes
            )
            try:
                await self._attach(disk, target)
                self._last_target = target
            except VhostsyncError:
                if target.create:
                    await anyio.to_thread.run_sync(target.path.unlink)
                raise
            finally:
                disk.close()  # what the engine did not take

    async def _await_fence(self) -> None:
        """A destination that was given up may still be written to by what it had under way (rule 8)."""
        with anyio.move_on_after(FENCE_WAIT_S):
            while self._fenced_path is not None:
                await self._changed.wait()
        if self._fenced_path is not None:
            raise MirrorError(
                f"requests to the former destination {self._fenced_path} are not over yet and could still "
                f"write there; wait until it has answered, or restart the backend"
            )
        if (await self._engine.snapshot()).record_pending:
            raise MirrorError(
                "the state record does not say yet that the former destination is outdated, because it "
                "cannot be written (see last-error); mend that first"
            )

    async def _attach(self, disk: Disk, target: MirrorTarget) -> None:
        place = Place.of(disk)
        full_copy_reason = "it was asked for" if target.full else await self._why_full(disk)
        resync = full_copy_reason is None
        async with self._record_lock:
            former = self._record
            await self._write_record(former.with_peer(disk.identity, former.bitmap if resync else None))
            try:
                await self._engine.mirror_speed(target.speed_bytes_per_s)
                self._destination, self._last_error = place, None
                await self._engine.mirror_start(disk, resync=resync)
            except EngineError:
                self._destination = None
                await self._write_record(former)
                raise
            if not resync:
                await self._begin_bitmap(place)
        self._peer.attached(place)
        self._full_copy_reason = full_copy_reason
        self._speed_bytes_per_s = target.speed_bytes_per_s
        log.info("copying", destination=str(place.path), everything_because=full_copy_reason)

    async def _begin_bitmap(self, place: Place) -> None:
        """The engine has marked that everything differs; once that is durable, the record may name it."""
        bitmap = self._bitmap
        if bitmap is None:
            return
        try:
            await anyio.to_thread.run_sync(bitmap.new_peer, (self._source.identity, place.identity))
            await self._write_record(self._record.with_bitmap(bitmap.token))
        except (OSError, VhostsyncError) as error:
            # The record names none: a restart copies everything, and loses nothing.
            log.error("the dirty bitmap is not used for this destination", error=str(error))

    async def _why_full(self, disk: Disk) -> str | None:
        await anyio.to_thread.run_sync(self._peer.look)
        return await anyio.to_thread.run_sync(self._peer.why_full, disk)

    async def cancel(self, *, force: bool) -> None:
        """Let go of the destination; in steady, unless forced, it becomes a copy of this moment first, and in
        ahead of the moment when the guest got ahead.
        MirrorError when there is none, or it could not be brought up to date."""
        async with self.exclusive("mirror-cancel"):
            if self.state is MirrorState.PASSTHROUGH:
                raise MirrorError("there is no mirror to cancel")
            if self.state is MirrorState.STEADY and not force:
                await self._drain("mirror-cancel --force lets go without that")
            with self._catch_up.held():
                if not force:
                    await self._catch_up.drained()
                await self._let_go()
            if not force:
                await self._see_it_off()

    async def _see_it_off(self) -> None:
        """Whoever changes the destination after the command has returned is to be noticed."""
        with anyio.move_on_after(FENCE_WAIT_S):
            while self._fenced_path is not None:
                await self._changed.wait()
            await anyio.to_thread.run_sync(self._peer.look)

    async def _drain(self, otherwise: str) -> None:
        try:
            await self._engine.mirror_drain()
        except EngineError as error:
            reason = f"the destination could not be brought up to date ({error}); {otherwise}"
            raise MirrorError(reason) from error

    async def _let_go(self) -> None:
        # First the record: after the stop, flushes are confirmed without the destination.
        async with self._record_lock:
            if self.state is MirrorState.STEADY:
                await self._write_record(self._record.with_worth(Worth.OUTDATED, _now()))
            self._fence_destination()
            await self._engine.mirror_stop()

    async def set_speed(self, bytes_per_s: int) -> None:
        """Limit the bulk copy; 0: no limit."""
        await self._engine.mirror_speed(bytes_per_s)
        self._speed_bytes_per_s = bytes_per_s

    # ---- the switch ------------------------------------------------------------------

    async def switch(
        self, *, deadline_s: float, max_pause_ms: float, keep_mirror: bool, accept_unreadable: bool = False
    ) -> SwitchResult:
        """Move the guest to the destination. SwitchError: it is still on the source, and the mirror is as it
        was (or what the error says became of it)."""
        plan = SwitchPlan(max_pause_ms, keep_mirror, accept_unreadable)
        async with self.exclusive("switch"):
            await self._check_switch(plan)
            self._hub.publish(events.SWITCH_STARTED, {"destination": str(self._destination_path())})
            try:
                with anyio.fail_after(deadline_s):
                    result = await self._try_until_switched(plan)
            except TimeoutError as error:
                raise self._switch_failed(
                    f"the switch did not succeed within {deadline_s:g} s: no pause of at most "
                    f"{max_pause_ms:g} ms was enough to bring the destination up to date; allow a longer "
                    f"pause or deadline"
                ) from error
            except VhostsyncError as error:
                raise self._switch_failed(str(error)) from error
            log.info("switched", **asdict(result))
            self._hub.publish(events.SWITCH_COMPLETED, asdict(result))
            return result

    def _switch_failed(self, reason: str) -> SwitchError:
        log.warning("switch failed", reason=reason)
        self._hub.publish(events.SWITCH_FAILED, {"reason": reason})
        return SwitchError(f"the guest is still on {self._source.path}: {reason}")

    async def _check_switch(self, plan: SwitchPlan) -> None:
        if self.state is not MirrorState.STEADY:
            how = "start it and wait until it is steady (mirror start --wait)"
            if self.state is MirrorState.AHEAD:
                how = "the destination was too slow and catches up by itself; wait until it is steady"
            raise SwitchError(
                f"a switch needs the mirror in the steady state, and it is {self.state}; {how}"
            )
        bad = BadRanges.of(await self._engine.snapshot())
        bad.check_switch(accept=plan.accept_unreadable, keep_mirror=plan.keep_mirror)

    async def _try_until_switched(self, plan: SwitchPlan) -> SwitchResult:
        attempts = 0
        while True:
            attempts += 1
            # Prepare, the guest running: the lag shrinks, and the destination shows that it can flush.
            await self._engine.mirror_drain(both_disks=plan.keep_mirror)
            async with self._record_lock:
                switched = await self._try_switch(plan)
            if switched is not None:
                if switched.accepted:
                    log.warning("accepted what the destination holds there", **switched.accepted.listed())
                return self._switched(switched, attempts)
            await anyio.sleep(SWITCH_RETRY_S * attempts)

    def _switched(self, switched: Switched, attempts: int) -> SwitchResult:
        return SwitchResult(
            pause_us=switched.pause_ns // 1000,
            attempts=attempts,
            source_path=str(self._source.path),
            destination_path=str(self._destination.path) if self._destination else None,
            accepted=switched.accepted.listed(),
        )

    async def leave_source(self, deadline_s: float) -> SwitchResult | None:
        """The engine keeps back what the source has failed: switch, without a flush of either disk. None:
        another switch has done so meanwhile. VhostsyncError."""
        while self._busy is not None:
            await self._changed.wait()
        async with self.exclusive("a switch from a failed source"), self._record_lock:
            if not (await self._engine.snapshot()).failover_pending:
                return None
            switched = await self._try_switch(SwitchPlan(deadline_s * 1000))
            if switched is None:
                raise SwitchError("the destination could not be brought up to date in time")
            return self._switched(switched, 1)

    async def _try_switch(self, plan: SwitchPlan) -> Switched | None:
        """None: the gate could not be closed in time."""
        prepared = await self._prepare_record(plan.keep_mirror)
        try:
            if not await self._close_gate(plan.max_pause_ms):
                return None
            # From here to the end nothing may be cut off: the guest is held.
            with anyio.CancelScope(shield=True):
                return await self._exchange(prepared, plan)
            raise AssertionError("nobody cancels that scope")
        finally:
            if prepared is not None:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(prepared.discard)

    async def _close_gate(self, max_pause_ms: float) -> bool:
        """False: it could not be closed in time, and is open again. So it is when this raises or is
        cancelled (the deadline of the switch): a gate that nobody opens would hold the guest for ever."""
        try:
            await self._engine.gate(int(max_pause_ms * 1000))
        except EngineError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            return False
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._engine.ungate()
            raise
        return True

    async def _prepare_record(self, keep_mirror: bool) -> Prepared | None:
        if self._state_file is None:
            return None
        record = self._record.switched(keep_mirror=keep_mirror)
        return await anyio.to_thread.run_sync(self._state_file.prepare, record)

    async def _exchange(self, prepared: Prepared | None, plan: SwitchPlan) -> Switched:
        """With the gate closed: the record, then the disks."""
        former = self._record
        self._next_record = former.switched(keep_mirror=plan.keep_mirror)
        accepted = BadRanges()
        try:
            if plan.accept_unreadable:
                accepted = BadRanges.of(await self._engine.snapshot())
            if prepared is not None:
                await anyio.to_thread.run_sync(prepared.commit)
            pause_ns = await self._engine.exchange(
                keep_mirror=plan.keep_mirror, accept_unreadable=plan.accept_unreadable
            )
            return Switched(pause_ns, accepted)
        except VhostsyncError:
            self._next_record = None
            # First the record: what the guest writes from here on goes to the disk that it is to name again.
            await self._restore_record(former)
            await self._engine.ungate()
            raise

    async def _restore_record(self, record: StateRecord) -> None:
        """The exchange did not take place, and the record may say that it did. Should this fail too, nothing
        that was flushed is at stake: the mirror is steady, and the engine confirms no flush without the
        destination before another record is durable."""
        try:
            await self._write_record(record)
        except StateRecordError as error:
            log.error("the state record may name the destination as the current disk", error=str(error))

    # ---- the end -----------------------------------------------------------------------

    async def detach(self, *, force: bool) -> None:
        """The backend ends, no frontend is attached any more: leave a destination that is worth what the
        record says. Errors are logged; the end goes on."""
        if self.state is MirrorState.STEADY and not force:
            try:
                await self._engine.mirror_drain()
            except EngineError as error:
                log.error("the destination could not be brought up to date", error=str(error))
        elif not force:
            with self._catch_up.held():
                await self._catch_up.drained()

    async def abandon(self) -> None:
        """The end shall not wait for the destination any longer: what waits for it goes on without."""
        if self.state in (MirrorState.STEADY, MirrorState.SYNCING, MirrorState.AHEAD):
            try:
                await self._let_go()
            except VhostsyncError as error:
                log.error("the destination could not be let go", error=str(error))

    def record_clean(self) -> None:
        """After the engine was closed: how both disks look, so that a later change is seen. Blocks."""
        if self._state_file is None or self._read_only:
            return
        current = look_again(self._source)
        peer = self._record.peer
        if current is None:
            return
        if peer is not None and self._destination is not None:
            peer = look_again(self._destination)
            if peer is None:
                return
        try:
            self._state_file.write(self._record.detached(current, peer))
        except StateRecordError as error:
            log.error("the state record could not note the clean end", error=str(error))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
