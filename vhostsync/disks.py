# SPDX-License-Identifier: Apache-2.0
"""Opening a disk so that nobody else has it, and judging whether it can serve. Everything here blocks.

The lock is also the fence against a killed predecessor (docs/durability.md, rule 8): the kernel goes on with
the I/O of a dead process for tens of milliseconds, and it drops a lock that sits on an open file description,
or a block device's O_EXCL claim, only when the last of that I/O is over. So the descriptor that is locked
here is the very one the I/O goes through, nothing is read or written before the lock is held, and a lock that
is taken is waited for.

Locks are those of QEMU (block/file-posix.c), so QEMU and this program keep each other out: a read lock on
byte 100 + p says "I use permission p", one on byte 200 + p "I do not let others use p"; having set its own,
everybody looks whether somebody else's stand against them. All are open-file-description locks. Block devices
get them too, besides O_EXCL, because QEMU opens block devices without O_EXCL.
"""

import errno
import fcntl
import os
import random
import stat
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from vhostsync.disk_identity import DiskIdentity
from vhostsync.disk_layers import overlap
from vhostsync.disk_signatures import signatures
from vhostsync.disk_users import users_of_device, users_of_file
from vhostsync.errors import DiskError, EngineError
from vhostsync.identify import identify
from vhostsync.kernel import why_denied
from vhostsync.own_file import kind_of, open_regular
from vhostsync.vhost_user.owned_fd import OwnedFd

log = structlog.get_logger(__name__)

CacheMode = Literal["none", "writeback"]

PERMISSION_BASE = 100
UNSHARED_BASE = 200
READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)
PERMISSIONS = (READ, WRITE, WRITE_UNCHANGED, RESIZE)
WRITER_USES = frozenset({READ, WRITE, WRITE_UNCHANGED})
READER_USES = frozenset({READ})
WRITER_SHARES: frozenset[int] = frozenset()
READER_SHARES = frozenset({READ})

BLKROGET = 0x125E  # <linux/fs.h>
FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux
# A random pause between two attempts: two that start at once must not refuse each other for ever.
RETRY_S = (0.01, 0.03)


@dataclass(frozen=True)
class DiskProbe:
    """What the C side found (struct vs_disk_probe)."""

    bytes: int
    is_block_device: bool
    logical_block_bytes: int
    physical_block_bytes: int
    memory_align_bytes: int
    inline_io: bool
    discard_granularity_bytes: int
    may_block: bool = False


# (descriptor, direct I/O) -> what it is; raises EngineError or OSError.
Probe = Callable[[int, bool], DiskProbe]


@dataclass(frozen=True)
class Disk:
    """An open, locked disk. `fd` goes to the engine (`fd.take()`) or is closed by `close`. `direct`: whether
    the descriptor does direct I/O, which is not so where it was asked for and the file system has none."""

    path: Path
    fd: OwnedFd
    probe: DiskProbe
    direct: bool
    read_only: bool
    identity: DiskIdentity

    @property
    def bytes(self) -> int:
        return self.probe.bytes

    def close(self) -> None:
        self.fd.close()


def open_disk(
    path: Path, *, read_only: bool, cache: CacheMode, lock_timeout_s: float, probe: Probe
) -> Disk:
    """Open and lock an image file or a block device. Waits up to `lock_timeout_s` seconds for whoever has it.
    DiskError says what is wrong and what to do."""
    absolute = path.absolute()
    deadline = time.monotonic() + lock_timeout_s
    fd, direct = _open_waiting(absolute, read_only=read_only, cache=cache, deadline=deadline)
    try:
        _lock_waiting(fd.fileno(), absolute, read_only=read_only, deadline=deadline)
        _check_not_replaced(fd.fileno(), absolute)
        _check_writable(fd.fileno(), absolute, read_only=read_only)
        _await_unused(fd.fileno(), absolute, read_only=read_only, deadline=deadline)
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
        return Disk(absolute, fd, found, direct, read_only, identify(fd.fileno(), absolute))
    except BaseException:
        fd.close()
        raise


