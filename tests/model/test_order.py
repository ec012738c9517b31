# SPDX-License-Identifier: Apache-2.0
"""The same bytes, in the same order, on both disks (docs/durability.md, rules 1 to 3)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine_driver import DiskOp, State
from tests.frontend import Request
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.sizes import MIB
from vhostsync._shim import lib

READ, WRITE, FLUSH, ZERO = DiskOp.READ, DiskOp.WRITE, DiskOp.FLUSH, DiskOp.ZERO


def drained(r: Rig) -> None:
    r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")


# -- the same bytes --------------------------------------------------------------


def test_scribbling_on_a_buffer_while_the_source_is_written() -> None:
    with rig(mirrored=True) as r:
        r.source.hold(WRITE)
        write = r.write(1, 1)
        r.driver.await_held(r.source, WRITE)
        write.scribble(b"scribble" * (BLOCK // 8))
        r.source.release(WRITE)
        r.guest.wait(write)
        drained(r)
        assert r.seen(r.source, 1) == r.seen(r.destination, 1) == pattern(1)


def test_scribbling_on_a_buffer_before_the_destination_is_written() -> None:
    with rig(mirrored=True) as r:
        r.destination.hold(WRITE)
        write = r.write(1, 1)
        r.guest.wait(write)
        write.scribble(b"scribble" * (BLOCK // 8))
        r.driver.await_held(r.destination, WRITE)
        write.scribble(b"SCRIBBLE" * (BLOCK // 8))
        r.destination.release(WRITE)
        drained(r)
        assert r.seen(r.source, 1) == r.seen(r.destination, 1) == pattern(1)


def test_scribbling_during_a_write_that_the_copy_must_bring_over() -> None:
    """In flight since before the mirror began: not captured, so its region has to be read after it."""
    with rig() as r:
        r.source.hold(WRITE)
        write = r.write(1, 1)
        r.driver.await_held(r.source, WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        assert r.driver.settle().state == State.SYNCING
        write.scribble(b"scribble" * (BLOCK // 8))
        r.source.release(WRITE)
        r.guest.wait(write)
        r.driver.await_state(State.STEADY)
        r.assert_same_content()


def test_unaligned_buffers_in_many_pieces() -> None:
    with rig(mirrored=True) as r:
        data = pattern(3, 8)
        write = r.guest.write(0, data, segments=5, align=16)
        r.guest.wait(write)
        assert write.ok
        drained(r)
        assert r.seen(r.destination, 0, 8) == data
        read = r.guest.read(0, len(data), segments=7, align=16)
        r.guest.wait(read)
        assert read.data == data


# -- the same order --------------------------------------------------------------


def test_overlapping_writes_of_two_queues_take_turns() -> None:
    with rig(mirrored=True) as r:
        r.source.hold(WRITE)
        r.destination.hold(WRITE)
        first = r.write(0, 1, blocks=4, queue=0)
        r.driver.await_held(r.source, WRITE)
        second = r.write(2, 2, blocks=4, queue=1)
        assert r.unconfirmed(first, second)
        assert r.source.held(WRITE) == 1
        r.source.release(WRITE)
        r.driver.await_held(r.source, WRITE)
        r.source.release(WRITE)
        r.guest.wait(first, second)
        r.driver.await_held(r.destination, WRITE)
        r.driver.settle()
        assert r.destination.held(WRITE) == 1
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        drained(r)
        assert r.seen(r.source, 2, 4) == pattern(2, 4)
        r.assert_same_content()


@pytest.mark.parametrize("later", ["discard", "zeroes"])
def test_zeroing_takes_turns_with_writes(later: str) -> None:
    with rig(mirrored=True) as r:
        r.source.hold(WRITE)
        r.destination.hold(WRITE)
        write = r.write(0, 1, blocks=4)
        r.driver.await_held(r.source, WRITE)
        zero = r.guest.discard if later == "discard" else r.guest.write_zeroes
        zeroed = zero(BLOCK, 2 * BLOCK, queue=1)
        again = r.write(2, 3, queue=0)
        assert r.unconfirmed(write, zeroed, again)
        r.source.hold(WRITE, False)
        r.source.release(WRITE)
        r.guest.wait(write, zeroed, again)
        r.driver.await_held(r.destination, WRITE)
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        drained(r)
        assert r.seen(r.source, 1) == bytes(BLOCK)
        assert r.seen(r.source, 2) == pattern(3)
        r.assert_same_content()


def test_what_does_not_overlap_goes_in_parallel() -> None:
    with rig(mirrored=True) as r:
        r.source.hold(WRITE)
        writes = [r.write(2 * number, number, queue=number % 2) for number in range(6)]
        r.driver.await_held(r.source, WRITE, 6)
        r.destination.hold(WRITE)
        r.source.release(WRITE)
        r.guest.wait(*writes)
        r.driver.await_held(r.destination, WRITE, 6)
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        drained(r)
        r.assert_same_content()


@pytest.mark.parametrize("seed", range(6))
def test_a_storm_of_overlapping_writes_completed_in_any_order(seed: int) -> None:
    """Held requests are let go newest first, a few at a time, on both disks."""
    rng = random.Random(seed)
    with rig(mirrored=True) as r:
        ops = (WRITE, ZERO)
        for disk in (r.source, r.destination):
            for op in ops:
                disk.hold(op)
        pending = []
        for number in range(120):
            block, blocks, queue = rng.randrange(20), rng.randrange(1, 6), rng.randrange(2)
            kind = rng.randrange(6)
            if kind == 0:
                pending.append(r.guest.discard(block * BLOCK, blocks * BLOCK, queue=queue))
            elif kind == 1:
                pending.append(r.guest.write_zeroes(block * BLOCK, blocks * BLOCK, queue=queue, unmap=True))
            else:
                pending.append(r.write(block, number, blocks=blocks, queue=queue))
            for disk in (r.source, r.destination):
                disk.release(rng.choice(ops), rng.randrange(3))
        for disk in (r.source, r.destination):
            disk.release_all()
        r.guest.wait(*pending)
        assert all(request.ok for request in pending)
        drained(r)
        r.assert_same_content()
        assert r.snapshot().counts.generation == 120


# -- the copy --------------------------------------------------------------------


def test_the_copy_brings_everything_and_writes_no_zeroes() -> None:
    with rig(size_bytes=8 * MIB) as r:
        r.source.load(0, pattern(1, 4))
        r.source.load(5 * MIB, pattern(2, 16))
        r.mirror()
        r.assert_same_content()
        assert r.durable(r.destination, 0, 4) == pattern(1, 4)
        snapshot = r.snapshot()
        assert snapshot.copy_bytes_done == snapshot.copy_bytes_total == 8 * MIB
        assert snapshot.copy_bytes_sparse >= 7 * MIB
        assert r.destination.count(WRITE) <= 4
        assert r.destination.count(ZERO) == 0  # the destination is all zeroes already


def test_the_copy_overwrites_what_the_destination_held_before() -> None:
    with rig(size_bytes=8 * MIB) as r:
        r.destination.load(0, pattern(9, 8 * MIB // BLOCK))
        r.source.load(3 * MIB, pattern(2, 16))
        r.mirror()
        r.assert_same_content()
        assert r.durable(r.destination, 0) == bytes(BLOCK)


def test_a_write_during_the_read_of_its_region() -> None:
    with rig(size_bytes=2 * MIB) as r:
        r.source.load(0, pattern(1, 2 * MIB // BLOCK))
        r.source.hold(READ)
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.source, READ)
        r.write_now(3, 2, blocks=2)  # completed while the region is being read
        r.guest.wait(r.guest.discard(8 * BLOCK, BLOCK))
        r.source.hold(READ, False)
        r.source.release(READ)
        r.driver.await_held(r.destination, WRITE)
        r.write_now(4, 3, blocks=2)
        r.destination.release(WRITE, 1)
        r.write_now(3, 4)
        r.destination.hold(WRITE, False)
        while r.destination.release(WRITE):
            pass
        r.driver.await_state(State.STEADY)
        drained(r)
        assert r.seen(r.destination, 3) == pattern(4)
        r.assert_same_content()


def test_a_stale_read_never_overtakes_a_write() -> None:
    """The region was read before the write and put after it would have been replicated: its place counts."""
    with rig(size_bytes=MIB) as r:
        r.source.load(0, pattern(1, MIB // BLOCK))
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, WRITE)  # the copy holds the old content and is about to be written
        r.write_now(7, 2)
        now = r.driver.settle()
        assert (now.counts.generation, now.state) == (1, State.SYNCING)
        assert r.destination.held(WRITE) == 1  # the guest's write waits its turn
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.driver.await_state(State.STEADY)
        drained(r)
        assert r.seen(r.destination, 7) == pattern(2)


def test_the_copy_ends_under_load_and_reads_no_region_twice() -> None:
    with rig(size_bytes=8 * MIB, dirty_region_bytes=65536) as r:
        r.source.load(0, pattern(1, 8 * MIB // BLOCK))
        assert r.driver.start_mirror(r.destination) == 0
        number = 0
        while r.snapshot().state != State.STEADY:
            number += 1
            assert number < 5000, "the copy does not end"
            r.write_now(number * 37 % 2048, number)
        # Each region is read at most once; a run of clean ones cuts a read in two, so count bytes.
        drained(r)
        assert r.source.count(READ) <= 8 * MIB // 65536
        r.assert_same_content()
        assert r.snapshot().copy_bytes_done == 8 * MIB


def test_a_write_into_a_hole_that_the_copy_passes_over() -> None:
    with rig(size_bytes=8 * MIB) as r:
        r.destination.load(0, pattern(5, 8 * MIB // BLOCK))
        r.destination.hold(ZERO)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, ZERO)
        for block in (0, 100, 1000, 2047):
            r.write_now(block, block)
        r.destination.hold(ZERO, False)
        r.destination.release(ZERO)
        r.driver.await_state(State.STEADY)
        drained(r)
        r.assert_same_content()


def test_the_copy_of_a_disk_that_is_no_multiple_of_anything() -> None:
    size = 3 * MIB + 65536 + 512
    with rig(size_bytes=size) as r:
        r.source.load(0, pattern(1, size // BLOCK + 1)[:size])
        r.mirror()
        r.guest.wait(r.guest.write(size - 512, b"E" * 512))
        drained(r)
        r.assert_same_content()


def test_a_speed_limit_of_the_copy_is_lifted_by_the_next_command() -> None:
    with rig(size_bytes=8 * MIB) as r:
        r.source.load(0, pattern(1, 8 * MIB // BLOCK))
        r.driver.call(lib.VS_CMD_MIRROR_SPEED, value=1024)
        assert r.driver.start_mirror(r.destination) == 0
        slow = r.driver.settle()
        assert slow.state == State.SYNCING and slow.copy_bytes_done < 8 * MIB
        r.write_now(2000, 1)
        r.driver.call(lib.VS_CMD_MIRROR_SPEED, value=0)
        r.driver.await_state(State.STEADY)
        drained(r)
        r.assert_same_content()


# -- bounded ---------------------------------------------------------------------


@contextmanager
def overfull(**options: Any) -> Iterator[tuple[Rig, list[Request]]]:
    """Twice as many bytes under way as the log holds, and a destination that takes none of them."""
    with rig(
        size_bytes=32 * MIB,
        log_bytes=8 * MIB,
        queue_size=256,
        memory_bytes=48 * MIB,
        mirrored=True,
        **options,
    ) as r:
        r.destination.hold(WRITE)
        writes = [r.write(64 * number, number, blocks=32, kick=False) for number in range(128)]
        r.guest.kick(0, force=True)
        yield r, writes


def test_a_full_log_blocks_writes_and_nothing_else() -> None:
    with overfull() as (r, writes):
        full = r.driver.settle()
        assert full.log_bytes_used <= 8 * MIB
        r.guest.poll()
        assert 0 < sum(write.done for write in writes) < 128
        assert r.guest.read_now(0, BLOCK, queue=1) == pattern(0)
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.guest.wait(*writes)
        assert all(write.ok for write in writes)
        drained(r)
        r.assert_same_content()
        assert r.snapshot().log_bytes_used == 0


def test_a_full_log_is_let_go_when_the_destination_is_given_up() -> None:
    with overfull(destination_timeout_us=200_000) as (r, writes):
        r.guest.wait(*writes)
        assert all(write.ok for write in writes)
        assert r.snapshot().state == State.DEGRADED


def test_the_log_is_bounded_in_time_too() -> None:
    """Writes are slowed down before the oldest one has lagged for `max_lag`, however small they are."""
    with rig(mirrored=True, max_lag_us=100_000) as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        r.driver.await_held(r.destination, WRITE)
        r.driver.until(lambda: r.driver.lag_ns() > 100_000_000, "the first write is that old")
        late = r.write(1, 2)
        assert r.unconfirmed(late)
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.guest.wait(late)
        assert late.ok
