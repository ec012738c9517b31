# SPDX-License-Identifier: Apache-2.0
"""What lay where at each instant of a run, and what a power cut at that instant may leave.

A sector is known by its tag, which every 64-bit word of it repeats: whose write it is and where it belongs.
Zeroes are tag 0.

* A disk keeps of each sector its durable content or any version since the last flush that covers it. So it
  does where its server begins anew (it has forgotten), and then that is all it has. It may hold what it was
  not given (other content is loaded), and sectors may become unreadable, until the next write.
* The bitmap's file keeps of each page the version that the last sync covered or any later one, or, torn, a
  part of one and the rest of another.
* The state record is what was durable, or what was renamed over it since.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.powercut.recorder import SECTOR_BITS, Kind, Moment

SECTOR = 512
PAGE = 4096
SECTOR_MASK = (1 << SECTOR_BITS) - 1
TORN_ONE_IN = 8  # pages of which a cut may leave more than one version


class TornSectorError(AssertionError):
    """A sector that no guest has written as it is: parts of two writes, or one at a wrong place."""


def sector_bytes(tag: int) -> bytes:
    return struct.pack("<Q", tag) * (SECTOR // 8)


def tags_of(data: bytes, first_sector: int) -> list[int]:
    """The tags of whole sectors; TornSectorError."""
    tags = []
    for number in range(len(data) // SECTOR):
        sector = data[number * SECTOR : (number + 1) * SECTOR]
        (tag,) = struct.unpack_from("<Q", sector)
        if sector != sector_bytes(tag) or (tag and tag & SECTOR_MASK != first_sector + number):
            raise TornSectorError(f"sector {first_sector + number} holds {sector[:16].hex()}…")
        tags.append(tag)
    return tags


def image_bytes(tags: Sequence[int]) -> bytes:
    return b"".join(struct.pack("<Q", tag) * (SECTOR // 8) for tag in tags)


@dataclass
class DiskMedium:
    """A disk with a volatile cache: per sector the durable tag, and (stamp, tag) of what came since.
    `spoilt`: the tags of sectors that cannot be read; `rotten`: of those that were loaded."""

    durable: list[int]
    volatile: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    spoilt: dict[int, int] = field(default_factory=dict)
    rotten: dict[int, int] = field(default_factory=dict)
    foreign: set[int] = field(init=False)  # all tags that were ever loaded

    def __post_init__(self) -> None:
        self.foreign = set(self.rotten.values())

    def apply(self, moment: Moment) -> Sequence[int]:
        """The sectors of which something else may be left now."""
        first, count = moment.offset // SECTOR, moment.length // SECTOR
        sectors = range(first, first + count)
        if moment.kind is Kind.FLUSHED:
            return self._flushed(moment.stamp)
        if moment.kind is Kind.SPOILT:
            self.spoilt |= {sector: self.latest(sector) for sector in sectors}
            return ()
        tags = [0] * count if moment.kind is Kind.ZERO else tags_of(moment.data, first)
        for sector, tag in zip(sectors, tags, strict=True):
            if moment.kind is Kind.LOADED:
                self._load(sector, tag)
            elif moment.kind is Kind.FORGOT:
                self.volatile.pop(sector, None)
                self.durable[sector] = tag
            else:
                self.volatile.setdefault(sector, []).append((moment.stamp, tag))
        return sectors

    def _load(self, sector: int, tag: int) -> None:
        self.volatile.pop(sector, None)
        self.durable[sector] = self.rotten[sector] = tag
        self.foreign.add(tag)

    def _flushed(self, stamp: int) -> list[int]:
        touched = []
        for sector, versions in list(self.volatile.items()):
            covered = [tag for at, tag in versions if at <= stamp]
            if not covered:
                continue
            touched.append(sector)
            self.durable[sector] = covered[-1]
            left = versions[len(covered) :]
            if left:
                self.volatile[sector] = left
            else:
                del self.volatile[sector]
        return touched

    def survivors(self, sector: int) -> set[int]:
        """The tags of which a power cut leaves one."""
        return {self.durable[sector], *(tag for _, tag in self.volatile.get(sector, ()))}

    def latest(self, sector: int) -> int:
        versions = self.volatile.get(sector)
        return versions[-1][1] if versions else self.durable[sector]

    def after_cut(self, chance: random.Random) -> list[int]:
        """One of the images that may be left; now all, now nothing, now a part of what was volatile."""
        image = self.durable.copy()
        keep = chance.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        for sector, versions in self.volatile.items():
            if chance.random() < keep:
                image[sector] = chance.choice(versions)[1] if chance.random() < 0.5 else versions[-1][1]
        return image

    def spoilt_in(self, image: Sequence[int]) -> frozenset[int]:
        """What of an image that was left cannot be read: no write has come to it since."""
        return frozenset(sector for sector, tag in self.spoilt.items() if image[sector] == tag)

    def rotten_in(self, image: Sequence[int]) -> dict[int, int]:
        return {sector: tag for sector, tag in self.rotten.items() if image[sector] == tag}

    def as_cached(self) -> list[int]:
        """What a process that is killed leaves behind."""
        image = self.durable.copy()
        for sector, versions in self.volatile.items():
            image[sector] = versions[-1][1]
        return image


class FileMedium:
    """The bitmap's file: of each page what is durable and what it was since, oldest first."""

    def __init__(self) -> None:
        self._pages: dict[int, list[tuple[int, bytes]]] = {}

    def apply(self, moment: Moment, place: int) -> None:
        if moment.kind is Kind.PAGE:
            self._pages.setdefault(moment.offset // PAGE, []).append((place, moment.data))
        elif moment.kind is Kind.SYNCED:
            for versions in self._pages.values():
                while len(versions) > 1 and versions[1][0] < moment.stamp:
                    versions.pop(0)

    def as_cached(self) -> bytes:
        return self._join({number: versions[-1][1] for number, versions in self._pages.items()})

    def after_cut(self, chance: random.Random) -> bytes:
        return self._join({number: _page_left(versions, chance) for number, versions in self._pages.items()})

    def _join(self, pages: dict[int, bytes]) -> bytes:
        blank = bytes(PAGE)
        return b"".join(pages.get(number, blank) for number in range(max(pages, default=-1) + 1))


def _page_left(versions: list[tuple[int, bytes]], chance: random.Random) -> bytes:
    if len(versions) == 1:
        return versions[0][1]
    old, new = sorted(chance.choices(range(len(versions)), k=2))
    if chance.randrange(TORN_ONE_IN):
        return versions[chance.choice((0, old, new, len(versions) - 1))][1]
    one, other = versions[old][1], versions[new][1]
    return b"".join(
        chance.choice((one, other))[at : at + SECTOR] for at in range(0, PAGE, SECTOR)
    )  # fmt: skip


@dataclass
class RecordMedium:
    """The state record's file. None: there is none."""

    durable: bytes | None = None
    renamed: list[bytes] = field(default_factory=list)

    def replaced(self, text: bytes) -> None:
        self.renamed.append(text)

    def settled(self) -> None:
        self.durable = self.latest()
        self.renamed.clear()

    def latest(self) -> bytes | None:
        return self.renamed[-1] if self.renamed else self.durable

    def possible(self) -> list[bytes | None]:
        return [self.durable, *self.renamed]
