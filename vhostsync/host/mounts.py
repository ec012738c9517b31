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
    root: Path  # what of the file system is seen there
    kind: str  # of the file system, as `ext4`
    options: frozenset[str]  # of the file system


def read_mounts() -> list[Mount]:
    """Empty where they cannot be told."""
    try:
        lines = os.fsdecode(MOUNTS.read_bytes()).split("\n")
    except OSError:
        return []
    found = []
    for line in lines:
        words = line.split(" ")
        try:
            major, minor = words[2].split(":")
            kind, source, options = words[words.index("-") + 1 :][:3]
            root, folder = (Path(plain_path(each)) for each in words[3:5])
            found.append(
                Mount(
                    int(words[0]), os.makedev(int(major), int(minor)), folder, plain_path(source), root, kind,
                    frozenset(options.split(",")),
                )
            )  # fmt: skip
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
