# SPDX-License-Identifier: Apache-2.0
"""A guest, a ring or a disk at the extremes of what the engine allows (docs/durability.md)."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine_driver import (
    DiskOp,
    EngineDriver,
    EngineOptions,
    EngineTransport,
    EventKind,
    MemoryDisk,
    State,
)
from tests.frontend import HEADER, Frontend, Op, Request
from tests.guest_ring import GuestMemory, Segment
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.sizes import MIB
from vhostsync._shim import ffi, lib

READ, WRITE, FLUSH = DiskOp.READ, DiskOp.WRITE, DiskOp.FLUSH


def unanswered(r: Rig, requests: Sequence[Request], timeout_s: float = 10.0) -> int:
    """How many stay unanswered although nothing but the guest touches the engine: no command, no kick."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not all(request.done for request in requests):
        r.guest.poll()
        time.sleep(0.005)
    return sum(not request.done for request in requests)


def kick_all(r: Rig) -> None:
    for queue in r.guest.queues:
        os.eventfd_write(queue.kick, 1)


# ---- R1: a dirty region larger than a copy's buffer ------------------------------------


@pytest.mark.parametrize("region_bytes", [MIB, 4 * MIB])
def test_a_dirty_region_may_be_larger_than_what_is_copied_at_once(region_bytes: int) -> None:
    size = 8 * MIB
    with rig(size_bytes=size, dirty_region_bytes=region_bytes, copy_depth=8) as r:
        for offset in range(0, size, MIB):
            r.source.load(offset, bytes([1 + offset // MIB]) * MIB)
        r.mirror()
        r.assert_same_content()


# ---- R2: a throttled write that never comes back -----------------------------------------


def test_a_throttled_write_that_goes_away_leaves_a_healthy_mirror_alone() -> None:
    timeout_us = 400_000
    with rig(
        mirrored=True,
        size_bytes=32 * MIB,
        memory_bytes=64 * MIB,
        log_bytes=8 * MIB,
        destination_timeout_us=timeout_us,
        queue_size=256,
    ) as r:
        r.destination.hold(WRITE)
        for number in range(40):
            r.guest.write(number * 262144, bytes(262144), segments=4, kick=False)
        r.guest.kick(0)
        r.driver.await_held(r.destination, WRITE)
        r.driver.until(lambda: r.snapshot().log_bytes_used > 4 * MIB, "the log fills")
        # The virtual machine is paused; the rest of its writes stays in the ring.
        stop = r.driver.submit(lib.VS_CMD_VRING_STOP, attachment=0, queue=0)
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.driver.wait(stop)
        r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")
        assert r.snapshot().state == State.STEADY
        time.sleep(2 * timeout_us / 1e6)  # what must not happen is bound to time
        assert r.snapshot().state == State.STEADY


# ---- R3: queues that were stalled are looked at again --------------------------------------


def test_the_record_lets_more_flushes_go_than_there_are_requests() -> None:
    with rig(mirrored=True, queues=2, queue_size=1024, memory_bytes=64 * MIB) as r:
        r.destination.fault(FLUSH, errno.EIO)
        r.write_now(0, 1)
        first = r.guest.flush()
        r.await_degraded()
        flushes = [r.guest.flush(queue=queue, kick=False) for queue in range(2) for _ in range(700)]
        kick_all(r)
        r.driver.settle()
        r.record_written()
        assert unanswered(r, [first, *flushes]) == 0


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("write_through", [False, True])
def test_more_waiting_flushes_than_there_are_requests(mirrored: bool, write_through: bool) -> None:
    with rig(mirrored=mirrored, queues=2, queue_size=1024, memory_bytes=64 * MIB) as r:
        if write_through:
            r.transport.set_write_cache(False)
        r.source.hold(FLUSH)
        requests = []
        for queue in range(2):
            for number in range(700):
                if write_through:
                    offset = number % 256 * BLOCK
                    requests.append(r.guest.write(offset, bytes(512), queue=queue, kick=False))
                else:
                    requests.append(r.guest.flush(queue=queue, kick=False))
        kick_all(r)
        r.driver.settle()
        r.source.hold(FLUSH, False)
        r.source.release(FLUSH)
        assert unanswered(r, requests) == 0


class FileDisk(MemoryDisk):
    """A real file as the engine's disk."""

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self.path = path
        self.direct = direct
        self.bytes = path.stat().st_size

    def hand_over(self) -> Any:
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0))
        found = ffi.new("struct vs_disk_probe *")
        assert lib.vs_disk_probe_fd(fd, self.direct, found) == 0
        return lib.vs_disk_file(fd, found, self.direct)

    def release_all(self) -> None:
        pass

    def drop(self) -> None:
        pass

    def count(self, op: DiskOp) -> int:
        return 0


@contextmanager
def engine_on(disk: MemoryDisk, queues: int) -> Iterator[tuple[EngineDriver, Frontend]]:
    options = EngineOptions(capacity_bytes=disk.bytes, queues_max=queues)
    with EngineDriver(options, disk) as driver:
        memory = GuestMemory((64 * MIB,))
        guest = Frontend(EngineTransport(driver), queues=queues, queue_size=256, memory=memory)
        try:
            guest.start()
            yield driver, guest
        finally:
            guest.close()


@pytest.mark.parametrize("mirrored", [False, True])
def test_many_full_queues_on_a_disk_that_answers_at_once(mirrored: bool, tmp_path: Path) -> None:
    """A file in memory is served without io_uring: requests end while others are still being taken up."""
    memory = Path("/dev/shm")
    folder = memory if os.access(memory, os.W_OK) else tmp_path
    paths = [folder / f"vhostsync-test-{os.getpid()}-{name}.img" for name in "ab"]
    queues = 16
    with ExitStack() as after:
        for path in paths:
            with path.open("wb") as file:
                after.callback(path.unlink)
                file.truncate(16 * MIB)
        driver, guest = after.enter_context(engine_on(FileDisk(paths[0]), queues))
        if mirrored:
            driver.mirror(FileDisk(paths[1]))
        requests = [
            guest.write(number * BLOCK, bytes(BLOCK), queue=queue, kick=False)
            if mirrored
            else guest.read(number * BLOCK, BLOCK, queue=queue, kick=False)
            for queue in range(queues)
            for number in range(100)
        ]
        for queue in guest.queues:
            os.eventfd_write(queue.kick, 1)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not all(request.done for request in requests):
            guest.poll()
            time.sleep(0.005)
        assert sum(not request.ok for request in requests) == 0


# ---- R4: where a ring stands that was set up and did not run -----------------------------------


def test_the_base_of_a_ring_that_never_ran_is_the_one_that_was_set() -> None:
    with rig() as r:
        # The incoming side of a migration on this machine: set up beside the one that runs.
        transport = EngineTransport(r.driver, attachment=1)
        guest = Frontend(transport, queues=1, memory=GuestMemory((MIB,)))
        transport.set_features(guest.features)
        transport.set_memory(guest.memory.regions)
        queue = guest.queues[0]
        transport.start_ring(0, queue.ring.size, queue.ring.addresses(), 7, queue.kick, queue.call, queue.err)
        transport.enable_ring(0, True)
        assert transport.stop_ring(0) == 7
        guest.close()


# ---- R5: descriptors that are always readable ---------------------------------------------------


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_kick_descriptor_that_is_always_readable_does_not_keep_the_engine_awake(path: str) -> None:
    with rig() as r:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        event = r.driver.wait(r.driver.submit(lib.VS_CMD_VRING_KICK, attachment=0, queue=0, fd=fd))
        assert -event.result in (0, errno.EINVAL)
        before = r.snapshot().wakeups
        time.sleep(0.3)  # what must not happen is bound to time
        assert r.snapshot().wakeups - before < 100


# ---- R6: guest memory that goes away while a write is captured ---------------------------------


def test_a_write_whose_memory_is_gone_is_no_write_of_zeroes() -> None:
    with rig(mirrored=True, memory_bytes=8 * MIB) as r:
        r.write_now(5, 1)
        r.flush_now()
        for _ in range(3):
            r.guest.memory.alloc(MIB)
        write = r.write(5, 2, kick=False)
        generation = r.snapshot().counts.generation
        assert write.payload_addr >= 2 * MIB, "behind all that the rings need"
        os.ftruncate(r.guest.memory.fd, write.payload_addr & ~4095)
        os.eventfd_write(r.guest.queues[0].kick, 1)
        r.driver.take_event(EventKind.ATTACHMENT_LOST)
        snapshot = r.driver.settle()
        os.ftruncate(r.guest.memory.fd, 8 * MIB)  # the test's own mapping of it is whole again
        assert r.seen(r.source, 5) == r.seen(r.destination, 5) == pattern(1)
        assert snapshot.counts.generation == generation and snapshot.doubt == ()


# ---- R7: the guest is served while a large hole is passed over ----------------------------------


def test_a_large_sparse_disk_does_not_hold_up_the_guest(tmp_path: Path) -> None:
    size = 8 << 40
    paths = tmp_path / "source.img", tmp_path / "destination.img"
    for path in paths:
        with path.open("wb") as file:
            file.truncate(size)
    with engine_on(FileDisk(paths[0]), 1) as (driver, guest):
        token = driver.submit(lib.VS_CMD_MIRROR_START, disk=FileDisk(paths[1]))
        reads = 0
        while driver.snapshot().copy_bytes_done < size:
            guest.read_now(0, BLOCK)
            reads += 1
        driver.wait(token)
        driver.await_state(State.STEADY)
        # Passed over in one go it leaves room for one. A bound in time would judge the machine.
        assert reads >= 10


# ---- R8: the pieces of a direct write ----------------------------------------------------------


def write_in_pieces(guest: Frontend, data: bytes, cut: int) -> Request:
    """A write to byte 0 whose data lies in two segments, the first of `cut` bytes."""
    memory = guest.memory
    request = Request(Op.WRITE, 0, 0, len(data), data=data, memory=memory, payload_bytes=len(data))
    request.header_addr, request.status_addr = memory.alloc(16), memory.alloc(1)
    request.payload_addr = memory.alloc(len(data), align=4096)
    memory.write(request.header_addr, HEADER.pack(Op.WRITE, 0, 0))
    memory.write(request.payload_addr, data)
    request.chain = [
        Segment(request.header_addr, 16),
        Segment(request.payload_addr, cut),
        Segment(request.payload_addr + cut, len(data) - cut),
        Segment(request.status_addr, 1, write=True),
    ]
    return guest._submit(request, kick=True)


def test_pieces_that_are_no_blocks_on_a_direct_disk(work: Path) -> None:
    path = work / "direct.img"
    path.write_bytes(bytes(MIB))
    with engine_on(FileDisk(path, direct=True), 1) as (_, guest):
        for cut in (508, 512, 516, 2048, 2052):
            data = pattern(cut)
            write = write_in_pieces(guest, data, cut)
            guest.wait(write)
            assert write.ok, f"a write in pieces of {cut} and {BLOCK - cut} bytes"
            assert guest.read_now(0, BLOCK) == data


# ---- R10: a stop that waits for the source alone -------------------------------------------------


def test_a_stop_that_waits_for_the_source_leaves_the_mirror_alone() -> None:
    with rig(mirrored=True, stop_timeout_us=200_000) as r:
        r.source.hold(READ)
        r.destination.hold(FLUSH)
        read = r.guest.read(0, BLOCK, queue=0)
        r.write_now(1, 1, queue=1)
        flush = r.guest.flush(queue=1)
        r.driver.await_held(r.destination, FLUSH)
        r.driver.await_held(r.source, READ)
        stop = r.driver.submit(lib.VS_CMD_VRING_STOP, attachment=0, queue=0)
        time.sleep(0.6)  # what must not happen is bound to time
        assert r.snapshot().state == State.STEADY
        assert r.driver.done(stop) is None
        r.source.hold(READ, False)
        r.source.release(READ)
        r.driver.wait(stop)
        r.destination.hold(FLUSH, False)
        r.destination.release(FLUSH)
        r.guest.wait(read, flush)
        assert read.ok and flush.ok
