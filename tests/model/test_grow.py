# SPDX-License-Identifier: Apache-2.0
"""The disk grows while the guest runs: what is new is on the destination before the guest may use it
(c_shim/mirror/grow.c)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine_driver import Cut, DiskOp, State
from tests.frontend import Status
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.model.test_bitmap_lost import Bits
from tests.sizes import MIB
from vhostsync._shim import lib

OLD, NEW = 4 * MIB, 6 * MIB - 4096
ROOM = 8 * MIB


def grow(r: Rig, *, expect: int = 0, value: int = NEW, source: int = ROOM, destination: int = ROOM) -> None:
    r.driver.call(lib.VS_CMD_GROW, grow=(value, source, destination), expect=expect)


def beyond(r: Rig, seed: int) -> int | None:
    """The status of a write to the last block of the larger disk."""
    request = r.write(NEW // BLOCK - 1, seed)
    r.guest.wait(request)
    return request.status


def test_without_a_mirror() -> None:
    with rig(size_bytes=OLD, disk_bytes=ROOM) as r:
        assert beyond(r, 1) == Status.IOERR
        grow(r, destination=0)
        assert beyond(r, 2) == Status.OK
        assert r.source.read(NEW - BLOCK, BLOCK) == pattern(2)


def test_the_new_range_is_equal_and_durable_before_it_is_used() -> None:
    with rig(size_bytes=OLD, disk_bytes=ROOM, mirrored=True) as r:
        r.source.load(OLD, b"old" * 4096)
        r.destination.load(OLD + MIB, b"rubbish!" * 4096)
        r.destination.hold(DiskOp.FLUSH)
        token = r.driver.submit(lib.VS_CMD_GROW, grow=(NEW, ROOM, ROOM))
        r.driver.await_held(r.destination, DiskOp.FLUSH)
        assert r.driver.done(token) is None
        assert beyond(r, 1) == Status.IOERR
        assert r.snapshot().state == State.STEADY
        r.destination.release_all()
        assert r.driver.wait(token).result == 0
        assert r.durable(r.destination, OLD // BLOCK, 3) == (b"old" * 4096)[: 3 * BLOCK]
        assert beyond(r, 2) == Status.OK
        r.flush_now()
        assert r.source.read(0, NEW) == r.destination.read(0, NEW)
        assert r.durable(r.destination, NEW // BLOCK - 1) == pattern(2)


def test_the_old_range_stays_mirrored_meanwhile() -> None:
    with rig(size_bytes=OLD, disk_bytes=ROOM, mirrored=True) as r:
        r.source.load(OLD, b"x" * MIB)
        r.source.hold(DiskOp.READ)
        token = r.driver.submit(lib.VS_CMD_GROW, grow=(NEW, ROOM, ROOM))
        r.driver.await_held(r.source, DiskOp.READ)
        r.write_now(OLD // BLOCK - 1, 7)
        r.flush_now()
        assert r.durable(r.destination, OLD // BLOCK - 1) == pattern(7)
        r.source.release_all()
        assert r.driver.wait(token).result == 0
        assert r.source.read(0, NEW) == r.destination.read(0, NEW)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("region_bytes", [4096, 64 << 10, 4 * MIB])
def test_in_steady_no_write_is_left_to_the_copy(region_bytes: int, begun: bool) -> None:
    """The old size is no whole number of regions: the region across the old end is to be copied, and what the
    guest writes in its old part waits for that copy neither before it has `begun` nor afterwards."""
    old = OLD + 3 * 512
    data = b"flushed!" * 64
    with rig(size_bytes=old, disk_bytes=ROOM, dirty_region_bytes=region_bytes) as r:
        r.source.load(OLD, b"last" * 384)  # what is copied last
        if not begun:
            r.driver.call(lib.VS_CMD_MIRROR_SPEED, value=16)  # after that the copy has to wait for minutes
        r.mirror()
        r.source.load(old, b"x" * MIB)
        r.source.hold(DiskOp.READ)
        token = r.driver.submit(lib.VS_CMD_GROW, grow=(NEW, ROOM, ROOM))
        if begun:
            r.driver.await_held(r.source, DiskOp.READ)
        last = r.guest.write(old - 512, data)
        r.guest.wait(last)
        r.write_now(0, 2)
        r.flush_now()
        assert r.destination.read(old - 512, 512, Cut.EVERYTHING) == data
        r.source.release_all()
        r.driver.call(lib.VS_CMD_MIRROR_SPEED, value=0)
        assert r.driver.wait(token).result == 0
        assert r.destination.read(old - 512, 512, Cut.EVERYTHING) == data
        assert r.source.read(0, NEW) == r.destination.read(0, NEW)


def test_a_destination_that_is_lost_meanwhile_lacks_it_and_the_bits_say_so() -> None:
    with rig(size_bytes=OLD, disk_bytes=ROOM, mirrored=True) as r:
        r.source.load(OLD, b"x" * MIB)
        r.destination.fault(DiskOp.WRITE, errno.EIO)
        token = r.driver.submit(lib.VS_CMD_GROW, grow=(NEW, ROOM, ROOM))
        r.await_degraded()
        assert r.driver.wait(token).result == 0
        r.record_written()
        assert beyond(r, 2) == Status.OK
        assert (r.snapshot().differing_bytes or 0) >= NEW - OLD
        r.driver.mirror(r.destination, resync=True)
        assert r.source.read(0, NEW) == r.destination.read(0, NEW)


def test_the_bits_stay_until_the_new_range_is_durable_there() -> None:
    """The counts say nothing of it: a checkpoint that goes by F = G would clear them too early."""
    with rig(size_bytes=OLD, disk_bytes=ROOM, mirrored=True, checkpoint_us=20_000) as r:
        r.write_now(0, 1)
        r.flush_now()
        r.driver.until(lambda: r.snapshot().differing_bytes == 0, "all is settled")
        r.source.load(OLD, b"x" * MIB)
        r.destination.hold(DiskOp.FLUSH)
        token = r.driver.submit(lib.VS_CMD_GROW, grow=(NEW, ROOM, ROOM))
        r.driver.await_held(r.destination, DiskOp.FLUSH, 2)  # grow's and the checkpoint's
        assert (r.snapshot().differing_bytes or 0) >= NEW - OLD
        r.destination.release_all()
        assert r.driver.wait(token).result == 0
        r.driver.until(lambda: r.snapshot().differing_bytes == 0, "the new range is settled")


def test_a_peer_that_is_away_lacks_it() -> None:
    with rig(size_bytes=OLD, disk_bytes=ROOM, mirrored=True) as r:
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=0)
        r.source.load(OLD, b"x" * MIB)
        grow(r, destination=0)
        r.driver.mirror(r.destination, resync=True)
        assert r.source.read(0, NEW) == r.destination.read(0, NEW)


@pytest.mark.parametrize(
    ("why", "error"),
    [
        ({"value": OLD}, errno.EINVAL),
        ({"value": NEW + 1}, errno.EINVAL),
        ({"source": NEW - 512}, errno.ENOSPC),
        ({"destination": NEW - 512}, errno.ENOSPC),
    ],
)
def test_what_is_refused_changes_nothing(why: dict[str, int], error: int) -> None:
    with rig(size_bytes=OLD, disk_bytes=ROOM, mirrored=True) as r:
        grow(r, expect=error, **why)
        assert beyond(r, 1) == Status.IOERR
        assert r.snapshot().state == State.STEADY


def test_not_while_it_copies() -> None:
    with rig(size_bytes=OLD, disk_bytes=ROOM) as r:
        r.write_now(0, 1)
        r.source.hold(DiskOp.READ)
        r.driver.start_mirror(r.destination)
        grow(r, expect=errno.EBUSY)
        r.source.release_all()
        r.driver.await_state(State.STEADY)


@contextmanager
def stopped(**options: Any) -> Iterator[Rig]:
    """A steady mirror of a disk that was to grow, and does not."""
    with rig(size_bytes=OLD, disk_bytes=ROOM, mirrored=True, **options) as r:
        r.source.load(OLD, b"x" * MIB)
        r.source.hold(DiskOp.READ)
        token = r.driver.submit(lib.VS_CMD_GROW, grow=(NEW, ROOM, ROOM))
        r.driver.await_held(r.source, DiskOp.READ)
        r.driver.call(lib.VS_CMD_GROW_STOP)
        assert r.driver.wait(token).result == -errno.ECANCELED
        grow(r, expect=errno.EBUSY)  # what was begun is not over
        r.source.release_all()
        r.driver.until(lambda: not r.source.held(DiskOp.READ), "the copy is over")
        r.driver.settle()
        assert beyond(r, 1) == Status.IOERR
        yield r


def test_stopped_then_mirrored_to_a_disk_of_the_old_size() -> None:
    """What lies beyond the end is nobody's: a destination needs no room for it."""
    with stopped() as r:
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=0)
        r.driver.until(lambda: not r.snapshot().fenced, "the former destination is closed")
        other = r.other_disk(OLD)
        r.driver.mirror(other)
        assert r.source.read(0, OLD) == other.read(0, OLD)


