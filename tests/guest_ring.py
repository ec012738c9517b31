# SPDX-License-Identifier: Apache-2.0
"""Guest memory on a memfd and the driver's side of a split virtqueue (virtio 1.2, 2.7), for tests."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

USER_BASE = 0x7F00_0000_0000
"""Where the pretended frontend has its guest's memory mapped; never a real address here."""

TIMEOUT_S = float(os.environ.get("VHOSTSYNC_TEST_TIMEOUT_S", "10"))
"""How long a test waits for what must happen; tests that must fail are given less."""

DESCRIPTOR = struct.Struct("<QIHH")
DESC_NEXT = 1
DESC_WRITE = 2
DESC_INDIRECT = 4


@dataclass(frozen=True)
class Region:
    """A piece of guest memory: `bytes` at guest address `guest_addr`, at `mmap_offset` of `fd`."""

    guest_addr: int
    bytes: int
    user_addr: int
    mmap_offset: int
    fd: int


@dataclass(frozen=True)
class RingAddresses:
    """Where a ring lies, in the frontend's user addresses, as SET_VRING_ADDR has them."""

    desc: int
    avail: int
    used: int


_fence = threading.Lock()


def full_barrier() -> None:
    """Orders the stores before it against the loads after it: taking a free lock is an atomic exchange."""
    with _fence:
        pass


class GuestMemory:
    """Guest RAM on a memfd, as one region or several with gaps between their guest addresses.

    Addresses handed out are guest addresses. `alloc` and `free` keep lists of power-of-two blocks.
    """

    def __init__(
        self, sizes: Sequence[int] = (16 << 20,), *, first_guest_addr: int = 0, gap: int = 1 << 20
    ) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        total = sum(sizes)
        os.ftruncate(self.fd, total)
        self._map = mmap.mmap(self.fd, total)
        self._view = memoryview(self._map)
        self.regions: list[Region] = []
        self._next: list[int] = []
        self._free: dict[int, list[int]] = {}
        guest, offset = first_guest_addr, 0
        for size in sizes:
            self.regions.append(Region(guest, size, USER_BASE + guest, offset, self.fd))
            self._next.append(guest)
            guest += size + gap
            offset += size

    def close(self) -> None:
        self._view.release()
        self._map.close()
        os.close(self.fd)

    def _offset(self, addr: int, length: int) -> int:
        for region in self.regions:
            if region.guest_addr <= addr and addr + length <= region.guest_addr + region.bytes:
                return region.mmap_offset + addr - region.guest_addr
        raise ValueError(f"guest address {addr:#x}+{length:#x} is outside guest memory")

    def view(self, addr: int, length: int) -> memoryview:
        """The bytes themselves, writable: what the backend sees at once. Release it before `close`."""
        start = self._offset(addr, length)
        return self._view[start : start + length]

    def read(self, addr: int, length: int) -> bytes:
        start = self._offset(addr, length)
        return self._map[start : start + length]

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        start = self._offset(addr, len(data))
        self._map[start : start + len(data)] = bytes(data)

    def u16(self, addr: int) -> ctypes.c_uint16:
        """A 16-bit field, read and written whole (the ring indices must never be seen torn)."""
        return ctypes.c_uint16.from_buffer(self._map, self._offset(addr, 2))

    def alloc(self, length: int, *, align: int = 16, region: int = 0) -> int:
        """At least `length` bytes of `region`, aligned to `align` (a power of two)."""
        size = 1 << max(4, (max(length, align) - 1).bit_length())
        pool = self._free.get((size << 8) | region)
        if pool:
            return pool.pop()
        step = min(size, 4096)
        start = (self._next[region] + step - 1) & ~(step - 1)
        end = self.regions[region].guest_addr + self.regions[region].bytes
        if start + size > end:
            raise MemoryError(f"guest memory region {region} is full")
        self._next[region] = start + size
        return start

    def free(self, addr: int, length: int, *, align: int = 16, region: int = 0) -> None:
        size = 1 << max(4, (max(length, align) - 1).bit_length())
        self._free.setdefault((size << 8) | region, []).append(addr)


@dataclass(frozen=True)
class Segment:
    """One buffer of a chain. `write`: the device writes it."""

    addr: int
    length: int
    write: bool = False


