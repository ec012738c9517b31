# SPDX-License-Identifier: Apache-2.0
"""Orders of events after which a power cut once lost something."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.engine_driver import (
    DiskOp,
    EngineDriver,
    EngineOptions,
    EngineTransport,
    EventKind,
    MemoryDisk,
    State,
)
from tests.frontend import Frontend
from tests.guest_ring import GuestMemory
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.powercut.checker import BITS_AT
from tests.powercut.machine import EXTENT, REGION, SHAPE, SIZE, Site, booted
from tests.sizes import MIB
from tests.testing_library import ffi, lib
from vhostsync.engine.engine import _engine_bitmap, bitmap_file_bytes
from vhostsync.record.bitmap import HEADER_BYTES, BitmapFile, Header, Trust
from vhostsync.record.state_record import StateRecord

BYTES = bitmap_file_bytes(SHAPE)


def opened(site: Site, record: StateRecord | None, boot: str) -> BitmapFile:
    return BitmapFile.open(site.bitmap, SHAPE, BYTES, record, boot)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def fresh_bitmap(site: Site) -> Iterator[Any]:
    """A vs_bitmap with one extent active at once; the engine takes it."""
    file = opened(site, None, "boot 1")
    handle = _engine_bitmap(file)
    lib.vs_test_bitmap_slots(handle, 1)
    yield handle
    file.close(clean=True)


def test_a_write_that_waits_for_its_extent_when_a_resync_begins_is_copied(fresh_bitmap: Any) -> None:
    """It was taken up while nothing was captured, and had no bit yet when the resync took the bits: so the
    destination was called up to date without it."""
    source, destination = MemoryDisk(SIZE), MemoryDisk(SIZE)
    options = EngineOptions(capacity_bytes=SIZE, dirty_region_bytes=REGION, checkpoint_us=1000)
    with (
        EngineDriver(options, source, bitmap=fresh_bitmap) as driver,
        Frontend(EngineTransport(driver), memory=GuestMemory((4 * MIB,))) as guest,
    ):
        driver.mirror(destination)
        driver.until(lambda: driver.snapshot().differing_bytes == 0, "all is settled")
        driver.call(lib.VS_CMD_MIRROR_STOP)
        source.hold(DiskOp.WRITE)
        writes = [guest.write(place, pattern(1)) for place in (0, EXTENT)]  # the second one waits
        driver.await_held(source, DiskOp.WRITE, 1)
        driver.until(lambda: driver.snapshot().fenced == 0, "the destination can come back")
        assert driver.start_mirror(destination, resync=True) == 0
        source.release_all()
        guest.wait(*writes)
        driver.settle()
        assert destination.read(EXTENT, BLOCK) == pattern(1)
    for disk in (source, destination):
        disk.drop()


def test_no_write_overtakes_one_that_overlaps_it_and_waits_for_its_extent(fresh_bitmap: Any) -> None:
    """Else the order at the source is not that of taking up, on which the copy relies where one of the two is
    captured and the other is not."""
    lib.vs_test_bitmap_slots(fresh_bitmap, 2)
    source, destination = MemoryDisk(SIZE), MemoryDisk(SIZE)
    options = EngineOptions(capacity_bytes=SIZE, dirty_region_bytes=REGION, checkpoint_us=1000)
    with (
        EngineDriver(options, source, bitmap=fresh_bitmap) as driver,
        Frontend(EngineTransport(driver), memory=GuestMemory((4 * MIB,))) as guest,
    ):
        driver.mirror(destination)
        source.hold(DiskOp.WRITE)
        edge = EXTENT - BLOCK
        busy = [guest.write(place, pattern(1)) for place in (0, 3 * EXTENT)]
        driver.await_held(source, DiskOp.WRITE, 2)
        wide = guest.write(edge, pattern(2, 2))  # of this extent and the next, which it waits for
        behind = guest.write(edge, pattern(3))
        driver.settle()
        assert source.held(DiskOp.WRITE) == 2
        source.release_all()
        guest.wait(*busy, wide, behind)
        driver.settle()
        for disk in (source, destination):
            assert disk.read(edge, BLOCK) == pattern(3)
    for disk in (source, destination):
        disk.drop()


def test_steady_begins_with_all_that_was_confirmed_without_the_destination() -> None:
    """A flush was confirmed by the source alone while the flush that makes the mirror steady was under way:
    then the destination was called up to date without what that flush had covered."""
    with rig() as it:
        it.destination.hold(DiskOp.FLUSH)
        assert it.driver.start_mirror(it.destination) == 0
        it.driver.await_held(it.destination, DiskOp.FLUSH)  # all is copied
        it.write_now(0, 1)
        flush = it.guest.flush()
        assert it.unconfirmed(flush), "from here on the destination is asked"
        it.destination.release(DiskOp.FLUSH)
        it.driver.await_state(State.STEADY)
        it.driver.await_held(it.destination, DiskOp.FLUSH)
        assert it.unconfirmed(flush)
        it.destination.release_all()
        it.guest.wait(flush)
        assert flush.ok and it.durable(it.destination, 0) == pattern(1)


def test_steady_waits_for_the_log_to_hold_what_was_confirmed() -> None:
    """The same, confirmed a little earlier: when all is copied, it is in the log and not there yet."""
    with rig() as it:
        it.destination.hold(DiskOp.WRITE)
        it.source.load(BLOCK, pattern(9))
        assert it.driver.start_mirror(it.destination) == 0
        it.driver.await_held(it.destination, DiskOp.WRITE)  # the only region with data is on its way
        it.write_now(0, 1, blocks=1)
        it.flush_now()
        it.destination.release(DiskOp.WRITE)
        it.driver.await_held(it.destination, DiskOp.WRITE)
        it.driver.settle()
        assert it.snapshot().state is State.SYNCING and it.destination.count(DiskOp.FLUSH) == 0
        it.destination.release_all()
        it.driver.await_state(State.STEADY)
        assert it.durable(it.destination, 0) == pattern(1)


def test_flushes_that_wait_for_steady_go_on_without_a_destination_that_is_lost() -> None:
    with rig() as it:
        it.destination.hold(DiskOp.FLUSH)
        assert it.driver.start_mirror(it.destination) == 0
        it.driver.await_held(it.destination, DiskOp.FLUSH)
        it.write_now(0, 1)
        flush = it.guest.flush()
        assert it.unconfirmed(flush)
        it.destination.fault(DiskOp.FLUSH, errno.EIO)
        it.destination.release(DiskOp.FLUSH)
        it.guest.wait(flush)
        assert flush.ok and it.snapshot().state is State.DEGRADED
        assert it.durable(it.source, 0) == pattern(1)


@contextmanager
def what_a_power_cut_leaves(file: BitmapFile, site: Site) -> Iterator[list[bytes]]:
    """If all that it keeps of what is not durable yet is the header: an entry for each header written."""
    durable, left = [site.bitmap.read_bytes()], []
    real_sync, real_write = os.fdatasync, os.pwrite

    def sync(fd: int) -> None:
        real_sync(fd)
        durable.append(site.bitmap.read_bytes())

    def write(fd: int, data: Any, offset: int) -> int:
        written = real_write(fd, data, offset)
        left.append(site.bitmap.read_bytes()[:HEADER_BYTES] + durable[-1][HEADER_BYTES:])
        return written

    with mock.patch.object(os, "fdatasync", sync), mock.patch.object(os, "pwrite", write):
        yield left


def test_a_disk_that_has_grown_without_its_peer_is_vouched_for_only_with_its_new_bits(site: Site) -> None:
    """A power cut left the header with the new size, and the bits without the new range: so a resync took it
    for equal."""
    old_bytes = SIZE - 32 * REGION  # the last word of bits is in use already
    small = replace(SHAPE, capacity_bytes=old_bytes)
    source, destination = MemoryDisk(SIZE), MemoryDisk(SIZE)
    options = EngineOptions(capacity_bytes=old_bytes, dirty_region_bytes=REGION, checkpoint_us=1000)
    with booted("boot 1"):
        file = BitmapFile.open(site.bitmap, small, bitmap_file_bytes(small), None)
        with EngineDriver(options, source, bitmap=_engine_bitmap(file)) as driver:
            driver.mirror(destination)
            driver.until(lambda: driver.snapshot().differing_bytes == 0, "all is settled")
            driver.call(lib.VS_CMD_MIRROR_STOP)
            file.lengthen(BYTES)
            os.fdatasync(file.fd)
            with what_a_power_cut_leaves(file, site) as left:
                driver.call(lib.VS_CMD_GROW, grow=(SIZE, SIZE, 0))
                file.note_capacity(SIZE)
        file.close(clean=False)
    bits = int.from_bytes(left[-1][BITS_AT + 16 : BITS_AT + 16 + SIZE // REGION // 8], "little")
    assert Header.decode(left[-1][:HEADER_BYTES]).shape == SHAPE
    assert bits >> old_bytes // REGION == 0xFFFFFFFF
    for disk in (source, destination):
        disk.drop()


def repair(it: Rig) -> int:
    """How many bytes the verification says it has repaired."""
    it.driver.call(lib.VS_CMD_VERIFY, verify=(1, 0))
    it.driver.take_event(EventKind.VERIFIED)
    it.driver.call(lib.VS_CMD_SNAPSHOT)
    raw = ffi.new("struct vs_snapshot *")
    lib.vs_engine_snapshot(it.driver.engine, raw)
    return int(raw.verify_bytes_repaired)


def test_what_is_called_repaired_is_durable() -> None:
    """F was G before it: so a switch that followed at once flushed nothing, nor did the guest's flushes on
    the new disk, and a power cut brought the damage back."""
    with rig(mirrored=True) as it:
        it.write_now(0, 1)
        it.flush_now()
        it.destination.load(0, b"x" * BLOCK)
        assert repair(it) == BLOCK
        assert it.durable(it.destination, 0) == pattern(1)


def test_what_cannot_be_made_durable_is_not_called_repaired() -> None:
    with rig(mirrored=True) as it:
        it.write_now(0, 1)
        it.flush_now()
        it.destination.load(0, b"x" * BLOCK)
        it.destination.fault(DiskOp.FLUSH, errno.EIO)
        assert repair(it) == 0
        assert it.snapshot().state is State.DEGRADED


def test_a_switch_waits_until_what_was_unreadable_is_durable_on_the_destination() -> None:
    """The guest had written there again, and not flushed: nothing was in the way, and a power cut after the
    switch brought back what the destination had there, older than what was flushed."""
    with rig() as it:
        it.source.load(0, pattern(1))
        it.source.spoil(0, BLOCK)
        it.driver.mirror(it.destination)
        assert it.snapshot().unreadable
        it.write_now(0, 2)
        assert not it.snapshot().unreadable
        it.driver.call(lib.VS_CMD_GATE, value=10_000_000, expect=errno.EAGAIN)
        assert not it.snapshot().gated
        it.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        it.driver.call(lib.VS_CMD_GATE, value=10_000_000)
        assert it.durable(it.destination, 0) == pattern(2)


def test_a_start_that_failed_after_a_host_crash_leaves_the_activity_log_to_the_next(site: Site) -> None:
    """It closed the bitmap as if it had ended in order; the next start took the bits without the log."""
    disks = [site.open_disk(number) for number in (0, 1)]
    first, second = (disk.identity for disk in disks)
    record = StateRecord.first(first).with_peer(second)
    with booted("boot 1"):
        file = opened(site, None, "boot 1")
        assert lib.vs_bitmap_close(_engine_bitmap(file)) == 0
        file.new_peer((first, second))
        record = record.with_bitmap(file.token)
        file.close(clean=False)  # the machine goes down
    with booted("boot 2"):
        file = opened(site, record, "boot 2")
        assert file.trust is Trust.AFTER_HOST_CRASH
        record = record.with_bitmap(file.token)
        file.close(clean=True)  # something else kept the backend from starting
        file = opened(site, record, "boot 2")
        assert file.trust is Trust.AFTER_HOST_CRASH
        assert lib.vs_bitmap_close(_engine_bitmap(file)) == 0
        record = record.with_bitmap(file.token)
        file.close(clean=True)
        file = opened(site, record, "boot 2")
        assert file.trust is Trust.SAME_BOOT
        file.close(clean=True)
    for disk in disks:
        disk.close()
