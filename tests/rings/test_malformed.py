# SPDX-License-Identifier: Apache-2.0
"""What a broken or hostile driver may put into a ring, and what becomes of it.

A request that has a status byte is answered with an error; where none can be found the queue is broken, and
only that queue. After each the other queue must serve as before.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.engine_driver import DiskOp, EventKind
from tests.frontend import HEADER, ZERO_SEGMENT, Op, Status
from tests.guest_ring import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DESCRIPTOR, Segment
from tests.model.rig import BLOCK, Rig, pattern, rig

CAPACITY_SECTORS = (4 << 20) // 512
NOWHERE = 1 << 40


@contextmanager
def guest() -> Iterator[Rig]:
    """A rig whose second queue must work before and after."""
    with rig() as r:
        r.write_now(100, 1, queue=1)
        yield r
        assert r.guest.read_now(100 * BLOCK, BLOCK, queue=1) == pattern(1)
        r.write_now(101, 2, queue=1)


class Bench:
    """Buffers for a chain made by hand."""

    def __init__(self, r: Rig) -> None:
        self.memory = r.guest.memory
        self.ring = r.guest.queues[0].ring
        self.header = self.memory.alloc(16)
        self.data = self.memory.alloc(64 * 1024, align=4096)
        self.status = self.memory.alloc(1)
        self.memory.write(self.status, bytes([Status.PENDING]))

    def head(self, op: int, sector: int = 0) -> Segment:
        self.memory.write(self.header, HEADER.pack(op, 0, sector))
        return Segment(self.header, 16)

    @property
    def end(self) -> Segment:
        return Segment(self.status, 1, write=True)


def outcome(r: Rig, bench: Bench, *chain: Segment, indirect: bool = False) -> int:
    head = bench.ring.add(chain, indirect=indirect)
    r.guest.submit_raw(head)
    r.guest.wait_raw(head)
    return bench.memory.read(bench.status, 1)[0]


Build = Callable[[Bench], list[Segment]]
ANSWERED: dict[str, tuple[Build, int]] = {
    "unknown type": (lambda b: [b.head(99), b.end], Status.UNSUPP),
    "beyond the end": (
        lambda b: [b.head(Op.WRITE, CAPACITY_SECTORS), Segment(b.data, 512), b.end],
        Status.IOERR,
    ),
    "across the end": (
        lambda b: [b.head(Op.READ, CAPACITY_SECTORS - 1), Segment(b.data, 1024, write=True), b.end],
        Status.IOERR,
    ),
    "a sector that wraps": (
        lambda b: [b.head(Op.WRITE, (1 << 64) - 1), Segment(b.data, 1024), b.end],
        Status.IOERR,
    ),
    "no whole sector": (lambda b: [b.head(Op.WRITE), Segment(b.data, 511), b.end], Status.IOERR),
    "a write into the guest": (
        lambda b: [b.head(Op.WRITE), Segment(b.data, 512, write=True), b.end],
        Status.IOERR,
    ),
    "data outside of memory": (lambda b: [b.head(Op.WRITE), Segment(NOWHERE, 512), b.end], Status.IOERR),
    "data that wraps round": (
        lambda b: [b.head(Op.WRITE), Segment((1 << 64) - 256, 512), b.end],
        Status.IOERR,
    ),
    "a huge discard": (
        lambda b: [b.head(Op.DISCARD), _ranges(b, (0, 0xFFFFFFFF, 0)), b.end],
        Status.IOERR,
    ),
    "a discard beyond the end": (
        lambda b: [b.head(Op.DISCARD), _ranges(b, (CAPACITY_SECTORS, 8, 0)), b.end],
        Status.IOERR,
    ),
    "two ranges of a discard": (
        lambda b: [b.head(Op.DISCARD), _ranges(b, (0, 8, 0), (8, 8, 0)), b.end],
        Status.UNSUPP,
    ),
    "two ranges to zero": (
        lambda b: [b.head(Op.WRITE_ZEROES), _ranges(b, (0, 8, 0), (8, 8, 0)), b.end],
        Status.UNSUPP,
    ),
    "half a range": (lambda b: [b.head(Op.WRITE_ZEROES), Segment(b.data, 8), b.end], Status.IOERR),
    "a reserved flag": (
        lambda b: [b.head(Op.WRITE_ZEROES), _ranges(b, (0, 8, 0x80)), b.end],
        Status.UNSUPP,
    ),
    "unmap flag of a discard": (
        lambda b: [b.head(Op.DISCARD), _ranges(b, (0, 8, 1)), b.end],
        Status.UNSUPP,
    ),
}


def _ranges(bench: Bench, *ranges: tuple[int, int, int]) -> Segment:
    data = b"".join(ZERO_SEGMENT.pack(*values) for values in ranges)
    bench.memory.write(bench.data, data)
    return Segment(bench.data, len(data))


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("what", ANSWERED)
def test_a_bad_request_is_answered(what: str, indirect: bool) -> None:
    build, expected = ANSWERED[what]
    with guest() as r:
        bench = Bench(r)
        assert outcome(r, bench, *build(bench), indirect=indirect) == expected
        r.write_now(0, 3)  # the queue itself is well
        assert r.driver.snapshot().counts.generation == 2


def test_a_header_that_is_too_short() -> None:
    with guest() as r:
        bench = Bench(r)
        bench.head(Op.WRITE)
        assert outcome(r, bench, Segment(bench.header, 8), bench.end) in (Status.IOERR, Status.UNSUPP)


def test_a_status_byte_behind_the_data() -> None:
    """The last byte that the device may write is the status, wherever its descriptor begins."""
    with guest() as r:
        bench = Bench(r)
        last = Segment(bench.data, 513, write=True)
        bench.memory.write(bench.data + 512, bytes([Status.PENDING]))
        head = bench.ring.add([bench.head(Op.READ), last])
        r.guest.submit_raw(head)
        r.guest.wait_raw(head)
        assert bench.memory.read(bench.data + 512, 1)[0] == Status.OK


def _loop(bench: Bench) -> int:
    bench.ring.write_descriptor(0, bench.header, 16, DESC_NEXT, 1)
    bench.ring.write_descriptor(1, bench.data, 512, DESC_NEXT, 0)
    return 0


def _next_outside(bench: Bench) -> int:
    bench.ring.write_descriptor(0, bench.header, 16, DESC_NEXT, 0x7FFF)
    return 0


def _no_status(bench: Bench) -> int:
    bench.head(Op.FLUSH)
    bench.ring.write_descriptor(0, bench.header, 16, 0)
    return 0


def _indirect(bench: Bench, length: int, addr: int | None = None, flags: int = DESC_INDIRECT) -> int:
    bench.ring.write_descriptor(0, bench.data if addr is None else addr, length, flags, 1)
    return 0


def _indirect_loop(bench: Bench) -> int:
    table = DESCRIPTOR.pack(bench.header, 16, DESC_NEXT, 1) + DESCRIPTOR.pack(bench.data, 512, DESC_NEXT, 0)
    bench.memory.write(bench.data, table)
    return _indirect(bench, len(table))


def _nested(bench: Bench) -> int:
    bench.memory.write(bench.data, DESCRIPTOR.pack(bench.data, 16, DESC_INDIRECT, 0))
    return _indirect(bench, 16)


def _status_outside(bench: Bench) -> int:
    bench.head(Op.FLUSH)
    bench.ring.write_descriptor(0, bench.header, 16, DESC_NEXT, 1)
    bench.ring.write_descriptor(1, NOWHERE, 1, DESC_WRITE)
    return 0


BREAKING: dict[str, Callable[[Bench], int]] = {
    "a chain that loops": _loop,
    "a next outside the table": _next_outside,
    "no status byte": _no_status,
    "a status byte outside memory": _status_outside,
    "a head outside the table": lambda b: 0xFFFF,
    "an indirect table of no length": lambda b: _indirect(b, 0),
    "an indirect table of a bad length": lambda b: _indirect(b, 24),
    "an indirect table outside memory": lambda b: _indirect(b, 48, NOWHERE),
    "an indirect table at the end of memory": lambda b: _indirect(b, 48, b.memory.regions[0].bytes - 16),
    "an indirect table with a next": lambda b: _indirect(b, 48, flags=DESC_INDIRECT | DESC_NEXT),
    "a loop in an indirect table": _indirect_loop,
    "nested indirect tables": _nested,
}


@pytest.mark.parametrize("what", BREAKING)
def test_rubbish_breaks_its_queue_and_no_other(what: str) -> None:
    with guest() as r:
        bench = Bench(r)
        head = BREAKING[what](bench)
        r.guest.submit_raw(head)
        r.guest.wait_broken(0)
        event = r.driver.take_event(EventKind.QUEUE_BROKEN)
        assert (event.attachment, event.queue) == (0, 0)
        assert event.reason != 0


def test_an_available_index_that_jumps() -> None:
    with guest() as r:
        r.guest.queues[0].ring.set_available_index(5000)
        r.guest.kick(0, force=True)
        r.guest.wait_broken(0)


def test_a_broken_queue_is_well_again_after_it_was_set_up_anew() -> None:
    with guest() as r:
        bench = Bench(r)
        r.guest.submit_raw(_next_outside(bench))
        r.guest.wait_broken(0)
        queue = r.guest.queues[0]
        r.transport.stop_ring(0)
        queue.ring.release()
        queue.ring = type(queue.ring)(r.guest.memory, 128, event_idx=True)
        queue.in_flight.clear()
        queue.base = 0
        r.guest.start_queue(0)
        r.write_now(0, 9)
        assert r.seen(r.source, 0) == pattern(9)


def test_requests_in_flight_survive_their_queue() -> None:
    """One request is at the source when the next one breaks the queue: it ends as it should."""
    with guest() as r:
        r.source.hold(DiskOp.WRITE)
        write = r.write(0, 5)
        r.driver.await_held(r.source, DiskOp.WRITE)
        bench = Bench(r)
        bench.ring.write_descriptor(100, bench.header, 16, DESC_NEXT, 0x7FFF)
        r.guest.submit_raw(100)
        r.guest.wait_broken(0)
        r.source.hold(DiskOp.WRITE, False)
        r.source.release(DiskOp.WRITE)
        r.guest.wait(write)
        assert write.ok and r.seen(r.source, 0) == pattern(5)


def test_a_read_only_disk() -> None:
    with rig(read_only=True) as r:
        write = r.write(0, 1)
        discard = r.guest.discard(0, BLOCK)
        r.guest.wait(write, discard)
        assert write.status == discard.status == Status.IOERR
        assert r.guest.read_now(0, BLOCK) == bytes(BLOCK)


def test_blocks_of_4096_bytes() -> None:
    with rig(block_bytes=4096) as r:
        small = r.guest.write(512, b"x" * 512)
        odd = r.guest.write(0, b"x" * 4608)
        zero = r.guest.write_zeroes(512, 4096)
        r.guest.wait(small, odd, zero)
        assert {small.status, odd.status, zero.status} == {Status.IOERR}
        r.write_now(1, 1)


def test_the_largest_request_and_one_that_is_larger() -> None:
    with rig(size_bytes=32 << 20, memory_bytes=48 << 20, queue_size=256) as r:
        data = bytes(126 * 65536)
        largest = r.guest.write(0, data, segments=126)
        r.guest.wait(largest)
        assert largest.ok
        larger = r.guest.write(0, bytes(9 << 20), segments=126)
        r.guest.wait(larger)
        assert larger.status == Status.IOERR


def test_rubbish_in_the_used_ring_and_event_fields_is_ignored() -> None:
    with guest() as r:
        ring = r.guest.queues[0].ring
        r.guest.memory.write(ring.used + 4, struct.pack("<II", 0xDEAD, 0xBEEF) * 8)
        r.write_now(0, 1)
