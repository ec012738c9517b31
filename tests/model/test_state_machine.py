# SPDX-License-Identifier: Apache-2.0
"""Hypothesis against the engine: any order of requests, held and failing disks, mirrors and switches.

Source and destination sit behind volatile caches (c_shim/testing/test_disk.c). After every step both are
looked at as they would be after a power cut, and the counts are checked. The rules only do things; what
must hold stands in guest_model.py, mirror_model.py and the invariants here. Rules have no preconditions,
because what hypothesis draws must not depend on how fast the engine is: a rule that does not fit does
nothing.

VHOSTSYNC_MODEL_EXAMPLES sets how many examples are run (a long hunt: some thousands).
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.engine_driver import (
    Cut,
    DiskOp,
    EngineDriver,
    EngineOptions,
    EngineTransport,
    MemoryDisk,
    Reason,
    Snapshot,
    State,
)
from tests.frontend import Frontend, Op, Request, Status
from tests.model.chores import (
    AT_THE_END,
    BLOCK,
    BLOCKS,
    CAPACITY,
    GROWS_BY,
    QUEUES,
    WINDOWS,
    Chore,
    chores,
    errors,
    ops,
    queues,
    roles,
)
from tests.model.guest_model import Floors, History, Version
from tests.model.mirror_model import MirrorModel
from tests.sizes import MIB
from vhostsync._shim import lib

LONG_US, SHORT_US = 30_000_000, 40_000
EXAMPLES = int(os.environ.get("VHOSTSYNC_MODEL_EXAMPLES", "60"))


@dataclass
class Pending:
    """What a request was submitted with."""

    version: Version | None
    floors: Floors
    completed_writes: int
    epoch: int
    mode: int
    """Counts the changes of the write mode; odd: write-through."""
    pause: int
    """Which pause held flushes then (MirrorModel.pause)."""


class Contract(RuleBasedStateMachine):
    timeout_us = LONG_US

    def __init__(self) -> None:
        super().__init__()
        self.history = History(BLOCK)
        self.pending: dict[Request, Pending] = {}
        self.mode = 0
        self.failed_writes = 0
        self.gated_at = 0
        self.record_failed = False
        self.step = 0
        self.all_disks: list[MemoryDisk] = []
        self.lacking: dict[MemoryDisk, set[int]] = {}
        """Blocks of a destination that the source could not give."""
        self.visible = BLOCKS - GROWS_BY
        """Blocks of the disk that the guest sees."""
        self.filled = False
        self.growing: tuple[int, int] | None = None
        """The token of a grow under way, and what is visible after it."""
        self.read_errors: set[int] = set()  # that a disk was told to give
        self.tracked: MemoryDisk | None = None  # of which the engine knows where it differs
        self.extent: dict[MemoryDisk, int] = {}
        """Blocks of a destination that were visible when it was last equal."""
        self.driver: EngineDriver | None = None

    @initialize(
        filled=st.booleans(),
        depth=st.integers(1, 4),
        mirrored=st.sampled_from([True, True, False]),
        pause=st.booleans(),
    )
    def begin(self, filled: bool, depth: int, mirrored: bool, pause: bool) -> None:
        self.source = self._disk()
        self.filled = filled
        half = BLOCKS // 2
        self.source.load(0, self.history.initial(0, half, zero=False))
        self.source.load(half * BLOCK, self.history.initial(half, self.visible, zero=not filled))
        options = EngineOptions(
            self.visible * BLOCK,
            destination_timeout_us=self.timeout_us,
            copy_depth=depth,
            pause_on_destination_error=pause,
        )
        self.driver = EngineDriver(options, self.source)
        self.model = MirrorModel(self.history, may_time_out=self.timeout_us != LONG_US)
        self.transport = EngineTransport(self.driver)
        self.guest = Frontend(self.transport, queues=QUEUES, queue_size=64)
        self.guest.start()
        if mirrored:
            self.start_mirror(1, rubbish=True)
            self.settle()

    def _disk(self, size_bytes: int = CAPACITY) -> MemoryDisk:
        disk = MemoryDisk(size_bytes, BLOCK)
        self.all_disks.append(disk)
        return disk

    def teardown(self) -> None:
        if self.driver is None:
            return
        self._let_all_go()
        self.driver.submit(lib.VS_CMD_RECORD_WRITTEN, value=0)
        self.driver.submit(lib.VS_CMD_UNGATE)
        self.driver.submit(lib.VS_CMD_MIRROR_STOP)  # ends a pause
        self.guest.close()
        self.driver.close()
        for disk in self.all_disks:
            disk.drop()

    # -- the guest ---------------------------------------------------------------

    def _range(self, window: tuple[int, int], start: int, length: int) -> tuple[int, int]:
        if window == AT_THE_END:
            return self.visible - 1 - start, min(self.visible - 1 - start + length, self.visible)
        first = min(window[0] + start, window[1] - 1)
        return first, min(first + length, window[1])

    def _submitted(self, request: Request, version: Version | None = None) -> None:
        floors = dict(self.history.completed_floor)
        self.pending[request] = Pending(
            version, floors, self.history.completed_writes, self.model.epoch, self.mode, self.model.pause
        )

    @rule(work=st.lists(chores, min_size=1, max_size=6))
    def work(self, work: list[Chore]) -> None:
        for chore in work:
            self._work(*chore)

    @rule(work=st.lists(chores, min_size=1, max_size=4), queue=queues)
    def work_and_flush(self, work: list[Chore], queue: int) -> None:
        self.work(work)
        self.settle()
        self._submitted(self.guest.flush(queue=queue))

    def _work(self, what: str, window: tuple[int, int], start: int, length: int, queue: int) -> None:
        first, end = self._range(window, start, length)
        at, size = first * BLOCK, (end - first) * BLOCK
        if what == "read":
            self._submitted(self.guest.read(at, size, queue=queue))
        elif what == "flush":
            self._submitted(self.guest.flush(queue=queue))
        elif what == "discard":
            version = self.history.submit_write(first, end, zero=True)
            self._submitted(self.guest.discard(at, size, queue=queue), version)
        elif what == "zeroes":
            version = self.history.submit_write(first, end, zero=True)
            request = self.guest.write_zeroes(at, size, unmap=length % 2 == 0, queue=queue)
            self._submitted(request, version)
        else:
            self._write(first, end, queue, scribble=what == "scribble")

    def _write(self, first: int, end: int, queue: int, *, scribble: bool) -> None:
        version = self.history.submit_write(first, end)
        data = self.history.content(version.number, first, end)
        pieces = 1 + (end - first) % 3
        request = self.guest.write(first * BLOCK, data, queue=queue, segments=pieces, align=16)
        self._submitted(request, version)
        captured = self.model.state in (State.SYNCING, State.STEADY) and not self.gated_at
        if scribble and captured and self.timeout_us == LONG_US:
            self.settle()
            if not request.done:  # taken up, and held somewhere
                request.scribble(b"\xee" * len(data))

    def _change_write_mode(self) -> None:
        self.mode += 1
        self.transport.set_write_cache(self.mode % 2 == 0)

    def _reboot(self) -> None:
        """The driver lets go of the device and takes it again, with the default mode."""
        if self.pending:
            return
        self.guest.stop()
        self.transport.reset()
        self.mode += 2 - self.mode % 2
        self.guest.start()

    @rule(
        what=st.sampled_from(
            ["write mode", "write mode", "reboot", "cancel", "force cancel", "time out", "lose", "lose"]
        )
    )
    def now_and_then(self, what: str) -> None:
        if what == "write mode":
            self._change_write_mode()
        elif what == "reboot":
            self._reboot()
        elif what == "cancel":
            self._cancel()
        elif what == "force cancel" and self.model.peer is not None:
            self._stop_mirror()
        elif what == "time out":
            self._let_the_destination_time_out()
        elif what == "lose":
            self._lose_the_connection()

    @rule(blocks=st.integers(1, 24), slowly=st.booleans())
    def grow(self, blocks: int, slowly: bool) -> None:
        """By no whole number of regions. `slowly`: what is new waits for its copy, and with it the region
        across the old end."""
        if self.growing is not None:
            return
        if slowly:
            self._driver().call(lib.VS_CMD_MIRROR_SPEED, value=16)
            self._begin_to_grow(1)
        if self.growing is None:
            self._begin_to_grow(blocks)

    def _begin_to_grow(self, blocks: int) -> None:
        visible = min(self.visible + blocks, BLOCKS)
        if visible == self.visible:
            return
        new = self.history.initial(self.visible, visible, zero=not self.filled)
        self.source.load(self.visible * BLOCK, new)
        token = self._driver().submit(lib.VS_CMD_GROW, grow=(visible * BLOCK, CAPACITY, CAPACITY))
        self.growing = token, visible
        self.settle()

    def _take_growth(self) -> None:
        if self.growing is None or (event := self._driver().done(self.growing[0])) is None:
            return
        visible, self.growing = self.growing[1], None
        self._take_events()
        if event.result != 0:  # a copy was under way, or the gate closed; or what is new could not be read
            assert -event.result in {errno.EBUSY, *self.read_errors}
            return
        self.visible = visible
        if self.model.peer is not None and self.model.state == State.STEADY:
            self.extent[self.model.peer] = visible

    # -- the disks ---------------------------------------------------------------

    def _role(self, role: str) -> MemoryDisk | None:
        return self.source if role == "source" else self.model.peer

    @rule(role=roles, op=ops)
    def hold(self, role: str, op: DiskOp) -> None:
        if disk := self._role(role):
            disk.hold(op)

    @rule(role=roles, op=ops, count=st.integers(1, 3), go_on=st.booleans())
    def release(self, role: str, op: DiskOp, count: int, go_on: bool) -> None:
        if disk := self._role(role):
            disk.hold(op, not go_on and disk.held(op) > 0)
            disk.release(op, count if not go_on else 1 << 30)

    @rule(disk=st.integers(0, 8), op=ops)
    def release_late(self, disk: int, op: DiskOp) -> None:
        """Also of a destination that was given up long ago."""
        if disk < len(self.all_disks):
            self.all_disks[disk].hold(op, False)
            self.all_disks[disk].release(op)
            if self.all_disks[disk] is not self.model.peer:
                self.all_disks[disk].land(1)

    @rule(role=roles, op=ops, error=errors, skip=st.integers(0, 2), count=st.integers(1, 2))
    def fault(self, role: str, op: DiskOp, error: int, skip: int, count: int) -> None:
        if disk := self._role(role):
            disk.fault(op, error, skip=skip, count=count)
            if op is DiskOp.READ:
                self.read_errors.add(error)

    def _let_all_go(self) -> None:
        for disk in self.all_disks:
            disk.release_all()
        self._driver().call(lib.VS_CMD_MIRROR_SPEED, value=0)

    # -- the mirror --------------------------------------------------------------

    @rule(which=st.integers(0, 3), rubbish=st.booleans())
    def start_mirror(self, which: int, rubbish: bool) -> None:
        """`which` 0: the disk that was left last, if there is one."""
        driver = self._driver()
        former = self.model.formers[-1].disk if which == 0 and self.model.formers else None
        disk = former or self._disk(CAPACITY + which * MIB)
        if rubbish and former is None:
            disk.load(0, b"\xdd" * disk.bytes)
        free = self.settle()
        if self.model.state in (State.DEGRADED, State.PASSTHROUGH) and not free.fenced:
            disk.land()  # the fence is the control plane's: what a lost connection has left is over
            disk.connect()
        result = driver.start_mirror(disk, resync=rubbish and disk is self.tracked)
        if result == 0:
            self.model.attached(disk)
            self.tracked = disk
            self.lacking[disk] = set()
            self.extent[disk] = self.visible
            return
        assert result == errno.EBUSY
        busy = self.model.state in (State.SYNCING, State.STEADY) or free.fenced or free.gated
        late_copy = free.disk_in_flight[0] > 0  # its buffer is in use
        assert busy or late_copy or self.model.record_pending or self.model.may_time_out, (
            "refused for no reason"
        )

    def _stop_mirror(self) -> None:
        self.settle()
        degraded = self.model.state == State.DEGRADED
        self.model.before_leaving_peer()
        if degraded:
            self._driver().call(lib.VS_CMD_RECORD_WRITTEN, value=0)
        self._driver().call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
        self._driver().call(lib.VS_CMD_RECORD_WRITTEN, value=0)
        self.model.after_leaving_peer()

    def _cancel(self) -> None:
        """Drained: the destination is the source as it is now, durably."""
        if self.model.state != State.STEADY:
            return
        self.complete()
        driver = self._driver()
        drained = driver.wait(driver.submit(lib.VS_CMD_MIRROR_DRAIN))
        snapshot = self.settle()
        if drained.result == 0 and self._state() == State.STEADY:
            self._same_content(snapshot, Cut.EVERYTHING)
        self._stop_mirror()

    @rule(fails=st.integers(0, 4))
    def record(self, fails: int) -> None:
        if not self.model.record_pending:
            return
        self.record_failed = self.record_failed or fails == 0
        self.model.before_leaving_peer()
        if fails == 0:
            self.model.record_pending = True  # as long as it could not be written
            self._driver().call(lib.VS_CMD_RECORD_WRITTEN, value=errno.EIO)
            self.settle()
            self.model.record_pending = False
        self._driver().call(lib.VS_CMD_RECORD_WRITTEN, value=0)
        self.model.after_leaving_peer()

    def _let_the_destination_time_out(self) -> None:
        disk = self.model.peer
        attached = self.model.state in (State.SYNCING, State.STEADY)
        if self.timeout_us == LONG_US or not attached or disk is None:
            return
        if any(disk.held(op) for op in DiskOp):
            self._driver().until(lambda: self._state() == State.DEGRADED, "the destination is given up")

    def _lose_the_connection(self) -> None:
        """Its server forgets what was not flushed, and may carry out later what was under way."""
        disk = self.model.peer
        if disk is None or self.model.state not in (State.SYNCING, State.STEADY) or self.gated_at:
            return
        disk.cut(forget_seed=self.step + 1)
        for op in DiskOp:
            disk.hold(op, False)
        self._write(0, 1, 0, scribble=False)
        if self._state() in (State.SYNCING, State.STEADY):
            self._stop_mirror()  # nobody has noticed

    @rule()
    def gate(self) -> None:
        if self.gated_at or self.growing is not None:  # the control plane keeps the two apart
            return
        held = any(disk.held(op) for disk in self.all_disks for op in DiskOp)
        event = self._driver().wait(
            self._driver().submit(lib.VS_CMD_GATE, value=5_000 if held else 3_000_000)
        )
        snapshot = self.settle()
        if event.result != 0:
            reasons = {errno.ENOTCONN} if not held else {errno.ENOTCONN, errno.ETIMEDOUT}
            assert -event.result in reasons, f"gate: {event.result}"
            assert not snapshot.gated
            return
        self.gated_at = self.history.tick()
        if self.model.state == State.STEADY:
            assert snapshot.counts.mirrored == snapshot.counts.generation
            self._same_content(snapshot, Cut.NONE)

    @rule()
    def ungate(self) -> None:
        self._driver().call(lib.VS_CMD_UNGATE)
        self.gated_at = 0

    @rule(keep=st.booleans(), work=st.lists(chores, max_size=2))
    def exchange(self, keep: bool, work: list[Chore]) -> None:
        self.gate()
        if self.growing is not None:
            return
        self.work(work)
        before = self.settle()
        peer, ceiling = self.model.peer, self.gated_at
        driver = self._driver()
        event = driver.wait(driver.submit(lib.VS_CMD_EXCHANGE, exchange=(int(keep),)))
        if event.result != 0:
            assert -event.result in (errno.EBUSY, errno.ENOTCONN), f"exchange: {event.result}"
            assert bool(self.gated_at) == driver.snapshot().gated
            self.ungate()
            return
        self.gated_at = 0
        assert before.gated and before.state == State.STEADY and peer is not None
        assert not before.doubt and not before.unreadable
        self.model.exchanged(self.source, keep=keep, ceiling=ceiling)
        self.extent[self.source] = self.visible
        self.tracked = self.source if keep else None
        self.source = peer

    # -- everything comes to an end ----------------------------------------------

    @rule()
    def complete(self) -> None:
        """With the disks well again every request is answered, and a copy ends."""
        driver = self._driver()
        self._let_all_go()
        self.ungate()
        self.settle()
        self.record(fails=1)
        driver.until(lambda: self._state() != State.SYNCING, "the copy ends")
        self.record(fails=1)
        driver.until(lambda: self.settle() is not None and self.growing is None, "the disk has grown")
        self.record(fails=1)
        if self.model.paused:
            self._stop_mirror()
        for request in list(self.pending):
            self._completed(self.guest.wait(request))
        snapshot = self.settle()
        assert not self.pending
        assert snapshot.requests_waiting == 0
        if snapshot.state == State.STEADY:
            assert snapshot.counts.mirrored == snapshot.counts.generation
            assert snapshot.log_bytes_used == 0 and snapshot.lag_bytes == 0
            self._same_content(snapshot, Cut.NONE)

    def _same_content(self, snapshot: Snapshot, cut: Cut) -> None:
        assert self.model.peer is not None
        left = bytearray(self.source.read(0, self.visible * BLOCK))
        right = bytearray(self.model.peer.read(0, self.visible * BLOCK, cut))
        for offset, length in snapshot.doubt + snapshot.unreadable:
            left[offset : offset + length] = right[offset : offset + length] = bytes(length)
        assert left == right, "the disks differ"

    # -- looking -------------------------------------------------------------------

    def _driver(self) -> EngineDriver:
        assert self.driver is not None
        return self.driver

    def _state(self) -> State:
        self.settle()
        return self.model.state

    def settle(self) -> Snapshot:
        """Waits until the engine has nothing more to do, and takes in all that it says."""
        driver = self._driver()
        for _ in range(1000):
            snapshot = driver.settle()
            for event in driver.events:
                self.model.event(event)
            driver.events.clear()
            self._completed(self.guest.poll())
            self._take_growth()
            if self.model.peer is not None:
                self.lacking.setdefault(self.model.peer, set()).update(_blocks(snapshot.unreadable))
            # An event that came after the snapshot belongs to the next one.
            if snapshot.state == self.model.state and snapshot.record_pending == self.model.record_pending:
                return snapshot
        raise AssertionError(f"the engine shows {snapshot}, its events say {self.model.state}")

    def _completed(self, requests: list[Request]) -> None:
        for request in requests:
            self._take_events()
            self._one_completed(request, self.pending.pop(request))
            self.guest.recycle(request)

    def _take_events(self) -> None:
        driver = self._driver()
        driver.pump()
        for event in driver.events:
            self.model.event(event)
        driver.events.clear()

    def _one_completed(self, request: Request, pending: Pending) -> None:
        history, ok = self.history, request.ok
        assert ok or request.status == Status.IOERR
        through = pending.mode % 2 == 1 and pending.mode == self.mode
        if ok and (request.op == Op.FLUSH or (through and pending.version is not None)):
            # One that was there when a pause began may have been confirmed just before.
            assert not pending.pause or pending.pause != self.model.pause, "confirmed during a pause"
        if pending.version is not None:
            history.complete_write(pending.version, ok=ok)
            if ok and through:
                history.confirm(pending.floors)
                history.confirm_write_through(pending.version)
            if not ok:
                self.failed_writes += 1
                blame = [DiskOp.WRITE, DiskOp.ZERO, *([DiskOp.FLUSH] if self.mode else [])]
                assert self.model.error_allowed(*blame) or (self.mode and self.record_failed), "write failed"
        elif request.op == Op.READ:
            if ok:
                history.check(request.offset // BLOCK, request.data, pending.floors, "a read")
            else:
                assert self.model.error_allowed(DiskOp.READ), "a read failed although the source did not"
        elif ok:
            history.confirm(pending.floors)
            snapshot = self._driver().snapshot()
            self._take_events()
            self.model.check_confirmed(snapshot, pending.completed_writes, pending.epoch)
        else:
            assert self.model.error_allowed(DiskOp.FLUSH) or self.record_failed, "a flush failed"

    # -- what must hold after every step ---------------------------------------------

    @invariant()
    def counts_are_in_order(self) -> None:
        if self.driver is None:
            return
        snapshot = self.settle()
        writes = sum(p.version is not None for p in self.pending.values())
        self.model.check(snapshot, pending_writes=writes, failed_writes=self.failed_writes)

    @invariant()
    def power_cuts_lose_nothing_that_was_flushed(self) -> None:
        if self.driver is None:
            return
        self.step += 1
        cuts = [(Cut.SUBSET, 2 * self.step), (Cut.SUBSET, 2 * self.step + 1), (Cut.EVERYTHING, 0)]
        flushed = self.history.flushed_floor
        for cut, seed in cuts:
            self._check_disk(self.source, cut, seed, flushed, "the source")
            if self.model.peer is not None and self.model.peer_is_good:
                self._check_disk(self.model.peer, cut, seed, flushed, "the destination")
            for former in self.model.formers[-2:]:
                self._check_disk(former.disk, cut, seed, former.floors, "a former disk", former.ceiling)

    def _check_disk(
        self, disk: MemoryDisk, cut: Cut, seed: int, floors: Floors, what: str, ceiling: int = 0
    ) -> None:
        options: dict[str, Any] = {"ceiling": ceiling} if ceiling else {}
        extent = self.visible if disk is self.source else self.extent[disk]
        for first, end in ((first, min(end, extent)) for first, end in WINDOWS):
            content = disk.read(first * BLOCK, (end - first) * BLOCK, cut, seed)
            lacking = self.lacking.get(disk, set())
            if lacking.isdisjoint(range(first, end)):
                self.history.check(first, content, floors, f"{what} after {cut.name} {seed}", **options)
                continue
            for block in set(range(first, end)) - lacking:
                one = content[(block - first) * BLOCK : (block - first + 1) * BLOCK]
                self.history.check(block, one, floors, f"{what} after {cut.name} {seed}", **options)


def _blocks(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    return {block for at, size in ranges for block in range(at // BLOCK, (at + size - 1) // BLOCK + 1)}


class HastyContract(Contract):
    """The same with a destination timeout that holding a request soon exceeds."""

    timeout_us = SHORT_US


CHECKS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

TestContract = pytest.mark.timeout(60 + 5 * EXAMPLES)(Contract.TestCase)
TestContract.settings = CHECKS
TestHastyContract = pytest.mark.timeout(60 + 5 * EXAMPLES)(HastyContract.TestCase)
TestHastyContract.settings = settings(CHECKS, max_examples=max(1, EXAMPLES // 3))
