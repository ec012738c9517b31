# SPDX-License-Identifier: Apache-2.0
"""The dirty log of a live migration: marked are exactly the pages that the backend has written.

What was written is found out by comparing the guest's memory before and after; every buffer holds something
else beforehand, so that a write shows.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.engine_driver import DiskOp, EventKind
from tests.frontend import DEFAULT_FEATURES, HEADER, Feature, Op, Request, Status
from tests.guest_ring import Region, Segment
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.sizes import MIB
from vhostsync._shim import lib

PAGE = 4096
MEMORY_BYTES = 16 * MIB
LOG_BYTES = MEMORY_BYTES // PAGE // 8
FORMS = {
    "all": DEFAULT_FEATURES,
    "no event index": DEFAULT_FEATURES & ~Feature.EVENT_IDX,
    "no indirect": DEFAULT_FEATURES & ~Feature.INDIRECT_DESC,
    "packed": DEFAULT_FEATURES | Feature.RING_PACKED,
    "packed, no indirect": (DEFAULT_FEATURES | Feature.RING_PACKED) & ~Feature.INDIRECT_DESC,
}


class Log:
    """A dirty log as a frontend has it: a memfd, at an offset that is no page's."""

    offset = 64

    def __init__(self, log_bytes: int = LOG_BYTES) -> None:
        self.bytes = log_bytes
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.offset + log_bytes)
        self._map = mmap.mmap(self.fd, self.offset + log_bytes)

    def take(self) -> set[int]:
        """The marked pages; they are marked no more."""
        bits = self._map[self.offset :]
        self._map[self.offset :] = bytes(self.bytes)
        assert not any(self._map[: self.offset])
        return {page for page in range(8 * self.bytes) if bits[page // 8] >> page % 8 & 1}

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


class Migrating:
    """A guest whose frontend logs."""

    def __init__(self, it: Rig) -> None:
        self.rig = it
        self.log = Log()

    def give_log(self, log: Log | None = None, *, expect: int = 0) -> None:
        log = log or self.log
        it = self.rig
        it.driver.call(
            lib.VS_CMD_SET_LOG_BASE, fd=os.dup(log.fd), area=(log.bytes, log.offset), expect=expect
        )

    def log_data(self, on: bool) -> None:
        """As SET_FEATURES does, on running rings."""
        self.rig.transport.set_features(self.rig.guest.features | (Feature.LOG_ALL if on else 0))

    def log_rings(self, on: bool) -> None:
        """As SET_VRING_ADDR does, on running rings."""
        for number, queue in enumerate(self.rig.guest.queues):
            at = queue.ring.addresses()
            log = queue.ring.used if on else (1 << 64) - 1
            self.rig.driver.call(
                lib.VS_CMD_VRING_ADDR, queue=number, ring=(at.desc, at.used, at.avail, log)
            )

    def begin(self) -> None:
        self.give_log()
        self.log_data(True)
        self.log_rings(True)

    def build_read(
        self,
        offset: int,
        addr: int,
        length: int,
        *,
        cuts: Sequence[int] = (),
        op: int = Op.READ,
        queue: int = 0,
    ) -> Request:
        """A read into `addr`, cut into segments there, not submitted."""
        memory = self.rig.guest.memory
        request = Request(op, queue, offset, length, memory=memory)
        request.header_addr, request.status_addr = memory.alloc(16), memory.alloc(1)
        memory.write(request.header_addr, HEADER.pack(op, 0, offset // 512))
        memory.write(request.status_addr, bytes([Status.PENDING]))
        memory.write(addr, b"\x5a" * length)
        edges = [0, *cuts, length]
        parts = [Segment(addr + a, b - a, write=True) for a, b in itertools.pairwise(edges) if b > a]
        request.chain = [
            Segment(request.header_addr, 16),
            *parts,
            Segment(request.status_addr, 1, write=True),
        ]
        request.payload_addr, request.payload_bytes = addr, length
        return request

    def answered(self, *requests: Request) -> set[int]:
        """Submits them at once; the pages that differ when the backend has answered and come to rest."""
        guest = self.rig.guest
        for request in requests:
            guest._submit(request, kick=False)
        before = self.content()
        for queue in {request.queue for request in requests}:  # another would see avail_event written anew
            os.eventfd_write(guest.queues[queue].kick, 1)
        return self.changed_since(before, requests)

    def changed_since(self, before: bytes, requests: Sequence[Request]) -> set[int]:
        rings = [queue.ring for queue in self.rig.guest.queues]
        open_ = len(requests)
        self.rig.driver.until(
            lambda: sum((r.used_index() - r.last_used) & 0xFFFF for r in rings) >= open_, "all are answered"
        )
        self.rig.driver.settle()
        after = self.content()
        self.rig.guest.poll()
        return {
            page
            for page in range(MEMORY_BYTES // PAGE)
            if before[page * PAGE : (page + 1) * PAGE] != after[page * PAGE : (page + 1) * PAGE]
        }

    def content(self) -> bytes:
        return self.rig.guest.memory.read(0, MEMORY_BYTES)


@contextmanager
def migrating(
    features: int = DEFAULT_FEATURES, *, begin: bool = True, queues: int = 2
) -> Iterator[Migrating]:
    with rig(features=features, queues=queues, memory_bytes=MEMORY_BYTES) as r:
        for block in range(64):
            r.source.load(block * BLOCK, pattern(block))
        it = Migrating(r)
        try:
            r.driver.settle()
            if begin:
                it.begin()
                it.log.take()
            yield it
        finally:
            it.log.close()


@pytest.mark.parametrize("features", FORMS.values(), ids=FORMS)
def test_exactly_what_was_written_is_marked(features: int) -> None:
    """Random requests of every kind, buffers that begin and end anywhere, on two rings at once."""
    random_ = random.Random(7)
    with migrating(features) as m:
        arena = m.rig.guest.memory.alloc(4 * MIB, align=PAGE)
        for _ in range(60):
            requests, at = [], arena
            for _ in range(random_.randrange(1, 6)):
                length = 512 * random_.randrange(1, 65)
                at += random_.choice([0, 1, 17, 511, 4000, 4096, 70000])
                cuts = sorted(random_.sample(range(length), random_.randrange(3)))
                offset = 512 * random_.randrange(256)
                queue = random_.randrange(2)
                requests.append(m.build_read(offset, at, length, cuts=cuts, queue=queue))
                at += length
            requests.append(m.build_read(0, at + 100, 20, op=Op.GET_ID))
            requests.append(m.build_read(0, at + 9000, 512, op=77))  # no such request
            changed = m.answered(*requests)
            assert m.log.take() == changed
            assert all(request.done for request in requests)


def test_elements_and_index_on_different_pages() -> None:
    """A large ring: the index on its first page, elements on all, what asks for kicks on the last."""
    with rig(queues=1, queue_size=1024, memory_bytes=MEMORY_BYTES) as r:
        m = Migrating(r)
        r.driver.settle()
        m.begin()
        ring = r.guest.queues[0].ring
        for number in range(1024):
            flush = r.guest.flush(kick=False)
            before = m.content() if number % 100 == 0 else b""
            os.eventfd_write(r.guest.queues[0].kick, 1)
            r.driver.until(lambda: ring.used_index() != ring.last_used, "it is answered")
            if before:
                assert m.changed_since(before, [flush]) == m.log.take()
            r.guest.poll()
            m.log.take()
        m.log.close()


def test_elements_of_a_packed_ring_on_different_pages() -> None:
    """Answers that are shown together, some on one page of the ring and some on the next."""
    with rig(queues=1, queue_size=1024, memory_bytes=MEMORY_BYTES, features=FORMS["packed"]) as r:
        m = Migrating(r)
        r.driver.settle()
        m.begin()
        for _ in range(PAGE // 16 - 5):
            r.guest.wait(r.guest.get_id())
        r.driver.settle()
        m.log.take()
        at = r.guest.memory.alloc(PAGE, align=PAGE)
        changed = m.answered(*(m.build_read(0, at + 20 * n, 20, op=Op.GET_ID) for n in range(10)))
        first = r.guest.queues[0].ring.desc // PAGE
        assert {first, first + 1} <= changed
        assert m.log.take() == changed
        m.log.close()


def test_writes_and_flushes_mark_their_status_and_the_used_ring_alone() -> None:
    with migrating(queues=1) as m:
        ring = m.rig.guest.queues[0].ring
        data = m.rig.write(3, 1, blocks=8)
        m.rig.guest.wait(data)
        m.rig.driver.settle()
        used = {(ring.used + at) // PAGE for at in range(6 + 8 * ring.size)}
        assert m.log.take() <= used | {data.status_addr // PAGE}
        flush = m.rig.guest.flush_now()
        m.rig.driver.settle()
        marked = m.log.take()
        assert flush.status_addr // PAGE in marked and marked <= used | {flush.status_addr // PAGE}


@pytest.mark.parametrize("aligned", [True, False])
def test_a_read_that_fails(aligned: bool) -> None:
    """What went straight into the guest's memory may be there in part."""
    with migrating(queues=1) as m:
        at = m.rig.guest.memory.alloc(64 * 1024, align=PAGE) + (0 if aligned else 1)
        m.rig.source.fault(DiskOp.READ, errno.EIO)
        request = m.build_read(0, at, 16384)
        changed = m.answered(request)
        assert request.status == Status.IOERR
        marked = m.log.take()
        whole = set(range(at // PAGE, (at + 16383) // PAGE + 1))
        assert changed <= marked <= changed | whole


def test_requests_that_were_taken_up_before_are_marked_when_they_are_answered() -> None:
    with migrating(begin=False) as m:
        at = m.rig.guest.memory.alloc(64 * 1024, align=PAGE)
        requests = [m.build_read(0, at, 16384), m.build_read(4096, at + 20480, 4096, queue=1)]
        m.rig.source.hold(DiskOp.READ)
        for request in requests:
            m.rig.guest._submit(request, kick=True)
        m.rig.driver.await_held(m.rig.source, DiskOp.READ, 2)
        m.rig.driver.settle()
        before = m.content()
        m.begin()
        assert m.log.take() == set()
        m.rig.source.release_all()
        changed = m.changed_since(before, requests)
        assert m.log.take() == changed
        assert {at // PAGE + page for page in (0, 1, 2, 3, 5)} <= changed


def test_a_short_read_is_marked_from_its_beginning() -> None:
    """A disk goes on with the rest of a segment; all of it was written."""
    with migrating() as m:
        at = m.rig.guest.memory.alloc(64 * 1024, align=PAGE)
        m.rig.source.fault(DiskOp.READ, 0)
        assert m.answered(m.build_read(0, at, 32768)) == m.log.take()


def test_nothing_is_marked_that_is_switched_off() -> None:
    with migrating(queues=1) as m:
        at = m.rig.guest.memory.alloc(64 * 1024, align=PAGE)
        ring = m.rig.guest.queues[0].ring
        used = {(ring.used + offset) // PAGE for offset in range(6 + 8 * ring.size)}
        m.log_rings(False)
        request = m.build_read(0, at, 8192)
        m.answered(request)
        data = {at // PAGE, at // PAGE + 1, request.status_addr // PAGE}
        assert m.log.take() == data
        m.log_data(False)
        m.answered(m.build_read(0, at, 8192))
        assert m.log.take() == set()
        m.log_rings(True)
        m.answered(m.build_read(0, at, 8192))
        marked = m.log.take()
        assert marked and marked <= used
        m.rig.transport.stop_ring(0)
        m.rig.transport.reset()
        assert m.log.take() == set()


def test_the_used_ring_is_marked_where_the_frontend_says() -> None:
    """log_guest_addr need not be where the ring is; it may lie beyond all memory, within the log."""
    with migrating(queues=1, begin=False) as m:
        at = m.rig.guest.queues[0].ring.addresses()
        elsewhere = Log(LOG_BYTES + 1)
        m.give_log(elsewhere)
        m.rig.driver.call(
            lib.VS_CMD_VRING_ADDR, ring=(at.desc, at.used, at.avail, MEMORY_BYTES + 5 * PAGE)
        )
        m.rig.guest.flush_now()
        m.rig.driver.settle()
        assert elsewhere.take() == {MEMORY_BYTES // PAGE + 5}
        elsewhere.close()


def test_another_log_in_the_place_of_the_first() -> None:
    """The memory has changed, and with it the log's size."""
    with migrating() as m:
        second = Log(2 * LOG_BYTES)
        m.give_log(second)
        at = m.rig.guest.memory.alloc(8192, align=PAGE)
        changed = m.answered(m.build_read(0, at, 8192))
        assert second.take() == changed
        assert m.log.take() == set()
        second.close()


def test_what_was_written_before_there_was_a_log_is_not_lost() -> None:
    with migrating(begin=False) as m:
        m.log_data(True)
        m.rig.guest.read_now(0, 4096)
        m.give_log()
        assert m.log.take() == set(range(MEMORY_BYTES // PAGE))
        at = m.rig.guest.memory.alloc(4096, align=PAGE)
        request = m.build_read(0, at, 4096)
        m.answered(request)
        assert m.log.take() == {at // PAGE, request.status_addr // PAGE}


def test_the_frontend_is_told_of_changes() -> None:
    with migrating() as m:
        told = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        m.rig.driver.call(lib.VS_CMD_SET_LOG_FD, fd=os.dup(told))
        m.rig.guest.flush_now()
        m.rig.driver.settle()
        assert os.eventfd_read(told) >= 1
        os.close(told)


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (LOG_BYTES, 65), (LOG_BYTES, (1 << 63) - 1), ((1 << 64) - 1, 64)]
)
def test_a_log_that_is_not_in_its_file_is_refused(size: int, offset: int) -> None:
    with migrating() as m:
        m.rig.driver.call(
            lib.VS_CMD_SET_LOG_BASE, fd=os.dup(m.log.fd), area=(size, offset), expect=errno.EINVAL
        )
        at = m.rig.guest.memory.alloc(4096, align=PAGE)
        assert m.log.take() == set()
        assert m.answered(m.build_read(0, at, 4096)) == m.log.take()  # the former one stays


def test_a_log_that_is_too_small_ends_the_attachment() -> None:
    with migrating(begin=False) as m:
        small = Log(1)
        m.give_log(small)
        m.log_data(True)
        m.rig.guest.memory.alloc(64 * 1024)
        m.rig.guest.read(0, 4096)
        event = m.rig.driver.take_event(EventKind.ATTACHMENT_LOST)
        assert event.value == lib.VS_LOSS_DIRTY_LOG
        small.close()


def test_a_log_that_was_shrunk_ends_the_attachment_and_nothing_else() -> None:
    with migrating() as m:
        os.ftruncate(m.log.fd, 0)
        m.rig.guest.read(0, 4096)
        event = m.rig.driver.take_event(EventKind.ATTACHMENT_LOST)
        assert event.value == lib.VS_LOSS_DIRTY_LOG
        m.rig.driver.snapshot()
        os.ftruncate(m.log.fd, m.log.offset + m.log.bytes)


def test_a_removed_region_is_marked_by_what_still_writes_to_it() -> None:
    """The request keeps the memory that it was taken up with, and that has the guest's addresses."""
    with migrating() as m:
        at = m.rig.guest.memory.alloc(8192, align=PAGE)
        m.rig.source.hold(DiskOp.READ)
        request = m.build_read(0, at, 8192)
        m.rig.guest._submit(request, kick=True)
        m.rig.driver.await_held(m.rig.source, DiskOp.READ)
        whole = m.rig.guest.memory.regions[0]
        moved = Region(whole.guest_addr + 4 * MEMORY_BYTES, whole.bytes, whole.user_addr, 0, whole.fd)
        m.rig.driver.call(lib.VS_CMD_SET_MEM_TABLE, regions=[moved])
        m.log.take()
        m.rig.source.release_all()
        m.rig.driver.until(lambda: m.rig.guest.queues[0].ring.used_index() == 1, "it is answered")
        assert {at // PAGE, at // PAGE + 1, request.status_addr // PAGE} <= m.log.take()
