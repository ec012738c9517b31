# SPDX-License-Identifier: Apache-2.0
"""How a disk finds the record of its lineage when no --state-file names one.

In the state directory each disk that was ever current or a peer has a small pointer file (`*.disk.json`: the
disk's identity and the name of the record). It is made durable before the record that mentions the disk is
written, so whichever of the two disks `serve` is started with, it finds the same record: the superseded one
is refused and told which disk is current. A disk is found by what it is (storage/identity.py); where no
pointer is certainly its own, those of its path and those that may be its own lead to a record that asks. A
disk that becomes the destination of another lineage is overwritten by it, so its pointer then names that
lineage, and the former one lets go of it (`other_record`).

A pointer says whether its record knows of more than one disk (`kept`). Such a record that is missing is no
licence to serve either of them: the start is refused until it is restored, or the operator promotes one. A
pointer to another record that does not exist means "no record".
"""

import hashlib
import os
import re
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import structlog

from vhostsync.errors import DamagedRecordError, StateRecordError
from vhostsync.host import directory as own_directory
from vhostsync.option_values import Answer
from vhostsync.record.files import FileSystem, RealFileSystem
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord, decode_checked, encode_checked, named
from vhostsync.record.who_may_serve import claims
from vhostsync.storage.identity import DiskIdentity, Likeness, decode_identity, same
from vhostsync.typed_fields import typed

log = structlog.get_logger(__name__)

POINTER_SUFFIX = ".disk.json"
RECORD_SUFFIX = ".record.json"


def default_directory(environment: dict[str, str] | None = None, user: int | None = None) -> Path:
    """$STATE_DIRECTORY (systemd's; the first of several), else /var/lib/vhostsync for root, else the state
    directory of the XDG base directory specification."""
    env = dict(os.environ) if environment is None else environment
    if env.get("STATE_DIRECTORY"):
        return Path(env["STATE_DIRECTORY"].split(":")[0])
    if (os.geteuid() if user is None else user) == 0:
        return Path("/var/lib/vhostsync")
    state_home = env.get("XDG_STATE_HOME", "")
    base = Path(state_home) if state_home.startswith("/") else Path(env.get("HOME", "/")) / ".local/state"
    return base / "vhostsync"


def open_state_file(
    explicit: Path | None, disk: DiskIdentity, *, lock_timeout_s: float,
    directory: Path | None = None, files: FileSystem | None = None, answer: Answer | None = None,
    of_name: Path | None = None,
) -> StateFile:
    """The locked state file for `disk`: the one named, or the one that the disk's name leads to (`of_name`,
    in the directory), or the one that the index finds, or a new one named after the disk (also where it looks
    like one that is known, if the operator's answer says that it is none). Blocks. Call it with the disk's
    own lock held. StateRecordError."""
    files = files if files is not None else RealFileSystem()
    if explicit is not None:
        # What the link leads to is the record: a rename over the link itself would leave two.
        explicit = Path(os.path.realpath(explicit))
        make_directory(explicit.parent)
        state_file = StateFile(explicit, files=files)
    else:
        base = directory if directory is not None else default_directory()
        make_directory(base)
        index = Index(base, files)
        path = index.record_of(disk, answer) if of_name is None else index.unclaimed(disk, of_name)
        state_file = StateFile(
            Path(os.path.realpath(path)), files=files,
            before_write=lambda record: index.point(record, path),
            other_record=lambda disk: index.other_record(disk, path),
            is_copied_mark=index.is_copied_mark,
        )  # fmt: skip
    state_file.lock(lock_timeout_s)
    return state_file


def make_directory(path: Path, owner: tuple[int, int] | None = None) -> None:
    """Of state records, for their owner alone. StateRecordError."""
    try:
        own_directory.make_directory(path, owner)
    except OSError as error:
        raise StateRecordError(
            f"the directory for the state record, {path}, cannot be made: {error.strerror}; name a "
            f"--state-file elsewhere, or use --no-state-file"
        ) from error


def know_pointers_beside(record: str) -> None:
    """Reads what a start will ask for, before it has to be quick, if that record lies where a start looks for
    records: whoever names it may mean to mislead. Blocks; what is wrong the start says."""
    directory = os.path.realpath(default_directory())
    if os.path.dirname(record) == directory:  # noqa: PTH120 as it is said
        with suppress(StateRecordError):
            Index(default_directory(), RealFileSystem()).pointers()


