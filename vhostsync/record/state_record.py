# SPDX-License-Identifier: Apache-2.0
"""Which disk is the truth: the state record (docs/durability.md, section 5).

Theory of operation
-------------------
A *lineage* is one guest's disk through all its switches: the current disk, perhaps a peer (the destination of
its mirror) and the disks that were current once. One file holds the record of one lineage (`state_file`). How
`serve`, given any disk of a lineage, finds its record when the operator named none: see `state_index`. The
dirty bitmap is a file of its own (`bitmap`), which the record names.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from vhostsync.storage.identity import DiskIdentity, decode_identity, same
from vhostsync.typed_fields import typed

RECORD_VERSION = 3
"""Of a record, to be raised with whatever a program that does not know it would decide wrongly without. 1
had no shape of the guest's disk, and of a superseded one only the identity; 2 did not know what a superseded
disk is worth: its programs would start from a copy that did not end."""
FILE_VERSION = 2
"""Of the other texts: a bitmap's header, what points to a record."""
WRONG_FIELDS = "fields are missing, unknown or of the wrong type"
_RANGES: Any = tuple[tuple[int, int], ...]
SUPERSEDED_MAX = 16
DOUBT_MAX = 64  # VS_RANGES_MAX: the engine makes more of them one, with what lies between


class Worth(StrEnum):
    """What the peer would be worth if the current disk were lost now."""

    UP_TO_DATE = "up-to-date"
    OUTDATED = "outdated"
    INCONSISTENT = "inconsistent"


@dataclass(frozen=True)
class Wanted:
    """The mirror that a mirror-start has asked for: a restart resumes it (retry.py)."""

    path: str
    cache: Literal["none", "writeback"]
    speed_bytes_per_s: int = 0


@dataclass(frozen=True)
class Superseded:
    """A disk that was current once and is not any more, since a switch, or since the operator has promoted
    another one because this was `lost`. Or (`worth`) that was a peer until another one took its place, or
    was promoted: `since` it was outdated. A copy that did not end is known as one for good."""

    disk: DiskIdentity
    since: str | None = None  # None: not known, as in records of version 1
    lost: bool = False
    worth: Worth | None = None


@dataclass(frozen=True)
class GuestDisk:
    """What the guest was told of its disk: the same on whatever disk it is, until a `resize`."""

    capacity_bytes: int
    block_bytes: int
    physical_block_bytes: int
    discard_bytes: int

    def __post_init__(self) -> None:
        if any(each >> 32 for each in (self.block_bytes, self.physical_block_bytes, self.discard_bytes)):
            raise ValueError("the blocks of the guest's disk are out of range")


