# SPDX-License-Identifier: Apache-2.0
"""Disks at a path of this host: image files (file.py) and block devices (block.py), which of the two is seen
when it is opened. Everything here blocks.

The lock is also the fence against a killed predecessor (docs/durability.md, rule 8): the kernel goes on with
the I/O of a dead process for tens of milliseconds, and it drops a lock that sits on an open file description,
or a block device's O_EXCL claim, only when the last of that I/O is over. So the descriptor that is locked
here is the very one the I/O goes through, nothing is read or written before the lock is held, and a lock that
is taken is waited for. Block devices get QEMU's image locks too, because QEMU opens them without O_EXCL.
"""

import errno
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from vhostsync.errors import DiskError, EngineError
from vhostsync.host.kernel import why_denied
from vhostsync.host.own_file import kind_of as in_words
from vhostsync.host.owned_fd import OwnedFd
from vhostsync.storage import identify as identifying
from vhostsync.storage import layers
from vhostsync.storage import signatures as looking
from vhostsync.storage.block import BlockDevice, is_block_device
from vhostsync.storage.condition import Condition, Look
from vhostsync.storage.disk import CacheMode, Disk, Spot, absolute_path
from vhostsync.storage.file import RETRY_S, ImageFile, create_image, remove_image
from vhostsync.storage.identity import DiskIdentity, Likeness
from vhostsync.storage.image_locks import (
    READER_SHARES,
    READER_USES,
    WRITER_SHARES,
    WRITER_USES,
    holders,
    is_locked,
    try_lock,
)
from vhostsync.storage.native import DiskProbe, file_disk
from vhostsync.storage.native import probe as probe_disk
from vhostsync.storage.network import Remote

log = structlog.get_logger(__name__)

# (descriptor, direct I/O) -> what it is; raises EngineError or OSError.
Probe = Callable[[int, bool], DiskProbe]


class Sort(Protocol):
    """In what image files and block devices differ."""

    open_flags: int

    def fits(self, mode: int) -> bool: ...
    def claimed_by(self, path: Path) -> str: ...
    def check_usable(self, fd: int, path: Path, *, read_only: bool, deadline: float) -> None: ...
    def users(self, fd: int) -> list[str]: ...
    def is_disk(self, status: os.stat_result, disk: DiskIdentity) -> bool: ...


SORTS: Final[tuple[Sort, ...]] = (ImageFile(), BlockDevice())


def _sort_of(mode: int) -> Sort | None:
    return next((sort for sort in SORTS if sort.fits(mode)), None)


@dataclass(frozen=True)
class LocalDisk:
    """An open, locked disk. `fd` goes to the engine (`to_engine`) or is closed by `close`. `direct`: whether
    the descriptor does direct I/O, which is not so where it was asked for and the file system has none."""

    path: Path
    fd: OwnedFd
    probe: DiskProbe
    direct: bool
    read_only: bool
    identity: DiskIdentity

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def bytes(self) -> int:
        return self.probe.bytes

    @property
    def logical_block_bytes(self) -> int:
        return self.probe.logical_block_bytes

    @property
    def physical_block_bytes(self) -> int:
        return self.probe.physical_block_bytes

    @property
    def discard_granularity_bytes(self) -> int:
        return self.probe.discard_granularity_bytes

    @property
    def why_no_source(self) -> str | None:
        return None

    def as_it_is(self) -> DiskIdentity:
        return identifying.identify(self.fd.fileno(), self.path, with_ctime=True)

    def with_mark(self, mark: str | None) -> "LocalDisk":
        return replace(self, identity=identifying.with_mark(self.fd.fileno(), self.identity, mark))

    def bear_mark(self) -> "LocalDisk":
        return replace(self, identity=identifying.bear_mark(self.fd.fileno(), self.identity))

    def image_format(self) -> str | None:
        return looking.image_format(self.fd.fileno())

    def signatures(self) -> list[str]:
        return looking.signatures(self.fd.fileno())

    def end_threads(self) -> None:
        """It has none."""

    def to_engine(self) -> Any:
        handle = file_disk(self.fd.fileno(), self.probe, self.direct, self.name)
        self.fd.take()
        return handle

    def close(self) -> None:
        self.fd.close()


