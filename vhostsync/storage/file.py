# SPDX-License-Identifier: Apache-2.0
"""Image files: what of a disk at a path is so only where it is one. Everything here blocks."""

import os
import random
import stat
import time
from pathlib import Path

import structlog

from vhostsync.errors import DiskError
from vhostsync.host.kernel import why_denied
from vhostsync.host.own_file import open_regular
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.image_locks import WRITER_SHARES, WRITER_USES, holders, try_lock
from vhostsync.storage.users import users_of_file

log = structlog.get_logger(__name__)

# A random pause between two attempts: two that start at once must not refuse each other for ever.
RETRY_S = (0.01, 0.03)


class ImageFile:
    open_flags = 0

    def fits(self, mode: int) -> bool:
        return stat.S_ISREG(mode)

    def claimed_by(self, path: Path) -> str:
        return holders(path)

    def check_usable(self, fd: int, path: Path, *, read_only: bool, deadline: float) -> None:
        """Waits for whoever uses it and asks for no lock: a loop device may be about to end. DiskError."""
        while users := users_of_file(fd, writing=not read_only):
            if time.monotonic() >= deadline:
                raise DiskError(f"{path} is in use: {'; '.join(users)}; end that use first")
            time.sleep(random.uniform(*RETRY_S))  # noqa: S311 no secret

    def users(self, fd: int) -> list[str]:
        return users_of_file(fd, writing=True)

    def is_disk(self, status: os.stat_result, disk: DiskIdentity) -> bool:
        return disk.kind == "file" and (status.st_dev, status.st_ino) == (disk.device, disk.inode)


def is_in_dev(folder: Path) -> bool:
    """Whether it is among the device nodes, where a file is in memory, and none that anybody keeps disks in.
    What is mounted below /dev (/dev/shm) is something else."""
    real = Path(os.path.realpath(folder))
    try:
        return real.is_relative_to("/dev") and real.stat().st_dev == Path("/dev").stat().st_dev
    except OSError:
        return False


def create_image(path: Path, size_bytes: int) -> os.stat_result:
    """A new, empty (sparse) image file, durable under its name. DiskError, and no file left, when that
    fails."""
    if size_bytes <= 0:
        raise ValueError("an image has at least one byte")
    absolute = path.absolute()
    if is_in_dev(absolute.parent):
        raise DiskError(
            f"{absolute} would lie in memory, as everything in /dev, and be gone with a reboot; name another "
            f"place for an image file, or a device that is there"
        )
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
