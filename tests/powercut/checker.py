# SPDX-License-Identifier: Apache-2.0
"""Every prefix of a record is a power cut: what may be left then is checked against what was promised.

At every prefix, for all that the caches may have dropped at once (sectors do not depend on each other):
  * the disk that the state record names holds only what the oracle allows, after a power cut or a kill;
  * where the record calls the other disk up to date, so does that one alone.

At some prefixes, for some samples of what is left: the backend's own code starts on it.
  * every region that differs has its bit, or everything is copied;
  * now and then an engine is started and the peer attached: both disks are equal then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.engine_driver import EngineDriver, EngineOptions, MemoryDisk
from tests.powercut.machine import (
    REGION,
    SECTORS,
    SHAPE,
    SIZE,
    RecordFiles,
    Remains,
    Site,
    booted,
    current_disk,
    open_machine,
)
from tests.powercut.media import SECTOR, DiskMedium, FileMedium, RecordMedium, image_bytes, tags_of
from tests.powercut.oracle import Oracle
from tests.powercut.recorder import Confirmed, Kind, Moment, Replaced, Settled, Submitted
from vhostsync import engine as engine_module
from vhostsync._shim import lib
from vhostsync.bitmap import HEADER_BYTES
from vhostsync.disks import Disk
from vhostsync.peer import Peer
from vhostsync.state_file import StateFile
from vhostsync.state_record import Worth, decode_record

IN_REGION = REGION // SECTOR
LOG_BYTES = (24 + 8 * SHAPE.extents + 4095) // 4096 * 4096
BITS_AT = HEADER_BYTES + 2 * LOG_BYTES


class LossError(AssertionError):
    """A promise was broken by a power cut (or a kill) that this tells of: what, then what became of `sector`
    up to then."""

    def __init__(self, what: str, sector: int, past: Sequence[Moment]) -> None:
        lines = [f"{place:6} {line}" for place, moment in enumerate(past) if (line := tell(moment, sector))]
        super().__init__("\n".join([what, *lines]))


def tell(moment: Moment, sector: int) -> str | None:
    """A line on a moment, if it has to do with the sector."""
    note = moment.note
    if moment.kind in (Kind.WRITE, Kind.ZERO):
        at = sector * SECTOR - moment.offset
        if not 0 <= at < moment.length:
            return None
        what = f"{int.from_bytes(moment.data[at : at + 8], 'little')}" if moment.data else "zeroes"
        return f"disk {moment.disk}: {what} at stamp {moment.stamp} ({moment.offset}+{moment.length})"
    if moment.kind is Kind.FLUSHED:
        return f"disk {moment.disk}: flushed up to stamp {moment.stamp}"
    if isinstance(note, Submitted | Confirmed):
        request = note.request
        if request.count and not request.first <= sector < request.first + request.count:
            return None
        name = f"write of {request.tag_at(sector)}" if request.count else f"flush {id(request) & 0xFFFFF:x}"
        return f"guest: {name} {'submitted' if isinstance(note, Submitted) else f'over, ok {request.ok}'}"
    if isinstance(note, Replaced):
        record = decode_record(note.text)
        return f"record: current {record.current.path}, worth {record.peer_worth}, bitmap {record.bitmap}"
    return "record durable" if isinstance(note, Settled) else None


@dataclass
class Tally:
    """What was checked."""

    prefixes: int = 0
    restarts: int = 0
    resyncs: int = 0
    full_copies: int = 0

    def __str__(self) -> str:
        return (
            f"{self.prefixes} prefixes, {self.restarts} restarts ({self.full_copies} with a full copy), "
            f"{self.resyncs} resyncs by an engine"
        )


@dataclass
class State:
    """All media and what was promised, at one prefix."""

    disks: tuple[DiskMedium, DiskMedium]
    file: FileMedium
    record: RecordMedium
    cut: Oracle
    kill: Oracle
    bad_after_cut: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))
    bad_after_kill: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))

    @classmethod
    def at_start(cls, site: Site, remains: Remains) -> State:
        initial = remains.images[current_disk(site, remains.record)]
        return cls(
            (DiskMedium(list(remains.images[0])), DiskMedium(list(remains.images[1]))),
            FileMedium(),
            RecordMedium(remains.record),
            Oracle(initial, promise_at_once=False),
            Oracle(initial, promise_at_once=True),
        )

    def judge_all(self) -> None:
        for number in (0, 1):
            self.judge(number, range(SECTORS))

    def apply(self, moment: Moment, place: int) -> None:
        if moment.note is None and moment.kind in (Kind.WRITE, Kind.ZERO, Kind.FLUSHED):
            self.judge(moment.disk, self.disks[moment.disk].apply(moment))
        elif moment.note is None:
            self.file.apply(moment, place)
        elif isinstance(moment.note, Replaced):
            self.record.replaced(moment.note.text)
        elif isinstance(moment.note, Settled):
            self.record.settled()
        else:
            self._guest(moment.note, place)

    def _guest(self, note: Submitted | Confirmed, place: int) -> None:
        touched = set(self.cut.apply(note, place)) | set(self.kill.apply(note, place))
        for number in (0, 1):
            self.judge(number, touched)

    def judge(self, number: int, sectors: Iterable[int]) -> None:
        disk = self.disks[number]
        after_cut, after_kill = self.bad_after_cut[number], self.bad_after_kill[number]
        for sector in sectors:
            _put(after_cut, sector, bad=not disk.survivors(sector) <= self.cut.allowed(sector))
            _put(after_kill, sector, bad=disk.latest(sector) not in self.kill.allowed(sector))


def _amid_pages(moments: Sequence[Moment], place: int) -> bool:
    """Pages that had changed when the record looked at them stand one after the other: the file was never as
    a part of them has it."""
    following = moments[place + 1 : place + 2]
    return moments[place].kind is Kind.PAGE and bool(following) and following[0].kind is Kind.PAGE


def _put(into: set[int], sector: int, *, bad: bool) -> None:
    if bad:
        into.add(sector)
    else:
        into.discard(sector)


@dataclass
class Checker:
    """Walks through one record. `on_cut` sees what each sampled cut has left (to start the next run on)."""

    site: Site
    chance: random.Random
    restarts_per_record: int
    resync_one_in: int = 12
    tally: Tally = field(default_factory=Tally)
    on_cut: Callable[[Remains], None] | None = None
    _moments: Sequence[Moment] = ()
    _place: int = 0

    def walk(self, moments: Sequence[Moment], remains: Remains) -> None:
        """LossError."""
        state = State.at_start(self.site, remains)
        settled = 0  # the pages as the run has found them
        while settled < len(moments) and moments[settled].kind is not Kind.SYNCED:
            settled += 1
        places = self._places(moments, settled)
        disks = (self.site.open_disk(0), self.site.open_disk(1))
        try:
            for place, moment in enumerate(moments):
                state.apply(moment, place)
                if place == settled:
                    state.judge_all()
                if place < settled or _amid_pages(moments, place):
                    continue
                self.tally.prefixes += 1
                self._moments, self._place = moments, place
                self._check_prefix(state, place)
                for _ in range(places.get(place, 0)):
                    self._restart(state, disks, remains.boot, place)
        finally:
            for disk in disks:
                disk.close()

    def _places(self, moments: Sequence[Moment], first: int) -> dict[int, int]:
        """Where to restart and how often: half at the rare moments, where what is durable changes."""
        rare = [
            place + step
            for place, moment in enumerate(moments)
            for step in (-1, 0, 1)
            if moment.kind in (Kind.SYNCED, Kind.FLUSHED) or isinstance(moment.note, Replaced | Settled)
            if first <= place + step < len(moments)
        ]
        chosen: dict[int, int] = {}
        for number in range(self.restarts_per_record):
            from_rare = rare and number % 2
            place = self.chance.choice(rare) if from_rare else self.chance.randrange(first, len(moments))
            chosen[place] = chosen.get(place, 0) + 1
        return chosen

    # ---- every prefix ------------------------------------------------------------

    def _check_prefix(self, state: State, place: int) -> None:
        for text in state.record.possible():
            named = current_disk(self.site, text)
            self._none(state, place, named, state.bad_after_cut[named], "named by the record, power cut")
            if text is not None and decode_record(text).peer_worth is Worth.UP_TO_DATE:
                bad = state.bad_after_cut[1 - named]
                self._none(state, place, 1 - named, bad, "said to be up to date, the other one lost")
        named = current_disk(self.site, state.record.latest())
        self._none(state, place, named, state.bad_after_kill[named], "named by the record, killed")

    def _none(self, state: State, place: int, number: int, bad: set[int], what: str) -> None:
        if not bad:
            return
        sector = min(bad)
        disk, cut, kill = state.disks[number], state.cut.allowed(sector), state.kill.allowed(sector)
        raise LossError(
            f"entry {place}: disk {number} ({what}): {len(bad)} sectors; {sector} may hold "
            f"{sorted(disk.survivors(sector))} (last {disk.latest(sector)}), allowed {sorted(cut)}, after a "
            f"kill {sorted(kill)}",
            sector,
            self._moments[: self._place + 1],
        )

    # ---- restarts ------------------------------------------------------------------

    def _restart(self, state: State, disks: tuple[Disk, Disk], boot: str, place: int) -> None:
        killed = self.chance.random() < 0.25
        if killed:
            images = (state.disks[0].as_cached(), state.disks[1].as_cached())
            left = Remains(images, state.file.as_cached(), state.record.latest(), boot)
        else:
            images = (state.disks[0].after_cut(self.chance), state.disks[1].after_cut(self.chance))
            text = self.chance.choice(state.record.possible())
            left = Remains(images, state.file.after_cut(self.chance), text, f"{boot}, cut off")
        self.tally.restarts += 1
        with booted(left.boot):
            self._start(left, disks, f"entry {place}, {'killed' if killed else 'power cut'}")
        if self.on_cut is not None:
            self.on_cut(left)

    def _start(self, left: Remains, disks: tuple[Disk, Disk], when: str) -> None:
        named = current_disk(self.site, left.record)
        self.site.bitmap.write_bytes(left.bitmap)
        state_file = StateFile(self.site.record, files=RecordFiles(left.record))
        opened = open_machine(self.site, left, disks[named], state_file)
        assert opened.bitmap is not None
        bitmap = engine_module._engine_bitmap(opened.bitmap)
        engine = None
        try:
            if opened.record is None or opened.record.peer is None:
                return
            resync = opened.peer_known and self._trusted(opened.record.peer.path, disks, opened)
            if not resync:
                self.tally.full_copies += 1
            else:
                self._check_bits(left, when)
            if self.chance.randrange(self.resync_one_in) == 0:
                engine = bitmap
                self._resync(left, named, bitmap, opened.peer_known, resync, when)
        finally:
            if engine is None:
                lib.vs_bitmap_close(bitmap)
            opened.bitmap.close(clean=False)

    def _trusted(self, path: str, disks: tuple[Disk, Disk], opened: Any) -> bool:
        peer = Peer()
        peer.known(opened.record.peer, opened.peer_left)
        return peer.why_full(disks[self.site.number_of(path)]) is None

    def _check_bits(self, left: Remains, when: str) -> None:
        file = self.site.bitmap.read_bytes()
        bits = int.from_bytes(file[BITS_AT + 16 : BITS_AT + 16 + SECTORS // IN_REGION // 8], "little")
        one, other = left.images
        for region in range(SECTORS // IN_REGION):
            part = slice(region * IN_REGION, (region + 1) * IN_REGION)
            if one[part] != other[part] and not bits >> region & 1:
                at = next(n for n in range(IN_REGION) if one[part][n] != other[part][n])
                raise LossError(
                    f"{when}: region {region} differs ({one[part][at]}, {other[part][at]}) and has no bit",
                    region * IN_REGION + at,
                    self._moments[: self._place + 1],
                )

    def _resync(
        self, left: Remains, named: int, bitmap: Any, tracked: bool, resync: bool, when: str
    ) -> None:
        self.tally.resyncs += 1
        held = (MemoryDisk(SIZE), MemoryDisk(SIZE))
        for disk, tags in zip(held, left.images, strict=True):
            disk.load(0, image_bytes(tags))
        options = EngineOptions(capacity_bytes=SIZE, dirty_region_bytes=REGION, log_bytes=8 << 20)
        with EngineDriver(options, held[named], bitmap=bitmap, peer_tracked=tracked) as driver:
            driver.mirror(held[1 - named], resync=resync)
            after = [tags_of(disk.read(0, SIZE), 0) for disk in held]
        for disk in held:
            disk.drop()
        if after[0] != after[1]:
            sector = next(n for n in range(SECTORS) if after[0][n] != after[1][n])
            raise LossError(
                f"{when}: after the {'resync' if resync else 'full copy'} sector {sector} differs",
                sector,
                self._moments[: self._place + 1],
            )
