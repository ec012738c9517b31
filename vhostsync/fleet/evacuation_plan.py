# SPDX-License-Identifier: Apache-2.0
"""What an evacuation has to do: which disks of the host lie at a place, and where each of them goes. Nothing
is changed here.

Where a name leads to is asked of a file system that may hang, so once for each name, by a thread that nobody
waits for beyond LOOK_S; what is not told then, is not known of that disk alone."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from vhostsync.errors import ConfigError, VhostsyncError
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.host.errands import ask_unless_cancelled
from vhostsync.storage.file import is_in_dev
from vhostsync.storage.kinds import absolute_name, is_absolute

LOOK_S: Final = 2.0
LOOKS_AT_ONCE: Final = 64


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


@dataclass(frozen=True)
class _Lies:
    """Of what has one name: whether it lies at the place, directly in the target, and is a file."""

    there: bool
    in_target: bool
    is_file: bool


async def plan_moves(disks: Iterable[HostDisk], where: str, to: str) -> list[Move]:
    """The disks that lie at `where` (a directory, a mount, or what names of disks begin with: `rbd:pool`),
    each with its destination in `to` (a directory, or `rbd:POOL`). A disk of which nothing can be told
    is among them, for it may lie there. ConfigError."""
    all_disks = list(disks)
    try:
        with anyio.fail_after(LOOK_S):
            to = await ask_unless_cancelled(partial(_target, where, to))
    except TimeoutError as error:
        raise ConfigError(f"{where} or --to {to} lies on a file system that does not answer.") from error
    names = {name for disk in all_disks for name in (disk.disk, disk.other) if name is not None}
    moves = _moves(all_disks, await _look_at(names, where, to), to)
    if not moves and where.startswith("/"):
        with anyio.move_on_after(LOOK_S):
            if not await ask_unless_cancelled(partial(os.path.lexists, where)):
                raise ConfigError(f"There is no {where}, and no disk of this host is known to lie there.")
    return moves


async def _look_at(names: Collection[str], where: str, to: str) -> Mapping[str, _Lies]:
    """What could be told in time. All in one thread, and by themselves those that it has not come to."""
    found: dict[str, _Lies] = {}

    def look_at_all() -> None:
        for name in names:
            found[name] = _look(name, where, to)

    with anyio.move_on_after(LOOK_S):
        await ask_unless_cancelled(look_at_all)
        return found
    told, limit = dict(found), anyio.CapacityLimiter(LOOKS_AT_ONCE)

    async def look_at(name: str) -> None:
        async with limit:
            with anyio.move_on_after(LOOK_S):
                told[name] = await ask_unless_cancelled(partial(_look, name, where, to))

    async with anyio.create_task_group() as tasks:
        for name in names - told.keys():
            tasks.start_soon(look_at, name)
    return told


def _look(name: str, where: str, to: str) -> _Lies:
    """Blocks."""
    is_file = name.startswith("/") and not Path(name).is_block_device()
    return _Lies(lies_at(name, where), _lies_in(name, to), is_file)


def _moves(disks: list[HostDisk], lies: Mapping[str, _Lies], to: str) -> list[Move]:
    moves: list[Move] = []
    for disk in disks:
        if disk.disk is None:
            moves.append(Move(disk, why_not=disk.problem or "it cannot be told which disk it has"))
        elif disk.disk not in lies:
            why = f"where {disk.disk} lies cannot be told: its file system does not answer"
            moves.append(Move(disk, why_not=why))
        elif lies[disk.disk].there:
            given = {move.destination for move in moves if move.destination is not None}
            moves.append(_move(disk, disks, lies, to, given))
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


def _target(where: str, to: str) -> str:
    to = _checked_target(to)
    here = to.startswith("/") and where.startswith("/")
    if here and _is_below(os.path.realpath(to), os.path.realpath(where)):
        raise ConfigError(f"--to {to} lies in {where} itself; name a place outside of it.")
    return to


def _checked_target(to: str) -> str:
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


def _move(
    disk: HostDisk, all_disks: list[HostDisk], lies: Mapping[str, _Lies], to: str, given: Collection[str]
) -> Move:
    assert disk.disk is not None
    if disk.status is None:
        return Move(disk, why_not=disk.problem or "no backend runs for it; start that, and evacuate again")
    if disk.status.get("read-only"):
        return Move(disk, why_not="it is served read-only, and such a disk has nothing to mirror")
    attached = disk.state in ("syncing", "steady", "ahead")
    is_begun = disk.other is not None and disk.other in lies and lies[disk.other].in_target
    if attached and disk.other is not None and not is_begun:
        return Move(disk, why_not=f"it is mirrored to {disk.other}; cancel that mirror first")
    if is_begun:
        return Move(disk, disk.other)  # by an earlier evacuation
    try:
        destination = absolute_name(_destination(disk, all_disks, lies, to), "--to")
    except VhostsyncError as error:
        return Move(disk, why_not=str(error))
    if destination in given:
        return Move(disk, why_not=f"another disk gets that name in {to}; mirror this one by hand")
    return Move(disk, destination)


def _lies_in(disk: str, to: str) -> bool:
    """Directly, as everything that an evacuation makes."""
    if to.startswith("rbd:") or disk.startswith("rbd:"):
        return disk.rpartition("/")[0] == to
    return disk.startswith("/") and os.path.realpath(Path(disk).parent) == os.path.realpath(to)


def _destination(disk: HostDisk, all_disks: list[HostDisk], lies: Mapping[str, _Lies], to: str) -> str:
    """By the name of the file; where another disk of this host has that, too, by the disk's own name beside
    it."""
    name = _file_name(disk.disk, lies, to)
    taken = {
        _file_name(place, lies, to)
        for other in all_disks
        if other is not disk
        for place in (other.disk, other.other)
        if place is not None and place in lies and (lies[place].there or lies[place].in_target)
    }
    if name in taken:
        stem, dot, suffix = name.rpartition(".")
        own = re.sub(r"[^A-Za-z0-9._-]+", "_", disk.name or disk.shown_name.removesuffix(".record.json"))
        name = f"{stem}-{own}{dot}{suffix}" if stem else f"{name}-{own}"
    return f"{to}/{name}"


def _file_name(disk: str | None, lies: Mapping[str, _Lies], to: str) -> str:
    """What it is called there: images of a pool have no suffix, and devices that become files get one."""
    name = (disk or "").rpartition("/")[2]
    if to.startswith("rbd:"):
        return re.sub(r"\.(img|raw)$", "", name)
    is_file = disk is not None and disk in lies and lies[disk].is_file
    return name if is_file or name.endswith((".img", ".raw")) else f"{name}.img"
