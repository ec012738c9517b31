# SPDX-License-Identifier: Apache-2.0
"""Which disk is the truth: the state record (docs/durability.md, "Who is the truth").

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
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, Literal

import structlog

from vhostsync.errors import StateRecordError

log = structlog.get_logger(__name__)

RECORD_VERSION = 1
SUPERSEDED_MAX = 16
DOUBT_MAX = 64  # VS_RANGES_MAX: the engine makes more of them one, with what lies between


class Worth(StrEnum):
    """What the peer would be worth if the current disk were lost now."""

    UP_TO_DATE = "up-to-date"
    OUTDATED = "outdated"
    INCONSISTENT = "inconsistent"


class Likeness(Enum):
    SAME = "same"
    OTHER = "other"
    UNSURE = "unsure"


@dataclass(frozen=True)
class DiskIdentity:
    """How a disk is recognised. `device` is st_dev of a file and st_rdev of a block device; `generation`
    tells a file from an earlier one with the same inode number (file systems that have it); `ctime_ns` is
    recorded at a clean detach only, so that a file that somebody changed meanwhile is seen."""

    path: str
    kind: Literal["file", "block"]
    device: int
    inode: int
    bytes: int
    ctime_ns: int | None = None
    generation: int | None = None
    serial: str | None = None
    wwn: str | None = None
    partuuid: str | None = None

    def likeness(self, other: "DiskIdentity") -> Likeness:
        """Whether both are the same disk, as far as can be seen. Sizes do not count: disks grow."""
        if self.kind != other.kind:
            return Likeness.OTHER
        return self._like_file(other) if self.kind == "file" else self._like_block(other)

    def _like_file(self, other: "DiskIdentity") -> Likeness:
        generations_known = self.generation is not None and other.generation is not None
        if generations_known and self.generation != other.generation:
            return Likeness.OTHER
        if self.inode != other.inode:
            # The inode numbers of one file system differ: two files. Of two file systems (or one that was
            # numbered anew at boot) a shared path is a hint, no more.
            same_path_elsewhere = self.device != other.device and self.path == other.path
            return Likeness.UNSURE if same_path_elsewhere else Likeness.OTHER
        if self.device == other.device:
            return Likeness.SAME
        if self.path != other.path:
            return Likeness.OTHER
        return Likeness.SAME if generations_known else Likeness.UNSURE

    def _like_block(self, other: "DiskIdentity") -> Likeness:
        pairs = ((self.wwn, other.wwn), (self.serial, other.serial), (self.partuuid, other.partuuid))
        if any(mine is not None and theirs is not None and mine != theirs for mine, theirs in pairs):
            return Likeness.OTHER
        # A copied disk has the partition UUIDs of its original, so these alone prove nothing.
        if any(mine is not None and mine == theirs for mine, theirs in pairs[:2]):
            return Likeness.SAME
        if self.device == other.device:
            return Likeness.SAME
        return Likeness.UNSURE if self.path == other.path else Likeness.OTHER

    @property
    def changes_show(self) -> bool:
        """Whether a change while nobody watched can be seen. Not on block devices."""
        return self.kind == "file"

    def changed_since(self, detached: "DiskIdentity") -> str | None:
        """Why the content may differ from what it was at the clean detach recorded in `detached`: a phrase,
        or None when nothing speaks for a change. Ask `changes_show` what that None is worth."""
        if detached.likeness(self) is not Likeness.SAME:
            return "it is another disk"
        if self.bytes != detached.bytes:
            return f"its size was {detached.bytes} bytes and is {self.bytes}"
        if self.changes_show and (detached.ctime_ns is None or self.ctime_ns != detached.ctime_ns):
            return "it was changed since (ctime)"
        return None


@dataclass(frozen=True)
class Wanted:
    """The mirror that a mirror-start has asked for: a restart resumes it (retry.py)."""

    path: str
    cache: Literal["none", "writeback"]
    speed_bytes_per_s: int = 0


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
    superseded: tuple[DiskIdentity, ...] = ()
    bitmap: str | None = None  # the token of the dirty bitmap that knows where the peer may differ
    doubt: tuple[tuple[int, int], ...] = ()  # offset, length: where writes to the current disk have failed
    spared: tuple[tuple[int, int], ...] = ()  # of these: what the peer holds better, if up to date or clean
    different_since: str | None = None  # a verification has found that the peer differs: until it is mended
    wanted: Wanted | None = None  # until somebody takes it back: mirror-cancel, a switch that keeps no mirror

    def __post_init__(self) -> None:
        if (self.peer is None) != (self.peer_worth is None):
            raise ValueError("peer and peer_worth go together")
        if self.outdated_since is not None and self.peer_worth is not Worth.OUTDATED:
            raise ValueError("outdated_since belongs to an outdated peer")
        if self.bitmap is not None and self.peer is None:
            raise ValueError("a bitmap belongs to a peer")
        if self.different_since is not None and self.peer is None:
            raise ValueError("a difference is one from a peer")
        if self.wanted is not None and self.peer is None:
            raise ValueError("a mirror that is wanted has a peer")
        for ranges in (self.doubt, self.spared):
            if len(ranges) > DOUBT_MAX or any(offset < 0 or length < 1 for offset, length in ranges):
                raise ValueError("the ranges in doubt are out of range")
        if self.epoch < 1 or len(self.superseded) > SUPERSEDED_MAX:
            raise ValueError("epoch or superseded out of range")

    @classmethod
    def first(cls, current: DiskIdentity) -> "StateRecord":
        return cls(epoch=1, current=current)

    def with_peer(self, peer: DiskIdentity, bitmap: str | None = None) -> "StateRecord":
        """A destination is attached. To be written before the first byte goes to it: it is worth nothing
        until the copy is done."""
        return replace(
            self, peer=peer, peer_worth=Worth.INCONSISTENT, outdated_since=None, clean=False, bitmap=bitmap,
            spared=(),
        )  # fmt: skip

    def peer_is(self, disk: DiskIdentity) -> bool:
        """This disk, as it is now (with its ctime), is the peer, and nothing speaks for a change by somebody
        else since the last clean end."""
        peer = self.peer
        if peer is None or not _same(peer, disk):
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

    def with_worth(self, worth: Worth, outdated_since: str | None = None) -> "StateRecord":
        # What the guest writes without the peer may end that it holds anything better, and no record waits.
        spared = self.spared if worth is Worth.UP_TO_DATE else ()
        return replace(self, peer_worth=worth, outdated_since=outdated_since, clean=False, spared=spared)

    def without_peer(self) -> "StateRecord":
        return replace(
            self, peer=None, peer_worth=None, outdated_since=None, clean=False, bitmap=None, spared=(),
            different_since=None, wanted=None,
        )  # fmt: skip

    def switched(self, *, keep_mirror: bool) -> "StateRecord":
        """The peer becomes the current disk. With `keep_mirror` the old one becomes the peer, up to date;
        in any case it is superseded, and a start with it will be refused."""
        if self.peer is None:
            raise ValueError("a switch needs a peer")
        return StateRecord(
            epoch=self.epoch + 1,
            current=self.peer,
            peer=self.current if keep_mirror else None,
            peer_worth=Worth.UP_TO_DATE if keep_mirror else None,
            superseded=self._superseded_by(self.peer),
            bitmap=self.bitmap if keep_mirror else None,
            different_since=self.different_since if keep_mirror else None,
            wanted=replace(self.wanted, path=self.current.path) if keep_mirror and self.wanted else None,
        )

    def detached(
        self, current: DiskIdentity, peer: DiskIdentity | None, spared: tuple[tuple[int, int], ...] = ()
    ) -> "StateRecord":
        """A clean end: identities as they are now, after the last write, with ctimes."""
        spared = spared if peer is not None else ()
        return replace(self, current=current, peer=peer, clean=True, spared=spared)

    def promoted(self, disk: DiskIdentity) -> "StateRecord":
        """The operator declares `disk` the truth, whatever was recorded (the current one is lost)."""
        return StateRecord(epoch=self.epoch + 1, current=disk, superseded=self._superseded_by(disk))

    def _superseded_by(self, disk: DiskIdentity) -> tuple[DiskIdentity, ...]:
        former = [self.current, *(old for old in self.superseded if not _same(old, self.current))]
        return tuple(old for old in former if not _same(old, disk))[:SUPERSEDED_MAX]


def _same(one: DiskIdentity, other: DiskIdentity) -> bool:
    return one.likeness(other) is Likeness.SAME


def check_start(record: StateRecord, disk: DiskIdentity, record_path: Path | None = None) -> StateRecord:
    """The record to go on with when `serve` is started with `disk`: `current` updated to how the disk is
    called today. StateRecordError when the disk is not the current one.

    What a disk *is* goes before what it is called: a renamed current disk is accepted, an old disk renamed to
    the current one's path is refused. A new file at the current disk's path (restored, compacted) is
    accepted. The peer is then worth nothing, or all that the operator has left: the mirror is not resumed."""
    if _same(record.current, disk):
        return replace(record, current=disk)
    former = [(False, old) for old in record.superseded]
    if record.peer is not None:
        former.insert(0, (True, record.peer))
    for is_peer, old in former:
        if _same(old, disk):
            raise StateRecordError(_refusal(record, disk, record_path, is_peer=is_peer, replaced=False))
    if disk.path == record.current.path:
        log.warning(
            "the disk at the current disk's path is not the one recorded; going on with it, without a mirror",
            path=disk.path, recorded_inode=record.current.inode, inode=disk.inode,
        )
        worth = None if record.peer is None else Worth.INCONSISTENT
        return replace(
            record, current=disk, peer_worth=worth, outdated_since=None, clean=False, bitmap=None, doubt=(),
            spared=(), wanted=None,
        )  # fmt: skip
    for is_peer, old in former:
        if old.path == disk.path:
            replaced = old.likeness(disk) is Likeness.OTHER
            raise StateRecordError(_refusal(record, disk, record_path, is_peer=is_peer, replaced=replaced))
    raise StateRecordError(
        f"{named(record_path)} belongs to other disks (the current one is {record.current.path}) and does "
        f"not know {disk.path}; name another --state-file, or start with --blk-file {record.current.path}"
    )


def named(record_path: Path | None) -> str:
    """What a message calls the record."""
    return "the state record" if record_path is None else f"the state record {record_path}"


def _refusal(
    record: StateRecord, disk: DiskIdentity, record_path: Path | None, *, is_peer: bool, replaced: bool
) -> str:
    if is_peer:
        assert record.peer_worth is not None
        since = f" since {record.outdated_since}" if record.outdated_since else ""
        what = f"is the other half of a mirror ({record.peer_worth.value}{since}), not the current disk"
    else:
        what = "was superseded by a switch"
    note = " (the file there now is not the one that was recorded)" if replaced else ""
    lack = "" if is_peer and record.peer_worth is Worth.UP_TO_DATE else ", without what the guest wrote since"
    return (
        f"{disk.path} {what}{note}: the current disk is {record.current.path}, says {named(record_path)} "
        f"(epoch {record.epoch}); start with --blk-file {record.current.path}, or, if that disk is lost for "
        f"good, move the record away to start anew from this one{lack}"
    )


# ---- the text of a record -----------------------------------------------


def encode_checked(kind: str, body: dict[str, Any]) -> bytes:
    """JSON with a version and a checksum over everything else in it."""
    content = {"kind": kind, "version": RECORD_VERSION, "body": body}
    return json.dumps({**content, "sha256": _checksum(content)}, indent=1).encode() + b"\n"


def decode_checked(kind: str, text: bytes) -> dict[str, Any]:
    """ValueError with a phrase when the text is not whole."""
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
    if content.get("version") != RECORD_VERSION:
        raise ValueError(f"it is of version {content.get('version')}, this program knows {RECORD_VERSION}")
    body: dict[str, Any] = content["body"]
    return body


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def decode_identity(body: dict[str, Any]) -> DiskIdentity:
    return DiskIdentity(**body)


def encode_record(record: StateRecord) -> bytes:
    return encode_checked("state-record", asdict(record))


def encode_announcement(former: StateRecord, switched: StateRecord, boot_id: str, mark: int) -> bytes:
    """A switch is about to take place: see state_file."""
    announced = {"former": asdict(former), "boot_id": boot_id, "mark": mark}
    return encode_checked("state-record", {**asdict(switched), "announced": announced})


def _ranges(rows: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(offset), int(length)) for offset, length in rows)


def is_announcement(text: bytes) -> bool:
    """ValueError with a phrase when the text is no whole record."""
    return "announced" in decode_checked("state-record", text)


def decode_record(text: bytes, boot_id: str | None = None, marked: int = 0) -> StateRecord:
    """As it is to be understood in this boot of the machine (None: a later one): a switch that was announced
    in the same one has taken place only if it is marked. ValueError with a phrase when the text is no whole
    record."""
    body = decode_checked("state-record", text)
    try:
        announced = body.get("announced")
        if announced is not None and announced["boot_id"] == boot_id and announced["mark"] != marked:
            body = announced["former"]
        peer, worth, wanted = body["peer"], body["peer_worth"], body.get("wanted")
        return StateRecord(
            epoch=body["epoch"],
            current=decode_identity(body["current"]),
            peer=None if peer is None else decode_identity(peer),
            peer_worth=None if worth is None else Worth(worth),
            outdated_since=body["outdated_since"],
            clean=body["clean"],
            superseded=tuple(decode_identity(disk) for disk in body["superseded"]),
            bitmap=body.get("bitmap"),
            doubt=_ranges(body.get("doubt", ())),
            spared=_ranges(body.get("spared", ())),
            different_since=body.get("different_since"),
            wanted=None if wanted is None else Wanted(**wanted),
        )
    except (KeyError, TypeError) as error:
        raise ValueError("fields are missing or unknown") from error
