# SPDX-License-Identifier: Apache-2.0
"""All media and all promises at one prefix of a record.

Each sector of each disk is judged: is whatever may be left of it allowed? Exceptions to that are few, and end
as soon as they can:
  * what the guest's disk cannot give any more (unreadable) may be missing on the other one, until a write
    that came later was promised; after a switch, only where its reply has said so;
  * where a write had failed before this run, the other disk may hold what was there before it;
  * what a disk has made of its data behind everybody's back is not blamed on the backend, until the guest is
    moved there;
  * what the guest has not been told of (its disk has grown) is nothing to it yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.powercut.machine import IN_REGION, Remains, Site, current_disk, decoded
from tests.powercut.media import SECTOR, DiskMedium, FileMedium, RecordMedium
from tests.powercut.oracle import Oracle
from tests.powercut.recorder import (
    Confirmed,
    DoubtAsked,
    DoubtRecorded,
    Enlarged,
    Grown,
    GuestRequest,
    Kind,
    Moment,
    Note,
    PauseReleased,
    Replaced,
    Settled,
    Submitted,
    Switched,
    Verified,
    VerifyBegun,
)
from vhostsync.record.state_record import StateRecord, Worth

ON_DISK = (Kind.WRITE, Kind.ZERO, Kind.FLUSHED, Kind.LOADED, Kind.FORGOT, Kind.SPOILT)
Ranges = Iterable[tuple[int, int]]


class BrokenPromiseError(AssertionError):
    def __init__(self, what: str, sector: int) -> None:
        super().__init__(what)
        self.sector = sector


def sectors_of(ranges: Ranges) -> frozenset[int]:
    """Of (offset, length) in bytes."""
    return frozenset(
        sector for offset, length in ranges for sector in range(offset // SECTOR, (offset + length) // SECTOR)
    )


def pieces_of(sectors: Iterable[int]) -> frozenset[int]:
    """What the copy gives up where these cannot be read."""
    pieces = {sector // IN_REGION for sector in sectors}
    return frozenset(piece * IN_REGION + n for piece in pieces for n in range(IN_REGION))


@dataclass
class Doubt:
    """Rule 5. `sectors`: a write of the guest's has failed there, and none came since; `spared`: the tag that
    it may have left on the guest's disk, which no copy may put on the other one; `_soon`: so, as soon as
    that one is known to hold all that came before."""

    sectors: set[int] = field(default_factory=set)
    spared: dict[int, int] = field(default_factory=dict)
    _soon: dict[int, tuple[int, int]] = field(default_factory=dict)  # the tag, and since which place
    _failing: set[GuestRequest] = field(default_factory=set)  # in flight
    _asked: frozenset[int] = frozenset()
    _recorded: frozenset[int] = frozenset()
    _leaving: set[int] = field(default_factory=set)  # `sectors` of the disk that is being left
    _exchanged_at: int = -1

    @classmethod
    def at_start(cls, record: StateRecord | None, current: Sequence[int], other: Sequence[int]) -> Doubt:
        if record is None:
            return cls()
        tags = {sector: current[sector] for sector in sectors_of(record.spared)}
        spared = {sector: tag for sector, tag in tags.items() if tag not in (0, other[sector])}
        return cls(set(sectors_of(record.doubt)), spared)

    def submitted(self, request: GuestRequest) -> None:
        """It may end the doubt at any time from here on. (How it ends itself is known in advance.)"""
        if request.ok is False:
            self._failing.add(request)
        for sector in range(request.first, request.first + request.count):
            self.sectors.discard(sector)
            self.spared.pop(sector, None)
            self._soon.pop(sector, None)

    def failed(self, request: GuestRequest, oracle: Oracle, other: DiskMedium, *, steady: bool) -> None:
        """The guest has seen its error. `steady`: it was so when this was submitted, and is."""
        self._failing.discard(request)
        if request.submitted_at < self._exchanged_at:
            return
        for sector in range(request.first, request.first + request.count):
            if not oracle.alone(request, sector):
                continue
            self.sectors.add(sector)
            left = request.tag_at(sector)
            if left and steady and left in other.survivors(sector):
                raise BrokenPromiseError(f"a write that failed was replicated to sector {sector}", sector)
            if left and steady:
                self._soon[sector] = (left, request.confirmed_at)

    def flushed(self, request: GuestRequest) -> None:
        """In steady: the other disk holds all that came before this was submitted. A write that fails later
        may delay that."""
        if self._failing or any(since > request.submitted_at for _, since in self._soon.values()):
            return
        self.spared |= {sector: tag for sector, (tag, _) in self._soon.items()}
        self._soon.clear()

    def put(self, disk: DiskMedium, sectors: Iterable[int]) -> None:
        """Something was put on the other disk there."""
        for sector in sectors:
            if self.spared.get(sector) == disk.latest(sector):
                raise BrokenPromiseError(f"sector {sector} is in doubt and was put on the other disk", sector)

    def replaced(self, record: StateRecord) -> None:
        self._want(self._recorded & self.sectors, record)
        if record.peer_worth is not Worth.UP_TO_DATE:
            self._soon.clear()
        if record.peer_worth is Worth.INCONSISTENT and record.bitmap is None:
            self.spared.clear()  # if everything is copied, that may have been asked for

    def asked(self) -> None:
        self._asked = frozenset(self.sectors)

    def recorded(self, records: Iterable[StateRecord | None]) -> None:
        self._recorded = self._asked & self.sectors
        for record in records:
            self._want(self._recorded, record)

    def _want(self, sectors: frozenset[int], record: StateRecord | None) -> None:
        lacking = sectors - (sectors_of(record.doubt) if record is not None else frozenset())
        if lacking:
            raise BrokenPromiseError("the record does not have what is in doubt", min(lacking))

    def exchanging(self, place: int) -> None:
        """The record names the other disk, of which all that is not true (or, if that came to nothing, the
        first one again)."""
        self.sectors, self._leaving = self._leaving, self.sectors
        self._recorded = frozenset()
        self._exchanged_at = place
        self.spared.clear()
        self._soon.clear()

    def switched(self, accepted: frozenset[int]) -> None:
        lacking = self._leaving - accepted
        if lacking:
            raise BrokenPromiseError("the guest was moved, and not told what is in doubt", min(lacking))
        self._leaving.clear()


@dataclass
class State:
    """`pauses`: flushes wait where a steady destination was lost. `visible`: sectors that the guest knows of;
    `capacity_bytes`: what a start would show it."""

    site: Site
    disks: tuple[DiskMedium, DiskMedium]
    file: FileMedium
    record: RecordMedium
    boot: str
    cut: Oracle
    kill: Oracle
    doubt: Doubt
    named: int
    capacity_bytes: int
    visible: int
    pauses: bool
    both_hold: bool = False  # also while the record says less
    bad_after_cut: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))
    bad_after_kill: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))
    _excused: dict[int, int] = field(default_factory=dict)  # by sector: since which place
    _not_copied: set[int] = field(default_factory=set)  # by the copy under way, or the next one
    _up_to_date_at: int | None = None  # the place since which the record says so
    _to_find: dict[int, int] = field(default_factory=dict)  # what a verification has to find

    @classmethod
    def at_start(cls, site: Site, remains: Remains, *, pauses: bool) -> State:
        record = decoded(remains.record, remains.boot)
        named = current_disk(site, remains.record, remains.boot)
        initial = remains.images[named]
        doubt = Doubt.at_start(record, initial, remains.images[1 - named])
        media = [
            DiskMedium(list(image), spoilt={sector: image[sector] for sector in spoilt}, rotten=dict(rotten))
            for image, spoilt, rotten in zip(remains.images, remains.spoilt, remains.rotten, strict=True)
        ]
        return cls(
            site,
            (media[0], media[1]),
            FileMedium(),
            RecordMedium(remains.record),
            remains.boot,
            Oracle(initial, promise_at_once=False),
            Oracle(initial, promise_at_once=True),
            doubt,
            named,
            remains.capacity_bytes,
            remains.capacity_bytes // SECTOR,
            pauses,
            _excused=dict.fromkeys(sectors_of(record.spared) if record is not None else (), -1),
        )

    @property
    def other(self) -> int:
        return 1 - self.named

    # ---- what happens --------------------------------------------------------------

    def apply(self, moment: Moment, place: int) -> None:
        """BrokenPromiseError."""
        if moment.note is not None:
            self._noted(moment.note, place)
        elif moment.kind in ON_DISK:
            self._on_disk(moment)
        else:
            self.file.apply(moment, place)

    def _on_disk(self, moment: Moment) -> None:
        disk = self.disks[moment.disk]
        touched = disk.apply(moment)
        if moment.kind is Kind.WRITE and moment.disk == self.other:
            self.doubt.put(disk, touched)
        elif moment.kind is Kind.SPOILT and moment.disk == self.named:
            self._not_copied |= pieces_of(sectors_of([(moment.offset, moment.length)]))
        self.judge(moment.disk, touched)

    def _noted(self, note: Note, place: int) -> None:
        match note:
            case Submitted() | Confirmed():
                self._guest(note, place)
            case Replaced():
                self._replaced(note.text, place)
            case Settled():
                self.record.settled()
            case Switched():
                self.doubt.switched(note.accepted)
                self._excused = {s: since for s, since in self._excused.items() if s in note.accepted}
                self.judge_all()
            case PauseReleased():
                self.both_hold = False
            case DoubtAsked():
                self.doubt.asked()
            case DoubtRecorded():
                self.doubt.recorded(decoded(text) for text in self.record.possible())
            case VerifyBegun():
                self._to_find = dict(self.disks[self.other].rotten)
            case Verified():
                self._verified(clean=note.clean)
            case Enlarged():
                self.capacity_bytes = note.capacity_bytes
            case Grown():
                self.visible = note.capacity_bytes // SECTOR
                self.judge_all()

    def _guest(self, note: Submitted | Confirmed, place: int) -> None:
        request = note.request
        touched = set(self.cut.apply(note, place)) | set(self.kill.apply(note, place))
        steady = self._up_to_date_at is not None and request.submitted_at > self._up_to_date_at
        if request.count and isinstance(note, Submitted):
            self.doubt.submitted(request)
        elif request.count and not request.ok:
            self.doubt.failed(request, self.kill, self.disks[self.other], steady=steady)
        elif isinstance(note, Confirmed) and not request.count and request.ok and steady:
            self.doubt.flushed(request)
        for number in (0, 1):
            self.judge(number, touched)

    def _excuse(self, since: dict[int, int]) -> None:
        self._excused |= since
        for number in (0, 1):
            self.judge(number, since)

    def _replaced(self, text: bytes, place: int) -> None:
        self.record.replaced(text)
        record = decoded(text, self.boot)
        assert record is not None
        named = self.site.number_of(record.current.path)
        if named != self.named:
            self.named = named
            self.doubt.exchanging(place)
            self.disks[named].foreign.clear()
            self.judge_all()
        self.doubt.replaced(record)
        if record.peer_worth is not Worth.UP_TO_DATE:
            self._up_to_date_at = None
        elif self._up_to_date_at is None:
            self._up_to_date_at = place
        if record.peer_worth is Worth.INCONSISTENT:
            source = self.disks[self.named]
            self._not_copied |= pieces_of(source.spoilt_in(source.as_cached()))
        if record.peer_worth is Worth.UP_TO_DATE:
            self._excuse(dict.fromkeys(self._not_copied, place))
            self._not_copied.clear()
            self.both_hold = self.pauses
        if record.wanted is None:
            self.both_hold = False

    def _verified(self, *, clean: bool) -> None:
        """What was repaired is durable; a write of the guest's need not be."""
        disk = self.disks[self.other]
        left = [
            sector
            for sector, tag in self._to_find.items()
            if tag in disk.survivors(sector)
            and (tag == disk.latest(sector) or self.cut.is_promised(sector, disk.latest(sector)))
        ]
        if clean and left:
            raise BrokenPromiseError("called equal, and would not be after a power cut", min(left))

    # ---- judging ---------------------------------------------------------------------

    def judge_all(self) -> None:
        for number in (0, 1):
            self.judge(number, range(len(self.disks[number].durable)))

    def judge(self, number: int, sectors: Iterable[int]) -> None:
        disk = self.disks[number]
        after_cut, after_kill = self.bad_after_cut[number], self.bad_after_kill[number]
        for sector in sectors:
            if sector >= self.visible or self._is_excused(sector):
                cut_bad = kill_bad = False
            else:
                cut_bad = not disk.survivors(sector) - disk.foreign <= self.cut.allowed(sector)
                latest = disk.latest(sector)
                kill_bad = latest not in self.kill.allowed(sector) and latest not in disk.foreign
            _put(after_cut, sector, bad=cut_bad)
            _put(after_kill, sector, bad=kill_bad)

    def _is_excused(self, sector: int) -> bool:
        since = self._excused.get(sector)
        return since is not None and not self.cut.promised_since(sector, since)


def _put(into: set[int], sector: int, *, bad: bool) -> None:
    if bad:
        into.add(sector)
    else:
        into.discard(sector)
