# SPDX-License-Identifier: Apache-2.0
"""The disks of this host, one after the other: `known_disks` finds them, `ask` asks their backends.

A disk is known by a state record of the state directory (or of one below it, where each backend has its own),
or by a control socket in the place that sockets have by name. A record's backend is the process that holds
the record's lock, and it listens in the place that its socket has by the record's name, else where the link
beside the record leads. Where the lock is held, nobody else is asked, whatever listens there
(control/found_socket.py).

What a disk's backend has said, or has put in a directory of its own, may lead to a file system that hangs. No
record or name there that is a link is followed, and a socket or a record that it names is looked up by a
thread that is not waited for beyond ANSWER_S."""

import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio

from vhostsync.control import qmp
from vhostsync.control.client import LostError, RefusedError, ask_found
from vhostsync.control.found_socket import Control, FoundSocket
from vhostsync.errors import ControlError, StateRecordError
from vhostsync.host.errands import ask_unless_cancelled
from vhostsync.host.flocks import Flocks, the_one
from vhostsync.lineage_name import control_below, control_of, is_lineage_name, runtime_directory
from vhostsync.record.names import Lineage, Names, all_names, find_name, names_of
from vhostsync.record.record_report import linked_socket, records_in, socket_by_command
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_index import default_directory
from vhostsync.record.state_record import StateRecord, Worth
from vhostsync.typed_fields import is_text

ASKED_AT_ONCE: Final = 64
ANSWER_S: Final = 5.0
AGAIN_S: Final = (0.1, 0.2, 0.3)
"""After so long each it is looked again for a disk that seems to be between two backends."""
ALL_AGAIN_S: Final = 1.0
"""And for so long in all: one of them may hang."""
SETTLED_S: Final = 1.0
"""Who begins or ends has written the record less than so long ago, and is to be looked at again."""

Answer = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HostDisk:
    """One disk of this host. `name` and `group` are those that `vhostsync create` has given it; `record` is
    None where nothing could be read. `control`: where its backend listens. `status` and `mirror` are what it
    has answered (query-status, query-mirror); None: none runs, or it does not answer (`problem`). `in_use`: a
    process holds the record's lock. `settled`: it was not written just now. `passing`: why there was no
    answer, where there may be one in a moment. `real_record`: where the record is in truth, and `said`: where
    that is of which the backend says that it uses it."""

    name: str | None = None
    group: str | None = None
    record_path: Path | None = None
    record: StateRecord | None = None
    in_use: bool = False
    settled: bool = True
    real_record: str | None = None
    control: Control | None = None
    passing: str | None = None
    said: str | None = None
    status: Answer | None = None
    mirror: Answer | None = None
    problem: str | None = None

    @property
    def running(self) -> bool:
        return self.status is not None

    @property
    def own(self) -> str | None:
        """Its record, as it is told from others."""
        if self.real_record is not None or self.record_path is None:
            return self.real_record
        return str(self.record_path)

    def may_come_back(self, looked: int) -> bool:
        """It seems to be between two backends, after so many looks. (One that has no control socket at all is
        not waited for.)"""
        silent = self.status is None and self.problem is None and self.record_path is not None
        begins = self.in_use and self.control is None and looked == 1
        return self.passing is not None or (silent and (begins or not self.settled))

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
    known = {place for each in found for place in _places(each.control)}
    found += [HostDisk(control=FoundSocket(path)) for path in listening if path not in known]
    return sorted(found, key=lambda each: (each.name is None, each.name or each.shown_name))


def _places(control: Control | None) -> Sequence[Path]:
    if isinstance(control, FoundSocket):
        return control.places
    return () if control is None else (control,)


def _found_again(disks: Sequence[HostDisk]) -> list[HostDisk]:
    """Those with a record, as they are by now. Blocks."""
    base, runtime, flocks = default_directory(), runtime_directory(), Flocks()
    found = []
    for disk in disks:
        path = disk.record_path
        assert path is not None
        lineage = Lineage(disk.name, path, disk.group) if disk.name is not None else None
        found.append(_recorded(names_of(path.parent, base), path, lineage, flocks, runtime))
    return found


def _recorded(
    names: Names, path: Path, lineage: Lineage | None, flocks: Flocks, runtime: Path
) -> HostDisk:
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
    """The same, with what their backends say of themselves."""
    asked = list(disks)
    await _ask_each(dict(enumerate(disks)), asked)
    return _each_once(asked)


async def _ask_each(disks: Mapping[int, HostDisk], asked: list[HostDisk]) -> None:
    """So many at once. Each goes into its place in `asked` once it has answered."""
    limit = anyio.CapacityLimiter(ASKED_AT_ONCE)

    async def ask_one(at: int, disk: HostDisk) -> None:
        async with limit:
            asked[at] = await _ask(disk)

    async with anyio.create_task_group() as tasks:
        for at, disk in disks.items():
            if disk.control is not None:
                tasks.start_soon(ask_one, at, disk)
            else:
                asked[at] = disk


async def host_disks() -> list[HostDisk]:
    """All disks of this host, as they are now. StateRecordError, ControlError."""
    try:
        disks = await ask_unless_cancelled(known_disks)
        await _ask_each(dict(enumerate(disks)), disks)
        with anyio.move_on_after(ALL_AGAIN_S):
            for looked, pause_s in enumerate(AGAIN_S, start=1):
                unclear = [at for at, disk in enumerate(disks) if disk.may_come_back(looked)]
                if not unclear:
                    break
                await anyio.sleep(pause_s)
                found = await ask_unless_cancelled(partial(_found_again, [disks[at] for at in unclear]))
                await _ask_each(dict(zip(unclear, found, strict=True)), disks)
    except OSError as error:
        raise ControlError(f"The disks of this host cannot be looked for: {error.strerror}.") from error
    return _each_once(list(map(_not_as_stopped, disks)))


