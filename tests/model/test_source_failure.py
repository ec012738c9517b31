# SPDX-License-Identifier: Apache-2.0
"""A source that fails: what the copy cannot read, and what a switch makes of it (docs/durability.md,
rule 5)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.engine_driver import DiskOp, EventKind, Reason, State
from tests.frontend import Status
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.sizes import MIB
from vhostsync._shim import lib

READ, WRITE, FLUSH, ZERO = DiskOp.READ, DiskOp.WRITE, DiskOp.FLUSH, DiskOp.ZERO
CHECKPOINT_US = 50_000
BLOCKS_A_REGION = 65536 // BLOCK


def drained(r: Rig) -> None:
    r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")


def loaded(r: Rig) -> None:
    """The source holds data, the destination other data, so that what is not copied shows."""
    r.source.load(0, pattern(1, r.source.bytes // BLOCK))
    r.destination.load(0, pattern(2, r.source.bytes // BLOCK))


def stop(r: Rig) -> None:
    r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
    r.driver.take_event(EventKind.FENCE_CLEAR)


# -- what the copy cannot read ---------------------------------------------------------


def test_a_read_that_fails_once_is_tried_again() -> None:
    with rig() as r:
        loaded(r)
        r.source.fault(READ, errno.EIO, count=3)
        r.mirror()
        assert r.snapshot().unreadable == ()
        r.assert_same_content()


def test_the_copy_goes_on_around_what_it_cannot_read() -> None:
    with rig() as r:
        loaded(r)
        r.source.spoil(5 * BLOCK + 512, 512)
        r.source.spoil(40 * BLOCK, 2 * BLOCK)
        r.source.spoil(r.source.bytes - BLOCK, BLOCK)
        r.mirror()
        last = r.source.bytes // BLOCK - 1
        assert r.snapshot().unreadable == (
            (5 * BLOCK, BLOCK),
            (40 * BLOCK, 2 * BLOCK),
            (last * BLOCK, BLOCK),
        )
        for block in range(r.source.bytes // BLOCK):
            bad = block in (5, 40, 41, last)
            expected = pattern(2 if bad else 1, last + 1)[block * BLOCK : (block + 1) * BLOCK]
            assert r.durable(r.destination, block) == expected, f"block {block}"
        assert r.snapshot().copy_bytes_done == r.source.bytes


def test_a_few_bad_blocks_cost_a_few_reads() -> None:
    """Halved where a read fails, doubled where it succeeds."""
    with rig(size_bytes=MIB) as r:
        loaded(r)
        r.source.spoil(100 * BLOCK, BLOCK)
        before = r.source.count(READ)
        r.mirror()
        assert r.source.count(READ) - before < 40


def test_a_source_that_cannot_be_read_at_all() -> None:
    with rig() as r:
        loaded(r)
        r.source.fault(READ, errno.EIO, count=-1)
        r.mirror()
        assert r.snapshot().unreadable == ((0, r.source.bytes),)
        assert r.durable(r.destination, 0, 16) == pattern(2, 16)


def test_a_guest_that_reads_there_gets_the_sources_error() -> None:
    with rig() as r:
        loaded(r)
        r.source.spoil(5 * BLOCK, BLOCK)
        r.mirror()
        read = r.guest.read(5 * BLOCK, BLOCK)
        r.guest.wait(read)
        assert read.status == Status.IOERR
        assert r.snapshot().state == State.STEADY


def test_a_guest_write_heals_what_is_unreadable() -> None:
    with rig() as r:
        loaded(r)
        r.source.spoil(4 * BLOCK, 4 * BLOCK)
        r.mirror()
        r.write_now(4, 7)
        r.guest.wait(r.guest.discard(7 * BLOCK, BLOCK))
        assert r.driver.settle().unreadable == ((5 * BLOCK, 2 * BLOCK),)
        r.write_now(5, 8, blocks=2)
        drained(r)
        assert r.snapshot().unreadable == ()
        r.assert_same_content()


def test_a_guest_write_during_the_copy_heals_too() -> None:
    """The region keeps its place in the order while it is looked through: the write follows it."""
    with rig(copy_depth=1) as r:
        loaded(r)
        r.source.spoil(4 * BLOCK, BLOCK)
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, WRITE)
        assert r.snapshot().unreadable == ((4 * BLOCK, BLOCK),)
        r.write_now(4, 7)
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.driver.await_state(State.STEADY)
        drained(r)
        assert r.snapshot().unreadable == ()
        r.assert_same_content()


def test_what_is_unreadable_stays_different_and_is_found_again() -> None:
    with rig(checkpoint_us=CHECKPOINT_US) as r:
        loaded(r)
        r.source.spoil(4 * BLOCK, BLOCK)
        r.mirror()
        r.write_now(9 * BLOCKS_A_REGION, 7)
        r.driver.until(lambda: r.snapshot().differing_bytes == 65536, "all else is known to be equal")
        stop(r)
        r.driver.mirror(r.destination, resync=True)
        assert r.snapshot().copy_bytes_total == 65536
        assert r.snapshot().unreadable == ((4 * BLOCK, BLOCK),)
        assert r.seen(r.destination, 4) == pattern(2, 5)[-BLOCK:]
        r.write_now(4, 8)
        r.driver.until(lambda: r.snapshot().differing_bytes == 0, "healed, both disks are equal")
        r.assert_same_content()


@pytest.mark.parametrize("resync", [True, False])
def test_what_is_in_doubt_is_not_copied_over_the_destination(resync: bool) -> None:
    with rig(mirrored=True, checkpoint_us=CHECKPOINT_US) as r:
        r.write_now(0, 1, blocks=4)
        r.flush_now()
        drained(r)
        r.source.fault(WRITE, errno.EIO)
        r.guest.wait(r.write(1, 2, blocks=2))  # half of it is on the source
        stop(r)
        r.write_now(8, 3)
        r.driver.mirror(r.destination, resync=resync, spare_doubt=True)
        assert r.seen(r.destination, 0, 4) == pattern(1, 4)
        assert r.seen(r.destination, 8) == pattern(3)
        assert r.snapshot().doubt == ((BLOCK, 2 * BLOCK),)


def failed_write(r: Rig, block: int, seed: int) -> None:
    r.source.fault(WRITE, errno.EIO)
    request = r.write(block, seed)
    r.guest.wait(request)
    assert request.status == Status.IOERR


def written_without_the_destination(r: Rig) -> None:
    stop(r)
    r.write_now(1, 5)
    r.flush_now()
    failed_write(r, 1, 6)


def not_mirrored_yet(r: Rig) -> None:
    r.destination.hold(WRITE)
    r.write_now(1, 4)
    r.driver.await_held(r.destination, WRITE)
    r.write_now(1, 5)  # waits for its turn there
    failed_write(r, 1, 6)
    r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
    r.destination.hold(WRITE, False)
    r.destination.release(WRITE)
    r.driver.take_event(EventKind.FENCE_CLEAR)


def healed_without_the_destination(r: Rig) -> None:
    failed_write(r, 1, 4)
    assert r.driver.settle().spared == ((BLOCK, BLOCK),)
    stop(r)
    r.write_now(1, 5)
    failed_write(r, 1, 6)


@pytest.mark.parametrize(
    "make_doubt", [written_without_the_destination, not_mirrored_yet, healed_without_the_destination]
)
def test_what_the_destination_lacks_is_copied_although_it_is_in_doubt(
    make_doubt: Callable[[Rig], None],
) -> None:
    """The guest's write 5 is on the source alone, and steady promises it."""
    with rig(mirrored=True) as r:
        r.write_now(1, 1)
        r.flush_now()
        make_doubt(r)
        r.driver.mirror(r.destination, resync=True)
        now = r.snapshot()
        assert (now.doubt, now.spared) == (((BLOCK, BLOCK),), ())
        assert r.seen(r.destination, 1) == r.seen(r.source, 1) != pattern(1)


