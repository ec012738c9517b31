# SPDX-License-Identifier: Apache-2.0
"""Who holds the lock of a file (flock(2)), as the kernel shows it. Nothing is locked to find out: who came
for the lock at that moment would be refused."""

import os
import re
from pathlib import Path
from typing import Final

LOCKS: Final = Path("/proc/locks")
MOUNTS: Final = Path("/proc/self/mountinfo")


def lock_holder(lock: Path) -> int | None:
    """The process that holds it; 0 if it cannot be told which. Blocks."""
    return Flocks().holder_of(lock)


class Flocks:
    """All such locks of this host, at one moment. Blocks."""

    def __init__(self) -> None:
        try:
            lines = LOCKS.read_text().splitlines()
        except OSError:
            lines = []
        rows = [line.split() for line in lines]
        self._holders = {
            words[5]: max(int(words[4]), 0) for words in rows if len(words) > 5 and words[1] == "FLOCK"
        }
        self._devices: dict[int, str] = {}  # as files tell them, and as locks do

    def holder_of(self, lock: Path) -> int | None:
        """The process; 0 if it cannot be told which. Blocks. Who takes a lock follows no link that has its
        name (own_file.py), so none is followed here: it could lead to the lock of another disk."""
        try:
            fd = os.open(lock, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            device = self._devices.get(status.st_dev)
            if device is None:
                device = self._devices[status.st_dev] = _device_of_mount(fd) or _shown(
                    os.major(status.st_dev), os.minor(status.st_dev)
                )
        finally:
            os.close(fd)
        return self._holders.get(f"{device}:{status.st_ino}")


def _shown(major: int, minor: int) -> str:
    """As /proc/locks has it."""
    return f"{major:02x}:{minor:02x}"


def _device_of_mount(fd: int) -> str | None:
    """Of the mount through which it was opened, for locks are listed by that; on btrfs, st_dev has other
    numbers."""
    try:
        mount = re.search(r"^mnt_id:\s*(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split(" ")
        if mount is not None and words[0] == mount[1]:
            major, _, minor = words[2].partition(":")
            return _shown(int(major), int(minor))
    return None
