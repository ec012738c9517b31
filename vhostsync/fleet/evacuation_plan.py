# SPDX-License-Identifier: Apache-2.0
"""What an evacuation has to do: which disks of the host lie at a place, and where each of them goes. Nothing
is changed here, and everything blocks."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vhostsync.errors import ConfigError, VhostsyncError
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.storage.file import is_in_dev
from vhostsync.storage.kinds import absolute_name, is_absolute


@dataclass(frozen=True)
class Move:
    """One disk that lies there. `why_not`: it cannot be moved now, in words."""

    disk: HostDisk
    destination: str | None = None
    why_not: str | None = None

    @property
    def label(self) -> str:
        return self.disk.shown_name

    @property
    def bytes(self) -> int:
        """As far as it is known."""
        if self.disk.status is not None:
            return int(self.disk.status["capacity"])
        return self.disk.record.current.bytes if self.disk.record is not None else 0


def plan_moves(disks: Iterable[HostDisk], where: str, to: str) -> list[Move]:
    """The disks that lie at `where` (a directory, a mount, or what names of disks begin with: `rbd:pool`),
    each with its destination in `to` (a directory, or `rbd:POOL`). A disk of which nothing can be told
    is among them, for it may lie there. ConfigError."""
    all_disks = list(disks)
    to = _target(to)
    here = to.startswith("/") and where.startswith("/")
    if here and _is_below(os.path.realpath(to), os.path.realpath(where)):
        raise ConfigError(f"--to {to} lies in {where} itself; name a place outside of it.")
    moves = []
    for disk in all_disks:
        if disk.disk is None:
            moves.append(Move(disk, why_not=disk.problem or "it cannot be told which disk it has"))
        elif lies_at(disk.disk, where):
            moves.append(_move(disk, all_disks, where, to))
    return moves


def lies_at(disk: str, where: str) -> bool:
    """A file lies where its name leads to; a block device where it has its name, for all of them lie in /dev
    in the end."""
    if not where.startswith("/"):
        return disk.startswith(f"{where.rstrip('/')}/")
    if not disk.startswith("/"):
        return False
    place = os.path.realpath(where)
    if Path(disk).is_block_device():
        return _is_below(os.path.normpath(disk), os.path.normpath(where)) or _is_below(disk, place)
    return _is_below(os.path.realpath(disk), place)


def is_same_place(one: str, other: str) -> bool:
    """Whether both names lead to the same disk."""
    if one == other:
        return True
    paths = one.startswith("/") and other.startswith("/")
    return paths and os.path.realpath(one) == os.path.realpath(other)


def _is_below(path: str, directory: str) -> bool:
    return path == directory or Path(path).is_relative_to(directory)


def _target(to: str) -> str:
    if to.startswith("rbd:"):
        return to.rstrip("/")
    if is_absolute(to) and not to.startswith("/"):
        raise ConfigError(f"--to {to}: name a directory, or rbd:POOL.")
    path = Path(to).absolute()
    if not path.is_dir():
        raise ConfigError(f"--to {path} is no directory; make it, or mount what belongs there, first.")
    if is_in_dev(path):
        raise ConfigError(
            f"--to {path}: image files there would lie in memory, and be gone with a reboot; name a "
            f"directory of a disk, or mirror to each device by itself (vhostsync mirror start)."
        )
    return str(path)


def _move(disk: HostDisk, all_disks: list[HostDisk], where: str, to: str) -> Move:
    assert disk.disk is not None
    if disk.status is None:
        return Move(disk, why_not=disk.problem or "no backend runs for it; start that, and evacuate again")
    if disk.status.get("read-only"):
        return Move(disk, why_not="it is served read-only, and such a disk has nothing to mirror")
    attached = disk.state in ("syncing", "steady", "ahead")
    if attached and disk.other is not None and not _lies_in(disk.other, to):
        return Move(disk, why_not=f"it is mirrored to {disk.other}; cancel that mirror first")
    if disk.other is not None and _lies_in(disk.other, to):
        return Move(disk, disk.other)  # an earlier evacuation has begun it
    try:
        return Move(disk, absolute_name(_destination(disk, all_disks, where, to), "--to"))
    except VhostsyncError as error:
        return Move(disk, why_not=str(error))


def _lies_in(disk: str, to: str) -> bool:
    """Directly, as everything that an evacuation makes."""
    if to.startswith("rbd:") or disk.startswith("rbd:"):
        return disk.rpartition("/")[0] == to
    return disk.startswith("/") and os.path.realpath(Path(disk).parent) == os.path.realpath(to)


def _destination(disk: HostDisk, all_disks: list[HostDisk], where: str, to: str) -> str:
    """By the name of the file; where another disk of this host has that, too, by the disk's own name beside
    it."""
    name = _file_name(disk.disk, to)
    taken = {
        _file_name(place, to)
        for other in all_disks
        if other is not disk
        for place in (other.disk, other.other)
        if place is not None and (lies_at(place, where) or _lies_in(place, to))
    }
    if name in taken:
        stem, dot, suffix = name.rpartition(".")
        own = re.sub(r"[^A-Za-z0-9._-]+", "_", disk.name or disk.shown_name.removesuffix(".record.json"))
        name = f"{stem}-{own}{dot}{suffix}" if stem else f"{name}-{own}"
    return f"{to}/{name}"


def _file_name(disk: str | None, to: str) -> str:
    """What it is called there: images of a pool have no suffix, and devices that become files get one."""
    name = (disk or "").rpartition("/")[2]
    if to.startswith("rbd:"):
        return re.sub(r"\.(img|raw)$", "", name)
    is_file = (disk or "").startswith("/") and not Path(disk or "").is_block_device()
    return name if is_file or name.endswith((".img", ".raw")) else f"{name}.img"
