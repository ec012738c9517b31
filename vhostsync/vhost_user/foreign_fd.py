# SPDX-License-Identifier: Apache-2.0
"""Descriptors that a frontend has sent: what is memory, and closing the rest.

What is asked of a file on FUSE or NFS (fstat, fstatfs, a page fault, close) may wait for its server for ever.
So the engine gets only descriptors whose pages cannot hang, and all that might wait is done in a thread that
nobody waits for. Shared memory, the usual case, is told apart at once and without a thread: only a tmpfs or
hugetlbfs file (a memfd, /dev/shm) has seals.
"""

import fcntl
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Final

from vhostsync.host.errands import Errands
from vhostsync.host.kernel import file_system_type
from vhostsync.host.owned_fd import OwnedFd

from ..errors import FrontendError

LOOK_S: Final = 5.0
"""How long a file system may take to say what it is; a frontend waits meanwhile, and perhaps its VM."""

# <linux/magic.h>. On local storage a page fault waits for the disk below, as the host's own programs do.
MEMORY_FILE_SYSTEMS: Final = {
    0x01021994: "tmpfs", 0x958458F6: "hugetlbfs", 0x858458F6: "ramfs", 0xEF53: "ext", 0x58465342: "xfs",
    0x9123683E: "btrfs", 0xF2F52010: "f2fs", 0xCA451A4E: "bcachefs", 0x2FC12FC1: "zfs",
    # A container's root: a file that is open for writing lies in the upper layer, which is nearly always
    # local, and fstatfs asks that layer alone.
    0x794C7630: "overlay",
}  # fmt: skip
KNOWN_TO_HANG: Final = {
    0x65735546: "FUSE", 0x6969: "NFS", 0xFF534D42: "CIFS", 0xFE534D42: "SMB", 0x01021997: "9p",
    0x00C36400: "Ceph",
}  # fmt: skip
DAX: Final = "/dax"


_errands: Final = Errands()


def _is_shared_memory(fd: int) -> bool:
    """Asks nobody but this kernel."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _closes_at_once(fd: int) -> bool:
    if _is_shared_memory(fd):
        return True
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"  # noqa: PTH115
    except OSError:
        return False


def close_foreign(fds: Iterable[OwnedFd]) -> None:
    """Close every one that is still owned, without waiting for it."""
    for fd in fds:
        if fd.owned:
            number = fd.take()
            if _closes_at_once(number):
                os.close(number)
            else:
                _errands.give(partial(_close, number))


def _close(fd: int) -> None:
    with suppress(OSError):  # what a file system could not write back is not ours
        os.close(fd)


async def check_memory(fds: Iterable[OwnedFd], what: str) -> None:
    """FrontendError unless all of them can be mapped and touched without waiting for anybody's server."""
    for fd in fds:
        if not _is_shared_memory(fd.fileno()):
            reason = await _why_not_memory(fd.fileno())
            if reason is not None:
                raise FrontendError(
                    f"{what} lies {reason}, which could keep the guest waiting for ever; share memory of a "
                    f"memfd, tmpfs or hugetlbfs, or of a file on a local file system"
                )


async def _why_not_memory(fd: int) -> str | None:
    try:
        own = os.dup(fd)  # it may be closed here before the thread is back
    except OSError as error:
        return f"in a file that cannot be examined ({error.strerror})"

    def look() -> str | None:
        try:
            return _look(own)
        finally:
            _errands.give(partial(_close, own))

    try:
        return await _errands.answer(look, LOOK_S)
    except TimeoutError:
        return f"on a file system that has not answered for {LOOK_S:g} s"


def _look(fd: int) -> str | None:
    """Why it is no memory that always answers; None: it is. Blocks, perhaps for ever."""
    try:
        magic = file_system_type(fd)
        if magic not in MEMORY_FILE_SYSTEMS:
            return f"on {KNOWN_TO_HANG.get(magic, f'a file system of type {magic:#x}')}"
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) or (stat.S_ISCHR(status.st_mode) and _is_dax(status.st_rdev)):
            return None
    except OSError as error:
        return f"in a file that cannot be examined ({error.strerror})"
    return "in no file"


def _is_dax(device: int) -> bool:
    """Persistent memory: the only devices that guests' memory is known to lie in."""
    link = f"/sys/dev/char/{os.major(device)}:{os.minor(device)}/subsystem"
    try:
        return os.readlink(link).endswith(DAX)  # noqa: PTH115
    except OSError:
        return False
