# SPDX-License-Identifier: Apache-2.0
"""What the source has no data for, on a destination that has to write zeroes there and is slow at it."""

from __future__ import annotations

from tests.engine_driver import DiskOp, State
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.sizes import MIB

READ, ZERO = DiskOp.READ, DiskOp.ZERO
SIZE = 32 * MIB
DEPTH = 4


def await_zeroing(r: Rig, parts: int) -> None:
    r.driver.await_held(r.destination, ZERO, parts)
    r.driver.settle()
    assert r.destination.held(ZERO) == parts


def copied(r: Rig) -> int:
    return r.snapshot().copy_bytes_done


def await_copied(r: Rig, count: int) -> None:
    r.driver.until(lambda: copied(r) == count, "a part is zeroed")


def test_a_hole_is_zeroed_in_parts_and_no_more_of_them_at_once_than_of_any_others() -> None:
    with rig(size_bytes=SIZE, copy_depth=DEPTH) as r:
        r.destination.load(0, b"rubbish!" * (SIZE // 8))
        r.destination.hold(ZERO)
        assert r.driver.start_mirror(r.destination) == 0
        await_zeroing(r, DEPTH)
        for parts in range(1, 4):
            assert r.destination.release(ZERO, 1) == 1
            await_copied(r, parts * MIB)
            await_zeroing(r, DEPTH)
        r.destination.release_all()
        r.driver.await_state(State.STEADY)
        r.assert_same_content()


def test_a_write_waits_for_one_part_of_the_hole() -> None:
    with rig(size_bytes=SIZE, copy_depth=1) as r:
        r.destination.load(0, b"rubbish!" * (SIZE // 8))
        r.destination.hold(ZERO)
        assert r.driver.start_mirror(r.destination) == 0
        await_zeroing(r, 1)
        r.write_now(3, 1)
        assert r.snapshot().lag_writes == 1
        r.destination.release(ZERO, 1)
        r.driver.until(lambda: r.snapshot().lag_writes == 0, "it is mirrored")
        assert r.seen(r.destination, 3) == pattern(1)
        assert copied(r) <= MIB
        r.destination.release_all()
        r.driver.await_state(State.STEADY)
        r.assert_same_content()


def test_while_the_guest_works_the_parts_are_small() -> None:
    with rig(size_bytes=SIZE, copy_depth=DEPTH) as r:
        r.destination.load(0, b"rubbish!" * (SIZE // 8))
        r.source.hold(READ)
        r.destination.hold(ZERO)
        read = r.guest.read(0, BLOCK)
        r.driver.await_held(r.source, READ)
        assert r.driver.start_mirror(r.destination) == 0
        await_zeroing(r, 1)
        r.destination.release(ZERO, 1)
        r.driver.until(lambda: copied(r) > 0, "a part is zeroed")
        assert copied(r) == 128 << 10
        await_zeroing(r, 1)
        r.source.release_all()
        r.guest.wait(read)
        r.destination.release_all()
        r.driver.await_state(State.STEADY)


def test_what_is_a_hole_on_both_is_passed_over() -> None:
    with rig(size_bytes=SIZE, copy_depth=DEPTH) as r:
        r.destination.load(5 * MIB, b"rubbish!" * (MIB // 8))
        r.destination.hold(ZERO)
        assert r.driver.start_mirror(r.destination) == 0
        await_zeroing(r, 1)
        assert copied(r) == SIZE - MIB
        r.destination.release_all()
        r.driver.await_state(State.STEADY)
        r.assert_same_content()
