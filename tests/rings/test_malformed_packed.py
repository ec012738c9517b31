# SPDX-License-Identifier: Apache-2.0
"""A hostile guest on a packed ring: its rubbish breaks that ring, no other, and goes no further (virtio 1.2,
2.8)."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.engine_driver import DiskOp, EventKind
from tests.frontend import DEFAULT_FEATURES, HEADER, Feature, Op
from tests.guest_ring import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, PACKED_DESCRIPTOR, WRAP, PackedRing
from tests.model.rig import Rig, pattern, rig
from vhostsync._shim import lib
from vhostsync.vhost_user.rules import INFLIGHT_PACKED_RING_BYTES, QUEUE_ENTRIES_MAX

NOWHERE = 1 << 50
SIZE = 8
PACKED_HEADER_BYTES = 32
"""Of the record of requests in flight, before its descriptors."""


@contextmanager
def guest() -> Iterator[Rig]:
    with rig(queues=2, queue_size=SIZE, features=DEFAULT_FEATURES | Feature.RING_PACKED) as r:
        yield r


class Bench:
    """Writes descriptors as given, and shows the first."""

    def __init__(self, r: Rig) -> None:
        ring = r.guest.queues[0].ring
        assert isinstance(ring, PackedRing)
        self.ring, self.guest = ring, r.guest
        self.memory = r.guest.memory
        self.header, self.data = self.memory.alloc(16), self.memory.alloc(4096)
        self.memory.write(self.header, HEADER.pack(Op.FLUSH, 0, 0))

    def put(self, *descriptors: tuple[int, int, int, int]) -> None:
        """(address, length, ID, flags) of each, from where the next chain begins."""
        place = head = self.ring.next_avail
        for addr, length, number, flags in reversed(descriptors):
            place = self.ring.step(head, len(descriptors) - 1)
            flags |= self.ring.available(place)
            at = self.ring.desc + 16 * (place & ~WRAP)
            self.memory.write(at, PACKED_DESCRIPTOR.pack(addr, length, number, flags))
            descriptors = descriptors[:-1]
        self.guest.kick(0, force=True)

    def indirect(self, length: int, addr: int | None = None, flags: int = 0) -> None:
        self.put((self.data if addr is None else addr, length, 0, DESC_INDIRECT | flags))


BREAKING: dict[str, tuple[Callable[[Bench], None], int]] = {
    "a chain around the whole ring": (
        lambda b: b.put(*[(b.header, 16, 0, DESC_NEXT)] * SIZE),
        lib.VS_BREACH_CHAIN,
    ),
    "an ID that is none": (lambda b: b.put((b.header, 16, SIZE, DESC_WRITE)), lib.VS_BREACH_HEAD),
    "an ID that is none at the end of a list": (
        lambda b: b.put((b.header, 16, 0, DESC_NEXT), (b.data, 1, 0xFFFF, DESC_WRITE)),
        lib.VS_BREACH_HEAD,
    ),
    "no status byte": (lambda b: b.put((b.header, 16, 0, 0)), lib.VS_BREACH_NO_STATUS),
    "a status byte outside memory": (
        lambda b: b.put((b.header, 16, 0, DESC_NEXT), (NOWHERE, 1, 0, DESC_WRITE)),
        lib.VS_BREACH_NO_STATUS,
    ),
    "an indirect table of no length": (lambda b: b.indirect(0), lib.VS_BREACH_INDIRECT),
    "an indirect table of a bad length": (lambda b: b.indirect(24), lib.VS_BREACH_INDIRECT),
    "an indirect table outside memory": (lambda b: b.indirect(48, NOWHERE), lib.VS_BREACH_INDIRECT),
    "an indirect table at the end of memory": (
        lambda b: b.indirect(48, b.memory.regions[0].bytes - 16),
        lib.VS_BREACH_INDIRECT,
    ),
    "an indirect table in a list": (
        lambda b: b.put((b.data, 16, 0, DESC_INDIRECT | DESC_NEXT), (b.data, 16, 0, DESC_INDIRECT)),
        lib.VS_BREACH_CHAIN,
    ),
}


@pytest.mark.parametrize("what", BREAKING)
def test_rubbish_breaks_its_ring_and_no_other(what: str) -> None:
    put, reason = BREAKING[what]
    with guest() as r:
        put(Bench(r))
        r.guest.wait_broken(0)
        event = r.driver.take_event(EventKind.QUEUE_BROKEN)
        assert (event.attachment, event.queue, event.reason) == (0, 0, reason)
        r.write_now(0, 3, queue=1)
        assert r.seen(r.source, 0) == pattern(3)


def test_an_id_that_is_in_flight() -> None:
    """The first request is at the source when the second comes with its ID: it ends as it should."""
    with guest() as r:
        r.source.hold(DiskOp.WRITE)
        write = r.write(0, 5)
        r.driver.await_held(r.source, DiskOp.WRITE)
        Bench(r).put((0, 16, write.head, DESC_WRITE))
        r.guest.wait_broken(0)
        assert r.driver.take_event(EventKind.QUEUE_BROKEN).reason == lib.VS_BREACH_HEAD
        r.source.hold(DiskOp.WRITE, False)
        r.source.release(DiskOp.WRITE)
        r.guest.wait(write)
        assert write.ok and r.seen(r.source, 0) == pattern(5)


@pytest.mark.parametrize("base", [WRAP | SIZE, 0xFFFFFFFF])
def test_a_base_outside_the_ring(base: int) -> None:
    with guest() as r:
        r.guest.stop()
        r.guest.queues[0].base = base
        r.guest.start_queue(0)
        r.guest.wait_broken(0)
        assert r.driver.take_event(EventKind.QUEUE_BROKEN).reason == lib.VS_BREACH_AVAILABLE_INDEX


def test_a_broken_ring_is_well_again_after_it_was_set_up_anew() -> None:
    with guest() as r:
        Bench(r).indirect(0)
        r.guest.wait_broken(0)
        queue = r.guest.queues[0]
        r.transport.stop_ring(0)
        queue.ring.release()
        queue.ring = PackedRing(r.guest.memory, SIZE)
        queue.base = queue.ring.first_base
        r.guest.start_queue(0)
        r.write_now(0, 9)
        assert r.seen(r.source, 0) == pattern(9)


def test_rubbish_in_the_event_suppression_is_ignored() -> None:
    with guest() as r:
        ring = r.guest.queues[0].ring
        for flags in (0, 3, 0xFFFF):
            r.guest.memory.write(ring.avail, flags.to_bytes(2, "little") * 2)
            r.guest.memory.write(ring.used, flags.to_bytes(2, "little") * 2)
            r.write_now(0, flags)


def start_again(r: Rig) -> None:
    """As a frontend that has not set the base since: GET_VRING_BASE, SET_VRING_KICK."""
    r.transport.stop_ring(0)
    kick = os.dup(r.guest.queues[0].kick)
    r.driver.call(lib.VS_CMD_VRING_KICK, queue=0, fd=kick)


def await_broken(r: Rig, reason: int) -> None:
    r.guest.wait_broken(0)
    assert r.driver.take_event(EventKind.QUEUE_BROKEN).reason == reason


def test_a_place_outside_the_ring_is_not_gone_on_from() -> None:
    with guest() as r:
        r.guest.stop()
        r.guest.queues[0].base = WRAP - 1
        r.guest.start_queue(0)
        await_broken(r, lib.VS_BREACH_AVAILABLE_INDEX)
        start_again(r)
        await_broken(r, lib.VS_BREACH_AVAILABLE_INDEX)


def test_a_ring_that_was_made_smaller_is_not_looked_at_beyond_its_end() -> None:
    with guest() as r:
        for number in range(SIZE // 2):
            r.write_now(number, number)
        place = r.transport.stop_ring(0) & (WRAP - 1)
        assert place > 1
        r.driver.call(lib.VS_CMD_VRING_NUM, queue=0, value=1)
        start_again(r)
        await_broken(r, lib.VS_BREACH_AVAILABLE_INDEX)


def test_a_record_of_rubbish_is_not_gone_on_with() -> None:
    """Where a chain runs out of the record, what was read of it so far must not lead anywhere later."""
    with guest() as r:
        r.guest.stop()
        record = os.memfd_create("inflight")
        os.truncate(record, INFLIGHT_PACKED_RING_BYTES)
        header = struct.pack("<QHHHHHHBB", 0, 1, *[QUEUE_ENTRIES_MAX] * 3, 0, 0, 1, 1)  # nothing is free
        chain = struct.pack("<BxHHHQ", 1, 0xFFFF, 0, 2, 0)
        os.pwrite(record, header, 0)
        os.pwrite(record, chain, PACKED_HEADER_BYTES)
        r.driver.call(lib.VS_CMD_SET_INFLIGHT, fd=record, area=(INFLIGHT_PACKED_RING_BYTES, 0, 1))
        r.guest.start_queue(0)
        await_broken(r, lib.VS_BREACH_CHAIN)
        start_again(r)
        await_broken(r, lib.VS_BREACH_CHAIN)
