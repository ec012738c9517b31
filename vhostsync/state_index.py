# SPDX-License-Identifier: Apache-2.0
"""How a disk finds the record of its lineage when no --state-file names one.

In the state directory each disk path that was ever current or a peer has a small pointer file
(`*.disk.json`: the disk's identity and the name of the record). It is made durable before the record that
mentions the disk is written, so whichever of the two disks `serve` is started with, it finds the same record:
the superseded one is refused and told which disk is current. A disk that was renamed is found by its
identity. A disk that becomes the destination of another lineage is overwritten by it, so its pointer then
names that lineage, and the former one lets go of it (`other_record`).

A pointer to a record that does not exist means "no record": so moving a record away is how to start anew.
"""

import hashlib
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from vhostsync.errors import StateRecordError
from vhostsync.state_file import FileSystem, RealFileSystem, StateFile
from vhostsync.state_record import (
    DiskIdentity,
    Likeness,
    StateRecord,
    decode_checked,
    decode_identity,
    encode_checked,
)

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
    directory: Path | None = None, files: FileSystem | None = None,
) -> StateFile:
    """The locked state file for `disk`: the one named, or the one that the index finds, or a new one named
    after the disk. Blocks. Call it with the disk's own lock held. StateRecordError."""
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
        path = index.record_of(disk)
        state_file = StateFile(
            Path(os.path.realpath(path)), files=files,
            before_write=lambda record: index.point(record, path),
            other_record=lambda disk: index.other_record(disk, path),
        )  # fmt: skip
    state_file.lock(lock_timeout_s)
    return state_file


def make_directory(path: Path, owner: tuple[int, int] | None = None) -> None:
    """With its missing parents, each durable in its own parent, for the owner alone. `owner`: user and group
    that get the last of them, if it is made here."""
    try:
        missing = [path] if not path.exists() else []
        while missing and not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        for each in reversed(missing):
            _make_one(each, owner if each == path else None)
    except OSError as error:
        raise StateRecordError(
            f"the directory for the state record, {path}, cannot be made: {error.strerror}; name a "
            f"--state-file elsewhere, or use --no-state-file"
        ) from error


def _make_one(path: Path, owner: tuple[int, int] | None) -> None:
    """By descriptors: by its name, the owner would be given to what somebody has put in its place."""
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.mkdir(path.name, 0o700, dir_fd=parent)
        except FileExistsError:
            return  # somebody else was quicker, and keeps it
        if owner is not None:
            made = os.open(
                path.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent
            )
            try:
                ours = os.fstat(made).st_uid == os.geteuid()
                if not ours or os.listdir(made):  # noqa: PTH208 a descriptor
                    raise OSError(0, "somebody has put another directory in its place")
                os.fchown(made, *owner)
            finally:
                os.close(made)
        os.fsync(parent)
    finally:
        os.close(parent)


class Index:
    def __init__(self, directory: Path, files: FileSystem) -> None:
        self._directory = directory
        self._files = files
        self._pointed: dict[str, DiskIdentity] = {}

    def record_of(self, disk: DiskIdentity) -> Path:
        """The path of the record for this disk, whether or not there is one yet. What a disk is goes before
        what it is called. StateRecordError when the pointer of this path is damaged or two lineages claim the
        disk."""
        own = self._pointer_path(disk)
        pointers = self._pointers(own)
        for wanted in (
            [record for known, record in pointers.values() if known.likeness(disk) is Likeness.SAME],
            [pointers[own][1]] if own in pointers else [],
        ):
            records = sorted({record for record in wanted if self._exists(record)})
            if len(records) > 1:
                raise StateRecordError(
                    f"two state records claim {disk.path}: {records[0]} and {records[1]}; move the wrong one "
                    f"away"
                )
            if records:
                return records[0]
        return self._directory / f"{_stem(disk.path)}{RECORD_SUFFIX}"

    def other_record(self, disk: DiskIdentity, path: Path) -> Path | None:
        """The record that has taken this disk from the one at `path`. StateRecordError as `record_of`."""
        found = self.record_of(disk)
        return found if found != path and self._exists(found) else None

    def point(self, record: StateRecord, path: Path) -> None:
        """Makes both disks of the record find it, durably. Raises OSError."""
        disks = [record.current] if record.peer is None else [record.current, record.peer]
        changed = False
        for disk in disks:
            known = self._pointed.get(disk.path)
            if known is not None and known.likeness(disk) is Likeness.SAME:
                continue
            own = self._pointer_path(disk)
            body = {"disk": asdict(disk), "record": path.name}
            # The record's: whoever holds its lock is alone with it, and it is free while a record is written.
            temporary = self._directory / f"{path.name}.new"
            self._files.write_durable(temporary, encode_checked("state-pointer", body))
            self._files.rename(temporary, own)
            # Pointers of the same disk under other names to another lineage: void from here on.
            for other, (pointed, target) in self._pointers(None).items():
                if other != own and target != path and pointed.likeness(disk) is Likeness.SAME:
                    log.warning("the disk leaves another state record", disk=disk.path, record=str(target))
                    self._files.unlink(other)
            self._pointed[disk.path] = disk
            changed = True
        if changed:
            self._files.sync_directory(self._directory)

    def _pointer_path(self, disk: DiskIdentity) -> Path:
        return self._directory / f"{_stem(disk.path)}{POINTER_SUFFIX}"

    def _exists(self, record: Path) -> bool:
        try:
            self._files.read(record)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def _pointers(self, own: Path | None) -> dict[Path, tuple[DiskIdentity, Path]]:
        found = {}
        try:
            names = self._files.names(self._directory)
        except OSError as error:
            raise StateRecordError(
                f"the directory of the state records, {self._directory}, cannot be read: {error.strerror}; "
                f"be the user that it belongs to, or name a --state-file"
            ) from error
        for name in names:
            if not name.endswith(POINTER_SUFFIX):
                continue
            path = self._directory / name
            try:
                body: dict[str, Any] = decode_checked("state-pointer", self._files.read(path))
                found[path] = decode_identity(body["disk"]), self._directory / Path(str(body["record"])).name
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                if path == own:
                    raise StateRecordError(
                        f"{path}, which says where the state record of this disk is, is damaged ({error}); "
                        f"name the record with --state-file, or remove that file if the disk is certainly "
                        f"the current one"
                    ) from error
                log.warning("a damaged pointer to a state record is passed over", path=name, error=str(error))
        return found


def _stem(path: str) -> str:
    """A file name that a person recognises and no other path shares."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).name)[:40].lstrip(".") or "disk"
    return f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
