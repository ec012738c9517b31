# SPDX-License-Identifier: Apache-2.0
"""Both disks are compared while the guest writes: what is equal is found equal under any load, what is not is
found, and mended if asked for (c_shim/mirror/verifier.c)."""

from __future__ import annotations

import errno
import random
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.engine_driver import DiskOp, Errand, Event, EventKind, State
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.model.stage import Stage, play, until
from tests.sizes import MIB
from vhostsync._shim import ffi, lib
from vhostsync.errors import MirrorError
from vhostsync.events import EventHub
from vhostsync.mirror.verify import Verifier

SIZE = 4 * MIB


def verify(r: Rig, *, repair: bool = False, speed: int = 0, expect: int = 0) -> None:
    r.driver.call(lib.VS_CMD_VERIFY, verify=(repair, speed), expect=expect)


def ended(r: Rig) -> Event:
    return r.driver.take_event(EventKind.VERIFIED)


def found(r: Rig) -> tuple[int, int, int, tuple[tuple[int, int], ...]]:
    """Bytes done, skipped, differing, and where."""
    r.driver.call(lib.VS_CMD_SNAPSHOT)
    s = ffi.new("struct vs_snapshot *")
    lib.vs_engine_snapshot(r.driver.engine, s)
    ranges = tuple((each.offset, each.length) for each in s.verify_ranges[0 : s.verify_range_count])
    return s.verify_bytes_done, s.verify_bytes_skipped, s.verify_bytes_differing, ranges


def repaired_bytes(r: Rig) -> int:
    s = ffi.new("struct vs_snapshot *")
    lib.vs_engine_snapshot(r.driver.engine, s)
    return int(s.verify_bytes_repaired)


def test_equal_disks_are_found_equal_and_nothing_is_written() -> None:
    with rig(size_bytes=SIZE, mirrored=True) as r:
        r.write_now(3, 1, blocks=4)
        r.driver.settle()
        written = r.destination.count(DiskOp.WRITE)
        verify(r)
        assert ended(r).result == 0
        assert found(r) == (SIZE, 0, 0, ())
        assert r.destination.count(DiskOp.WRITE) == written


def test_what_differs_is_found_to_the_block() -> None:
    with rig(size_bytes=SIZE, mirrored=True) as r:
        r.write_now(0, 1, blocks=8)
        r.driver.settle()
        r.destination.load(5 * BLOCK, b"x" * 512)
        r.destination.load(2 * MIB, b"y" * BLOCK)
        verify(r)
        assert ended(r).result == 0
        assert found(r) == (SIZE, 0, 512 + BLOCK, ((5 * BLOCK, 512), (2 * MIB, BLOCK)))
        assert r.destination.read(5 * BLOCK, 512) == b"x" * 512


def test_it_is_repaired_if_asked_for_and_marked_until_it_is_durable() -> None:
    with rig(size_bytes=SIZE, mirrored=True, dirty_region_bytes=65536) as r:
        r.write_now(0, 1, blocks=8)
        r.flush_now()
        r.driver.settle()
        r.destination.load(5 * BLOCK, b"x" * BLOCK)
        verify(r, repair=True)
        assert ended(r).result == 0
        assert found(r)[2] == BLOCK
        r.assert_same_content()
        assert (r.snapshot().differing_bytes or 0) >= MIB  # no checkpoint has come yet
        verify(r)
        assert ended(r).result == 0
        assert found(r)[2] == 0


def checked(**options: Any) -> AbstractContextManager[Rig]:
    """With a mirror whose checkpoints come often."""
    return rig(size_bytes=SIZE, mirrored=True, checkpoint_us=50_000, **options)


def settled(r: Rig) -> None:
    r.driver.until(lambda: r.snapshot().differing_bytes == 0, "the disks are known to be equal", timeout_s=20)


def test_no_count_says_that_a_repair_is_durable() -> None:
    """The guest has flushed all that it wrote before: F = G, and the repair must be flushed nevertheless."""
    with checked() as r:
        r.write_now(0, 1, blocks=8)
        r.flush_now()
        settled(r)
        r.destination.load(5 * BLOCK, b"x" * BLOCK)
        verify(r, repair=True)
        assert ended(r).result == 0
        settled(r)
        assert r.durable(r.destination, 5) == r.durable(r.source, 5)


def test_a_repair_in_flight_while_a_checkpoint_passes_stays_different() -> None:
    with checked() as r:
        r.write_now(0, 1, blocks=8)
        r.flush_now()
        settled(r)
        r.destination.load(5 * BLOCK, b"x" * BLOCK)
        r.destination.hold(DiskOp.WRITE)
        verify(r, repair=True)
        r.driver.await_held(r.destination, DiskOp.WRITE)
        time.sleep(0.3)  # several intervals in which nothing may be called equal
        assert (r.snapshot().differing_bytes or 0) >= MIB
        r.destination.release_all()
        assert ended(r).result == 0
        settled(r)
        assert r.durable(r.destination, 5) == r.durable(r.source, 5)


