# SPDX-License-Identifier: Apache-2.0
"""Guest memory on a memfd and the driver's side of a virtqueue, for tests: split or packed (virtio 1.2, 2.7
and 2.8)."""

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

    packed = False
    first_base = 0
    """Where the device of a new ring begins, as SET_VRING_BASE has it."""

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

    def all_used(self) -> bool:
        """All that was made available is used, and was reaped."""
        return self.used_index() == self.next_avail

    def base_after_crash(self) -> int:
        """What QEMU sends in SET_VRING_BASE to the backend that takes a killed one's place."""
        return self.used_index()

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


PACKED_DESCRIPTOR = struct.Struct("<QIHH")
PACKED_AVAIL = 1 << 7
PACKED_USED = 1 << 15
WRAP = 0x8000


class PackedRing(SplitRing):
    """The driver's side of one packed virtqueue, for whoever uses a `SplitRing`: a head is a buffer ID here.
    Places in the ring are an index with the wrap counter in bit 15."""

    packed = True
    first_base = WRAP | WRAP << 16

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool = True, region: int = 0) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.desc = memory.alloc(16 * size, align=16, region=region)
        self.avail = memory.alloc(4, region=region)
        self.used = memory.alloc(4, region=region)
        memory.write(self.desc, bytes(16 * size))
        memory.write(self.avail, bytes(4))
        memory.write(self.used, bytes(4))
        self.free = list(range(size))
        self.free_descriptors = size
        self.next_avail = WRAP
        self.next_used = WRAP
        self.last_used = 0
        self._fill = WRAP  # where the next chain is written, perhaps not yet shown
        self._kicked_at = WRAP
        self._hidden: dict[int, tuple[int, int]] = {}  # by ID: place and flags of a head that was not shown
        self._lengths: dict[int, int] = {}
        self._tables = {}
        self._flags = [memory.u16(self.desc + 16 * index + 14) for index in range(size)]
        self._driver_place, self._driver_flags = memory.u16(self.avail), memory.u16(self.avail + 2)
        self._device_place, self._device_flags = memory.u16(self.used), memory.u16(self.used + 2)

    def release(self) -> None:
        del self._flags, self._driver_place, self._driver_flags, self._device_place, self._device_flags

    def step(self, place: int, steps: int) -> int:
        index = (place & ~WRAP) + steps
        return place + steps if index < self.size else (place & WRAP ^ WRAP) | (index - self.size)

    def available(self, place: int) -> int:
        """The flags that make a descriptor available there."""
        return PACKED_AVAIL if place & WRAP else PACKED_USED

    def add(self, chain: Sequence[Segment], *, indirect: bool = False) -> int:
        if not self.free or self.free_descriptors < (1 if indirect else len(chain)):
            raise MemoryError("the ring has not enough free descriptors")
        number = self.free.pop(0)
        flags = [DESC_WRITE if segment.write else 0 for segment in chain]
        fields = [(s.addr, s.length, f) for s, f in zip(chain, flags, strict=True)]
        if indirect:
            table = b"".join(PACKED_DESCRIPTOR.pack(addr, length, 0, flag) for addr, length, flag in fields)
            addr = self.memory.alloc(len(table))
            self.memory.write(addr, table)
            self._tables[number] = (addr, len(table))
            fields = [(addr, len(table), DESC_INDIRECT)]
        self._write_list(number, fields)
        return number

    def _write_list(self, number: int, fields: Sequence[tuple[int, int, int]]) -> None:
        head = self._fill
        for position, (addr, length, flag) in enumerate(fields):
            last = position == len(fields) - 1
            flag |= self.available(self._fill) | (0 if last else DESC_NEXT)
            index = self._fill & ~WRAP
            # All but the flags, which the device may look at any time.
            self.memory.write(self.desc + 16 * index, PACKED_DESCRIPTOR.pack(addr, length, number, 0)[:14])
            if position == 0:
                self._hidden[number] = (head, flag)
            else:
                self._flags[index].value = flag
            self._fill = self.step(self._fill, 1)
        self._lengths[number] = len(fields)
        self.free_descriptors -= len(fields)

    def publish(self, *heads: int) -> None:
        """Makes what `add` has returned available, in the order in which it was added."""
        for head in heads:
            place, flags = self._hidden.pop(head)
            assert place == self.next_avail, "not in the order of the ring"
            full_barrier()
            self._flags[place & ~WRAP].value = flags
            self.next_avail = self.step(place, self._lengths[head])

    def wants_kick(self) -> bool:
        full_barrier()
        old, self._kicked_at = self._kicked_at, self.next_avail
        flags, wish = self._device_flags.value, self._device_place.value
        if flags != 2:
            return flags != 1
        added = ((self.next_avail & ~WRAP) - (old & ~WRAP)) % self.size
        if added == 0 and old != self.next_avail:
            added = self.size
        behind = (self.next_avail & ~WRAP) - (wish & ~WRAP)
        if (wish ^ self.next_avail) & WRAP:
            behind += self.size
        return 0 < behind <= added

    def _is_used(self) -> bool:
        flags = self._flags[self.next_used & ~WRAP].value & (PACKED_AVAIL | PACKED_USED)
        return flags == (PACKED_AVAIL | PACKED_USED if self.next_used & WRAP else 0)

    def arm(self) -> bool:
        if self.event_idx:
            self._driver_place.value = self.next_used
            self._driver_flags.value = 2
        else:
            self._driver_flags.value = 0
        full_barrier()
        return not self._is_used()

    def used_index(self) -> int:
        """How many used elements there are, those that were not reaped included."""
        count, kept = self.last_used, self.next_used
        while self._is_used():
            self.next_used = self.step(self.next_used, self._lengths[self._used_element()[0]])
            count += 1
        self.next_used = kept
        return count

    def all_used(self) -> bool:
        return self.next_used == self.next_avail

    def base_after_crash(self) -> int:
        return self.first_base  # what it had before: the ring does not tell

    def _used_element(self) -> tuple[int, int]:
        full_barrier()
        index = self.next_used & ~WRAP
        _, written, number, _ = PACKED_DESCRIPTOR.unpack(self.memory.read(self.desc + 16 * index, 16))
        return number, written

    def reap(self) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []
        while self._is_used():
            number, written = self._used_element()
            length = self._lengths.pop(number)
            self.next_used = self.step(self.next_used, length)
            self.free_descriptors += length
            self.last_used += 1
            self.free.append(number)
            if number in self._tables:
                self.memory.free(*self._tables.pop(number))
            done.append((number, written))
        return done
