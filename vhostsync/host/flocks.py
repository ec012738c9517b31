# SPDX-License-Identifier: Apache-2.0
"""Who holds the lock of a file (flock(2)), as the kernel shows it. Nothing is locked to find out: who came
for the lock at that moment would be refused."""

import os
from pathlib import Path
from typing import Final

LOCKS: Final = Path("/proc/locks")


def lock_holder(lock: Path) -> int | None:
    """The process that holds it; 0 if it cannot be told which. Blocks."""
    return holder_of(lock, lock_holders())


def lock_holders() -> dict[str, int]:
    """Of all such locks of this host: their files, as the kernel numbers them, and who holds them."""
    try:
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return {}
    rows = [line.split() for line in lines]
    return {words[5]: max(int(words[4]), 0) for words in rows if len(words) > 5 and words[1] == "FLOCK"}


def holder_of(lock: Path, holders: dict[str, int]) -> int | None:
    """Blocks. Who takes a lock follows no link that has its name (own_file.py), so none is followed here: it
    could lead to the lock of another disk."""
    try:
        status = lock.lstat()
    except OSError:
        return None
    return holders.get(f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}")