def test_what_an_earlier_run_left_in_doubt_stands_in_the_way() -> None:
    with rig(mirrored=True, doubt=((BLOCK, 2 * BLOCK), (9 * BLOCK, BLOCK))) as r:
        r.gate()
        r.exchange(keep=False, expect=errno.EBUSY)
        r.driver.call(lib.VS_CMD_UNGATE)
        r.write_now(1, 1, blocks=2)
        assert r.snapshot().doubt == ((9 * BLOCK, BLOCK),)
        r.write_now(9, 1)
        r.gate()
        r.exchange(keep=False)


# -- a switch in spite of it -------------------------------------------------------------


def test_what_is_unreadable_stands_in_the_way_of_a_switch_unless_accepted() -> None:
    with rig() as r:
        loaded(r)
        r.source.spoil(4 * BLOCK, BLOCK)
        r.mirror()
        r.gate()
        r.exchange(keep=False, expect=errno.EBUSY)
        r.exchange(keep=True, accept=True, expect=errno.EBUSY)  # it would be no mirror
        r.exchange(keep=False, accept=True)
        assert r.snapshot().unreadable == ()
        assert r.guest.read_now(0, 6 * BLOCK) == (
            pattern(1, 4) + pattern(2, 5)[-BLOCK:] + pattern(1, 6)[-BLOCK:]
        )


def test_doubt_is_accepted_too() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        drained(r)
        r.source.fault(WRITE, errno.EIO)
        r.guest.wait(r.write(0, 2))
        r.gate()
        r.exchange(keep=False, accept=True)
        assert r.snapshot().doubt == ()
        assert r.guest.read_now(0, BLOCK) == pattern(1)
        r.write_now(0, 3)
        r.flush_now()