def test_stopped_then_mirrored_again_with_its_bitmap(tmp_path: Path) -> None:
    """The file has room for the larger size by then, and what is marked there is nobody's either."""
    bits = Bits(tmp_path / "bits", room_bytes=NEW)
    with stopped(bitmap=bits.open(), checkpoint_us=20_000) as r:
        r.write_now(0, 1)
        r.flush_now()
        r.driver.until(lambda: r.snapshot().differing_bytes == 0, "nothing differs that is the guest's")
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=0)
        r.driver.until(lambda: not r.snapshot().fenced, "the former destination is closed")
        r.write_now(OLD // BLOCK - 1, 2)
        other = r.other_disk(OLD)
        r.driver.mirror(other)
        assert r.source.read(0, OLD) == other.read(0, OLD)


def test_stopped_then_grown_less_far() -> None:
    with stopped() as r:
        less = OLD + 64 * 1024
        grow(r, value=less)
        request = r.write(less // BLOCK - 1, 3)
        r.guest.wait(request)
        assert request.status == Status.OK
        assert beyond(r, 2) == Status.IOERR
        r.flush_now()
        assert r.source.read(0, less) == r.destination.read(0, less)


def test_stopped_then_a_checkpoint() -> None:
    with stopped(checkpoint_us=20_000) as r:
        r.write_now(0, 1)
        r.flush_now()
        r.driver.until(lambda: r.snapshot().differing_bytes == 0, "nothing differs that is the guest's")
