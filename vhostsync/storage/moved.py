# SPDX-License-Identifier: Apache-2.0
"""A block device that a record knows may have another name after a boot (/dev/sdb is /dev/sdc). What the
hardware calls itself finds it again. Everything here blocks."""

import os
from pathlib import Path
from typing import Final

from vhostsync.storage.identify import identify
from vhostsync.storage.identity import DiskIdentity, same
from vhostsync.storage.layers import block_identifiers, lasting_place, loop_backing

NODES: Final = Path("/sys/class/block")


def name_today(disk: DiskIdentity) -> str:
    """Its path, unless that certainly leads to another device by now, or to none, and exactly one other
    device is the disk: then that one's."""
    if disk.kind != "block" or _is(disk, Path(disk.path)) is not False:
        return disk.path
    found = [path for path in map(_device, sorted(NODES.iterdir())) if path and _is(disk, path)]
    return str(found[0]) if len(found) == 1 else disk.path


def _device(node: Path) -> Path | None:
    path = Path("/dev") / node.name.replace("!", "/")
    return path if path.is_block_device() else None


def _is(disk: DiskIdentity, path: Path) -> bool | None:
    """None: it cannot be told. Only what may be the disk is opened: a device may hang who opens it."""
    try:
        number = path.stat().st_rdev
    except OSError:
        return False
    if number != disk.device and not _may_be(disk, number, path):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return same(disk, identify(fd, path))
    except OSError:
        return None
    finally:
        os.close(fd)


def _may_be(disk: DiskIdentity, number: int, path: Path) -> bool:
    names = block_identifiers(number)
    known = [(disk.wwn, names.wwn), (disk.serial, names.serial), (disk.place, lasting_place(number, path))]
    loops = (disk.serial or "").startswith("loop-file:") and loop_backing(number) is not None
    return loops or any(mine is not None and mine == theirs for mine, theirs in known)
