# SPDX-License-Identifier: Apache-2.0
"""Who holds the lock of a file (flock(2)), as the kernel shows it. Nothing is locked to find out: who came
for the lock at that moment would be refused."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from .mounts import file_system_of, read_mounts

LOCKS: Final = Path("/proc/locks")


def lock_holder(lock: Path) -> int | None:
    """The process that holds it; 0 if it cannot be told which. Blocks."""
    return the_one(lock_holders(lock))


def lock_holders(lock: Path) -> frozenset[int]:
    """The process that holds it, and whoever cannot be told from it. Blocks."""
    return Flocks().holders_of(lock)


def the_one(holders: frozenset[int]) -> int | None:
    """None: there is none; 0: there are several."""
    return None if not holders else next(iter(holders)) if len(holders) == 1 else 0


class Flocks:
    """All such locks of this host, at one moment. Blocks."""

    def __init__(self) -> None:
        try:
            lines = LOCKS.read_text().splitlines()
        except OSError:
            lines = []
        self._holders: dict[str, set[int]] = {}
        for words in map(str.split, lines):
            if len(words) > 5 and words[1] == "FLOCK":
                self._holders.setdefault(words[5], set()).add(max(int(words[4]), 0))
        self._devices: dict[int, str] = {}  # as files tell them, and as locks do

    @property
    def processes(self) -> frozenset[int]:
        """All that hold one."""
        return frozenset().union(*self._holders.values())

    def holders_of(self, lock: Path) -> frozenset[int]:
        """The process that holds it. There may be several: the subvolumes of a btrfs have their inode numbers
        each, and one device number in the list of locks. Blocks. Who takes a lock follows no link that has
        its name (own_file.py), so none is followed here: it could lead to the lock of another disk."""
        try:
            fd = os.open(lock, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return frozenset()
        try:
            status = os.fstat(fd)
            device = self._devices.get(status.st_dev)
            if device is None:
                device = self._devices[status.st_dev] = _listed_device(fd, status)
        finally:
            os.close(fd)
        return frozenset(self._holders.get(f"{device}:{status.st_ino}", ()))


def _listed_device(fd: int, status: os.stat_result) -> str:
    """As the list of locks has it: that of the mount, which on btrfs is not st_dev."""
    device = None
    with suppress(OSError):
        device = file_system_of(fd, read_mounts())
    if device is None:
        device = status.st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}"
