# SPDX-License-Identifier: Apache-2.0
"""The disks of this host, one after the other: `known_disks` finds them, `ask` asks their backends.

A disk is known by a state record of the state directory (or of one below it, where each backend has its own),
or by a control socket in the place that sockets have by name. A record's backend is the process that holds
the record's lock, and it listens where the link beside the record leads, else in the place that its socket
has by the record's name. Where the lock is held, nobody else is asked, whatever listens there
(control/found_socket.py).

Nothing that a disk's backend has said, or put in its place, is looked up but by a thread that is not waited
for beyond ANSWER_S: it may lead to a file system that hangs."""

import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio

from vhostsync.control.client import RefusedError, ask_once
from vhostsync.control.found_socket import Control, FoundSocket
from vhostsync.errors import ControlError, StateRecordError
from vhostsync.host.errands import ask_unless_cancelled
from vhostsync.host.flocks import Flocks, the_one
from vhostsync.lineage_name import control_below, control_of, is_lineage_name, runtime_directory
from vhostsync.record.names import Lineage, Names, find_name, state_directories
from vhostsync.record.record_report import linked_socket, records_in, socket_by_command
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_index import default_directory
from vhostsync.record.state_record import StateRecord

ASKED_AT_ONCE: Final = 64
ANSWER_S: Final = 5.0
AGAIN_S: Final = (0.1, 0.2, 0.3)
"""After so long each it is looked again for a disk that seems to be between two backends."""
SETTLED_S: Final = 1.0
"""Who begins or ends has written the record less than so long ago, and is to be looked at again."""

Answer = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HostDisk:
    """One disk of this host. `name` and `group` are those that `vhostsync create` has given it; `record` is
    None where nothing could be read. `control`: where its backend listens. `status` and `mirror` are what it
    has answered (query-status, query-mirror); None: none runs, or it does not answer (`problem`). `in_use`: a
    process holds the record's lock. `place`: which record the backend says that it uses."""

    name: str | None = None
    group: str | None = None
    record_path: Path | None = None
    record: StateRecord | None = None
    in_use: bool = False
    settled: bool = True
    control: Control | None = None
    place: str | None = None
    status: Answer | None = None
    mirror: Answer | None = None
    problem: str | None = None

    @property
    def running(self) -> bool:
        return self.status is not None

    @property
    def nobody_listens(self) -> bool:
        return self.status is None and self.problem is None and self.record_path is not None

    @property
    def shown_name(self) -> str:
        """What people call it: its name, else what its backend is called, else the record."""
        if self.name is not None:
            return self.name
        label = str(self.status["name"]) if self.status is not None else ""
        if label or self.record_path is None:
            return label or str(self.control)
        return self.record_path.name

    @property
    def state(self) -> str:
        """Of the mirror, where a backend runs; else `stopped`, or `unknown` where it cannot be told."""
        if self.mirror is not None:
            return str(self.mirror["state"])
        return "stopped" if self.problem is None else "unknown"

    @property
    def disk(self) -> str | None:
        """The current one."""
        if self.status is not None:
            return str(self.status["disk"])
        return self.record.current.path if self.record is not None else None

    @property
    def other(self) -> str | None:
        """The destination, or the last one."""
        if self.mirror is not None:
            return None if self.mirror["destination"] is None else str(self.mirror["destination"])
        peer = self.record.peer if self.record is not None else None
        return peer.path if peer is not None else None

    @property
    def worth(self) -> str | None:
        """Of that, if the current disk were lost now."""
        if self.mirror is not None:
            return None if self.mirror["worth"] is None else str(self.mirror["worth"])
        worth = self.record.peer_worth if self.record is not None else None
        return str(worth) if worth is not None else None

    @property
    def guest(self) -> str | None:
        """`runs` (it has the disk in use), `connected`, `none`; None: no backend runs."""
        if self.status is None:
            return None
        if self.status["active"]:
            return "runs"
        return "connected" if self.status["frontends"] else "none"

    def in_json(self) -> dict[str, Any]:
        mirror = self.mirror or {}
        return {
            "name": self.name,
            "group": self.group,
            "label": self.shown_name,
            "running": self.running,
            "state": self.state,
            "disk": self.disk,
            "other": self.other,
            "worth": self.worth,
            "guest": self.guest,
            "lag-bytes": mirror.get("lag-bytes"),
            "lag-ms": mirror.get("lag-ms"),
            "capacity": self.status["capacity"] if self.status is not None else None,
            "copy-bytes-done": mirror.get("copy-bytes-done"),
            "copy-bytes-total": mirror.get("copy-bytes-total"),
            "copy-remaining-s": mirror.get("copy-remaining-s"),
            "last-error": mirror.get("last-error"),
            "control": str(self.control) if self.control is not None else None,
            "record": str(self.record_path) if self.record_path is not None else None,
            "problem": self.problem,
        }