class Index:
    """Pointer files of one directory. What a disk is goes before what it is called; a pointer's name is made
    from what the disk is, so the pointer of one never replaces that of another.

    A node full of disks has thousands of them, and one start looks at all of them several times. So each is
    read again only once it has changed: `_read`, of this process, by directory and name."""

    _read: ClassVar[dict[Path, dict[str, tuple[Hashable, "Pointer"]]]] = {}

    def __init__(self, directory: Path, files: FileSystem) -> None:
        self._directory = directory
        self._files = files
        self._pointed: dict[str, tuple[DiskIdentity, bool]] = {}

    def record_of(self, disk: DiskIdentity, answer: Answer | None = None) -> Path:
        """The path of the record for this disk, whether or not there is one yet. StateRecordError when two
        lineages claim the disk, its pointer is damaged, or the record is missing that knows it."""
        pointers = self.pointers(disk)
        as_new = answer is Answer.NEW_DISK
        if (own := self._only(disk, _records(pointers, disk, Likeness.SAME))) is not None:
            if as_new:
                raise StateRecordError(
                    f"{disk.path} is certainly a disk that {named(own)} knows, and no new one; leave out "
                    f"--new-disk to see what it is there"
                )
            return own
        for pointer in pointers:
            if pointer.kept and same(pointer.disk, disk):
                if answer is Answer.PROMOTE:
                    return pointer.record
                raise StateRecordError(
                    f"the state record {pointer.record}, which knows {disk.path} and another disk, is "
                    f"missing, so it cannot be told which of them is the current one; restore it or, if this "
                    f"one certainly is, begin a new record with --promote"
                )
        if not as_new:
            hints = {pointer.record for pointer in pointers if pointer.disk.path == disk.path}
            hints |= _records(pointers, disk, Likeness.UNSURE)
            claimed = self._only(disk, {path for path in hints if self._claims(path, disk)})
            if claimed is not None:
                return claimed
        return self._new_record(disk)

    def is_copied_mark(self, disk: DiskIdentity) -> bool:
        """Whether the mark that the disk bears is that of another one, of which it is a copy."""
        pointers = self.pointers(disk)
        alike = [pointer for pointer in pointers if pointer.disk.mark == disk.mark is not None]
        return bool(alike) and not any(same(pointer.disk, disk) for pointer in alike)

    def other_record(self, disk: DiskIdentity, path: Path) -> Path | None:
        """The record that has taken this disk from the one at `path`. StateRecordError as `record_of`."""
        found = self._only(disk, _records(self.pointers(disk), disk, Likeness.SAME))
        return found if found != path else None

    def unclaimed(self, disk: DiskIdentity, path: Path) -> Path:
        """`path`, if no other record has this disk. StateRecordError."""
        if (other := self.other_record(disk, path)) is not None:
            raise StateRecordError(
                f"{disk.path} belongs to {named(other)} by now, and not to {named(path)}; see what both say: "
                f"vhostsync record {other}"
            )
        return path

    def point(self, record: StateRecord, path: Path) -> None:
        """Makes both disks of the record find it, durably. Raises OSError."""
        disks = [record.current] if record.peer is None else [record.current, record.peer]
        # Not of a record that is to be the first: nothing is lost with it.
        kept = record.at_stake and self._exists(path)
        new = [disk for disk in disks if self._pointed.get(_key(disk)) != (_lasting(disk), kept)]
        if not new:
            return
        for disk in new:
            own = self._pointer_path(disk)
            body = {"disk": asdict(disk), "record": path.name, "kept": kept}
            # The record's: whoever holds its lock is alone with it, and it is free while a record is written.
            temporary = self._directory / f"{path.name}.new"
            self._files.write_durable(temporary, encode_checked("state-pointer", body))
            self._files.rename(temporary, own)
        self._files.sync_directory(self._directory)
        self._drop_former(new, path)
        self._pointed.update({_key(disk): (_lasting(disk), kept) for disk in new})

    def _drop_former(self, disks: list[DiskIdentity], path: Path) -> None:
        """Pointers of the same disks that were made when it bore another name or mark, or belonged to another
        lineage, which the disk leaves."""
        dropped = False
        own = {self._pointer_path(disk) for disk in disks}
        for pointer in self.pointers():
            if pointer.path in own or not any(same(pointer.disk, disk) for disk in disks):
                continue
            if pointer.record != path:
                log.warning(
                    "the disk leaves another state record", disk=pointer.disk.path, record=str(pointer.record)
                )
            self._files.unlink(pointer.path)
            dropped = True
        if dropped:
            self._files.sync_directory(self._directory)

    def _pointer_path(self, disk: DiskIdentity) -> Path:
        return self._directory / f"{_readable(disk.path)}-{_key(disk)}{POINTER_SUFFIX}"

    def _new_record(self, disk: DiskIdentity) -> Path:
        """Where this disk's record is or would be, if it is the first of its lineage: one that was lost is
        found there when it is put back."""
        stem = f"{_readable(disk.path)}-{_key(disk)}"
        return self._directory / f"{stem}{RECORD_SUFFIX}"

    def _only(self, disk: DiskIdentity, records: set[Path]) -> Path | None:
        there = sorted(path for path in records if self._exists(path))
        if len(there) > 1:
            raise StateRecordError(
                f"two state records claim {disk.path}: {there[0]} and {there[1]}; name the right one with "
                f"--state-file, or move the wrong one away"
            )
        return there[0] if there else None

    def _claims(self, path: Path, disk: DiskIdentity) -> bool:
        try:
            record = StateFile(path, files=self._files).load()
        except DamagedRecordError:
            return True  # the start asks, or has the answer
        return record is not None and claims(record, disk)

    def _exists(self, record: Path) -> bool:
        try:
            self._files.read(record)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def pointers(self, wanted: DiskIdentity | None = None) -> list["Pointer"]:
        """All of them. StateRecordError if that of the wanted disk is damaged; others are passed over."""
        found = []
        try:
            versions = self._files.versions(self._directory, POINTER_SUFFIX)
        except OSError as error:
            raise StateRecordError(
                f"the directory of the state records, {self._directory}, cannot be read: {error.strerror}; "
                f"be the user that it belongs to, or name a --state-file"
            ) from error
        former, current = self._read.get(self._directory, {}), {}
        for name, version in versions.items():
            try:
                known = former.get(name)
                if known is None or version is None or known[0] != version:
                    known = self._pointer_at(self._directory / name)
                current[name] = known
                found.append(known[1])
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                if wanted is not None and _may_be_of(name, wanted):
                    raise StateRecordError(
                        f"{self._directory / name}, which says where the state record of this disk is, is "
                        f"damaged ({error}); name the record with --state-file, or remove that file if the "
                        f"disk is certainly the current one"
                    ) from error
                log.warning("a damaged pointer to a state record is passed over", path=name, error=str(error))
        self._read[self._directory] = current
        return found

    def _pointer_at(self, path: Path) -> tuple[Hashable, "Pointer"]:
        """And in which version it was read."""
        text, version = self._files.read_version(path)
        body: dict[str, Any] = decode_checked("state-pointer", text)
        name = Path(typed(str, body["record"])).name
        if name in ("", ".."):
            raise ValueError("it names no record")
        disk, kept = decode_identity(body["disk"]), bool(body.get("kept", False))
        return version, Pointer(path, disk, self._directory / name, kept)


@dataclass(frozen=True)
class Pointer:
    """The file at `path`: this disk belongs to that record."""

    path: Path
    disk: DiskIdentity
    record: Path
    kept: bool  # the record knows of more than one disk: without it, none of them may be served


def _records(pointers: list[Pointer], disk: DiskIdentity, likeness: Likeness) -> set[Path]:
    return {pointer.record for pointer in pointers if pointer.disk.likeness(disk) is likeness}


def _lasting(disk: DiskIdentity) -> DiskIdentity:
    """Without what changes from day to day."""
    return replace(disk, bytes=0, ctime_ns=None)


def _key(disk: DiskIdentity) -> str:
    """Of what the disk is, whatever it is called."""
    return hashlib.sha256(disk.lasting_words().encode(errors="surrogateescape")).hexdigest()[:16]


def _may_be_of(name: str, disk: DiskIdentity) -> bool:
    """By the name of a pointer, of this version or the one before."""
    former = hashlib.sha256(os.fsencode(disk.path)).hexdigest()[:16]
    return any(name.endswith(f"-{each}{POINTER_SUFFIX}") for each in (_key(disk), former))


def _readable(path: str) -> str:
    """The part of a file's name by which a person recognises it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).name)[:40].lstrip(".") or "disk"
