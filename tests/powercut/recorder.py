# SPDX-License-Identifier: Apache-2.0
"""One ordered record of a run: what both disks did, what became of the bitmap's file, and the notes of the
guest and of the state record (c_shim/testing/test_record.c keeps the order)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tests.engine_driver import MemoryDisk
from tests.testing_library import ffi, lib

SECTOR_BITS = 20


def tag(serial: int, sector: int) -> int:
    """What every 64-bit word of a sector says that a write has filled: whose it is, and where it belongs."""
    return serial << SECTOR_BITS | sector


class Kind(IntEnum):
    """enum vs_test_moment_kind."""

    WRITE = lib.VS_MOMENT_WRITE
    ZERO = lib.VS_MOMENT_ZERO
    FLUSHED = lib.VS_MOMENT_FLUSHED
    LOADED = lib.VS_MOMENT_LOADED
    FORGOT = lib.VS_MOMENT_FORGOT
    SPOILT = lib.VS_MOMENT_SPOILT
    PAGE = lib.VS_MOMENT_PAGE
    SYNC_BEGUN = lib.VS_MOMENT_SYNC_BEGUN
    SYNCED = lib.VS_MOMENT_SYNCED
    NOTE = lib.VS_MOMENT_NOTE


@dataclass(frozen=True)
class Submitted:
    """A guest's request is about to be shown to the backend."""

    request: GuestRequest


@dataclass(frozen=True)
class Confirmed:
    """The guest has seen it completed: perhaps long after it was, which asks less of the disks."""

    request: GuestRequest


@dataclass(frozen=True)
class Replaced:
    """The state record was renamed into its place: the old one may come back until the next `Settled`."""

    text: bytes


@dataclass(frozen=True)
class Settled:
    """Its directory was synced."""


@dataclass(frozen=True)
class Switched:
    """The operator was told that the guest is on the other disk now, and where that one may lack what the
    guest had written (`accepted`: sectors)."""

    accepted: frozenset[int]


@dataclass(frozen=True)
class PauseReleased:
    """Flushes that a pause holds may be let go from here on without a mirror."""


@dataclass(frozen=True)
class DoubtAsked:
    """The engine is asked what is in doubt: what the guest saw fail before this."""


@dataclass(frozen=True)
class DoubtRecorded:
    """The state record has what was asked for last."""


@dataclass(frozen=True)
class VerifyBegun:
    """What is different from here on is to be found."""


@dataclass(frozen=True)
class Verified:
    """`clean`: both disks were found equal, or were made so."""

    clean: bool


@dataclass(frozen=True)
class Enlarged:
    """The owner of both disks has made them larger: a start shows all of it."""

    capacity_bytes: int


@dataclass(frozen=True)
class Grown:
    """The guest is told that its disk has grown."""

    capacity_bytes: int


Note = (
    Submitted
    | Confirmed
    | Replaced
    | Settled
    | Switched
    | PauseReleased
    | DoubtAsked
    | DoubtRecorded
    | VerifyBegun
    | Verified
    | Enlarged
    | Grown
)


@dataclass(eq=False)
class GuestRequest:
    """A write (`serial` 0: zeroes) of `count` sectors from `first` on, or a flush (`count` 0). `ok`: None
    until it is confirmed."""

    first: int
    count: int
    serial: int
    write_through: bool = False
    ok: bool | None = None
    submitted_at: int = -1
    confirmed_at: int = -1

    def tag_at(self, sector: int) -> int:
        """What it leaves there."""
        return tag(self.serial, sector) if self.serial else 0


@dataclass(frozen=True)
class Moment:
    """struct vs_test_moment; `note` is set for Kind.NOTE."""

    kind: Kind
    disk: int
    offset: int
    length: int
    stamp: int
    data: bytes
    note: Note | None


class Recorder:
    """Used from any thread. `close` frees it: what was taken from it stays valid."""

    def __init__(self) -> None:
        self.handle: Any = lib.vs_test_record_new()
        self._notes: list[Note] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        lib.vs_test_record_free(self.handle)

    def watch_disk(self, disk: MemoryDisk, number: int) -> None:
        lib.vs_test_disk_record(disk.handle, self.handle, number)

    def forget_disk(self, disk: MemoryDisk) -> None:
        lib.vs_test_disk_record(disk.handle, ffi.NULL, 0)

    def watch_file(self, fd: int) -> None:
        assert lib.vs_test_record_file(self.handle, fd) == 0

    def sync_begun(self) -> int:
        return int(lib.vs_test_record_sync_begun(self.handle))

    def synced(self, begun: int) -> None:
        lib.vs_test_record_synced(self.handle, begun)

    def note(self, note: Note) -> None:
        with self._lock:
            self._notes.append(note)
            lib.vs_test_record_note(self.handle, len(self._notes) - 1)

    def moments(self) -> Iterator[Moment]:
        """All there is, when nothing is added any more."""
        raw = ffi.new("struct vs_test_moment *")
        place = 0
        while lib.vs_test_record_moment(self.handle, place, raw):
            kind = Kind(raw.kind)
            data = bytes(ffi.buffer(raw.data, raw.length)) if raw.data != ffi.NULL else b""
            note = self._notes[raw.stamp] if kind is Kind.NOTE else None
            yield Moment(kind, int(raw.disk), int(raw.offset), int(raw.length), int(raw.stamp), data, note)
            place += 1