def _not_as_stopped(disk: HostDisk) -> HostDisk:
    if disk.status is not None or disk.problem is not None or not disk.in_use:
        return disk
    return replace(disk, problem=disk.passing or "its backend runs, and has no control socket to be asked at")


async def _ask(disk: HostDisk) -> HostDisk:
    assert disk.control is not None
    try:
        with anyio.fail_after(ANSWER_S):
            control, (status, mirror) = await ask_found(disk.control, "query-status", "query-mirror")
            said = await _record_said(disk, status)
    except TimeoutError:
        return replace(disk, problem=f"the backend at {disk.control} does not answer")
    except LostError as error:
        return replace(disk, problem=str(error), passing=str(error) if disk.record_path else None)
    except ControlError as error:
        if isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError):
            # A socket that its backend has left behind; or it begins or ends just now.
            place = error.__cause__.filename or disk.control
            passing = f"a process holds its record, and nobody listens at {place}"
            return replace(disk, control=None, passing=passing if disk.in_use else None)
        return replace(disk, problem=str(error))
    except OSError as error:
        return replace(disk, problem=f"it cannot be asked: {error.strerror}")
    if isinstance(status, Mapping) and "receiver" in status:
        return replace(disk, control=None)  # the receiver of another host's disk
    for answer in (status, mirror):
        if isinstance(answer, RefusedError):
            going = str(answer) == qmp.GOING_DOWN and disk.record_path is not None
            return replace(disk, problem=str(answer), passing=str(answer) if going else None)
    if (wrong := _not_in_form(status, _STATUS) or _not_in_form(mirror, _MIRROR)) is not None:
        return replace(disk, problem=f"the backend at {disk.control} answers with what is no {wrong}")
    return replace(disk, control=control, status=status, mirror=mirror, said=said)


async def _record_said(disk: HostDisk, status: Any) -> str | None:
    """The record that the backend says it uses: where that is in truth."""
    said = status.get("record") if isinstance(status, Mapping) else None
    if said is None or not is_text(said):
        return None
    if said == str(disk.record_path):
        return disk.own
    return await ask_unless_cancelled(partial(os.path.realpath, said))


# A backend may have been taken over by its guest: what it says costs no other disk its line.


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1 << 64


def _is_worth(value: Any) -> bool:
    return value in list(Worth)


def _are_counts(value: Any) -> bool:
    writes = value.get("source-generation") if isinstance(value, Mapping) else ""
    return writes is None or _is_number(writes)


_Form = Mapping[str, tuple[Callable[[Any], bool], bool]]
"""By the name: whether it is one, and whether there may be none."""
_STATUS: Final[_Form] = {
    "name": (is_text, False), "disk": (is_text, False), "active": (_is_number, False),
    "frontends": (_is_number, False), "capacity": (_is_number, False), "record": (is_text, True),
}  # fmt: skip
_MIRROR: Final[_Form] = {
    "state": (is_text, False), "destination": (is_text, True), "worth": (_is_worth, True),
    "lag-bytes": (_is_number, False), "lag-ms": (_is_number, False), "counts": (_are_counts, False),
    "copy-bytes-done": (_is_number, False), "copy-bytes-total": (_is_number, False),
    "copy-rate-bytes-per-s": (_is_number, False), "copy-remaining-s": (_is_number, True),
    "reason": (is_text, True), "last-error": (is_text, True),
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


def _each_once(disks: list[HostDisk]) -> list[HostDisk]:
    """What answers at the place of a name may be the backend of another record: each answer goes to the
    record that its backend names, and what is left has none. But of a record that is held, the answer is
    that of its holder, who may say what he will: commands go where an answer has come from. And who runs
    elsewhere than in a record's place is not its backend while no process holds it."""
    held = {each.own for each in disks if _is_held(each)}
    used = {each.own for each in disks if each.in_use}
    records = [each.own for each in disks]
    named = [_record_of_answer(each, held, used) for each in disks]
    taken = {place for each in disks if each.record_path is not None for place in _places(each.control)}
    answers = {place: each for each, place in zip(disks, named, strict=True) if place is not None}
    known = set(records)
    found = []
    for disk, own, place in zip(disks, records, named, strict=True):
        if own is not None:
            found.append(_with_answer(disk, answers.get(own)))
        if own is None and disk.control is not None and taken.intersection(_places(disk.control)):
            continue  # it was asked in the place of its record, too, which was found later
        if disk.status is not None and (place is None or place not in known):
            found.append(HostDisk(control=disk.control, status=disk.status, mirror=disk.mirror))
        if disk.record_path is None and disk.problem is not None:
            found.append(disk)
    return found


def _with_answer(disk: HostDisk, theirs: HostDisk | None) -> HostDisk:
    if theirs is None:
        return disk if disk.status is None else replace(disk, control=None, status=None, mirror=None)
    return replace(disk, control=theirs.control, status=theirs.status, mirror=theirs.mirror, problem=None)


def _record_of_answer(disk: HostDisk, held: Set[str | None], used: Set[str | None]) -> str | None:
    """The record that the backend names; one of an earlier version names none, and is believed to use that in
    whose place it was found, its own."""
    own = disk.own
    if disk.status is None:
        return None
    if "record" not in disk.status or (own is not None and own in held):
        return own
    return disk.said if disk.said == own or (disk.said in used and disk.said not in held) else None
