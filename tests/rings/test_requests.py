# SPDX-License-Identifier: Apache-2.0
"""Well-formed requests through rings of every shape, straight into the engine (virtio 1.2, 2.7 and 5.2)."""

from __future__ import annotations

import pytest

from tests.engine_driver import EngineDriver, EngineOptions, EngineTransport, MemoryDisk
from tests.frontend import DEFAULT_FEATURES, Feature, Frontend, Op, Status
from tests.guest_ring import GuestMemory, Segment
from tests.model.rig import BLOCK, pattern, rig
from tests.sizes import MIB

SHAPES = {
    "all": DEFAULT_FEATURES,
    "no event index": DEFAULT_FEATURES & ~Feature.EVENT_IDX,
    "no indirect": DEFAULT_FEATURES & ~Feature.INDIRECT_DESC,
    "neither": DEFAULT_FEATURES & ~Feature.INDIRECT_DESC & ~Feature.EVENT_IDX,
    "packed": DEFAULT_FEATURES | Feature.RING_PACKED,
    "packed, neither": (DEFAULT_FEATURES | Feature.RING_PACKED) & ~Feature.INDIRECT_DESC & ~Feature.EVENT_IDX,
}


@pytest.mark.parametrize("features", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("segments", [1, 2, 7])
def test_what_was_written_is_read(features: int, segments: int) -> None:
    with rig(features=features, queues=3) as r:
        for queue in range(3):
            data = pattern(queue, 4)
            at = 64 * queue * BLOCK
            r.guest.wait(r.guest.write(at, data, queue=queue, segments=segments))
            read = r.guest.read(at, len(data), queue=(queue + 1) % 3, segments=segments)
            r.guest.wait(read)
            assert read.ok and read.data == data
            assert read.written == len(data) + 1


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 1024])
def test_every_legal_queue_size(size: int) -> None:
    with rig(queue_size=size) as r:
        for number in range(3 * size + 5):
            r.write_now(number % 512, number)
        assert r.seen(r.source, (3 * size + 4) % 512) == pattern(3 * size + 4)


@pytest.mark.parametrize("size", [1, 3, 8, 100, 1024])
def test_every_size_of_a_packed_ring(size: int) -> None:
    with rig(queue_size=size, features=SHAPES["packed"]) as r:
        for number in range(3 * size + 5):
            r.write_now(number % 512, number)
        assert r.seen(r.source, (3 * size + 4) % 512) == pattern(3 * size + 4)


def test_a_packed_ring_goes_on_where_it_stopped() -> None:
    """The base has both wrap counters; it is taken by another attachment as by this one."""
    with rig(queue_size=5, queues=1, features=SHAPES["packed, neither"]) as r:
        for number in range(9):
            r.write_now(number, number)
            (base,) = r.guest.stop()
            ring = r.guest.queues[0].ring
            assert base == ring.next_avail | ring.next_avail << 16
            if number % 2:  # frontends that know of 16 bits
                r.guest.queues[0].base = base & 0xFFFF
            r.guest.start_queue(0)
        assert r.seen(r.source, 8) == pattern(8)


@pytest.mark.parametrize("features", [SHAPES["all"], SHAPES["neither"]], ids=["all", "neither"])
def test_the_indices_wrap_round(features: int) -> None:
    """More requests than 16 bits count, in full batches."""
    with rig(features=features, queue_size=1024, queues=1) as r:
        per_batch = 1024 if features & Feature.INDIRECT_DESC else 1024 // 3
        left = 66_000
        while left > 0:
            batch = [r.guest.read(512 * n, 512, kick=False, align=512) for n in range(min(per_batch, left))]
            r.guest.kick(0)
            r.guest.wait(*batch)
            for request in batch:
                assert request.ok
                r.guest.recycle(request)
            left -= len(batch)


def test_get_id() -> None:
    with rig() as r:
        request = r.guest.get_id()
        r.guest.wait(request)
        assert request.ok and request.data == b"model" + bytes(15)


def test_zeroing_ranges() -> None:
    with rig() as r:
        r.write_now(0, 1, blocks=16)
        for request in (
            r.guest.discard(0, BLOCK),
            r.guest.write_zeroes(2 * BLOCK, BLOCK),
            r.guest.write_zeroes(4 * BLOCK, BLOCK, unmap=True),
        ):
            r.guest.wait(request)
            assert request.ok
        content = r.seen(r.source, 0, 16)
        expected = bytearray(pattern(1, 16))
        for block in (0, 2, 4):
            expected[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
        assert content == bytes(expected)


def test_a_ring_is_stopped_and_resumed_where_it_was() -> None:
    with rig() as r:
        for number in range(5):
            r.write_now(number, number)
        assert r.guest.stop() == [5, 0]
        waiting = r.write(9, 9, kick=False)
        r.guest.start()
        r.guest.wait(waiting)  # no kick: a ring that starts is looked at
        assert waiting.ok
        assert r.guest.read_now(4 * BLOCK, BLOCK) == pattern(4)


def test_a_disabled_ring_takes_nothing_up_and_the_others_go_on() -> None:
    with rig() as r:
        r.transport.enable_ring(0, False)
        waiting = r.write(0, 1, queue=0)
        r.write_now(1, 2, queue=1)
        assert r.unconfirmed(waiting)
        r.transport.enable_ring(0, True)
        r.guest.wait(waiting)
        assert waiting.ok


def test_memory_in_several_regions_and_a_buffer_across_two() -> None:
    source = MemoryDisk(4 * MIB)
    with EngineDriver(EngineOptions(4 * MIB), source) as driver:
        memory = GuestMemory((MIB, MIB, 2 * MIB), first_guest_addr=1 << 32, gap=0)
        with Frontend(EngineTransport(driver), memory=memory, queues=1) as guest:
            border = memory.regions[1].guest_addr
            data = pattern(1, 2)
            memory.write(border - BLOCK, data[:BLOCK])
            memory.write(border, data[BLOCK:])
            header, status = memory.alloc(16), memory.alloc(1)
            memory.write(header, Op.WRITE.to_bytes(16, "little"))
            ring = guest.queues[0].ring
            chain = [Segment(header, 16), Segment(border - BLOCK, 2 * BLOCK), Segment(status, 1, write=True)]
            head = ring.add(chain)
            guest.submit_raw(head)
            guest.wait_raw(head)
            assert memory.read(status, 1)[0] == Status.OK
            assert source.read(0, 2 * BLOCK) == data
    source.drop()


def test_header_and_status_in_pieces() -> None:
    """A driver may lay out a request as it likes (virtio 1.2, 2.7.4.3)."""
    with rig() as r:
        memory, ring = r.guest.memory, r.guest.queues[0].ring
        header, data, status = memory.alloc(16), memory.alloc(BLOCK, align=BLOCK), memory.alloc(1)
        memory.write(header, Op.WRITE.to_bytes(16, "little"))
        memory.write(data, pattern(5))
        pieces = [
            Segment(header, 4),
            Segment(header + 4, 12),
            Segment(data, 100),
            Segment(data + 100, BLOCK - 100),
        ]
        head = ring.add([*pieces, Segment(status, 1, write=True)])
        r.guest.submit_raw(head)
        r.guest.wait_raw(head)
        assert memory.read(status, 1)[0] == Status.OK
        assert r.seen(r.source, 0) == pattern(5)


def test_an_idle_guest_costs_no_wake_ups() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.flush_now()
        r.driver.settle()
        before = r.snapshot().wakeups
        assert not r.driver.pump(0.3)
        assert r.snapshot().wakeups <= before + 1  # the snapshot's own
