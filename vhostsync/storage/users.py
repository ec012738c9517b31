# SPDX-License-Identifier: Apache-2.0
"""Who uses a disk beside those that lock it: loop devices of an image file, mounts, device mapper and RAID,
swap. As far as /proc and /sys tell, and as can be seen from this mount namespace. Everything here blocks.

A block device that is in use cannot be opened with O_EXCL, so of those this only tells by whom. Nothing of
the kind protects an image file: loop devices and swap ask for no lock.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vhostsync.host.mounts import Mount, file_system_of, plain_path, read_mounts

SYS_BLOCK: Final = Path("/sys/block")
SYS_DEVICES: Final = Path("/sys/dev/block")
SWAPS: Final = Path("/proc/swaps")


def users_of_file(fd: int, *, writing: bool) -> list[str]:
    """Who uses the open image file, in words; empty where nobody is found. `writing`: it is to be written to,
    so whoever only reads it counts as well."""
    status = os.fstat(fd)
    mounts = read_mounts()
    found = [
        _loop_in_words(node, mounts)
        for node in _loop_devices(fd, status, mounts)
        if writing or _read(node / "ro") != "1"
    ]
    if any((swap.st_dev, swap.st_ino) == (status.st_dev, status.st_ino) for swap in _swaps()):
        found.append("it is swap space (swapoff ends that)")
    return found


def users_of_device(device: int) -> list[str]:
    """Who uses the block device or a partition of it, in words; empty where nobody is found."""
    return _users_of_node(SYS_DEVICES / f"{os.major(device)}:{os.minor(device)}", read_mounts())


def _users_of_node(node: Path, mounts: list[Mount]) -> list[str]:
    found = []
    swaps = [swap.st_rdev for swap in _swaps() if stat.S_ISBLK(swap.st_mode)]
    for part in (node, *(entry.parent for entry in sorted(node.glob("*/partition")))):
        number = _number(part)
        found += [f"it is mounted at {mount.folder}" for mount in mounts if _is_of(mount, number)]
        found += [f"it is part of /dev/{entry.name}" for entry in sorted(part.glob("holders/*"))]
        found += ["it is swap space"] if number in swaps else []
    return list(dict.fromkeys(found))


def _is_of(mount: Mount, device: int | None) -> bool:
    if mount.device == device:
        return True
    # Some file systems (btrfs) have a number of their own, and name the device.
    if not mount.source.startswith("/dev/"):
        return False
    try:
        status = Path(mount.source).stat()
    except OSError:
        return False
    return stat.S_ISBLK(status.st_mode) and status.st_rdev == device


# ---- loop devices ----------------------------------------------------------------


def _loop_devices(fd: int, status: os.stat_result, mounts: list[Mount]) -> Iterator[Path]:
    """In sysfs, those that show the open file."""
    here = file_system_of(fd, mounts)
    for entry in sorted(SYS_BLOCK.glob("loop*/loop/backing_file")):
        path = Path(_read(entry) or "")
        # No other file system is asked: it may be remote, and not answer.
        if here is None or _device_below(path, mounts) != here:
            continue
        try:
            backing = path.stat()
        except OSError:
            continue  # deleted, or in another mount namespace
        if (backing.st_dev, backing.st_ino) == (status.st_dev, status.st_ino):
            yield entry.parent.parent


def _loop_in_words(node: Path, mounts: list[Mount]) -> str:
    device = f"/dev/{node.name}"
    uses = _users_of_node(node, mounts)
    if uses:
        return f"{device} shows it, and of that device {', '.join(uses)}"
    return f"{device} shows it (losetup --detach {device} ends that)"


def _device_below(path: Path, mounts: list[Mount]) -> int | None:
    """Of the file system on which the path lies."""
    deepest = None
    for mount in mounts:  # of several at one place, the last hides the others
        if path.is_relative_to(mount.folder) and (
            deepest is None or len(mount.folder.parts) >= len(deepest.folder.parts)
        ):
            deepest = mount
    return deepest.device if deepest is not None else None


# ---- what the kernel tells --------------------------------------------------------


def _swaps() -> list[os.stat_result]:
    found = []
    for line in (_read(SWAPS) or "").splitlines()[1:]:
        try:
            found.append(Path(plain_path(line.split()[0])).stat())
        except (OSError, IndexError):
            continue
    return found


def _number(node: Path) -> int | None:
    major, colon, minor = (_read(node / "dev") or "").partition(":")
    return os.makedev(int(major), int(minor)) if colon else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="surrogateescape").strip() or None
    except OSError:
        return None