def timestamp() -> str:
    """Now, as records say it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class StateRecord:
    """The record of one lineage. `clean`: both disks were detached in order, and the identities have the
    ctimes of that moment. The methods below are the only transitions."""

    epoch: int
    current: DiskIdentity
    peer: DiskIdentity | None = None
    peer_worth: Worth | None = None
    outdated_since: str | None = None
    clean: bool = False
    superseded: tuple[Superseded, ...] = ()  # the last one first
    bitmap: str | None = None  # the token of the dirty bitmap that knows where the peer may differ
    doubt: tuple[tuple[int, int], ...] = ()  # offset, length: where writes to the current disk have failed
    spared: tuple[tuple[int, int], ...] = ()  # of these: what the peer holds better, if up to date or clean
    different_since: str | None = None  # a verification has found that the peer differs: until it is mended
    wanted: Wanted | None = None  # until somebody takes it back: mirror-cancel, a switch that keeps no mirror
    guest: GuestDisk | None = None  # None: not known, in records of version 1
    # Where requests may be under way that nobody waits for any more once this process or its connection is
    # gone (mirror/fence.py). Only disks whose kind does not fence itself.
    unfenced: tuple[DiskIdentity, ...] = ()
    # The peer was let go of together with those of the group, as copies of one instant, which all bear this
    # name. A program that does not know it forgets it.
    cut: str | None = None

    def __post_init__(self) -> None:
        if (self.peer is None) != (self.peer_worth is None):
            raise ValueError("peer and peer_worth go together")
        if self.outdated_since is not None and self.peer_worth is not Worth.OUTDATED:
            raise ValueError("outdated_since belongs to an outdated peer")
        if self.bitmap is not None and self.peer is None:
            raise ValueError("a bitmap belongs to a peer")
        if self.different_since is not None and self.peer is None:
            raise ValueError("a difference is one from a peer")
        if self.cut is not None and self.peer_worth is not Worth.OUTDATED:
            raise ValueError("what was let go of with its group is outdated")
        if self.wanted is not None and self.peer is None:
            raise ValueError("a mirror that is wanted has a peer")
        for ranges in (self.doubt, self.spared):
            if len(ranges) > DOUBT_MAX or any(offset < 0 or length < 1 for offset, length in ranges):
                raise ValueError("the ranges in doubt are out of range")
        if self.epoch < 1 or len(self.superseded) > SUPERSEDED_MAX:
            raise ValueError("epoch or superseded out of range")

    @classmethod
    def first(cls, current: DiskIdentity, guest: GuestDisk | None = None) -> "StateRecord":
        return cls(epoch=1, current=current, guest=guest)

    @property
    def at_stake(self) -> bool:
        """Whether more is known than that there is a disk: serving the wrong one would lose something."""
        return self.peer is not None or bool(self.superseded) or bool(self.doubt)

    @property
    def disks(self) -> tuple[DiskIdentity, ...]:
        """All that it knows: the current one, the peer, and those that were current before."""
        peer = () if self.peer is None else (self.peer,)
        return (self.current, *peer, *(old.disk for old in self.superseded))

    def of_disk(self, disk: DiskIdentity) -> DiskIdentity | None:
        """How the record has this disk; None if it does not know it."""
        return next((each for each in self.disks if same(each, disk)), None)

    def with_guest(self, guest: GuestDisk) -> "StateRecord":
        return replace(self, guest=guest)

    def with_peer(self, peer: DiskIdentity, bitmap: str | None = None) -> "StateRecord":
        """A destination is attached. To be written before the first byte goes to it: it is worth nothing
        until the copy is done."""
        former = () if self.peer is None or same(self.peer, peer) else (self._former_peer(),)
        return replace(
            self, peer=peer, peer_worth=Worth.INCONSISTENT, outdated_since=None, clean=False, bitmap=bitmap,
            spared=(), superseded=self._superseded_by(self.current, *former), cut=None,
        )  # fmt: skip

    def peer_is(self, disk: DiskIdentity) -> bool:
        """This disk, as it is now (with its ctime), is the peer, and nothing speaks for a change by somebody
        else since the last clean end."""
        peer = self.peer
        if peer is None or not same(peer, disk):
            return False
        return peer.ctime_ns is None or disk.changed_since(peer) is None

    def with_bitmap(self, token: str | None) -> "StateRecord":
        """The bitmap of this token has seen every write since it and the peer were equal; None: none has."""
        return replace(self, bitmap=token)

    def with_doubt(
        self, doubt: tuple[tuple[int, int], ...], spared: tuple[tuple[int, int], ...]
    ) -> "StateRecord":
        return replace(self, doubt=doubt, spared=spared if self.peer_worth is Worth.UP_TO_DATE else ())

    def with_difference(self, since: str | None) -> "StateRecord":
        """What a verification has found; None: the peer is equal, or is made so by a copy of everything."""
        return replace(self, different_since=since if self.peer is not None else None)

    def with_wanted(self, wanted: Wanted | None) -> "StateRecord":
        return replace(self, wanted=wanted)

    def with_unfenced(self, disk: DiskIdentity) -> "StateRecord":
        """Requests may be under way there. To be written before the first one."""
        return replace(self, unfenced=(disk, *self.with_fenced(disk).unfenced))

    def with_fenced(self, disk: DiskIdentity) -> "StateRecord":
        """None is, for certain."""
        return replace(self, unfenced=tuple(each for each in self.unfenced if not same(each, disk)))

    def with_worth(self, worth: Worth, outdated_since: str | None = None) -> "StateRecord":
        # What the guest writes without the peer may end that it holds anything better, and no record waits.
        spared = self.spared if worth is Worth.UP_TO_DATE else ()
        return replace(
            self, peer_worth=worth, outdated_since=outdated_since, clean=False, spared=spared, cut=None
        )

    def with_cut(self, cut: str) -> "StateRecord":
        """The destination was let go of, and stays as it is until somebody starts the mirror."""
        return replace(self, cut=cut, wanted=None)

    def without_peer(self) -> "StateRecord":
        return replace(
            self, peer=None, peer_worth=None, outdated_since=None, clean=False, bitmap=None, spared=(),
            different_since=None, wanted=None, cut=None,
        )  # fmt: skip

    def switched(self, *, keep_mirror: bool, since: str | None = None) -> "StateRecord":
        """The peer becomes the current disk. With `keep_mirror` the old one becomes the peer, up to date;
        in any case it is superseded, and a start with it will be refused."""
        if self.peer is None:
            raise ValueError("a switch needs a peer")
        return StateRecord(
            epoch=self.epoch + 1,
            current=self.peer,
            peer=self.current if keep_mirror else None,
            peer_worth=Worth.UP_TO_DATE if keep_mirror else None,
            superseded=self._superseded_by(self.peer, Superseded(self.current, since)),
            bitmap=self.bitmap if keep_mirror else None,
            different_since=self.different_since if keep_mirror else None,
            wanted=replace(self.wanted, path=self.current.path) if keep_mirror and self.wanted else None,
            guest=self.guest,
            unfenced=self.unfenced,
        )

    def detached(
        self, current: DiskIdentity, peer: DiskIdentity | None, spared: tuple[tuple[int, int], ...] = ()
    ) -> "StateRecord":
        """A clean end: identities as they are now, after the last write, with ctimes."""
        spared = spared if peer is not None else ()
        return replace(self, current=current, peer=peer, clean=True, spared=spared)

    def promoted(self, disk: DiskIdentity, since: str | None = None) -> "StateRecord":
        """The operator declares `disk` the truth, whatever was recorded: the current one is lost, and must
        not be served should it come back; nor the peer."""
        gone = [Superseded(self.current, since, lost=True)]
        if self.peer is not None:
            gone.append(replace(self._former_peer(since), lost=True))
        return StateRecord(
            epoch=self.epoch + 1, current=disk, superseded=self._superseded_by(disk, *gone), guest=self.guest,
            unfenced=self.unfenced,
        )  # fmt: skip

    def replaced(self, disk: DiskIdentity) -> "StateRecord":
        """Another file took the current disk's place, and nothing else is known of this lineage."""
        return replace(self, current=disk, clean=False, guest=None)

    def continued(self, disk: DiskIdentity) -> "StateRecord":
        """The current disk, as it is called and numbered today. What it looked like at the last clean end is
        kept for whoever asks whether it was changed; it keeps the mark that it had."""
        if disk.mark is None and self.current.mark is not None:
            disk = replace(disk, mark=self.current.mark, mark_is_set=False)
        return replace(self, current=disk)

    def _former_peer(self, now: str | None = None) -> Superseded:
        """`now`: from when on one that is up to date is outdated."""
        assert self.peer is not None
        if self.peer_worth is Worth.UP_TO_DATE:
            return Superseded(self.peer, now, worth=Worth.OUTDATED)
        return Superseded(self.peer, self.outdated_since, worth=self.peer_worth)

    def _superseded_by(self, disk: DiskIdentity, *gone: Superseded) -> tuple[Superseded, ...]:
        former = list(gone)
        for old in self.superseded:
            if not any(same(old.disk, new.disk) for new in gone):
                former.append(old)
        former = [old for old in former if not same(old.disk, disk)]
        while len(former) > SUPERSEDED_MAX:  # the oldest; those that were current are known for longest
            peers = [old for old in former if old.worth is not None]
            former.remove(peers[-1] if peers else former[-1])
        return tuple(former)


