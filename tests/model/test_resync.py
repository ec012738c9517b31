# SPDX-License-Identifier: Apache-2.0
"""What differs is known, and only that is copied when a destination comes back (rule 4)."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine_driver import DiskOp, EventKind, Reason, State
from tests.frontend import Request
from tests.model import rig as rigs
from tests.model.rig import BLOCK, Rig
from tests.sizes import MIB
from vhostsync._shim import lib

READ, WRITE, FLUSH, ZERO = DiskOp.READ, DiskOp.WRITE, DiskOp.FLUSH, DiskOp.ZERO
REGION = 65536
BLOCKS_A_REGION = REGION // BLOCK


@contextmanager
def rig(**options: Any) -> Iterator[Rig]:
    with rigs.rig(checkpoint_us=50_000, **options) as r:
        yield r


def stop(r: Rig) -> None:
    r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
    r.driver.take_event(EventKind.FENCE_CLEAR)


def differing(r: Rig) -> int:
    found = r.snapshot().differing_bytes
    assert found is not None
    return found


def settled(r: Rig) -> None:
    """Until checkpoints have found that nothing differs."""
    r.driver.until(lambda: differing(r) == 0, "both disks are known to be equal", timeout_s=20)


def resync(r: Rig) -> int:
    """Attaches the same destination again; the bytes that were copied."""
    r.driver.mirror(r.destination, resync=True)
    return r.snapshot().copy_bytes_total


def test_without_a_peer_there_is_nothing_to_resync() -> None:
    with rig() as r:
        assert r.driver.start_mirror(r.other_disk(), resync=True) == errno.EINVAL
        assert r.snapshot().differing_bytes is None


def test_an_idle_mirror_is_known_to_be_equal() -> None:
    with rig(mirrored=True) as r:
        settled(r)
        r.write_now(0, 1)
        assert differing(r) == REGION
        settled(r)
        assert r.durable(r.destination, 0) == r.durable(r.source, 0)


def test_after_a_cancel_only_what_was_written_is_copied() -> None:
    with rig(mirrored=True) as r:
        settled(r)
        stop(r)
        r.write_now(5 * BLOCKS_A_REGION, 1)
        r.write_now(9 * BLOCKS_A_REGION + 3, 2, blocks=2)
        r.guest.wait(r.guest.discard(20 * REGION, 2 * REGION))
        assert differing(r) == 4 * REGION
        assert resync(r) == 4 * REGION
        r.assert_same_content()


@pytest.mark.parametrize("op", [WRITE, FLUSH])
def test_after_a_failure_only_what_is_not_durable_there_is_copied(op: DiskOp) -> None:
    with rig(mirrored=True) as r:
        settled(r)
        r.destination.fault(op, errno.EIO, count=1)
        r.write_now(0, 1)
        flush = r.guest.flush()
        r.await_degraded()
        r.record_written()
        r.guest.wait(flush)
        r.write_now(7 * BLOCKS_A_REGION, 2)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        assert differing(r) == 2 * REGION
        assert resync(r) == 2 * REGION
        r.flush_now()
        r.assert_same_content()


def test_a_copy_that_was_cut_off_goes_on_where_it_was() -> None:
    with rig(size_bytes=8 * MIB, copy_depth=1) as r:
        r.source.load(0, bytes([7]) * 8 * MIB)
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        for _ in range(4):
            r.driver.await_held(r.destination, WRITE)
            r.destination.release(WRITE, 1)
        r.driver.until(lambda: differing(r) < 8 * MIB, "a checkpoint while it copies", timeout_s=20)
        r.destination.fault(WRITE, errno.ENOSPC, count=1)
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.driver.await_state(State.DEGRADED)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        assert 4 * MIB <= differing(r) <= 7 * MIB
        assert resync(r) < 8 * MIB
        r.assert_same_content()


def test_the_copy_keeps_one_small_part_in_flight_beside_a_working_guest_and_yet_ends() -> None:
    with rig(size_bytes=8 * MIB, copy_depth=4) as r:
        r.source.load(0, bytes([7]) * 8 * MIB)
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, WRITE, 4)
        r.source.hold(WRITE)
        write = r.write(0, 1)  # from here on the guest is at work
        r.driver.await_held(r.source, WRITE)
        for copied in (4 * MIB, 4 * MIB + 2 * REGION):
            r.destination.release(WRITE)
            r.driver.settle()
            assert r.snapshot().copy_bytes_done == copied
            assert r.destination.held(WRITE) == 1
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.driver.until(lambda: r.snapshot().copy_bytes_done == 8 * MIB, "it has copied everything")
        assert not write.done
        r.source.hold(WRITE, False)
        r.source.release(WRITE)
        r.driver.await_state(State.STEADY)
        r.flush_now()
        r.assert_same_content()


def test_beside_a_working_guest_disks_far_away_get_more_at_once() -> None:
    """A loaded machine makes the disks slower in between, now and then: one copy in five has to show it."""
    tries: list[list[int]] = []
    while not (tries and is_quicker(tries[-1])):
        assert len(tries) < 5, tries
        tries.append(far_away())


def is_quicker(at_once: list[int]) -> bool:
    return len(at_once) <= 50 and at_once[:7] == [1] * 7 and max(at_once) == 4  # one part at a time: 134


def far_away() -> list[int]:
    """How many parts of a copy were under way, time after time. Each disk answers all that it was given every
    few milliseconds; later ever sooner, so that no request of the copy is slowed by another one."""
    with rig(size_bytes=16 * MIB, copy_depth=4) as r:
        r.source.load(0, bytes([7]) * 16 * MIB)
        r.source.hold(READ)
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.source, READ, 4)
        r.source.hold(WRITE)
        r.write(0, 1)  # from here on the guest is at work
        r.driver.await_held(r.source, WRITE)
        at_once: list[int] = []
        while r.snapshot().copy_bytes_done < 12 * MIB:
            for disk, op in ((r.source, READ), (r.destination, WRITE)):
                time.sleep(0.02 if len(at_once) < 10 else 0.005)  # how far away they are
                disk.release(op)
                r.driver.settle()
            at_once.append(r.source.held(READ))
        for disk, op in ((r.source, READ), (r.source, WRITE), (r.destination, WRITE)):
            disk.hold(op, False)
            disk.release(op)
        r.driver.await_state(State.STEADY)
        r.flush_now()
        r.assert_same_content()
    return at_once


def test_a_write_in_flight_while_a_checkpoint_passes_stays_different() -> None:
    """Its region was in the checkpoint that began before the source had it."""
    with rig(mirrored=True) as r:
        settled(r)
        r.source.hold(WRITE)
        held = r.write(0, 1)
        r.driver.await_held(r.source, WRITE)
        r.source.hold(WRITE, False)  # the one that is held stays so
        for number in range(3):
            r.destination.hold(FLUSH)  # no checkpoint ends before it was looked at
            r.write_now(5 * BLOCKS_A_REGION, number)
            assert differing(r) == 2 * REGION
            r.destination.hold(FLUSH, False)
            r.destination.release(FLUSH)
            r.driver.until(lambda: differing(r) == REGION, "the other write is covered", timeout_s=20)
        r.source.release(WRITE, 1)
        r.guest.wait(held)
        settled(r)


def test_a_write_that_is_not_mirrored_yet_stays_different() -> None:
    with rig(mirrored=True) as r:
        settled(r)
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        r.driver.await_held(r.destination, WRITE)
        time.sleep(0.3)  # several intervals in which nothing may happen
        assert differing(r) == REGION
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        settled(r)


def test_a_failed_flush_settles_nothing() -> None:
    with rig(mirrored=True) as r:
        settled(r)
        r.source.fault(FLUSH, errno.EIO, count=1)
        r.write_now(0, 1)
        r.driver.take_event(EventKind.IO_ERROR, timeout_s=20)
        assert differing(r) == REGION
        settled(r)  # the next one succeeds


def test_a_range_in_doubt_stays_different() -> None:
    with rig(mirrored=True) as r:
        settled(r)
        r.source.fault(WRITE, errno.EIO, count=1)
        failed = r.write(0, 1)
        r.guest.wait(failed)
        assert not failed.ok
        r.write_now(5 * BLOCKS_A_REGION, 2)
        r.driver.until(lambda: differing(r) == REGION, "the other region is settled", timeout_s=20)
        r.write_now(0, 3)
        settled(r)


def test_a_switch_that_keeps_the_mirror_keeps_what_differs() -> None:
    with rig(mirrored=True) as r:
        settled(r)
        r.write_now(2 * BLOCKS_A_REGION, 1)
        r.switch(keep=True)
        assert differing(r) <= REGION
        r.write_now(8 * BLOCKS_A_REGION, 2)
        stop(r)
        assert differing(r) <= 2 * REGION
        resync(r)
        r.assert_same_content()
        r.switch(keep=False)
        assert r.snapshot().differing_bytes is None


def ends(r: Rig, choose: random.Random) -> None:
    """The mirror ends in one of the ways in which it can."""
    way = choose.choice(["stop", "write", "flush"])
    if way == "stop":
        stop(r)
        return
    r.destination.fault(WRITE if way == "write" else FLUSH, errno.EIO, count=1)
    r.write(choose.randrange(64), 1)
    flush = r.guest.flush()
    r.await_degraded()
    r.record_written()
    r.guest.wait(flush)
    r.driver.take_event(EventKind.FENCE_CLEAR)
    r.destination.fault(WRITE, 0, count=0)
    r.destination.fault(FLUSH, 0, count=0)


@pytest.mark.parametrize("seed", range(12))
def test_any_end_and_a_resync_leave_equal_disks(seed: int) -> None:
    """Random writes and discards with and without the mirror, ends of all kinds."""
    choose = random.Random(seed)
    region_bytes = choose.choice([4096, 65536, 1 << 21])
    with rig(size_bytes=4 * MIB, mirrored=True, dirty_region_bytes=region_bytes) as r:
        for number in range(6):
            requests: list[Request] = []
            step: list[Callable[[], Request]] = [
                lambda: r.write(choose.randrange(1000), choose.randrange(99), blocks=choose.randint(1, 8)),
                lambda: r.guest.discard(choose.randrange(512) * BLOCK, choose.randint(1, 32) * BLOCK),
                lambda: r.guest.flush(),
            ]
            for _ in range(choose.randrange(40)):
                requests.append(choose.choices(step, [8, 1, 1])[0]())
            if choose.random() < 0.5:
                r.guest.wait(*requests)
            if number % 2 == 0:
                ends(r, choose)
            else:
                r.driver.mirror(r.destination, resync=True)
            r.guest.wait(*requests)
        r.flush_now()
        r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")
        r.assert_same_content()
