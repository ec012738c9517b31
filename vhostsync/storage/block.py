# SPDX-License-Identifier: Apache-2.0
"""Block devices: what of a disk at a path is so only where it is one. Everything here blocks."""

import fcntl
import os
import stat
import sys
from pathlib import Path

from vhostsync.errors import DiskError
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.image_locks import holders
from vhostsync.storage.users import users_of_device

BLKROGET = 0x125E  # <linux/fs.h>


class BlockDevice:
    open_flags = os.O_EXCL  # keeps mounts and other devices away; image locks alone would not

    def fits(self, mode: int) -> bool:
        return stat.S_ISBLK(mode)

    def claimed_by(self, path: Path) -> str:
        try:
            found = users_of_device(path.stat().st_rdev)
        except OSError:
            found = []
        return ", ".join(found) or f"mounted, part of another device, or open by {holders(path)}"

    def check_usable(self, fd: int, path: Path, *, read_only: bool, deadline: float) -> None:
        """The kernel opens a read-only device for writing, and fails the writes. DiskError."""
        if not read_only and int.from_bytes(fcntl.ioctl(fd, BLKROGET, bytes(4)), sys.byteorder):
            raise DiskError(
                f"{path} is a read-only device, and no write would reach it; make it writable (blockdev "
                f"--setrw, or attach it anew), or serve it read-only"
            )

    def users(self, fd: int) -> list[str]:
        return users_of_device(os.fstat(fd).st_rdev)

    def is_disk(self, status: os.stat_result, disk: DiskIdentity) -> bool:
        return disk.kind == "block" and status.st_rdev == disk.device


def is_block_device(path: Path) -> bool:
    """False, too, where it cannot be told. Blocks."""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False
