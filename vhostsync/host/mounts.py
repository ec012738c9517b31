# SPDX-License-Identifier: Apache-2.0
"""The mounts that this process sees, as the kernel lists them. Everything here blocks."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOUNTS: Final = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    number: int  # of the mount
    device: int  # of its file system
    folder: Path
    source: str


def read_mounts() -> list[Mount]:
    """Empty where they cannot be told."""
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        words = line.split(" ")
        try:
            major, minor = words[2].split(":")
            source = words[words.index("-") + 2]
            device = os.makedev(int(major), int(minor))
            found.append(Mount(int(words[0]), device, Path(plain_path(words[4])), plain_path(source)))
        except (ValueError, IndexError):
            continue
    return found


def file_system_of(fd: int, mounts: Iterable[Mount]) -> int | None:
    """The device of the mount through which it was opened. Not st_dev, which has other numbers on btrfs.
    OSError."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    number = re.search(r"^mnt_id:\s*(\d+)$", text, re.MULTILINE)
    if number is None:
        return None
    return next((mount.device for mount in mounts if mount.number == int(number[1])), None)


def plain_path(word: str) -> str:
    """The kernel writes white space in paths as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), word)
