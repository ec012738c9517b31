# SPDX-License-Identifier: Apache-2.0
"""Why the destinations of a guest's disks, all of them in `steady`, are what a power cut could have left
together, and are not once one of them is outdated (docs/durability.md, section 6).

The guest keeps a database on one disk and its log on another: what stands in the database is in the log, and
what a checkpoint has freed in the log is in the database. It relies on confirmed flushes, and on nothing
else. Power is cut at any moment, from both destinations at once, with any part of what is not flushed."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.engine_driver import Cut, DiskOp, MemoryDisk
from tests.frontend import Request
from tests.model.rig import Rig, pattern, rig

SECTOR = 512  # what a power cut leaves whole
KEYS = 8
LOG_SECTORS = 64  # the log's; the first one says from which record on it is needed


def number_in(sector: bytes) -> int:
    """Of the write that it holds; 0: of none."""
    number = int(sector[:8]) if sector[:8].isdigit() else 0
    assert sector in (pattern(number)[:SECTOR], bytes(SECTOR)), "a torn sector"
    return number


class Database:
    """Record n says that the key n % KEYS is n."""

    def __init__(self, log: Rig, data: Rig, chance: random.Random) -> None:
        self.log = log
        self.data = data
        self._chance = chance
        self.committed = 0
        self.cuts = 0

    def commit(self) -> None:
        number = self.committed + 1
        self._write(self.log, 1 + number % (LOG_SECTORS - 1), number)
        self._flush(self.log)
        self.committed = number
        self._write(self.data, number % KEYS, number)
        if self._chance.random() < 0.2:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self._flush(self.data)
        self._write(self.log, 0, self.committed)

    def _write(self, to: Rig, sector: int, number: int) -> None:
        held = self._chance.random() < 0.5
        to.destination.hold(DiskOp.WRITE, held)
        request = to.guest.write(sector * SECTOR, pattern(number)[:SECTOR])
        to.guest.wait(request)
        assert request.ok
        self.look()
        if self._chance.random() < 0.5:
            to.destination.hold(DiskOp.WRITE, False)
            to.destination.release_all()

    def _flush(self, of: Rig) -> None:
        request: Request = of.guest.flush()
        self.look()
        of.destination.hold(DiskOp.WRITE, False)
        of.destination.release_all()
        of.guest.wait(request)
        assert request.ok
        self.look()

    def look(self) -> None:
        """Cut the power, and recover. The log first: what is looked at later may only be newer."""
        self.cuts += 1
        seed = self._chance.randrange(1 << 32)
        recovered(self.log.destination, self.data.destination, self.committed, seed)


class BrokenError(AssertionError):
    """What is there could never have been left by a power cut."""


def recovered(log: MemoryDisk, data: MemoryDisk, committed: int, seed: int) -> None:
    """BrokenError."""
    in_log = log.read(0, LOG_SECTORS * SECTOR, Cut.SUBSET, seed)
    in_data = data.read(0, KEYS * SECTOR, Cut.SUBSET, seed + 1)
    sectors = [number_in(in_log[at : at + SECTOR]) for at in range(0, len(in_log), SECTOR)]
    freed, records = sectors[0], set(sectors[1:])
    for key in range(KEYS):
        number = number_in(in_data[key * SECTOR : (key + 1) * SECTOR])
        if number > freed and number not in records:
            raise BrokenError(f"the database holds {number}, of which the log knows nothing")
        newest = max((each for each in range(1, freed + 1) if each % KEYS == key), default=0)
        if number < newest:
            raise BrokenError(f"{newest} was freed in the log, and the database holds {number}")
    missing = set(range(max(freed, committed - LOG_SECTORS + 2) + 1, committed + 1)) - records
    if missing:
        raise BrokenError(f"committed, and in no log: {sorted(missing)}")


@contextmanager
def database(seed: int) -> Iterator[Database]:
    with rig(mirrored=True) as log, rig(mirrored=True) as data:
        yield Database(log, data, random.Random(seed))


@pytest.mark.parametrize("seed", range(4))
def test_the_destinations_of_a_steady_group_are_what_a_power_cut_could_have_left(seed: int) -> None:
    with database(seed) as it:
        for _ in range(60):
            it.commit()
        assert it.cuts > 200


@pytest.mark.parametrize("lost", ["log", "data"])
def test_with_one_of_them_outdated_they_are_not(lost: str) -> None:
    with database(1) as it:
        for _ in range(10):
            it.commit()
        out = it.log if lost == "log" else it.data
        out.destination.hold(DiskOp.WRITE, False)
        out.destination.release_all()
        out.destination.fault(DiskOp.WRITE, errno.EIO, count=-1)
        out.write_now(LOG_SECTORS + 1, 1)
        out.await_degraded()
        out.record_written()
        with pytest.raises(BrokenError):
            for _ in range(60):
                it.commit()