def test_what_falls_in_doubt_meanwhile_is_not_copied_over_a_good_destination() -> None:
    """The part differs because a write is on its way on the source; that write fails (rule 5)."""
    with checked() as r:
        r.write_now(0, 1)
        r.driver.settle()
        r.destination.load(8 * BLOCK, b"x" * BLOCK)
        written = r.destination.count(DiskOp.WRITE)
        r.source.fault(DiskOp.WRITE, errno.EIO)
        r.source.hold(DiskOp.WRITE)
        failing = r.write(0, 2)
        r.driver.await_held(r.source, DiskOp.WRITE)
        verify(r, repair=True)
        r.driver.settle()
        assert not any(event.kind == EventKind.VERIFIED for event in r.driver.events)
        r.source.hold(DiskOp.WRITE, False)
        r.source.release(DiskOp.WRITE)
        r.guest.wait(failing)
        assert not failing.ok
        assert ended(r).result == 0
        assert found(r)[:3] == (SIZE, MIB, 0)
        assert r.destination.count(DiskOp.WRITE) == written


def test_a_repair_that_does_not_stay_is_not_counted() -> None:
    """It is read back, and what cannot be read there is not mended."""
    with checked() as r:
        r.write_now(0, 1)
        r.driver.settle()
        r.destination.load(0, b"x" * BLOCK)
        r.destination.fault(DiskOp.READ, errno.EIO, skip=2)  # glance, comparison; then the reading back
        verify(r, repair=True)
        assert ended(r).result == 0
        assert found(r)[2] == BLOCK and repaired_bytes(r) == 0
        r.destination.load(0, b"x" * BLOCK)
        verify(r, repair=True)
        assert ended(r).result == 0
        assert found(r)[2] == BLOCK == repaired_bytes(r)


def test_a_hole_that_ends_within_a_block_of_the_guests() -> None:
    """As servers tell of them, and disks with smaller blocks than the guest's."""
    with rig(size_bytes=SIZE, block_bytes=4096) as r:
        destination = r.other_disk(block_bytes=4096)
        content = bytes(512) + pattern(1, 1)[512:]
        assert r.guest.write_now(8 * BLOCK, content).ok
        r.driver.mirror(destination)
        verify(r)
        assert ended(r).result == 0
        assert found(r) == (SIZE, 0, 0, ())


