# SPDX-License-Identifier: Apache-2.0
"""Rings that are mostly valid, each invalid knob turned rarely: whatever comes, the engine serves on.

The long hunt is tests/fuzz/ (libFuzzer under sanitizers); this one runs with every test run, over the real
engine with its thread and eventfds.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.frontend import HEADER, Op, Status
from tests.guest_ring import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DESCRIPTOR
from tests.model.rig import BLOCK, Rig, pattern, rig

QUEUE_SIZE = 16
DATA_BYTES = 32 * 1024


@dataclass(frozen=True)
class Descriptor:
    """Where it points (a name of `_address`, or a number), how long it is, its flags, and its next."""

    where: str | int
    length: int
    flags: int
    following: int


def rarely(usual: st.SearchStrategy[int], odd: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    return st.one_of(usual, usual, usual, usual, usual, odd)


u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
descriptors = st.builds(
    Descriptor,
    st.one_of(st.sampled_from(["header", "data", "data", "status", "table"]), u64),
    rarely(st.sampled_from([1, 16, 512, 1024, 4096]), u32),
    rarely(st.sampled_from([0, DESC_NEXT, DESC_WRITE, DESC_NEXT | DESC_WRITE]), st.integers(0, 15)),
    rarely(st.integers(0, QUEUE_SIZE - 1), u16),
)
tables = st.lists(descriptors, min_size=1, max_size=QUEUE_SIZE)
types = rarely(st.sampled_from([int(op) for op in Op]), u32)
sectors = rarely(st.integers(0, 64), u64)


class Stage:
    """The guest's memory for one fuzzed ring."""

    def __init__(self, r: Rig) -> None:
        memory = r.guest.memory
        self.memory = memory
        self.ring = r.guest.queues[0].ring
        self.places = {
            "header": memory.alloc(16),
            "data": memory.alloc(DATA_BYTES, align=4096),
            "status": memory.alloc(1),
            "table": memory.alloc(16 * QUEUE_SIZE),
        }

    def pack(self, descriptor: Descriptor) -> bytes:
        where = descriptor.where
        addr = self.places[where] if isinstance(where, str) else where
        return DESCRIPTOR.pack(addr, descriptor.length, descriptor.flags, descriptor.following)

    def play(self, table: list[Descriptor], indirect: list[Descriptor], header: bytes) -> None:
        self.memory.write(self.places["header"], header)
        for index, descriptor in enumerate(table):
            self.memory.write(self.ring.desc + 16 * index, self.pack(descriptor))
        self.memory.write(self.places["table"], b"".join(map(self.pack, indirect)))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(
    table=tables,
    indirect=tables,
    kind=types,
    sector=sectors,
    heads=st.lists(rarely(st.integers(0, QUEUE_SIZE - 1), u16), min_size=1, max_size=12),
    jump=rarely(st.just(0), u16),
    scribble=st.binary(max_size=64),
    mirrored=st.booleans(),
)
def test_any_ring_is_survived(
    table: list[Descriptor],
    indirect: list[Descriptor],
    kind: int,
    sector: int,
    heads: list[int],
    jump: int,
    scribble: bytes,
    mirrored: bool,
) -> None:
    with rig(queue_size=QUEUE_SIZE, size_bytes=1 << 20, memory_bytes=1 << 20, mirrored=mirrored) as r:
        stage = Stage(r)
        stage.play(table, indirect, HEADER.pack(kind, 0, sector))
        r.guest.submit_raw(*heads)
        if jump:
            stage.ring.set_available_index(stage.ring.next_avail + jump)
            r.guest.kick(0, force=True)
        stage.memory.write(stage.places["data"], scribble)
        # At rest first: what the rubbish has asked for may be written anywhere, other buffers included.
        r.driver.settle()
        # The other queue serves on, and both disks stay alike.
        r.write_now(200, 2, queue=1)
        assert r.guest.read_now(200 * BLOCK, BLOCK, queue=1) == pattern(2)
        r.guest.wait(r.guest.flush(queue=1))
        snapshot = r.driver.settle()
        assert snapshot.requests_waiting == 0 and snapshot.disk_in_flight == (0, 0)
        if mirrored:
            r.assert_same_content()
        # The ring can be stopped, and taken into use again.
        r.transport.stop_ring(0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=st.lists(st.integers(1, 1500), min_size=1, max_size=12),
    op=st.sampled_from([Op.READ, Op.WRITE]),
    sector=st.integers(0, 16),
)
def test_any_cut_of_a_good_request_is_taken(pieces: list[int], op: Op, sector: int) -> None:
    """Lengths and alignments of the segments are the driver's affair, as long as they add up."""
    total = sum(pieces)
    pieces = [*pieces, -total % 512 or 512]
    with rig(queue_size=QUEUE_SIZE, size_bytes=1 << 20, queues=1, memory_bytes=1 << 20) as r:
        length = sum(pieces)
        content = pattern(7, 8)[:length].ljust(length, b"z")
        r.source.load(0, pattern(1, 16))
        expected = bytearray(pattern(1, 16))
        memory, ring = r.guest.memory, r.guest.queues[0].ring
        header, status, data = memory.alloc(16), memory.alloc(1), memory.alloc(2 * DATA_BYTES)
        memory.write(header, HEADER.pack(op, 0, sector))
        memory.write(data, content)
        flags = DESC_WRITE if op == Op.READ else 0
        table, at = DESCRIPTOR.pack(header, 16, DESC_NEXT, 1), data
        for index, piece in enumerate(pieces):
            table += DESCRIPTOR.pack(at, piece, DESC_NEXT | flags, index + 2)
            at += piece
        table += DESCRIPTOR.pack(status, 1, DESC_WRITE, 0)
        place = memory.alloc(len(table))
        memory.write(place, table)
        ring.write_descriptor(0, place, len(table), DESC_INDIRECT)
        r.guest.submit_raw(0)
        r.guest.wait_raw(0)
        assert memory.read(status, 1)[0] == Status.OK
        start = sector * 512
        if op == Op.READ:
            assert memory.read(data, length) == r.source.read(start, length)
        else:
            expected[start : start + length] = content
            assert r.seen(r.source, 0, 16) == bytes(expected[: 16 * BLOCK])