def named(place: Path | str | None) -> str:
    """What a message calls the record."""
    return "the state record" if place is None else f"the state record {place}"


class NewerVersionError(ValueError):
    """The text is whole, and not for this program."""


# ---- the text of a record -----------------------------------------------


def _version_of(kind: str) -> int:
    return RECORD_VERSION if kind == "state-record" else FILE_VERSION


def encode_checked(kind: str, body: dict[str, Any]) -> bytes:
    """JSON with a version and a checksum over everything else in it."""
    content = {"kind": kind, "version": _version_of(kind), "body": body}
    return json.dumps({**content, "sha256": _checksum(content)}, indent=1).encode() + b"\n"


def decode_checked(kind: str, text: bytes) -> dict[str, Any]:
    """ValueError with a phrase when the text is not whole; NewerVersionError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is no JSON" if text else "it is empty") from error
    if not isinstance(content, dict) or not isinstance(content.get("body"), dict):
        raise ValueError("it is not of this program")
    found = content.pop("sha256", None)
    if found != _checksum(content):
        raise ValueError("its checksum does not fit")
    if content.get("kind") != kind:
        raise ValueError(f"it is a {content.get('kind')}, not a {kind}")
    if content.get("version") not in range(1, _version_of(kind) + 1):
        raise NewerVersionError(
            f"it is of version {content.get('version')}, and this program knows versions up to "
            f"{_version_of(kind)}: a newer vhostsync wrote it; use that one"
        )
    body: dict[str, Any] = content["body"]
    return body


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encode_record(record: StateRecord) -> bytes:
    return encode_checked("state-record", asdict(record))


def encode_announcement(former: StateRecord, switched: StateRecord, boot_id: str, mark: int) -> bytes:
    """A switch is about to take place: see state_file."""
    announced = {"former": asdict(former), "boot_id": boot_id, "mark": mark}
    return encode_checked("state-record", {**asdict(switched), "announced": announced})


def _disk(body: Any) -> DiskIdentity | None:
    return None if body is None else decode_identity(body)


def _disks(rows: Any) -> tuple[DiskIdentity, ...]:
    return tuple(map(decode_identity, typed(list, rows)))


def _superseded(body: Any) -> Superseded:
    if "disk" not in typed(dict, body):
        return Superseded(decode_identity(body))  # version 1
    return Superseded(
        decode_identity(body["disk"]), typed(str | None, body["since"]), typed(bool, body["lost"]),
        typed(Worth | None, body.get("worth")),
    )  # fmt: skip


def is_announcement(text: bytes) -> bool:
    """ValueError with a phrase when the text is no whole record."""
    return "announced" in decode_checked("state-record", text)


def decode_record(text: bytes, boot_id: str | None = None, marked: int = 0) -> StateRecord:
    """As it is to be understood in this boot of the machine (None: a later one): a switch that was announced
    in the same one has taken place only if it is marked. ValueError with a phrase when the text is no whole
    record."""
    body = decode_checked("state-record", text)
    try:
        record = _record_of(body)
        if "announced" in body:
            announced = typed(dict, body["announced"])
            former = _record_of(typed(dict, announced["former"]))
            boot, mark = typed(str, announced["boot_id"]), typed(int, announced["mark"])
            if boot == boot_id and mark != marked:
                return former
        return record
    except (KeyError, TypeError) as error:
        raise ValueError(WRONG_FIELDS) from error


def _record_of(body: dict[str, Any]) -> StateRecord:
    """Other fields are passed over: of a later program, which a record of this version may have. KeyError,
    TypeError; ValueError with a phrase."""
    return StateRecord(
        epoch=typed(int, body["epoch"]),
        current=decode_identity(body["current"]),
        peer=_disk(body["peer"]),
        peer_worth=typed(Worth | None, body["peer_worth"]),
        outdated_since=typed(str | None, body["outdated_since"]),
        clean=typed(bool, body["clean"]),
        superseded=tuple(map(_superseded, typed(list, body["superseded"]))),
        bitmap=typed(str | None, body.get("bitmap")),
        doubt=typed(_RANGES, body.get("doubt", [])),
        spared=typed(_RANGES, body.get("spared", [])),
        different_since=typed(str | None, body.get("different_since")),
        wanted=typed(Wanted | None, body.get("wanted")),
        guest=typed(GuestDisk | None, body.get("guest")),
        unfenced=_disks(body.get("unfenced", [])),
        cut=typed(str | None, body.get("cut")),
    )
