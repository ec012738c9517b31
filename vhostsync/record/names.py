# SPDX-License-Identifier: Apache-2.0
"""The names of lineages, so that whoever starts a backend names the machine's disk and not a path: the name
finds the record, the record names the current disk, and after a switch nothing has to be edited.

A name is a small file in the state directory, `NAME.name.json`, which says which record of that directory is
meant. It says nothing of disks: only the record does. It is made by `vhostsync create` and goes with the
record (`vhostsync record --forget`). Everything here blocks."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog

from vhostsync.config import ServeConfig
from vhostsync.errors import StateRecordError
from vhostsync.lineage_name import is_lineage_name
from vhostsync.option_values import Answer
from vhostsync.record.files import FileSystem, OthersFiles, RealFileSystem
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_index import default_directory
from vhostsync.record.state_record import StateRecord, decode_checked, encode_checked, named
from vhostsync.storage.look import look
from vhostsync.storage.moved import name_today
from vhostsync.typed_fields import typed

log = structlog.get_logger(__name__)

NAME_SUFFIX: Final = ".name.json"
KIND: Final = "state-name"
ALONE_S: Final = 5.0
"""Nobody is alone with the names for longer than it takes to write one."""


@dataclass(frozen=True)
class Lineage:
    """One name: which record it means, and to which group it belongs (the disks of one machine)."""

    name: str
    record: Path
    group: str | None = None


@dataclass(frozen=True)
class Member:
    """A disk of a group, by the name of its record's file: of two state directories there may be disks, and
    groups, of one name."""

    group: str
    record: str

    def __str__(self) -> str:
        return f"{self.record} of the group {self.group}"


class Names:
    """Of one state directory. StateRecordError."""

    def __init__(self, directory: Path, files: FileSystem | None = None) -> None:
        self.directory = directory
        self.files: FileSystem = files if files is not None else RealFileSystem()

    def find(self, name: str) -> Lineage | None:
        path = self._path(name)
        try:
            body: dict[str, Any] = decode_checked(KIND, self.files.read(path))
            group: str | None = typed(str | None, body.get("group"))
            return Lineage(name, self.directory / Path(typed(str, body["record"])).name, group)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StateRecordError(
                f"{path}, which says what {name} means, cannot be read: {error.strerror}"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StateRecordError(
                f"{path}, which says what {name} means, is damaged ({error}); remove it, and give the disk "
                f"its name once more: vhostsync create {name} --disk DISK"
            ) from error

    def real(self, record: Path) -> str:
        """Where a record of this directory is in truth. OSError."""
        if isinstance(self.files, OthersFiles):
            return str(Path(os.path.realpath(self.directory)) / record.name)
        return os.path.realpath(record)

    def all(self) -> list[Lineage]:
        """By name; what is damaged is passed over."""
        found = []
        for each in self._each():
            if isinstance(each, Lineage):
                found.append(each)
            else:
                log.warning("a name is passed over", reason=str(each))
        return found

    def damaged(self) -> list[str]:
        """A sentence for each name of which nobody can tell what it means."""
        return [str(each) for each in self._each() if not isinstance(each, Lineage)]

    def _each(self) -> Iterator[Lineage | StateRecordError]:
        for name in self._file_names():
            if not name.endswith(NAME_SUFFIX) or not is_lineage_name(name.removesuffix(NAME_SUFFIX)):
                continue
            try:
                lineage = self.find(name.removesuffix(NAME_SUFFIX))
            except StateRecordError as error:
                yield error
            else:
                if lineage is not None:
                    yield lineage

    def of_record(self, record: Path) -> list[Lineage]:
        """What leads to this record: one name, or none."""
        return [each for each in self.all() if each.record.name == record.name]

    def give(self, lineage: Lineage) -> None:
        """From here on the name means that record; durable on return. Refused where the name means another
        one, or the record has another name."""
        with self.alone():
            self.check_free(lineage.name, lineage.record)
            path = self._path(lineage.name)
            body = {"record": lineage.record.name, "group": lineage.group}
            temporary = Path(f"{path}.new")
            try:
                self.files.write_durable(temporary, encode_checked(KIND, body))
                self.files.rename(temporary, path)
                self.files.sync_directory(self.directory)
            except OSError as error:
                raise StateRecordError(f"the name {path} cannot be written: {error.strerror}") from error

    def check_free(self, name: str, record: Path | None) -> None:
        """Whether `give` would be refused."""
        if (there := self.find(name)) is not None:
            raise StateRecordError(
                f"there is a disk named {name} already ({named(there.record)}); take another name, or, where "
                f"that disk is gone for good, vhostsync record --name {name} --forget"
            )
        if record is not None and (others := self.of_record(record)):
            raise StateRecordError(
                f"the disk has a name already, {others[0].name} ({named(record)}), and one is "
                f"enough; use that"
            )

    def forget_record(self, record: Path) -> None:
        """The names that lead to it are free from here on. OSError."""
        for lineage in self.of_record(record):
            self.files.unlink(self._path(lineage.name))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Of all that would change the names of this directory."""
        try:
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StateRecordError(
                f"the directory of the state records, {self.directory}, cannot be opened: {error.strerror}"
            ) from error
        try:
            deadline_s = time.monotonic() + ALONE_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() >= deadline_s:
                        raise StateRecordError(
                            f"another process is changing the names in {self.directory}; try again"
                        ) from error
                    time.sleep(0.02)
            yield
        finally:
            os.close(fd)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{NAME_SUFFIX}"

    def _file_names(self) -> list[str]:
        try:
            return self.files.names(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StateRecordError(
                f"the directory of the state records, {self.directory}, cannot be read: {error.strerror}; "
                f"be the user that it belongs to, or root"
            ) from error


def state_directories(base: Path) -> list[Path]:
    """That one, and those below it, where each backend has one of its own (one-user-per-disk.conf). No link
    is followed: those to backends lead where their users like."""
    try:
        with os.scandir(base) as entries:
            below = sorted(Path(each) for each in entries if each.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return [base]
    except OSError as error:
        raise StateRecordError(
            f"the directory of the state records, {base}, cannot be read: {error.strerror}; be the user that "
            f"it belongs to, or root"
        ) from error
    return [base, *below]


def all_names(base: Path) -> list[Names]:
    """Those of all state directories. StateRecordError."""
    return [names_of(directory, base) for directory in state_directories(base)]


def names_of(directory: Path, base: Path) -> Names:
    """One that lies below the base is another user's, perhaps: what there is a link is not followed."""
    return Names(directory, None if directory == base else OthersFiles())


def find_name(name: str, base: Path) -> Lineage:
    """In the state directory, or the one below it that is of this name alone. StateRecordError where the name
    is not known."""
    for directory in (base, base / name):
        if (lineage := names_of(directory, base).find(name)) is not None:
            return lineage
    raise StateRecordError(
        f"no disk is named {name} in {base}; begin one: vhostsync create {name} --disk DISK (or say where "
        f"the records are: STATE_DIRECTORY)"
    )


def follow_name(config: ServeConfig) -> ServeConfig:
    """With the disk that is to be served, where the configuration names it by its lineage (or by nothing but
    its --state-file), and with the record that the name leads to. To be called by whoever starts `serve`,
    before it becomes another user; the process has no other thread yet. StateRecordError."""
    if config.no_state_file:
        return config
    group = None
    if config.state_file is not None:
        if config.blk_file is not None:
            return config
        place, who = config.state_file, "it"
    else:
        directory = default_directory()
        lineage = Names(directory).find(config.name) if is_lineage_name(config.name) else None
        if lineage is None:
            if config.blk_file is not None and not config.group_freeze:
                return config  # the name is the machine's, in metrics
            lineage = find_name(config.name, directory)
        place, who, group = lineage.record, lineage.name, lineage.group
    if config.group_freeze and group is None:
        raise StateRecordError(
            f"{who} is in no group, so --group-freeze has nothing to do; leave it out, or begin the disk "
            f"with vhostsync create --group"
        )
    record = StateFile(place).load()
    if record is None and config.blk_file is None:
        raise StateRecordError(
            f"{named(place)}, which should name the disk of {who}, is missing; restore it or, if its disks "
            f"are gone for good, begin anew (vhostsync record {place} --forget)"
        )
    disk = config.blk_file
    if disk is None:
        assert record is not None
        disk = _to_promote(record, who) if config.answer is Answer.PROMOTE else name_today(record.current)
    of_name = place if config.state_file is None else None
    return replace(config, blk_file=disk, record_of_name=of_name, group=group)


def _to_promote(record: StateRecord, who: str) -> str:
    """The other disk, where the current one is gone: no disk was named, so nobody has said that it is to be
    left while it answers. (In a unit, the option would move the guest at each start.)"""
    current = look(record.current)
    if current.usable:
        raise StateRecordError(
            f"the current disk of {who}, {record.current.path}, is there and answers: start without "
            f"--promote; to leave it all the same, name the disk that is to take its place (--blk-file DISK "
            f"--promote)"
        )
    if record.peer is None:
        raise StateRecordError(
            f"the current disk of {who}, {record.current.path}, is {current.in_words()}, and the record "
            f"knows no other one; bring it back, or name a backup: --blk-file BACKUP --promote"
        )
    return record.peer.path
