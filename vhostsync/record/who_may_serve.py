# SPDX-License-Identifier: Apache-2.0
"""Whether `serve` may begin with the disk that it was given, as its record and the operator have it.

What a disk *is* goes before what it is called: a renamed current disk is accepted, an old one renamed to the
current one's path is refused. Where it cannot be told what the disk is, or another file has taken the current
one's place, and something is at stake, the start ends with a question: one sentence with the commands that
answer it, and nothing has been written. An answer is an option of `serve` (Answer), for one start."""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import structlog

from vhostsync.errors import StateRecordError
from vhostsync.option_values import Answer
from vhostsync.record.state_record import StateRecord, Superseded, Worth, named, timestamp
from vhostsync.storage.identity import DiskIdentity, Likeness, same

log = structlog.get_logger(__name__)


def check_start(
    record: StateRecord, disk: DiskIdentity, place: Path | str | None = None, answer: Answer | None = None
) -> StateRecord:
    """The record to go on with when `serve` is started with `disk`: `current` is how the disk is called
    today. StateRecordError when it is not the current disk, or it cannot be told whether it is."""
    if same(record.current, disk):
        if answer is not None:
            log.warning(
                "this is the current disk already: leave the option out, or it may answer another question",
                option=f"--{answer}", path=disk.path,
            )  # fmt: skip
        return record.continued(disk)
    case = _Case(record, disk, place)
    if answer is Answer.PROMOTE:
        return case.promote()
    for old, what in case.former():
        if same(old, disk):
            case.refuse(what, is_it=True)
    likeness = record.current.likeness(disk)
    if answer is Answer.SAME_DISK:
        return case.go_on(likeness)
    if record.at_stake or (likeness is Likeness.OTHER and disk.path != record.current.path):
        case.ask(likeness)
    return case.take_its_place(likeness)


def claims(record: StateRecord, disk: DiskIdentity) -> bool:
    """Whether a start with this disk is the record's affair, though it is not certainly one of its disks."""
    if not record.at_stake:
        return record.current.path == disk.path
    return any(
        each.path == disk.path or each.likeness(disk) is not Likeness.OTHER for each in record.disks
    )


