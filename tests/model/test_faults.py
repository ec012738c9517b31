# SPDX-License-Identifier: Apache-2.0
"""Disks that fail, and the outcome required of each (docs/durability.md, rules 5, 7 and 8)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tests.engine_driver import DiskOp, EventKind, Reason, State
from tests.frontend import Status
from tests.model.rig import BLOCK, Rig, flushes, pattern, rig
from tests.sizes import MIB
from vhostsync._shim import lib

READ, WRITE, FLUSH, ZERO = DiskOp.READ, DiskOp.WRITE, DiskOp.FLUSH, DiskOp.ZERO
HANG: dict[str, Any] = {"destination_timeout_us": 60_000}
DESTINATION_ERRORS = [errno.EIO, errno.ENOSPC]


def drained(r: Rig) -> None:
    r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")


# -- the source --------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_failed_source_write_is_the_guests_error_and_puts_its_range_in_doubt(error: int) -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1, blocks=4)
        r.flush_now()
        r.source.fault(WRITE, error)
        write = r.write(0, 2, blocks=4)
        r.guest.wait(write)
        assert write.status == Status.IOERR
        snapshot = r.driver.settle()
        assert snapshot.state == State.STEADY
        assert snapshot.doubt == ((0, 4 * BLOCK),)
        assert snapshot.counts.generation == 1
        report = r.driver.take_event(EventKind.IO_ERROR)
        assert (report.disk_role, report.op, report.result) == (lib.VS_SOURCE, WRITE, -error)
        # Half of it is on the source; the good copy on the destination must stay as it was.
        assert r.seen(r.source, 0) == pattern(2, 4)[:BLOCK]
        r.flush_now()
        assert r.durable(r.destination, 0, 4) == pattern(1, 4)


def test_doubt_ends_where_a_write_covers_it() -> None:
    with rig(mirrored=True) as r:
        r.source.fault(WRITE, errno.EIO)
        r.guest.wait(r.write(0, 1, blocks=4))
        r.write_now(1, 2)
        assert r.driver.settle().doubt == ((0, BLOCK), (2 * BLOCK, 2 * BLOCK))
        r.guest.wait(r.guest.discard(2 * BLOCK, 2 * BLOCK))
        assert r.driver.settle().doubt == ((0, BLOCK),)
        r.write_now(0, 3)
        drained(r)
        assert r.snapshot().doubt == ()
        r.assert_same_content()


def test_a_failed_zeroing_of_the_source() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1, blocks=4)
        r.source.fault(ZERO, errno.EIO, count=2)
        zero = r.guest.write_zeroes(0, 4 * BLOCK)
        discard = r.guest.discard(0, BLOCK)
        r.guest.wait(zero, discard)
        assert (zero.status, discard.status) == (Status.IOERR, Status.IOERR)
        assert r.driver.settle().doubt == ((0, 4 * BLOCK),)
        assert r.seen(r.destination, 0, 4) == pattern(1, 4)


def test_a_failed_overlapping_write_does_not_hold_up_the_next() -> None:
    with rig(mirrored=True) as r:
        r.source.hold(WRITE)
        first = r.write(0, 1, blocks=2)
        second = r.write(1, 2, blocks=2, queue=1)
        r.driver.await_held(r.source, WRITE)
        r.source.fault(WRITE, errno.EIO)
        r.source.hold(WRITE, False)
        r.source.release(WRITE)
        r.guest.wait(first, second)
        assert (first.status, second.status) == (Status.IOERR, Status.OK)
        assert r.driver.settle().doubt == ((0, BLOCK),)
        assert r.seen(r.destination, 1, 2) == pattern(2, 2)


def test_a_failed_source_flush_is_the_guests_error() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.source.fault(FLUSH, errno.EIO)
        assert r.guest.flush_now().status == Status.IOERR
        assert r.driver.settle().state == State.STEADY
        assert r.snapshot().counts.source_flushed == 0
        r.flush_now()  # direct I/O: the device may be asked again
        assert r.durable(r.source, 0) == pattern(1)


def test_a_failed_source_flush_fails_those_that_shared_it_and_no_other() -> None:
    with rig(mirrored=True) as r:
        r.source.hold(FLUSH)
        r.write_now(0, 1)
        first = r.guest.flush()
        r.driver.await_held(r.source, FLUSH)
        r.write_now(1, 2)
        second = r.guest.flush(queue=1)
        assert r.unconfirmed(first, second)
        r.source.fault(FLUSH, errno.EIO)
        r.source.release(FLUSH)
        r.guest.wait(first)
        assert first.status == Status.IOERR
        r.driver.await_held(r.source, FLUSH)
        r.source.release(FLUSH)
        r.guest.wait(second)
        assert second.ok
        assert r.durable(r.source, 1) == r.durable(r.destination, 1) == pattern(2)


def test_a_failed_source_flush_is_the_error_of_a_write_through_write() -> None:
    with rig(mirrored=True) as r:
        r.transport.set_write_cache(False)
        r.source.fault(FLUSH, errno.EIO)
        write = r.write(0, 1)
        r.guest.wait(write)
        assert write.status == Status.IOERR


def test_a_failed_flush_of_a_buffered_source_stays_an_error_until_a_switch() -> None:
    """A second fdatasync would succeed without the data."""
    with rig(mirrored=True, buffered=True) as r:
        r.write_now(0, 1)
        r.source.fault(FLUSH, errno.EIO)
        assert r.guest.flush_now().status == Status.IOERR
        assert r.guest.flush_now().status == Status.IOERR
        r.write_now(1, 2)
        assert r.guest.flush_now().status == Status.IOERR
        r.driver.until(lambda: r.driver.settle().counts.flushed == 2, "the destination holds it")
        r.gate()
        r.exchange(keep=False)
        r.flush_now()
        assert r.durable(r.destination, 0) == pattern(1)


def test_a_failed_read_is_the_guests_error_alone() -> None:
    with rig(mirrored=True) as r:
        r.source.fault(READ, errno.EIO)
        read = r.guest.read(0, BLOCK)
        r.guest.wait(read)
        assert read.status == Status.IOERR
        assert r.driver.settle().state == State.STEADY
        assert r.guest.read_now(0, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize("op", [READ, WRITE])
def test_short_transfers_are_continued(op: DiskOp) -> None:
    with rig(mirrored=True) as r:
        for disk in (r.source, r.destination):
            disk.fault(op, 0, count=-1)
        r.write_now(0, 1, blocks=8)
        assert r.guest.read_now(0, 8 * BLOCK) == pattern(1, 8)
        r.flush_now()
        assert r.durable(r.source, 0, 8) == r.durable(r.destination, 0, 8) == pattern(1, 8)


# -- the destination ---------------------------------------------------------------


def guest_goes_on(r: Rig) -> None:
    """Writes, reads, and flushes that need the source alone, once the record is written."""
    r.write_now(9, 99)
    flush = r.guest.flush()
    assert r.unconfirmed(flush), "a flush was confirmed before the state record said that it may be"
    r.record_written()
    r.guest.wait(flush)
    assert flush.ok
    assert r.durable(r.source, 9) == pattern(99)
    assert not r.snapshot().counts.mirrored_known


@pytest.mark.parametrize("error", DESTINATION_ERRORS)
def test_a_failed_destination_write_degrades_the_mirror_and_not_the_guest(error: int) -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.flush_now()
        r.destination.fault(WRITE, error)
        r.write_now(0, 2)
        assert r.await_degraded() == Reason.DESTINATION_WRITE
        report = r.driver.take_event(EventKind.IO_ERROR)
        assert (report.disk_role, report.op, report.result) == (lib.VS_DESTINATION, WRITE, -error)
        guest_goes_on(r)
        assert r.durable(r.destination, 0) == pattern(1)


def test_a_failed_destination_zeroing() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.destination.fault(ZERO, errno.EIO)
        discard = r.guest.discard(0, BLOCK)
        r.guest.wait(discard)
        assert discard.ok
        assert r.await_degraded() == Reason.DESTINATION_WRITE
        guest_goes_on(r)


@pytest.mark.parametrize("error", DESTINATION_ERRORS)
def test_a_failed_destination_flush_is_recorded_first_and_then_the_sources_result_decides(error: int) -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.destination.fault(FLUSH, error)
        flush = r.guest.flush()
        assert r.await_degraded() == Reason.DESTINATION_FLUSH
        assert r.snapshot().record_pending
        assert r.unconfirmed(flush)
        r.record_written()
        r.guest.wait(flush)
        assert flush.ok
        assert r.durable(r.source, 0) == pattern(1)


def test_both_flushes_fail() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.destination.fault(FLUSH, errno.EIO)
        r.source.fault(FLUSH, errno.EIO)
        flush = r.guest.flush()
        r.await_degraded()
        r.record_written()
        r.guest.wait(flush)
        assert flush.status == Status.IOERR


def test_a_record_that_cannot_be_written_fails_the_flushes_that_wait_for_it() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.destination.fault(FLUSH, errno.EIO)
        flush = r.guest.flush()
        r.await_degraded()
        r.record_written(errno.ENOSPC)
        r.guest.wait(flush)
        assert flush.status == Status.IOERR
        r.record_written()
        r.flush_now()


def test_write_through_writes_wait_for_the_record_too() -> None:
    with rig(mirrored=True) as r:
        r.transport.set_write_cache(False)
        r.destination.fault(WRITE, errno.EIO)
        write = r.write(0, 1)
        r.await_degraded()
        assert r.unconfirmed(write)
        r.record_written()
        r.guest.wait(write)
        assert write.ok


@pytest.mark.parametrize("op", [WRITE, ZERO, FLUSH])
def test_a_destination_that_fails_during_the_copy(op: DiskOp) -> None:
    with rig() as r:
        r.source.load(0, pattern(1, 4 * MIB // BLOCK // 2))
        r.destination.load(0, pattern(2, 4 * MIB // BLOCK))
        r.destination.fault(op, errno.EIO)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_state(State.DEGRADED)
        r.write_now(0, 3)
        r.flush_now()
        assert not any(event.kind == EventKind.DEGRADED for event in r.driver.events)


# -- a destination that hangs --------------------------------------------------------


@pytest.mark.parametrize("op", [WRITE, FLUSH])
def test_a_destination_that_hangs_is_given_up_and_fenced(op: DiskOp) -> None:
    with rig(mirrored=True, **HANG) as r:
        r.write_now(0, 1)
        r.flush_now()
        r.destination.hold(op)
        r.write_now(0, 2)
        flush = r.guest.flush()
        assert r.await_degraded() == Reason.DESTINATION_TIMEOUT
        assert r.unconfirmed(flush)
        r.record_written()
        r.guest.wait(flush)
        assert flush.ok
        # Its request may still take effect: it cannot come back, nor any other take its place.
        assert r.snapshot().fenced == 1
        assert r.driver.start_mirror(r.destination) == errno.EBUSY
        assert r.driver.start_mirror(r.other_disk()) == errno.EBUSY
        counts = r.snapshot().counts
        r.destination.hold(op, False)
        r.destination.release(op)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        assert r.snapshot().counts == counts, "a late completion moved a count"
        r.mirror()
        drained(r)
        r.assert_same_content()


def test_a_destination_that_hangs_during_the_copy() -> None:
    with rig(**HANG) as r:
        r.source.load(0, pattern(1, 512))
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_state(State.DEGRADED)
        r.flush_now()
        assert r.driver.start_mirror(r.other_disk()) == errno.EBUSY
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        r.mirror()


def test_buffers_stay_owned_until_a_late_write_is_over() -> None:
    """What lands late is what was captured, although the log has gone round since."""
    with rig(mirrored=True, log_bytes=8 * MIB, size_bytes=16 * MIB, **HANG) as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1, blocks=8)
        r.await_degraded()
        r.record_written()
        assert r.destination.held(WRITE) == 1
        for number in range(100):
            write = r.write(100, 1000 + number, blocks=32)
            r.guest.wait(write)
            r.guest.recycle(write)
        r.flush_now()
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        assert r.seen(r.destination, 0, 8) == pattern(1, 8)
        assert r.seen(r.destination, 100) == bytes(BLOCK), "a write reached a destination that was given up"


def test_stopping_a_ring_waits_for_the_destination_no_longer_than_the_stop_timeout() -> None:
    with rig(mirrored=True, stop_timeout_us=50_000) as r:
        r.destination.hold(FLUSH)
        r.write_now(0, 1)
        flush = r.guest.flush()
        r.driver.await_held(r.destination, FLUSH)
        stop = r.driver.submit(lib.VS_CMD_VRING_STOP, attachment=0, queue=0)
        assert r.await_degraded() == Reason.STOP_TIMEOUT
        r.record_written()
        r.driver.wait(stop)
        r.guest.poll()
        assert flush.ok


def test_a_write_that_was_captured_for_a_mirror_that_is_gone() -> None:
    """It was on its way to the source when its mirror was lost: the next mirror has to copy it."""
    with rig(mirrored=True) as r:
        r.source.hold(WRITE)
        captured = r.write(0, 1)
        r.driver.await_held(r.source, WRITE)
        r.destination.fault(ZERO, errno.EIO)
        r.guest.wait(r.guest.discard(64 * BLOCK, BLOCK))
        r.await_degraded()
        r.record_written()
        r.driver.take_event(EventKind.FENCE_CLEAR)
        second = r.other_disk()
        assert r.driver.start_mirror(second) == 0
        assert r.driver.settle().state == State.SYNCING, (
            "steady without a write in flight that it did not see"
        )
        r.source.hold(WRITE, False)
        r.source.release(WRITE)
        r.guest.wait(captured)
        assert captured.ok
        r.driver.await_state(State.STEADY)
        r.flush_now()
        assert r.durable(second, 0) == pattern(1)
        assert r.snapshot().log_bytes_used == 0


def test_the_mirror_comes_back_after_a_failure() -> None:
    with rig(mirrored=True) as r:
        for round_ in range(3):
            r.destination.fault(WRITE, errno.EIO)
            r.write_now(round_, round_ + 1)
            r.await_degraded()
            r.record_written()
            r.driver.take_event(EventKind.FENCE_CLEAR)
            r.mirror()
            before = flushes(r.destination)
            r.write_now(10 + round_, round_)
            r.flush_now()
            assert flushes(r.destination) == before + 1
            r.assert_same_content()
