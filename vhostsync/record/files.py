# SPDX-License-Identifier: Apache-2.0
"""What state records and all that leads to them need of the operating system: small files that are replaced
durably, in directories that somebody else may have put something into."""

import errno
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
    each name that ends so. While it is the one that `read_version` has told with a text, that is what there
    is to read. None: it cannot be told."""

    def read(self, path: Path) -> bytes: ...
    def read_version(self, path: Path) -> tuple[bytes, Hashable]: ...
    def write_durable(self, path: Path, text: bytes) -> None: ...
    def rename(self, old: Path, new: Path) -> None: ...
    def sync_directory(self, path: Path) -> None: ...
    def unlink(self, path: Path) -> None: ...
    def names(self, path: Path) -> list[str]: ...
    def versions(self, path: Path, suffix: str) -> Mapping[str, Hashable]: ...


class RealFileSystem:
    def read(self, path: Path) -> bytes:
        return self.read_version(path)[0]

    def read_version(self, path: Path) -> tuple[bytes, Hashable]:
        try:
            return self._read(path)
        except OSError as error:
            if not isinstance(error, ForeignFileError) and error.errno != errno.ELOOP:
                raise
            return self._read(Path(os.path.realpath(path)))  # it is a link, or was one just now

    def _read(self, path: Path) -> tuple[bytes, Hashable]:
        fd = open_regular(path, os.O_RDONLY)
        try:
            # Of what is read, whatever the path leads to by now; what is written meanwhile changes it.
            version = _version(os.fstat(fd))
            text = b""
            while part := os.read(fd, READ_BYTES):
                text += part
                if len(text) > TEXT_BYTES_MAX:
                    raise ForeignFileError(seems_to_be(fd))
            return text, version
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
        with os.scandir(path) as entries:
            wanted = sorted((each for each in entries if each.name.endswith(suffix)), key=attrgetter("name"))
        return {each.name: _version_of(each) for each in wanted}


def _version_of(entry: "os.DirEntry[str]") -> Hashable:
    try:
        return _version(entry.stat())
    except OSError:
        return None


def _version(found: os.stat_result) -> Hashable:
    if found.st_ctime_ns > time.time_ns() - SETTLED_NS:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class OthersFiles(RealFileSystem):
    """In a directory of another user, who may have put a link there to what hangs, or is none of theirs."""

    def read_version(self, path: Path) -> tuple[bytes, Hashable]:
        return self._read(path)
