# SPDX-License-Identifier: Apache-2.0
"""Which disks this host has, and where their backends listen; nobody is asked anything here, and everything
blocks.

A disk is known by a state record of the state directory (or of one below it, where each backend has its own),
or by a control socket in the place that sockets have by name. A record's backend is the process that holds
the record's lock, and it listens in the place that its socket has by the record's name, else where the link
beside the record leads. Where the lock is held, nobody else is asked, whatever listens there
(control/found_socket.py).

What a disk's backend has put in a directory of its own may lead to a file system that hangs: no record or
name there that is a link is followed."""

import stat
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from vhostsync.control.found_socket import AGAIN_S, FoundSocket
from vhostsync.errors import StateRecordError
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.host.flocks import Flocks, the_one
from vhostsync.lineage_name import control_below, control_of, is_lineage_name, runtime_directory
from vhostsync.record.names import Lineage, Names, all_names, find_name, names_of
from vhostsync.record.record_report import linked_socket, records_in, socket_by_command
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_index import default_directory

SETTLED_S: Final = 1.0
"""Who begins or ends has written the record less than so long ago, and is to be looked at again."""


def known_disks(state: Path | None = None, runtime: Path | None = None) -> list[HostDisk]:
    """All of them, none asked yet; by name, those without one last. Blocks. StateRecordError where the state
    directory cannot be read."""
    runtime = runtime if runtime is not None else runtime_directory()
    # In the order in which a backend begins from the end: one that listens by now is seen to hold its record.
    listening = control_sockets(runtime)
    flocks = Flocks()
    found: list[HostDisk] = []
    for names in all_names(state if state is not None else default_directory()):
        try:
            records, lineages = records_in(names.directory), names.all()
        except StateRecordError as error:
            found.append(HostDisk(record_path=names.directory, problem=str(error)))
            continue
        of_record = {each.record.name: each for each in lineages}
        found += [_recorded(names, path, of_record.get(path.name), flocks, runtime) for path in records]
        there = {path.name for path in records}
        found += [_lost(each) for each in lineages if each.record.name not in there]
    known = {place for each in found for place in each.places}
    found += [HostDisk(control=FoundSocket(path)) for path in listening if path not in known]
    return sorted(found, key=lambda each: (each.name is None, each.name or each.shown_name))


def settled_disks(patience_s: float) -> list[HostDisk]:
    """As `known_disks`, but none is called stopped that is between two backends; for that it waits so long at
    most. Blocks."""
    disks = known_disks()
    for pause_s in AGAIN_S:
        unclear = [at for at, disk in enumerate(disks) if disk.control is None and not disk.settled]
        patience_s -= pause_s
        if not unclear or patience_s < 0:
            break
        time.sleep(pause_s)
        again = found_again([disks[at] for at in unclear])
        for at, disk in zip(unclear, again, strict=True):
            disks[at] = disk
    # What listened in the place of a name may be the backend of a record that was found to have it later.
    taken = {place for each in disks if each.record_path is not None for place in each.places}
    return [each for each in disks if each.record_path is not None or taken.isdisjoint(each.places)]


def found_again(
    disks: Sequence[HostDisk], state: Path | None = None, runtime: Path | None = None
) -> list[HostDisk]:
    """Those with a record, as they are by now. Blocks."""
    base = state if state is not None else default_directory()
    runtime = runtime if runtime is not None else runtime_directory()
    flocks, found = Flocks(), []
    for disk in disks:
        path = disk.record_path
        assert path is not None
        lineage = Lineage(disk.name, path, disk.group) if disk.name is not None else None
        found.append(_recorded(names_of(path.parent, base), path, lineage, flocks, runtime))
    return found


def _recorded(names: Names, path: Path, lineage: Lineage | None, flocks: Flocks, runtime: Path) -> HostDisk:
    disk = HostDisk(record_path=path, real_record=names.real(path))
    if lineage is not None:
        disk = replace(disk, name=lineage.name, group=lineage.group)
    try:
        disk = replace(disk, record=StateFile(path, files=names.files).load())
    except StateRecordError as error:
        disk = replace(disk, problem=str(error))
    by_name = control_below(runtime, lineage.name) if lineage is not None else None
    holders = flocks.holders_of(_lock_of(path))
    control = _find_socket(path, by_name, holders)
    return replace(disk, in_use=bool(holders), settled=_is_settled(path), control=control)


def _lock_of(record: Path) -> Path:
    return Path(f"{record}.lock")


def _is_settled(record: Path) -> bool:
    try:
        return abs(time.time() - record.lstat().st_mtime) > SETTLED_S
    except OSError:
        return True


def _find_socket(record: Path, by_name: Path | None, holders: frozenset[int]) -> FoundSocket | None:
    """Of the record's backend: what lies in the place of its name may be left over, and so may the link."""
    places = [by_name] if by_name is not None and _is_socket(by_name) else []
    if holders:
        told = linked_socket(record)
        if told is None and (process := the_one(holders)) is not None:
            told = socket_by_command(process)
        places += [told] if told is not None and told not in places else []
    if not places:
        return None
    if not holders:
        return FoundSocket(places[0])
    return FoundSocket(places[0], _lock_of(record), holders, tuple(places[1:]))


def _lost(lineage: Lineage) -> HostDisk:
    return HostDisk(
        name=lineage.name, group=lineage.group, record_path=lineage.record,
        problem=f"the state record {lineage.record} is missing; restore it, or vhostsync record --name "
        f"{lineage.name} --forget",
    )  # fmt: skip


def control_sockets(runtime: Path) -> list[Path]:
    """Of all backends that have their place by name."""
    try:
        folders = sorted(runtime.iterdir())
    except OSError:
        return []
    return [each / "control" for each in folders if _is_socket(each / "control")]


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


def find_control(name: str) -> FoundSocket:
    """Where the backend of this name listens, or would. Blocks: where it seems to be between two processes,
    until the next one listens, but not for long. ConfigError."""
    place = control_of(name)
    for pause_s in AGAIN_S:
        found, settled = _find_control(name, place)
        # One that is elsewhere is not looked at: a link may lead to a file system that hangs.
        if found.path != place or _is_socket(place) or (settled and found.lock is None):
            return found
        time.sleep(pause_s)
    return _find_control(name, place)[0]


def _find_control(name: str, place: Path) -> tuple[FoundSocket, bool]:
    """And whether its record was not written just now. `place`: where it has its socket by the name."""
    try:
        record = find_name(name, default_directory()).record if is_lineage_name(name) else None
    except StateRecordError:
        record = None  # a name that only its backend has
    if record is None:
        return FoundSocket(place), True
    found = _find_socket(record, place, Flocks().holders_of(_lock_of(record)))
    return found or FoundSocket(place), _is_settled(record)