class Local:
    """The kind of a name that is a path."""

    prefix = ""
    identities = frozenset({"file", "block"})
    over_network = False
    fences_itself = True

    def keep_files(self) -> None:
        """There are none."""

    def absolute(self, name: str) -> str:
        return absolute_path(name, "the disk")

    def open(self, name: str, *, read_only: bool, cache: CacheMode, lock_timeout_s: float) -> LocalDisk:
        return open_disk(
            Path(name), read_only=read_only, cache=cache, lock_timeout_s=lock_timeout_s, probe=probe_disk
        )

    def create(self, name: str, size_bytes: int) -> os.stat_result:
        return create_image(Path(name), size_bytes)

    def remove(self, name: str, made: object) -> None:
        assert isinstance(made, os.stat_result)
        remove_image(Path(name), made)

    def is_made(self, disk: Disk, made: object) -> bool:
        assert isinstance(disk, LocalDisk) and isinstance(made, os.stat_result)
        return os.path.samestat(os.fstat(disk.fd.fileno()), made)

    def overlap(self, one: str, other: str) -> str | None:
        return layers.overlap(Path(one), Path(other))

    def is_named(self, name: str, disk: DiskIdentity) -> bool:
        try:
            status = Path(name).stat()
        except OSError:
            return False
        sort = _sort_of(status.st_mode)
        return sort is not None and sort.is_disk(status, disk)

    def look(self, disk: DiskIdentity) -> Look:
        return look_here(disk)

    def identify(self, name: str) -> DiskIdentity:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return identifying.identify(fd, Path(name), with_ctime=True)
        finally:
            os.close(fd)

    def spot(self, name: str) -> Spot:
        real = Path(os.path.realpath(name))
        return Spot(real, real if is_block_device(real) else real.parent)

    def remote(self, name: str) -> Remote | None:
        return None

    def places(self, disk: DiskIdentity) -> Iterable[Path]:
        """Of a block device it alone, not all of /dev."""
        path, spot = Path(disk.path), self.spot(disk.path)
        if is_block_device(spot.real):
            return [spot.real]
        # Of a device that is missing, the place would be all of /dev.
        return [path.parent, spot.allow] if disk.kind == "file" else []


LOCAL: Final = Local()


def open_disk(
    path: Path, *, read_only: bool, cache: CacheMode, lock_timeout_s: float, probe: Probe
) -> LocalDisk:
    """Open and lock an image file or a block device. Waits up to `lock_timeout_s` seconds for whoever has it.
    DiskError says what is wrong and what to do."""
    absolute = path.absolute()
    deadline = time.monotonic() + lock_timeout_s
    fd, direct = _open_waiting(absolute, read_only=read_only, cache=cache, deadline=deadline)
    try:
        _lock_waiting(fd.fileno(), absolute, read_only=read_only, deadline=deadline)
        _check_not_replaced(fd.fileno(), absolute)
        sort = _sort_of(os.fstat(fd.fileno()).st_mode)
        assert sort is not None
        sort.check_usable(fd.fileno(), absolute, read_only=read_only, deadline=deadline)
        try:
            found = probe(fd.fileno(), direct)
        except (OSError, EngineError) as error:
            raise DiskError(f"{absolute} cannot be examined: {_reason(error)}") from error
        if found.bytes == 0:
            raise DiskError(f"{absolute} is empty (0 bytes): there is nothing to serve")
        if found.bytes < found.logical_block_bytes:
            raise DiskError(
                f"{absolute} has {found.bytes} bytes, less than one block of {found.logical_block_bytes}"
            )
        return LocalDisk(absolute, fd, found, direct, read_only, identifying.identify(fd.fileno(), absolute))
    except BaseException:
        fd.close()
        raise


# ---- opening ----------------------------------------------------------------


def _open_waiting(path: Path, *, read_only: bool, cache: CacheMode, deadline: float) -> tuple[OwnedFd, bool]:
    """The descriptor, and whether it does direct I/O. Waits for a block device that is claimed."""
    while True:
        try:
            # Looked at before it is opened: opening a FIFO would wait for its other end, a tape would rewind.
            mode = path.stat().st_mode
            sort = _sort_of(mode)
            if sort is None:
                raise DiskError(f"{path} is {in_words(mode)}, and a disk is an image file or a block device")
            flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR) | sort.open_flags
            return _open(path, flags, direct=cache == "none")
        except OSError as error:
            if error.errno == errno.EBUSY and time.monotonic() < deadline:
                time.sleep(random.uniform(*RETRY_S))  # noqa: S311 no secret
                continue
            raise _open_error(path, error, read_only=read_only) from error


