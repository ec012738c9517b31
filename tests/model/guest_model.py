# SPDX-License-Identifier: Apache-2.0
"""What a guest may expect of its disk, after docs/durability.md: pure Python, no engine.

A `History` keeps, block by block, every version that the guest has written, with the time (a counter of
what the test did and saw) at which the write was submitted and at which its completion was seen. From that
follows which version a disk may show:

* A version is superseded by a write that was submitted after the version's own completion was seen. Writes
  in flight together may land in either order, so neither supersedes the other.
* A read must not show a version superseded by a write which had completed when the read was submitted.
* A disk after a power cut must not show a version superseded by a flushed write: one that had completed
  when a flush was submitted that has been confirmed since.
* No disk ever shows what the guest has not written ("bytes from the future").

A failed write may have landed, wholly, in part or not at all: it supersedes nothing, and may be superseded.

Because only the latest superseding write counts, each rule needs one number for a block, its floor: the
version is allowed if it was not seen complete before the floor. `Floors` are such numbers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

NEVER = 1 << 62
"""A completion that has not been seen yet."""

STAMP = struct.Struct("<QQ")
MAGIC = 0x5673 << 48
"""In the number of every stamp, so that no stamp is all zeroes."""


@dataclass(eq=False)
class Version:
    """One write of the guest (or zeroing), over blocks `first` .. `end` - 1."""

    number: int
    first: int
    end: int
    zero: bool
    submitted: int
    completed: int = NEVER
    failed: bool = False

    @property
    def pending(self) -> bool:
        return self.completed == NEVER


class ContentError(AssertionError):
    """A disk shows what it must not."""


Floors = dict[int, int]
"""Of a block: versions seen complete before this time must not be shown any more."""


class History:
    """All that the guest has written, and what it may find again. Blocks are of `block_bytes`."""

    def __init__(self, block_bytes: int) -> None:
        assert block_bytes % STAMP.size == 0
        self.block_bytes = block_bytes
        self.zero_block = bytes(block_bytes)
        self.now = 0
        self.versions: dict[int, Version] = {}
        self.blocks: dict[int, list[Version]] = {}
        self.completed_floor: Floors = {}
        self.flushed_floor: Floors = {}
        self.completed_writes = 0
        self._initial = Version(0, 0, NEVER, False, submitted=0, completed=0)
        self._initial_zero: set[int] = set()

    def tick(self) -> int:
        self.now += 1
        return self.now

    # -- content ------------------------------------------------------------

    def content(self, number: int, first: int, end: int) -> bytes:
        """What write `number` puts into these blocks: each says who wrote it, and where it belongs."""
        repeat = self.block_bytes // STAMP.size
        return b"".join(STAMP.pack(MAGIC | number, block) * repeat for block in range(first, end))

    def initial(self, first: int, end: int, *, zero: bool) -> bytes:
        """The content of blocks before the guest's first write: version 0, or zeroes."""
        if zero:
            self._initial_zero.update(range(first, end))
            return bytes((end - first) * self.block_bytes)
        return self.content(0, first, end)

    # -- what the guest does ------------------------------------------------

    def submit_write(self, first: int, end: int, *, zero: bool = False) -> Version:
        version = Version(len(self.versions) + 1, first, end, zero, self.tick())
        self.versions[version.number] = version
        for block in range(first, end):
            self.blocks.setdefault(block, []).append(version)
        return version

    def complete_write(self, version: Version, *, ok: bool) -> None:
        version.completed = self.tick()
        version.failed = not ok
        if ok:
            self.completed_writes += 1
            _raise(self.completed_floor, version)

    def confirm(self, covered: Floors) -> None:
        """A flush was confirmed that was submitted when the completed floors were `covered`."""
        for block, floor in covered.items():
            self.flushed_floor[block] = max(self.flushed_floor.get(block, 0), floor)

    def confirm_write_through(self, version: Version) -> None:
        _raise(self.flushed_floor, version)

    # -- what a disk shows --------------------------------------------------

    def check(self, first: int, content: bytes, floors: Floors, what: str, *, ceiling: int = NEVER) -> None:
        """Each block of `content`, from block `first` on, is an allowed version. ContentError.

        `ceiling`: nothing that was submitted from this time on may be there.
        """
        for index in range(len(content) // self.block_bytes):
            block = first + index
            data = content[index * self.block_bytes : (index + 1) * self.block_bytes]
            candidates = self._candidates(block, data, what)
            floor = floors.get(block, 0)
            if any(v.completed >= floor and v.submitted < ceiling for v in candidates):
                continue
            raise ContentError(self._describe(block, candidates, floor, ceiling, what))

    def _candidates(self, block: int, data: bytes, what: str) -> list[Version]:
        """The versions that have this content."""
        if data == self.zero_block:
            zeroes = [v for v in self.blocks.get(block, []) if v.zero]
            return [self._initial, *zeroes] if block in self._initial_zero else zeroes
        number, place = STAMP.unpack_from(data)
        if data != STAMP.pack(number, place) * (self.block_bytes // STAMP.size):
            raise ContentError(f"{what}: block {block} is torn or nothing that the guest wrote")
        number ^= MAGIC
        version = self._initial if number == 0 else self.versions.get(number)
        if version is None or place != block or not version.first <= block < version.end:
            raise ContentError(f"{what}: block {block} holds write {number} of block {place}")
        return [version]

    def _describe(self, block: int, candidates: list[Version], floor: int, ceiling: int, what: str) -> str:
        found = ", ".join(f"write {v.number} ({v.submitted}..{v.completed})" for v in candidates) or "zeroes"
        known = [
            f"{v.number} ({v.submitted}..{v.completed}{' failed' * v.failed})" for v in self.blocks[block]
        ]
        return (
            f"{what}: block {block} holds {found}, which is not allowed with floor {floor}"
            f" and ceiling {ceiling}; its writes: {'; '.join(known)}"
        )


def _raise(floors: Floors, version: Version) -> None:
    for block in range(version.first, version.end):
        floors[block] = max(floors.get(block, 0), version.submitted)