# ---- which there are ------------------------------------------------------------------


def known_disks(state: Path | None = None, runtime: Path | None = None) -> list[HostDisk]:
    """All of them, none asked yet; by name, those without one last. Blocks. StateRecordError where the state
    directory cannot be read."""
    runtime = runtime if runtime is not None else runtime_directory()
    flocks = Flocks()
    found: list[HostDisk] = []
    for directory in state_directories(state if state is not None else default_directory()):
        try:
            records, names = records_in(directory), Names(directory).all()
        except StateRecordError as error:
            found.append(HostDisk(record_path=directory, problem=str(error)))
            continue
        of_record = {each.record.name: each for each in names}
        found += [_recorded(path, of_record.get(path.name), flocks, runtime) for path in records]
        there = {path.name for path in records}
        found += [_lost(each) for each in names if each.record.name not in there]
    listening = {str(each.control) for each in found}
    found += [
        HostDisk(control=FoundSocket(path)) for path in control_sockets(runtime) if str(path) not in listening
    ]
    return sorted(found, key=lambda each: (each.name is None, each.name or each.shown_name))


def _recorded(path: Path, lineage: Lineage | None, flocks: Flocks, runtime: Path) -> HostDisk:
    disk = HostDisk(record_path=path)
    if lineage is not None:
        disk = replace(disk, name=lineage.name, group=lineage.group)
    try:
        disk = replace(disk, record=StateFile(path).load())
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
        return abs(time.time() - record.stat().st_mtime) > SETTLED_S
    except OSError:
        return True


def _find_socket(record: Path, by_name: Path | None, holders: frozenset[int]) -> FoundSocket | None:
    """Of the record's backend. What lies in the place of the name may be left over."""
    stands = by_name is not None and _is_socket(by_name)
    if not holders:
        return FoundSocket(by_name) if by_name is not None and stands else None
    place = linked_socket(record)
    if place is None and stands:
        place = by_name
    if place is None and (process := the_one(holders)) is not None:
        place = socket_by_command(process)
    return FoundSocket(place, _lock_of(record), holders) if place is not None else None


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
    """Where the backend of this name listens, or would. Blocks. ConfigError."""
    place = control_of(name)
    try:
        record = find_name(name, default_directory()).record if is_lineage_name(name) else None
    except StateRecordError:
        record = None  # a name that only its backend has
    if record is None:
        return FoundSocket(place)
    return _find_socket(record, place, Flocks().holders_of(_lock_of(record))) or FoundSocket(place)


# ---- what their backends say -----------------------------------------------------------


async def ask(disks: Sequence[HostDisk]) -> list[HostDisk]:
    """The same, with what their backends say of themselves, so many at once."""
    asked = list(disks)
    limit = anyio.CapacityLimiter(ASKED_AT_ONCE)

    async def ask_one(at: int) -> None:
        async with limit:
            asked[at] = await _ask(asked[at])

    async with anyio.create_task_group() as tasks:
        for at, disk in enumerate(asked):
            if disk.control is not None:
                tasks.start_soon(ask_one, at)
    held = {_real(each.record_path) for each in disks if _is_held(each)}
    return _each_once(asked, held)


async def host_disks() -> list[HostDisk]:
    """All disks of this host, as they are now. StateRecordError."""
    disks = await ask(await ask_unless_cancelled(known_disks))
    for pause_s in AGAIN_S:
        if not any(each.nobody_listens and (each.in_use or not each.settled) for each in disks):
            break
        await anyio.sleep(pause_s)
        disks = await ask(await ask_unless_cancelled(known_disks))
    return list(map(_not_as_stopped, disks))


def _not_as_stopped(disk: HostDisk) -> HostDisk:
    if not disk.nobody_listens or not disk.in_use:
        return disk
    return replace(
        disk, problem="a process holds its record, and nobody listens: its backend begins or ends just now "
        "(vhostsync record names the process)",
    )  # fmt: skip