@pytest.mark.parametrize("repair", [False, True])
def test_a_guest_that_writes_all_over_is_no_difference(repair: bool) -> None:
    """Writes are on their way at every moment; none of them may be taken for a mismatch, nor undone."""
    chance = random.Random(7)
    with rig(size_bytes=SIZE, mirrored=True, queues=2) as r:
        last: dict[int, int] = {}
        for turn in range(6):
            verify(r, repair=repair)
            running, n = True, 0
            while running:
                n += 1
                requests = []
                for block in chance.sample(range(SIZE // BLOCK), 24):
                    last[block] = turn * 1_000_000 + n
                    requests.append(r.write(block, last[block], queue=n % 2))
                r.guest.wait(*requests)
                for request in requests:
                    assert request.ok
                    r.guest.recycle(request)
                r.driver.pump()
                running = not any(event.kind == EventKind.VERIFIED for event in r.driver.events)
            assert ended(r).result == 0
            assert found(r)[:3] == (SIZE, 0, 0)
        r.flush_now()
        r.assert_same_content()
        for block, seed in last.items():
            assert r.source.read(block * BLOCK, BLOCK) == pattern(seed)


def test_a_write_on_its_way_to_the_destination_is_waited_for() -> None:
    with rig(size_bytes=SIZE, mirrored=True) as r:
        r.destination.hold(DiskOp.WRITE)
        r.write_now(0, 1)
        verify(r)
        r.driver.settle()
        assert not any(event.kind == EventKind.VERIFIED for event in r.driver.events)
        behind = r.write(1, 2)  # of the same part: it waits for its turn
        r.driver.settle()
        r.guest.poll()
        assert not behind.done
        r.destination.release_all()
        r.guest.wait(behind)
        assert ended(r).result == 0
        assert found(r)[2] == 0


def test_ranges_in_doubt_are_skipped() -> None:
    with rig(size_bytes=SIZE, mirrored=True) as r:
        r.source.fault(DiskOp.WRITE, errno.EIO)
        failed = r.write(0, 1)
        r.guest.wait(failed)
        assert not failed.ok
        verify(r)
        assert ended(r).result == 0
        assert found(r)[:3] == (SIZE, MIB, 0)


def test_what_the_destination_cannot_read_differs_and_what_the_source_cannot_is_skipped() -> None:
    with rig(size_bytes=SIZE, mirrored=True) as r:
        r.write_now(0, 1)
        r.driver.settle()
        r.destination.fault(DiskOp.READ, errno.EIO, count=2)
        verify(r)
        assert ended(r).result == 0
        assert found(r)[2] > 0
        r.source.fault(DiskOp.READ, errno.EIO, count=1)
        verify(r)
        assert ended(r).result == 0
        done, skipped, differing, _ = found(r)
        assert (done, differing) == (SIZE, 0) and skipped == MIB


def test_it_is_refused_and_ended_in_words() -> None:
    with rig(size_bytes=SIZE) as r:
        verify(r, expect=errno.ENOTCONN)
        r.mirror()
        r.write_now(0, 1)  # holes are not read
        r.driver.settle()
        r.destination.hold(DiskOp.READ)
        verify(r)
        verify(r, expect=errno.EBUSY)
        r.driver.call(lib.VS_CMD_VERIFY_STOP)
        r.destination.release_all()
        assert ended(r).result == -errno.ECANCELED
        r.driver.call(lib.VS_CMD_VERIFY_STOP, expect=errno.ENOENT)


@pytest.mark.parametrize("step", ["glance", "waits"])
def test_a_destination_that_is_lost_ends_it(step: str) -> None:
    with rig(size_bytes=SIZE, mirrored=True) as r:
        if step == "waits":
            r.destination.hold(DiskOp.WRITE)
            r.write_now(0, 1)
        else:
            r.write_now(0, 1)  # holes are not read
            r.driver.settle()
            r.destination.hold(DiskOp.READ)
        verify(r)
        r.driver.settle()
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=0)
        r.destination.release_all()
        assert ended(r).result == -errno.ENOTCONN
        r.write_now(0, 2)  # nothing holds the range any more
        assert r.snapshot().state == State.PASSTHROUGH


def test_a_switch_that_keeps_the_mirror_does_not_end_it() -> None:
    with rig(size_bytes=SIZE, mirrored=True) as r:
        r.write_now(0, 1, blocks=16)
        verify(r, speed=8 * MIB)
        r.switch(keep=True)
        r.write_now(1, 2)
        assert ended(r).result == 0
        assert found(r)[:3] == (SIZE, 0, 0)
        r.flush_now()
        r.assert_same_content()


@pytest.mark.parametrize("keep", [False, True])
def test_the_guest_is_not_moved_to_what_one_that_runs_has_found_different(keep: bool) -> None:
    with rig(size_bytes=SIZE, mirrored=True, switch_on_source_error=True) as r:
        r.write_now(0, 1)
        r.driver.settle()
        r.destination.load(0, b"x" * BLOCK)
        verify(r, speed=MIB)
        r.driver.until(lambda: found(r)[2] > 0, "it is found")
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN, value=int(keep))
        r.gate()
        r.exchange(keep=keep, expect=errno.EBADE)
        r.driver.call(lib.VS_CMD_UNGATE)
        r.source.fault(DiskOp.WRITE, errno.EIO)
        write = r.write(1, 2)
        r.guest.wait(write)
        assert not write.ok, "it is left for a disk that differs"
        r.write_now(1, 2)
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN, value=int(keep))
        r.gate()
        flags = lib.VS_EXCHANGE_KEEP * keep | lib.VS_EXCHANGE_DIFFERENT
        r.driver.call(lib.VS_CMD_EXCHANGE, exchange=(flags,))


def test_the_speed_is_limited() -> None:
    with rig(size_bytes=SIZE, mirrored=True) as r:
        r.write_now(0, 1)
        verify(r, speed=1)
        r.driver.settle()
        assert found(r)[0] < SIZE
        r.driver.call(lib.VS_CMD_VERIFY_STOP)
        assert ended(r).result == -errno.ECANCELED


def test_one_that_comes_while_the_last_still_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled, and has a question at a disk."""

    async def scene(it: Stage) -> None:
        await it.attach()
        first, second = (Verifier(it.engine, it.mirror, EventHub()) for _ in range(2))
        it.first.hold(Errand.EXTENTS)
        await first.start(repair=False, speed_bytes_per_s=0)
        await until(lambda: it.first.held(Errand.EXTENTS) > 0)
        await first.cancel()
        with pytest.raises(MirrorError, match="a verification is under way; wait for its end"):
            await second.start(repair=False, speed_bytes_per_s=0)
        it.first.release_all()

    play(scene, tmp_path, monkeypatch)