class _Case:
    """One disk before one record. What ends in "refuse" or "ask" raises StateRecordError."""

    def __init__(self, record: StateRecord, disk: DiskIdentity, place: Path | str | None) -> None:
        self._record = record
        self._disk = disk
        self._named = f"{named(place)} (epoch {record.epoch})"

    # ---- accepted -------------------------------------------------------------

    def promote(self) -> StateRecord:
        record, disk = self._record, self._disk
        for copy in self.unfinished():
            likeness = copy.likeness(disk)
            if likeness is Likeness.OTHER:
                continue
            sure = likeness is Likeness.SAME
            of_its_own = "" if sure else " or, if it is certainly another disk, use --new-disk"
            raise StateRecordError(
                f"{disk.path} {'is' if sure else 'may be'} a copy that did not end, and no disk to start "
                f"from, says {self._named}; serve the current disk, {record.current.path}, or restore a "
                f"backup and promote that{of_its_own}"
            )
        log.warning(
            "promoted: the current disk so far is given up for good", path=disk.path,
            lost=record.current.path, epoch=record.epoch + 1,
        )  # fmt: skip
        return record.promoted(disk, timestamp())

    def go_on(self, likeness: Likeness) -> StateRecord:
        record, disk = self._record, self._disk
        if likeness is Likeness.OTHER:
            raise StateRecordError(
                f"{disk.path} is certainly not the disk that {self._named} calls the current one, "
                f"{record.current.path}; if it is to take its place, start it with --promote instead of "
                f"--same-disk"
            )
        log.warning("taken for the current disk, as the operator says", path=disk.path)
        # What was copied, or rolled back to a snapshot, lacks what no bitmap knows of.
        kept = None if record.current.lies_elsewhere(disk) else record.bitmap
        return replace(record.continued(disk), bitmap=kept)

    def take_its_place(self, likeness: Likeness) -> StateRecord:
        """Nothing is at stake: there never was another disk."""
        record, disk = self._record, self._disk
        log.warning(
            "the disk at the current disk's path is not known to be the one recorded; going on with it",
            path=disk.path, recorded_inode=record.current.inode, inode=disk.inode,
        )  # fmt: skip
        return record.continued(disk) if likeness is Likeness.UNSURE else record.replaced(disk)

    # ---- refused ----------------------------------------------------------------

    def unfinished(self) -> list[DiskIdentity]:
        """The disks whose last copy did not end."""
        record = self._record
        copies = [old.disk for old in record.superseded if old.worth is Worth.INCONSISTENT]
        if record.peer is None:
            return copies
        copies = [copy for copy in copies if not same(copy, record.peer)]
        return [record.peer, *copies] if record.peer_worth is Worth.INCONSISTENT else copies

    def former(self) -> list[tuple[DiskIdentity, str]]:
        """The disks that are not the current one, and what is to be said of each."""
        record = self._record
        peer = [] if record.peer is None else [(record.peer, self.peer())]
        return peer + [(old.disk, self.superseded(old)) for old in record.superseded]

    def refuse(self, what: str, *, is_it: bool) -> NoReturn:
        """`what` says what the disk is and, after a semicolon, from when."""
        of_it, moment = what.rsplit("; ", 1)
        own = "" if is_it else " or, if it is a disk of its own, add --new-disk,"
        raise StateRecordError(
            f"{self._disk.path} {of_it}: the current disk is {self._where()}, says {self._named}; start with "
            f"--blk-file {self._record.current.path}{own} or, if the current disk is lost for good, {moment}"
        )

    def peer(self) -> str:
        record = self._record
        assert record.peer_worth is not None
        since = f" since {record.outdated_since}" if record.outdated_since else ""
        what = f"is the other half of a mirror ({record.peer_worth.value}{since}), not the current disk"
        return f"{what}; {_moment(record.peer_worth, record.outdated_since)}"

    def superseded(self, old: Superseded) -> str:
        when = f" at {old.since}" if old.since else ""
        if old.worth is not None:
            since = f", {old.worth.value}{f' since {old.since}' if old.since else ''}"
            how = "given up as lost" if old.lost else "the other half of a mirror"
            then = "was promoted" if old.lost else "took its place"
            return f"was {how}{since}, when another disk {then}; {_moment(old.worth, old.since)}"
        if old.lost:
            what = f"was given up as lost{when}, when another disk was promoted"
        else:
            what = f"was superseded by a switch{when}"
        return f"{what}; {_moment(Worth.OUTDATED, old.since)}"

    def ask(self, likeness: Likeness) -> NoReturn:
        record, disk = self._record, self._disk
        current = record.current
        if likeness is Likeness.UNSURE:
            raise StateRecordError(
                f"{disk.path} may be the current disk of {self._named}, last at {current.path}, or a copy of "
                f"it: add --same-disk if it is that disk (moved, or its file system numbered anew), "
                f"--promote if it is another one that is to take its place, --new-disk if it is a copy for "
                f"another machine"
            )
        if disk.path == current.path:
            raise StateRecordError(
                f"{disk.path} is not the disk that was there: {self._named} knows another file as the "
                f"current disk; to go on with the file that is there now, add --promote{self._other_way()}"
            )
        for old, what in self.former():
            if old.likeness(disk) is Likeness.UNSURE:
                self.refuse(f"may be {old.path}, or a copy of it, which {what}", is_it=False)
        for old, what in self.former():
            if old.path == disk.path:
                of_it, moment = what.rsplit("; ", 1)
                note = "the file there now is not the one that was recorded"
                self.refuse(f"{of_it} ({note}); {moment}", is_it=False)
        raise StateRecordError(
            f"{self._named} belongs to other disks (the current one is {current.path}) and does not know "
            f"{disk.path}; name another --state-file, start with --blk-file {current.path} or, if that disk "
            f"is lost for good and this one is to take its place, add --promote"
        )

    def _other_way(self) -> str:
        record = self._record
        if record.peer is None:
            return "; if it came there by mistake, put the current disk back"
        if record.peer_worth is Worth.INCONSISTENT:
            return f"; the other disk, {record.peer.path}, is a copy that did not end, and of no use"
        assert record.peer_worth is not None
        how = {
            Worth.UP_TO_DATE: "is up to date and lacks nothing that was flushed",
            Worth.OUTDATED: f"is the disk as of {record.outdated_since or 'an unknown moment'}",
        }[record.peer_worth]
        return (
            f"; to go on with the other disk, which {how}, start with --blk-file {record.peer.path} --promote"
        )

    def _where(self) -> str:
        path = self._record.current.path
        return f"another file, last at the same path ({path})" if path == self._disk.path else path


def _moment(worth: Worth, since: str | None) -> str:
    if worth is Worth.UP_TO_DATE:
        return "add --promote: this one lacks nothing that was flushed"
    if worth is Worth.INCONSISTENT:
        return "restore a backup: this one is a copy that did not end, and of no use"
    moment = f"as of {since}" if since else "of an unknown moment"
    return f"add --promote: this one is the disk {moment}, without what the guest wrote since"