def create_image(path: Path, size_bytes: int) -> os.stat_result:
    """A new, empty (sparse) image file, durable under its name. DiskError, and no file left, when that
    fails."""
    if size_bytes <= 0:
        raise ValueError("an image has at least one byte")
    absolute = path.absolute()
    try:
        fd = os.open(absolute, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise DiskError(
            f"{absolute} exists already and is not overwritten; do without creating, or name another path"
        ) from error
    except OSError as error:
        raise DiskError(f"{absolute} cannot be created: {why_denied(error)}") from error
    try:
        try:
            os.ftruncate(fd, size_bytes)
            os.fsync(fd)
            made = os.fstat(fd)
        finally:
            os.close(fd)
        directory = os.open(absolute.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        absolute.unlink(missing_ok=True)
        raise DiskError(
            f"{absolute} cannot be made {size_bytes} bytes long and durable: {error.strerror}"
        ) from error
    return made


def remove_image(path: Path, made: os.stat_result) -> None:
    """One that `create_image` has made and nobody needs. Whoever has taken it meanwhile keeps it, and what
    has taken its name stays."""
    try:
        fd = open_regular(path, os.O_RDWR)
        try:
            if not os.path.samestat(os.fstat(fd), made):
                log.warning("what has taken the place of the image that was made stays", path=str(path))
            elif try_lock(fd, uses=WRITER_USES, shares=WRITER_SHARES):
                path.unlink()
            else:
                log.warning("the image that was made stays, for somebody else has it", path=str(path))
        finally:
            os.close(fd)
    except OSError as error:
        log.warning("the image that was made could not be removed", path=str(path), error=error.strerror)


def is_named(path: Path, disk: DiskIdentity) -> bool:
    """Whether the path still is a name of that disk. Blocks."""
    try:
        status = path.stat()
    except OSError:
        return False
    if stat.S_ISBLK(status.st_mode):
        return disk.kind == "block" and status.st_rdev == disk.device
    return disk.kind == "file" and (status.st_dev, status.st_ino) == (disk.device, disk.inode)


def check_distinct(source: Path, destination: Path) -> None:
    """DiskError when both paths lead to the same bytes: by symlinks or hard links, loop devices of one file,
    a partition and its disk. To be asked before the destination is opened, whose lock would only say "in
    use". A destination that does not exist is distinct."""
    try:
        shared = overlap(source, destination)
    except OSError as error:
        raise DiskError(f"{error.filename} cannot be examined: {error.strerror}") from error
    if shared is not None:
        raise DiskError(f"{destination} and the source {source} are the same storage ({shared})")


def check_destination(destination: Disk, *, capacity_bytes: int, guest_block_bytes: int) -> None:
    """DiskError unless the destination can take the guest: `capacity_bytes` is what the guest sees,
    `guest_block_bytes` its logical block."""
    if destination.read_only:
        raise DiskError(f"the destination {destination.path} is open for reading only")
    if destination.bytes < capacity_bytes:
        lacking = capacity_bytes - destination.bytes
        raise DiskError(
            f"the destination {destination.path} is too small: {destination.bytes} bytes, the guest's disk "
            f"has {capacity_bytes} ({lacking} more); enlarge it or take another"
        )
    if destination.probe.logical_block_bytes > guest_block_bytes:
        raise DiskError(
            f"the destination {destination.path} has logical blocks of "
            f"{destination.probe.logical_block_bytes} bytes and the guest writes blocks of "
            f"{guest_block_bytes}; take a destination with smaller blocks, or an image file with "
            f"cache=writeback"
        )


def check_holds_nothing(disk: Disk) -> None:
    """DiskError when signatures tell that there is something on the disk."""
    try:
        found = signatures(disk.fd.fileno())
    except OSError as error:
        raise DiskError(
            f"what {disk.path} holds cannot be found out ({error.strerror}), and it would be lost; if it may "
            f"be, start the mirror with --force"
        ) from error
    if found:
        raise DiskError(
            f"{disk.path} holds something that would be lost: {', '.join(found)}; name another destination, "
            f"or, if it may be overwritten, start the mirror with --force"
        )


# ---- opening ----------------------------------------------------------------


def _open_waiting(path: Path, *, read_only: bool, cache: CacheMode, deadline: float) -> tuple[OwnedFd, bool]:
    """The descriptor, and whether it does direct I/O. Waits for a block device that is claimed."""
    while True:
        try:
            # Looked at before it is opened: opening a FIFO would wait for its other end, a tape would rewind.
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise DiskError(f"{path} is {kind_of(mode)}, and a disk is an image file or a block device")
            flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
            if stat.S_ISBLK(mode):
                flags |= os.O_EXCL
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
            return DiskError(f"{path} is in use: {_device_users(path)}; end that use first")
        case _:
            return DiskError(f"{path} cannot be opened: {why_denied(error)}")


def _device_users(path: Path) -> str:
    """Of a block device that is claimed."""
    try:
        found = users_of_device(path.stat().st_rdev)
    except OSError:
        found = []
    return ", ".join(found) or f"mounted, part of another device, or open by {holders(path)}"


def _check_writable(fd: int, path: Path, *, read_only: bool) -> None:
    """The kernel opens a read-only block device for writing, and fails the writes."""
    if read_only or not stat.S_ISBLK(os.fstat(fd).st_mode):
        return
    if int.from_bytes(fcntl.ioctl(fd, BLKROGET, bytes(4)), sys.byteorder):
        raise DiskError(
            f"{path} is a read-only device, and no write would reach it; make it writable (blockdev --setrw, "
            f"or attach it anew), or serve it read-only"
        )


def _await_unused(fd: int, path: Path, *, read_only: bool, deadline: float) -> None:
    """Whoever uses an image file and asks for no lock. A loop device may be about to end."""
    while stat.S_ISREG(os.fstat(fd).st_mode):
        users = users_of_file(fd, writing=not read_only)
        if not users:
            return
        if time.monotonic() >= deadline:
            raise DiskError(f"{path} is in use: {'; '.join(users)}; end that use first")
        time.sleep(random.uniform(*RETRY_S))  # noqa: S311 no secret


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


# ---- QEMU's image locks -------------------------------------------------------


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


def try_lock(fd: int, *, uses: frozenset[int], shares: frozenset[int]) -> bool:
    """Takes QEMU's image locks on the open file description, or takes none and returns False."""
    own = [PERMISSION_BASE + p for p in uses]
    own += [UNSHARED_BASE + p for p in PERMISSIONS if p not in shares]
    # What stands against us: somebody uses what we do not share, or does not share what we use.
    against = [PERMISSION_BASE + p for p in PERMISSIONS if p not in shares]
    against += [UNSHARED_BASE + p for p in uses]
    for byte in own:
        _set_lock(fd, fcntl.F_RDLCK, byte)
    if not any(_held_by_another(fd, byte) for byte in against):
        return True
    for byte in own:
        _set_lock(fd, fcntl.F_UNLCK, byte)
    return False


def _set_lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_another(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def is_locked(fd: int) -> bool:
    """Whether another open file description has QEMU's image locks. Takes none."""
    places = (base + p for base in (PERMISSION_BASE, UNSHARED_BASE) for p in PERMISSIONS)
    return any(_held_by_another(fd, byte) for byte in places)


def holders(path: Path) -> str:
    """Who has it open, as far as may be seen: the owner of such a lock is not recorded, so every process that
    has the file open is named."""
    try:
        wanted = path.stat()
    except OSError:
        return "nobody that can be seen"
    found = []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda entry: int(entry.name)):
        try:
            descriptors = list((process / "fd").iterdir())
            name = (process / "comm").read_text(errors="replace").strip()  # cut off after 15 bytes
        except OSError:
            continue
        if any(_leads_to(entry, wanted) for entry in descriptors) and process.name != str(os.getpid()):
            found.append(f"{name} (pid {process.name})")
    return ", ".join(found[:4]) or "a process that cannot be seen from here"


def _leads_to(descriptor: Path, wanted: os.stat_result) -> bool:
    try:
        status = descriptor.stat()
    except OSError:
        return False
    if stat.S_ISBLK(wanted.st_mode):
        return stat.S_ISBLK(status.st_mode) and status.st_rdev == wanted.st_rdev
    return (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino)