class SplitRing:
    """The driver's side of one split virtqueue."""

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool = True, region: int = 0) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.desc = memory.alloc(16 * size, align=16, region=region)
        self.avail = memory.alloc(6 + 2 * size, region=region)
        self.used = memory.alloc(6 + 8 * size, region=region)
        memory.write(self.desc, bytes(16 * size))
        memory.write(self.avail, bytes(6 + 2 * size))
        memory.write(self.used, bytes(6 + 8 * size))
        self.free: list[int] = list(range(size))
        self.last_used = 0
        self.next_avail = 0
        self._kicked_at = 0
        self._chains: dict[int, list[int]] = {}
        self._tables: dict[int, tuple[int, int]] = {}
        self._avail_idx = memory.u16(self.avail + 2)
        self._used_event = memory.u16(self.avail + 4 + 2 * size)
        self._used_flags = memory.u16(self.used)
        self._used_idx = memory.u16(self.used + 2)
        self._avail_event = memory.u16(self.used + 4 + 8 * size)

    def release(self) -> None:
        """Lets go of the views into guest memory."""
        del self._avail_idx, self._used_event, self._used_flags, self._used_idx, self._avail_event

    def addresses(self) -> RingAddresses:
        return RingAddresses(USER_BASE + self.desc, USER_BASE + self.avail, USER_BASE + self.used)

    def write_descriptor(self, index: int, addr: int, length: int, flags: int, following: int = 0) -> None:
        """One descriptor as given: no check, no bookkeeping."""
        self.memory.write(self.desc + 16 * index, DESCRIPTOR.pack(addr, length, flags, following))

    def add(self, chain: Sequence[Segment], *, indirect: bool = False) -> int:
        """Puts a chain into the table and returns its head; not yet visible to the device."""
        if indirect:
            return self._add_indirect(chain)
        if len(self.free) < len(chain):
            raise MemoryError("the ring has not enough free descriptors")
        indices = [self.free.pop(0) for _ in chain]
        for position, (index, segment) in enumerate(zip(indices, chain, strict=True)):
            last = position == len(chain) - 1
            flags = (DESC_WRITE if segment.write else 0) | (0 if last else DESC_NEXT)
            following = 0 if last else indices[position + 1]
            self.write_descriptor(index, segment.addr, segment.length, flags, following)
        self._chains[indices[0]] = indices
        return indices[0]

    def _add_indirect(self, chain: Sequence[Segment]) -> int:
        if not self.free:
            raise MemoryError("the ring has not enough free descriptors")
        table = bytearray()
        for position, segment in enumerate(chain):
            last = position == len(chain) - 1
            flags = (DESC_WRITE if segment.write else 0) | (0 if last else DESC_NEXT)
            table += DESCRIPTOR.pack(segment.addr, segment.length, flags, 0 if last else position + 1)
        addr = self.memory.alloc(len(table))
        self.memory.write(addr, table)
        head = self.free.pop(0)
        self.write_descriptor(head, addr, len(table), DESC_INDIRECT)
        self._chains[head] = [head]
        self._tables[head] = (addr, len(table))
        return head

    def publish(self, *heads: int) -> None:
        """Makes heads (any numbers at all) available."""
        for head in heads:
            slot = self.avail + 4 + 2 * (self.next_avail % self.size)
            self.memory.write(slot, struct.pack("<H", head & 0xFFFF))
            self.next_avail = (self.next_avail + 1) & 0xFFFF
        full_barrier()
        self._avail_idx.value = self.next_avail

    def set_available_index(self, index: int) -> None:
        """The available index as given: a jump further than the ring is a breach."""
        self.next_avail = index & 0xFFFF
        full_barrier()
        self._avail_idx.value = self.next_avail

    def wants_kick(self) -> bool:
        """Whether the device asked for a kick for what was published since the last kick."""
        full_barrier()
        if not self.event_idx:
            return not self._used_flags.value & 1
        old, new = self._kicked_at, self.next_avail
        self._kicked_at = new
        return ((new - self._avail_event.value - 1) & 0xFFFF) < ((new - old) & 0xFFFF)

    def arm(self) -> bool:
        """Asks for a call at the next completion; False if one has come meanwhile."""
        self._used_event.value = self.last_used
        full_barrier()
        return self._used_idx.value == self.last_used

    def used_index(self) -> int:
        return int(self._used_idx.value)

    def reap(self) -> list[tuple[int, int]]:
        """(head, bytes written) of all that the device has returned; frees their descriptors."""
        done: list[tuple[int, int]] = []
        while self.last_used != self._used_idx.value:
            full_barrier()
            head, written = struct.unpack(
                "<II", self.memory.read(self.used + 4 + 8 * (self.last_used % self.size), 8)
            )
            self.last_used = (self.last_used + 1) & 0xFFFF
            self.free.extend(self._chains.pop(head, []))
            if head in self._tables:
                self.memory.free(*self._tables.pop(head))
            done.append((head, written))
        return done
