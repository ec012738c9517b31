# SPDX-License-Identifier: Apache-2.0
"""A guest, an engine and test disks, put together for the directed tests of the contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.engine_driver import (
    Cut,
    DiskOp,
    EngineDriver,
    EngineOptions,
    EngineTransport,
    EventKind,
    MemoryDisk,
    Snapshot,
    State,
)
from tests.frontend import DEFAULT_FEATURES, Frontend, Request
from tests.guest_ring import GuestMemory
from tests.sizes import MIB
from vhostsync._shim import ffi, lib

BLOCK = 4096
"""What the tests count in; the disks' logical blocks are smaller."""


def pattern(seed: int, blocks: int = 1) -> bytes:
    """`blocks` blocks that tell which write they belong to."""
    return b"".join(f"{seed:08d}.{index:06d}\n".encode() * (BLOCK // 16) for index in range(blocks))


@dataclass
class Rig:
    """One guest on `source`; `mirror` attaches `destination`."""

    driver: EngineDriver
    transport: EngineTransport
    guest: Frontend
    source: MemoryDisk
    destination: MemoryDisk
    extra: list[MemoryDisk] = field(default_factory=list)

    # -- the guest ------------------------------------------------------------

    def write(self, block: int, seed: int, *, blocks: int = 1, queue: int = 0, kick: bool = True) -> Request:
        return self.guest.write(block * BLOCK, pattern(seed, blocks), queue=queue, kick=kick)

    def write_now(self, block: int, seed: int, *, blocks: int = 1, queue: int = 0) -> None:
        request = self.write(block, seed, blocks=blocks, queue=queue)
        self.guest.wait(request)
        assert request.ok

    def flush_now(self) -> None:
        assert self.guest.flush_now().ok

    def unconfirmed(self, *requests: Request) -> bool:
        """None of them is answered although the engine has nothing more to do."""
        self.driver.settle()
        self.guest.poll()
        return not any(request.done for request in requests)

    # -- the mirror -----------------------------------------------------------

    def mirror(self) -> None:
        self.driver.mirror(self.destination)

    def snapshot(self) -> Snapshot:
        return self.driver.snapshot()

    def other_disk(self, size_bytes: int | None = None, block_bytes: int = 512) -> MemoryDisk:
        disk = MemoryDisk(size_bytes or self.source.bytes, block_bytes)
        self.extra.append(disk)
        return disk

    def await_degraded(self) -> int:
        """The reason for which the mirror left steady; flushes are held from then on."""
        event = self.driver.take_event(EventKind.DEGRADED)
        assert event.value == State.DEGRADED
        return event.reason

    def record_written(self, error: int = 0) -> None:
        self.driver.call(lib.VS_CMD_RECORD_WRITTEN, value=error)

    def gate(self, allowed_us: int = 5_000_000, *, expect: int = 0) -> None:
        self.driver.call(lib.VS_CMD_GATE, value=allowed_us, expect=expect)

    def exchange(self, *, keep: bool, accept: bool = False, expect: int = 0) -> int:
        """The pause in nanoseconds."""
        flags = lib.VS_EXCHANGE_KEEP * keep | lib.VS_EXCHANGE_ACCEPT * accept
        return self.driver.call(lib.VS_CMD_EXCHANGE, exchange=(flags,), expect=expect).value

    def switch(self, *, keep: bool) -> None:
        """A whole switch; `source` and `destination` change names with it."""
        self.driver.call(lib.VS_CMD_MIRROR_DRAIN, value=int(keep))
        self.gate()
        self.exchange(keep=keep)
        self.source, self.destination = self.destination, self.source

    # -- the disks ------------------------------------------------------------

    def durable(self, disk: MemoryDisk, block: int, blocks: int = 1) -> bytes:
        return disk.read(block * BLOCK, blocks * BLOCK, Cut.EVERYTHING)

    def seen(self, disk: MemoryDisk, block: int, blocks: int = 1) -> bytes:
        return disk.read(block * BLOCK, blocks * BLOCK)

    def assert_same_content(self) -> None:
        """Both disks read alike, over the guest's whole disk."""
        size = self.driver.options.capacity_bytes
        assert self.source.read(0, size) == self.destination.read(0, size)


def flushes(disk: MemoryDisk) -> int:
    return disk.count(DiskOp.FLUSH)


@contextmanager
def rig(
    *,
    size_bytes: int = 4 * MIB,
    disk_bytes: int | None = None,
    queues: int = 2,
    queue_size: int = 128,
    features: int = DEFAULT_FEATURES,
    mirrored: bool = False,
    memory_bytes: int = 16 * MIB,
    buffered: bool = False,
    doubt: Sequence[tuple[int, int]] = (),
    bitmap: Any = ffi.NULL,
    **options: Any,
) -> Iterator[Rig]:
    """A running guest on a disk of zeroes (`disk_bytes`: larger than the guest sees); `mirrored`: and a
    steady mirror. `bitmap`: a vs_bitmap, the engine's from here on."""
    source, destination = MemoryDisk(disk_bytes or size_bytes), MemoryDisk(disk_bytes or size_bytes)
    if buffered:
        source.make_buffered()
    engine_options = EngineOptions(capacity_bytes=size_bytes, **options)
    with EngineDriver(engine_options, source, doubt=doubt, bitmap=bitmap) as driver:
        transport = EngineTransport(driver)
        guest = Frontend(
            transport,
            queues=queues,
            queue_size=queue_size,
            features=features,
            memory=GuestMemory((memory_bytes,)),
        )
        it = Rig(driver, transport, guest, source, destination)
        try:
            guest.start()
            if mirrored:
                it.mirror()
                driver.events.clear()
            yield it
        finally:
            for disk in driver.disks:
                disk.release_all()
            driver.submit(lib.VS_CMD_RECORD_WRITTEN, value=0)  # nothing may be held back for ever
            driver.submit(lib.VS_CMD_UNGATE)
            if driver.options.pause_on_destination_error:
                driver.submit(lib.VS_CMD_MIRROR_STOP)
            guest.close()
    for disk in {source, destination, *driver.disks, *it.extra}:
        disk.drop()
