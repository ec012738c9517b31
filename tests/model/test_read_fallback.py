# SPDX-License-Identifier: Apache-2.0
"""Reads that the source fails, answered from the destination (docs/durability.md, "Reads from the
destination")."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine_driver import DiskOp, EventKind, State
from tests.frontend import Status
from tests.model import rig as rigs
from tests.model.rig import BLOCK, Rig, pattern
from vhostsync._shim import lib

READ, WRITE, FLUSH = DiskOp.READ, DiskOp.WRITE, DiskOp.FLUSH


@contextmanager
def rig(**options: Any) -> Iterator[Rig]:
    with rigs.rig(mirrored=True, read_fallback=True, **options) as r:
        yield r


@pytest.mark.parametrize("error", [errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EREMOTEIO])
def test_a_read_that_the_source_fails_is_answered_by_the_destination(error: int) -> None:
    with rig() as r:
        r.write_now(0, 1, blocks=4)
        r.source.fault(READ, error, count=-1)
        assert r.guest.read_now(0, 4 * BLOCK) == pattern(1, 4)
        assert r.guest.read_now(BLOCK, BLOCK) == pattern(1, 4)[BLOCK : 2 * BLOCK]
        snapshot = r.driver.settle()
        assert snapshot.reads_from_destination == 2
        assert snapshot.state == State.STEADY
        told = r.driver.take_event(EventKind.READ_FALLBACK)
        assert (told.offset, told.length) == (0, 4 * BLOCK)
        assert not any(event.kind == EventKind.READ_FALLBACK for event in r.driver.events), "told once"
        assert r.driver.take_event(EventKind.IO_ERROR).disk_role == lib.VS_SOURCE


def test_without_the_option_it_is_the_guests_error() -> None:
    with rigs.rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.source.fault(READ, errno.EIO)
        read = r.guest.read(0, BLOCK)
        r.guest.wait(read)
        assert read.status == Status.IOERR
        assert r.snapshot().reads_from_destination == 0


def test_it_waits_until_the_destination_has_what_the_guest_has_written() -> None:
    with rig() as r:
        r.write_now(0, 1)
        r.destination.hold(WRITE)
        r.write_now(0, 2)
        r.driver.await_held(r.destination, WRITE)
        r.source.fault(READ, errno.EIO)
        read = r.guest.read(0, BLOCK)
        assert r.unconfirmed(read)
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.guest.wait(read)
        assert read.ok and read.data == pattern(2)


def test_a_range_in_doubt_is_the_guests_error() -> None:
    with rig() as r:
        r.write_now(0, 1, blocks=4)
        r.source.fault(WRITE, errno.EIO)
        r.guest.wait(r.write(1, 2))
        r.source.fault(READ, errno.EIO, count=2)
        inside, beside = r.guest.read(0, 2 * BLOCK), r.guest.read(2 * BLOCK, BLOCK)
        r.guest.wait(inside, beside)
        assert inside.status == Status.IOERR
        assert beside.ok and beside.data == pattern(1, 4)[2 * BLOCK : 3 * BLOCK]


def test_an_unreadable_range_is_the_guests_error() -> None:
    with rigs.rig(read_fallback=True) as r:
        r.source.load(0, pattern(1, 16))
        r.source.spoil(4 * BLOCK, BLOCK)
        r.mirror()
        read = r.guest.read(4 * BLOCK, BLOCK)
        r.guest.wait(read)
        assert read.status == Status.IOERR
        r.source.spoil(5 * BLOCK, BLOCK)  # after the copy
        assert r.guest.read_now(5 * BLOCK, BLOCK) == pattern(1, 16)[5 * BLOCK : 6 * BLOCK]


def test_nothing_of_a_destination_that_is_known_to_differ() -> None:
    with rig() as r:
        r.write_now(0, 1)
        r.driver.call(lib.VS_CMD_PEER_DIFFERS, value=1)
        r.source.fault(READ, errno.EIO)
        read = r.guest.read(0, BLOCK)
        r.guest.wait(read)
        assert read.status == Status.IOERR
        r.driver.call(lib.VS_CMD_PEER_DIFFERS, value=0)
        r.source.fault(READ, errno.EIO)
        assert r.guest.read_now(0, BLOCK) == pattern(1)


def test_what_falls_in_doubt_while_it_waits() -> None:
    with rig() as r:
        r.write_now(0, 1)
        r.destination.hold(WRITE)
        r.write_now(9, 2)
        r.driver.await_held(r.destination, WRITE)
        r.source.fault(READ, errno.EIO)
        read = r.guest.read(0, BLOCK)
        assert r.unconfirmed(read)
        r.source.fault(WRITE, errno.EIO)
        r.guest.wait(r.write(0, 3))
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.guest.wait(read)
        assert read.status == Status.IOERR


def test_both_disks_fail() -> None:
    with rig() as r:
        r.write_now(0, 1)
        r.source.fault(READ, errno.EIO)
        r.destination.fault(READ, errno.EIO)
        read = r.guest.read(0, BLOCK)
        r.guest.wait(read)
        assert read.status == Status.IOERR
        snapshot = r.driver.settle()
        assert (snapshot.state, snapshot.reads_from_destination) == (State.STEADY, 0)


def test_a_mirror_that_is_lost_meanwhile() -> None:
    with rig() as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        r.driver.await_held(r.destination, WRITE)
        r.source.fault(READ, errno.EIO)
        read = r.guest.read(0, BLOCK)
        assert r.unconfirmed(read)
        r.destination.fault(WRITE, errno.EIO)
        r.destination.release(WRITE)
        r.await_degraded()
        r.guest.wait(read)
        assert read.status == Status.IOERR
        r.record_written()


def test_a_destination_that_hangs_in_the_read_delays_the_guest_no_longer_than_its_timeout() -> None:
    with rig(destination_timeout_us=60_000) as r:
        r.write_now(0, 1)
        r.flush_now()
        r.destination.hold(READ)
        r.source.fault(READ, errno.EIO)
        read = r.guest.read(0, BLOCK)
        r.guest.wait(read)
        assert read.status == Status.IOERR
        r.await_degraded()
        r.record_written()
        assert r.snapshot().fenced == 1
        # What comes back late is nobody's.
        r.guest.recycle(read)
        r.write_now(1, 2)
        r.destination.hold(READ, False)
        r.destination.release(READ)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        r.mirror()
        r.source.fault(READ, errno.EIO)
        assert r.guest.read_now(BLOCK, BLOCK) == pattern(2)


def test_stopping_a_ring_waits_for_it_no_longer_than_the_stop_timeout() -> None:
    with rig(stop_timeout_us=50_000) as r:
        r.destination.hold(READ)
        r.source.fault(READ, errno.EIO)
        read = r.guest.read(0, BLOCK)
        r.driver.await_held(r.destination, READ)
        stop = r.driver.submit(lib.VS_CMD_VRING_STOP, attachment=0, queue=0)
        r.await_degraded()
        r.driver.wait(stop)
        r.guest.poll()
        assert read.status == Status.IOERR
        r.record_written()


def test_many_at_once() -> None:
    """More than the pool has."""
    with rig() as r:
        r.write_now(0, 1, blocks=64)
        r.source.fault(READ, errno.EIO, count=-1)
        reads = [r.guest.read(number * BLOCK, BLOCK, queue=number % 2) for number in range(64)]
        r.guest.wait(*reads)
        for number, read in enumerate(reads):
            assert read.ok and read.data == pattern(1, 64)[number * BLOCK : (number + 1) * BLOCK]
        assert r.snapshot().reads_from_destination == 64
