# SPDX-License-Identifier: Apache-2.0
"""Every prefix of a record is a power cut: what may be left then is checked against what was promised.

At every prefix, for all that the caches may have dropped at once (sectors do not depend on each other):
  * the disk that the state record names holds only what the oracle allows, after a power cut or a kill;
  * where the record calls the other disk up to date, so does that one alone;
  * in a pause the other disk does so too, whatever the record says: no flush was confirmed without it.

At some prefixes, for some samples of what is left: the backend's own code starts on it.
  * every region that differs has its bit, or everything is copied;
  * now and then an engine is started and the peer attached: both disks are equal then, but for what the
    engine lists as unreadable and what is in doubt and the peer held better, which is as it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.engine_driver import EngineDriver, EngineOptions
from tests.powercut.machine import (
    IN_REGION,
    REGION,
    SHAPE,
    SIZE,
    RecordFiles,
    Remains,
    Site,
    booted,
    current_disk,
    decoded,
    open_machine,
)
from tests.powercut.media import SECTOR, tags_of
from tests.powercut.recorder import Confirmed, Kind, Moment, Replaced, Settled, Submitted
from tests.powercut.state import BrokenPromiseError, State, pieces_of, sectors_of
from vhostsync._shim import lib
from vhostsync.engine import engine as engine_module
from vhostsync.mirror.bad_ranges import within
from vhostsync.mirror.peer import Peer
from vhostsync.record.bitmap import HEADER_BYTES
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import Worth, decode_record
from vhostsync.storage.local import LocalDisk

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
    if moment.kind in (Kind.WRITE, Kind.ZERO, Kind.LOADED, Kind.FORGOT, Kind.SPOILT):
        at = sector * SECTOR - moment.offset
        if not 0 <= at < moment.length:
            return None
        if moment.kind is Kind.SPOILT:
            return f"disk {moment.disk}: unreadable from here on"
        what = f"{int.from_bytes(moment.data[at : at + 8], 'little')}" if moment.data else "zeroes"
        how = {Kind.LOADED: "is put there", Kind.FORGOT: "is left, for it has forgotten what came later"}
        told = how.get(moment.kind, f"at stamp {moment.stamp}")
        return f"disk {moment.disk}: {what} {told} ({moment.offset}+{moment.length})"
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
    if isinstance(note, Settled):
        return "record durable"
    return None if note is None else f"{note}"


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


def _amid_pages(moments: Sequence[Moment], place: int) -> bool:
    """Pages that had changed when the record looked at them stand one after the other: the file was never as
    a part of them has it."""
    following = moments[place + 1 : place + 2]
    return moments[place].kind is Kind.PAGE and bool(following) and following[0].kind is Kind.PAGE


@dataclass
class Checker:
    """Walks through one record. `on_cut` sees what each sampled cut has left (to start the next run on)."""

    site: Site
    chance: random.Random
    restarts_per_record: int
    resync_one_in: int = 12
    pauses: bool = False
    tally: Tally = field(default_factory=Tally)
    on_cut: Callable[[Remains], None] | None = None
    _moments: Sequence[Moment] = ()
    _place: int = 0

    def walk(self, moments: Sequence[Moment], remains: Remains) -> None:
        """LossError."""
        state = State.at_start(self.site, remains, pauses=self.pauses)
        settled = 0  # the pages as the run has found them
        while settled < len(moments) and moments[settled].kind is not Kind.SYNCED:
            settled += 1
        places = self._places(moments, settled)
        disks = (self.site.open_disk(0), self.site.open_disk(1))
        try:
            for place, moment in enumerate(moments):
                self._moments, self._place = moments, place
                self._apply(state, moment)
                if place == settled:
                    state.judge_all()
                if place < settled or _amid_pages(moments, place):
                    continue
                self.tally.prefixes += 1
                self._check_prefix(state, place)
                for _ in range(places.get(place, 0)):
                    self._restart(state, disks, remains.boot, place)
        finally:
            for disk in disks:
                disk.close()

    def _apply(self, state: State, moment: Moment) -> None:
        try:
            state.apply(moment, self._place)
        except BrokenPromiseError as broken:
            raise self._loss(f"entry {self._place}: {broken}", broken.sector) from broken

    def _loss(self, what: str, sector: int) -> LossError:
        return LossError(what, sector, self._moments[: self._place + 1])

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
            record = decoded(text)
            if record is not None and record.peer_worth is Worth.UP_TO_DATE:
                bad = state.bad_after_cut[1 - named]
                self._none(state, place, 1 - named, bad, "said to be up to date, the other one lost")
        if state.both_hold:
            bad = state.bad_after_cut[state.other]
            self._none(state, place, state.other, bad, "flushes wait for it, the other one lost")
        named = state.named
        self._none(state, place, named, state.bad_after_kill[named], "named by the record, killed")

    def _none(self, state: State, place: int, number: int, bad: set[int], what: str) -> None:
        if not bad:
            return
        sector = min(bad)
        disk, cut, kill = state.disks[number], state.cut.allowed(sector), state.kill.allowed(sector)
        raise self._loss(
            f"entry {place}: disk {number} ({what}): {len(bad)} sectors; {sector} may hold "
            f"{sorted(disk.survivors(sector))} (last {disk.latest(sector)}), allowed {sorted(cut)}, after a "
            f"kill {sorted(kill)}",
            sector,
        )

    # ---- restarts ------------------------------------------------------------------

    def _restart(self, state: State, disks: tuple[LocalDisk, LocalDisk], boot: str, place: int) -> None:
        killed = self.chance.random() < 0.25
        if killed:
            one, other = (disk.as_cached() for disk in state.disks)
            bitmap, text = state.file.as_cached(), state.record.latest()
        else:
            one, other = (disk.after_cut(self.chance) for disk in state.disks)
            bitmap, text = state.file.after_cut(self.chance), self.chance.choice(state.record.possible())
            boot = f"{boot}, cut off"
        first, second = state.disks
        left = Remains(
            (one, other), bitmap, text, boot, state.capacity_bytes,
            spoilt=(first.spoilt_in(one), second.spoilt_in(other)),
            rotten=(first.rotten_in(one), second.rotten_in(other)),
        )  # fmt: skip
        self.tally.restarts += 1
        with booted(left.boot):
            self._start(left, disks, f"entry {place}, {'killed' if killed else 'power cut'}")
        if self.on_cut is not None:
            self.on_cut(left)

    def _start(self, left: Remains, disks: tuple[LocalDisk, LocalDisk], when: str) -> None:
        named = current_disk(self.site, left.record, left.boot)
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

    def _trusted(self, path: str, disks: tuple[LocalDisk, LocalDisk], opened: Any) -> bool:
        peer = Peer()
        peer.known(opened.record.peer, opened.peer_left)
        return peer.why_full(disks[self.site.number_of(path)]) is None

    def _check_bits(self, left: Remains, when: str) -> None:
        file = self.site.bitmap.read_bytes()
        regions = -(-left.capacity_bytes // REGION)
        bits = int.from_bytes(file[BITS_AT + 16 : BITS_AT + 16 + regions // 8 + 1], "little")
        for sector in self._differing(left.images, left):
            region = sector // IN_REGION
            if not bits >> region & 1:
                one, other = (image[sector] for image in left.images)
                raise self._loss(f"{when}: region {region} differs ({one}, {other}) and has no bit", sector)

    def _differing(self, images: Sequence[Sequence[int]], left: Remains) -> list[int]:
        """But for what a disk has made different itself, and nobody has written since."""
        one, other = images
        rotten = (left.rotten[0].get, left.rotten[1].get)
        return [
            sector
            for sector in range(left.capacity_bytes // SECTOR)
            if one[sector] != other[sector]
            and rotten[0](sector) != one[sector]
            and rotten[1](sector) != other[sector]
        ]

    def _resync(self, left: Remains, named: int, bitmap: Any, tracked: bool, resync: bool, when: str) -> None:
        self.tally.resyncs += 1
        held = (left.disk(0), left.disk(1))
        capacity, record = left.capacity_bytes, decoded(left.record, left.boot)
        assert record is not None
        doubt, spared = within(record.doubt, capacity), within(record.spared, capacity)
        options = EngineOptions(capacity_bytes=capacity, dirty_region_bytes=REGION, log_bytes=8 << 20)
        driver = EngineDriver(
            options, held[named], bitmap=bitmap, peer_tracked=tracked, doubt=doubt, spared=spared
        )
        with driver:
            driver.mirror(held[1 - named], resync=resync, spare_doubt=True)
            found = driver.snapshot()
            after = [tags_of(disk.read(0, SIZE), 0) for disk in held]
        for disk in held:
            disk.drop()
        what = f"{when}: after the {'resync' if resync else 'full copy'}"
        unreadable = sectors_of(found.unreadable)
        without_rot = left if resync else replace(left, rotten=({}, {}))
        for sector in self._differing(after, without_rot):
            if sector not in sectors_of(spared) | unreadable:
                raise self._loss(f"{what} sector {sector} differs", sector)
        for sector in unreadable - pieces_of(left.spoilt[named]):
            raise self._loss(f"{what} sector {sector} is called unreadable", sector)
        for sector in sectors_of(doubt) - sectors_of(found.doubt):
            raise self._loss(f"{what} it is forgotten that sector {sector} is in doubt", sector)
        for sector in sectors_of(spared):
            if after[1 - named][sector] != left.images[1 - named][sector]:
                raise self._loss(f"{what} sector {sector}, which the other disk held better, is lost", sector)
