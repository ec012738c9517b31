# SPDX-License-Identifier: Apache-2.0
"""What state records and all that leads to them need of the operating system: small files that are replaced
durably, in directories that somebody else may have put something into."""

import os
import time
from collections.abc import Hashable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Final, Protocol

from vhostsync.host.own_file import ForeignFileError, open_regular, remove_leftover, seems_to_be

READ_BYTES: Final = 64 * 1024  # at once
TEXT_BYTES_MAX: Final = 4 * 1024 * 1024  # of a record; a disk of that name is not read into memory
SETTLED_NS = 2_000_000_000
"""A file's times have a grain: what was changed later than that may be changed again without another time."""


class FileSystem(Protocol):
    """What the record needs of the operating system; tests put one with crashes in its place. OSError.
    `write_durable` makes a new file, in the place of what a crash has left of an earlier one. `versions`: of
    each name that ends so; while it is the same, so is what is read there. None: that cannot be told."""

    def read(self, path: Path) -> bytes: ...
    def write_durable(self, path: Path, text: bytes) -> None: ...
    def rename(self, old: Path, new: Path) -> None: ...
    def sync_directory(self, path: Path) -> None: ...
    def unlink(self, path: Path) -> None: ...
    def names(self, path: Path) -> list[str]: ...
    def versions(self, path: Path, suffix: str) -> Mapping[str, Hashable]: ...


class RealFileSystem:
    def read(self, path: Path) -> bytes:
        try:
            return self._read(path)
        except ForeignFileError:
            if not path.is_symlink():
                raise
            return self._read(Path(os.path.realpath(path)))

    def _read(self, path: Path) -> bytes:
        fd = open_regular(path, os.O_RDONLY)
        try:
            text = b""
            while part := os.read(fd, READ_BYTES):
                text += part
                if len(text) > TEXT_BYTES_MAX:
                    raise ForeignFileError(seems_to_be(fd))
            return text
        except BlockingIOError as error:  # a file of the kernel's that has nothing at the moment
            raise ForeignFileError(seems_to_be(fd)) from error
        finally:
            os.close(fd)

    def write_durable(self, path: Path, text: bytes) -> None:
        remove_leftover(path, "state-")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(text)
            while view:
                view = view[os.write(fd, view):]
            os.fsync(fd)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def names(self, path: Path) -> list[str]:
        return sorted(entry.name for entry in path.iterdir())

    def versions(self, path: Path, suffix: str) -> dict[str, Hashable]:
        now_ns = time.time_ns()
        with os.scandir(path) as entries:
            wanted = sorted((each for each in entries if each.name.endswith(suffix)), key=attrgetter("name"))
        return {each.name: _version(each, now_ns) for each in wanted}


def _version(entry: "os.DirEntry[str]", now_ns: int) -> Hashable:
    try:
        found = entry.stat()
    except OSError:
        return None
    if found.st_ctime_ns > now_ns - SETTLED_NS:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class OthersFiles(RealFileSystem):
    """In a directory of another user, who may have put a link there to what hangs, or is none of theirs."""

    def read(self, path: Path) -> bytes:
        return self._read(path)