def _open(path: Path, flags: int, *, direct: bool) -> tuple[OwnedFd, bool]:
    if direct:
        try:
            return OwnedFd(os.open(path, flags | os.O_DIRECT)), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            log.warning("the file system has no direct I/O: buffered instead", path=str(path))
    return OwnedFd(os.open(path, flags)), False


def _open_error(path: Path, error: OSError, *, read_only: bool) -> DiskError:
    match error.errno:
        case errno.ENOENT:
            missing = "it does not exist" if path.parent.is_dir() else f"there is no directory {path.parent}"
            return DiskError(f"{path} cannot be opened: {missing}")
        case errno.EROFS if not read_only:
            return DiskError(
                f"{path} cannot be opened for writing: its file system is read-only; mount it for writing "
                f"(after an error it may have become so by itself: see dmesg), or serve the disk read-only"
            )
        case errno.EACCES | errno.EPERM if not read_only:
            return DiskError(
                f"{path} cannot be opened for writing: {why_denied(error)}; change its permissions, or serve "
                f"it read-only"
            )
        case errno.EBUSY:
            return DiskError(f"{path} is in use: {_claimed_by(path)}; end that use first")
        case _:
            return DiskError(f"{path} cannot be opened: {why_denied(error)}")


def _claimed_by(path: Path) -> str:
    try:
        sort = _sort_of(path.stat().st_mode)
    except OSError:
        sort = None
    return sort.claimed_by(path) if sort is not None else holders(path)


def _check_not_replaced(fd: int, path: Path) -> None:
    """Somebody may have renamed another file over the path while its lock was waited for."""
    opened = os.fstat(fd)
    try:
        named = path.stat()
    except OSError as error:
        raise DiskError(f"{path} went away while it was being opened: {error.strerror}") from error
    if (opened.st_dev, opened.st_ino) != (named.st_dev, named.st_ino):
        raise DiskError(f"{path} was replaced by another file while it was being opened; try again")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _lock_waiting(fd: int, path: Path, *, read_only: bool, deadline: float) -> None:
    uses, shares = (READER_USES, READER_SHARES) if read_only else (WRITER_USES, WRITER_SHARES)
    while True:
        try:
            free = try_lock(fd, uses=uses, shares=shares)
        except OSError as error:
            raise DiskError(
                f"{path} cannot be locked ({error.strerror}), so nothing would keep others from writing to "
                f"it; use a file system that has open-file-description locks"
            ) from error
        if free:
            return
        if time.monotonic() >= deadline:
            raise DiskError(
                f"{path} is in use (QEMU's image lock): open by {holders(path)}; end that use first"
            )
        time.sleep(random.uniform(*RETRY_S))  # noqa: S311 no secret


# ---- looking -----------------------------------------------------------------


def look_here(disk: DiskIdentity) -> Look:
    """For as long as it takes: see look.py."""
    path = Path(disk.path)
    try:
        fd = _open_to_look(path)
    except FileNotFoundError:
        return Look(Condition.MISSING)
    except OSError as error:
        return Look(Condition.FAILING, error.strerror)
    try:
        likeness = disk.likeness(identifying.identify(fd, path))
        if likeness is Likeness.OTHER:
            return Look(Condition.OTHER)
        users = _users(fd, path)
        looking.read_block(fd, 0)
        condition = Condition.THERE if likeness is Likeness.SAME else Condition.UNSURE
        return Look(condition, users=users)
    except OSError as error:
        return Look(Condition.FAILING, error.strerror)
    finally:
        os.close(fd)


def _open_to_look(path: Path) -> int:
    """For direct I/O where there is some: what is in the page cache says nothing about the disk."""
    if _sort_of(path.stat().st_mode) is None:
        raise OSError(0, "it is neither a file nor a block device")
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:
        return os.open(path, flags)


def _users(fd: int, path: Path) -> tuple[str, ...]:
    sort = _sort_of(os.fstat(fd).st_mode)
    found = sort.users(fd) if sort is not None else []
    if is_locked(fd):
        found.insert(0, f"locked by {holders(path)}")
    return tuple(found)