async def _ask(disk: HostDisk) -> HostDisk:
    assert disk.control is not None
    try:
        with anyio.fail_after(ANSWER_S):
            status, mirror = await ask_once(disk.control, "query-status", "query-mirror")
            place = await _place_said(disk, status)
    except TimeoutError:
        return replace(disk, problem=f"the backend at {disk.control} does not answer")
    except ControlError as error:
        if isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError):
            return replace(disk, control=None)  # a socket that its backend has left behind
        return replace(disk, problem=str(error))
    if isinstance(status, Mapping) and "receiver" in status:
        return replace(disk, control=None)  # the receiver of another host's disk
    for answer in (status, mirror):
        if isinstance(answer, RefusedError):
            return replace(disk, problem=str(answer))
    if (wrong := _not_in_form(status, _STATUS) or _not_in_form(mirror, _MIRROR)) is not None:
        return replace(disk, problem=f"the backend at {disk.control} answers with what is no {wrong}")
    return replace(disk, status=status, mirror=mirror, place=place)


async def _place_said(disk: HostDisk, status: Any) -> str | None:
    """The record that the backend says it uses: where that is in truth."""
    said = status.get("record") if isinstance(status, Mapping) else None
    if said is None or not _is_text(said):
        return None
    if said == str(disk.record_path):
        return _real(disk.record_path)
    return await ask_unless_cancelled(partial(os.path.realpath, said))


# A backend may have been taken over by its guest: what it says costs no other disk its line.


def _is_text(value: Any) -> bool:
    """One that may be a path."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1 << 64


def _are_counts(value: Any) -> bool:
    writes = value.get("source-generation") if isinstance(value, Mapping) else ""
    return writes is None or _is_number(writes)


_Form = Mapping[str, tuple[Callable[[Any], bool], bool]]
"""By the name: whether it is one, and whether there may be none."""
_STATUS: Final[_Form] = {
    "name": (_is_text, False), "disk": (_is_text, False), "active": (_is_number, False),
    "frontends": (_is_number, False), "capacity": (_is_number, False), "record": (_is_text, True),
}  # fmt: skip
_MIRROR: Final[_Form] = {
    "state": (_is_text, False), "destination": (_is_text, True), "worth": (_is_text, True),
    "lag-bytes": (_is_number, False), "lag-ms": (_is_number, False), "counts": (_are_counts, False),
    "copy-bytes-done": (_is_number, False), "copy-bytes-total": (_is_number, False),
    "copy-rate-bytes-per-s": (_is_number, False), "copy-remaining-s": (_is_number, True),
    "reason": (_is_text, True), "last-error": (_is_text, True),
}  # fmt: skip


def _not_in_form(answer: Any, form: _Form) -> str | None:
    """What of it is missing, or is not what it should be."""
    if not isinstance(answer, Mapping):
        return "answer"
    for name, (fits, may_be_none) in form.items():
        value = answer.get(name)
        if not (may_be_none if value is None else fits(value)):
            return name
    return None


def _is_held(disk: HostDisk) -> bool:
    """Whether a process holds the record's lock. Then nobody else is asked (found_socket.py)."""
    return isinstance(disk.control, FoundSocket) and disk.control.lock is not None


def _each_once(disks: list[HostDisk], held: Set[str | None]) -> list[HostDisk]:
    """What answers at the place of a name may be the backend of another record: each answer goes to the
    record that its backend names, and what is left has none. But of a record that is `held`, the answer is
    that of its holder, who may say what he will: commands go where an answer has come from."""
    records = [_real(each.record_path) for each in disks]
    named = [_record_of_answer(each, own, held) for each, own in zip(disks, records, strict=True)]
    answers = {place: each for each, place in zip(disks, named, strict=True) if place is not None}
    known = set(records)
    found = []
    for disk, own, place in zip(disks, records, named, strict=True):
        if own is not None:
            found.append(_with_answer(disk, answers.get(own)))
        if disk.status is not None and (place is None or place not in known):
            found.append(HostDisk(control=disk.control, status=disk.status, mirror=disk.mirror))
        if disk.record_path is None and disk.problem is not None:
            found.append(disk)
    return found


def _with_answer(disk: HostDisk, theirs: HostDisk | None) -> HostDisk:
    if theirs is None:
        return disk if disk.status is None else replace(disk, control=None, status=None, mirror=None)
    return replace(disk, control=theirs.control, status=theirs.status, mirror=theirs.mirror, problem=None)


def _record_of_answer(disk: HostDisk, own: str | None, held: Set[str | None]) -> str | None:
    """The record that the backend names; one of an earlier version names none, and is believed to use that in
    whose place it was found, its `own`."""
    if disk.status is None:
        return None
    if "record" not in disk.status or (own is not None and own in held):
        return own
    return None if disk.place in held else disk.place


def _real(path: Path | None) -> str | None:
    return None if path is None else os.path.realpath(path)
