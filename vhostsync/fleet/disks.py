# SPDX-License-Identifier: Apache-2.0
"""The disks of this host, with what their backends say of themselves.

A disk's backend may hang, or have been taken over by its guest, and what it says may lead to a file system
that hangs. So each is asked by a task of its own, for ANSWER_S; what it answers is held against what it
should be; and a record that it names is looked up by a thread that nobody waits for beyond that. One that
seems to be between two backends is looked at again."""

import os
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio

from vhostsync.control import qmp
from vhostsync.control.client import LostError, RefusedError, ask_found
from vhostsync.control.found_socket import AGAIN_S
from vhostsync.errors import ControlError
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.fleet.known_disks import found_again, known_disks
from vhostsync.host.errands import ask_unless_cancelled
from vhostsync.record.state_record import Worth
from vhostsync.typed_fields import is_text

ASKED_AT_ONCE: Final = 64
ANSWER_S: Final = 5.0
ALL_AGAIN_S: Final = 1.0
"""How long it is looked again for disks that seem to be between two backends: one of them may hang."""



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


async def host_disks(state: Path | None = None, runtime: Path | None = None) -> list[HostDisk]:
    """All disks of this host, as they are now. StateRecordError, ControlError."""
    try:
        disks = await ask_unless_cancelled(partial(known_disks, state, runtime))
        await _ask_each(dict(enumerate(disks)), disks)
        with anyio.move_on_after(ALL_AGAIN_S):
            for looked, pause_s in enumerate(AGAIN_S, start=1):
                unclear = [at for at, disk in enumerate(disks) if disk.may_come_back(looked)]
                if not unclear:
                    break
                await anyio.sleep(pause_s)
                look = partial(found_again, [disks[at] for at in unclear], state, runtime)
                await _ask_each(dict(zip(unclear, await ask_unless_cancelled(look), strict=True)), disks)
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
    if (wrong := not_in_form(status, _STATUS) or not_in_form(mirror, MIRROR)) is not None:
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
MIRROR: Final[_Form] = {
    "state": (is_text, False), "destination": (is_text, True), "worth": (_is_worth, True),
    "lag-bytes": (_is_number, False), "lag-ms": (_is_number, False), "counts": (_are_counts, False),
    "copy-bytes-done": (_is_number, False), "copy-bytes-total": (_is_number, False),
    "copy-rate-bytes-per-s": (_is_number, False), "copy-remaining-s": (_is_number, True),
    "reason": (is_text, True), "last-error": (is_text, True),
}  # fmt: skip


def not_in_form(answer: Any, form: _Form) -> str | None:
    """What of it is missing, or is not what it should be."""
    if not isinstance(answer, Mapping):
        return "answer"
    for name, (fits, may_be_none) in form.items():
        value = answer.get(name)
        if not (may_be_none if value is None else fits(value)):
            return name
    return None


def _each_once(disks: list[HostDisk]) -> list[HostDisk]:
    """What answers at the place of a name may be the backend of another record: each answer goes to the
    record that its backend names, and what is left has none. But of a record that is held, the answer is
    that of its holder, who may say what he will: commands go where an answer has come from. And who runs
    elsewhere than in a record's place is not its backend while no process holds it."""
    held = {each.own for each in disks if each.holder_known}
    used = {each.own for each in disks if each.in_use}
    records = [each.own for each in disks]
    named = [_record_of_answer(each, held, used) for each in disks]
    taken = {place for each in disks if each.record_path is not None for place in each.places}
    answers = {place: each for each, place in zip(disks, named, strict=True) if place is not None}
    known = set(records)
    found = []
    for disk, own, place in zip(disks, records, named, strict=True):
        if own is not None:
            found.append(_with_answer(disk, answers.get(own)))
        if own is None and disk.control is not None and taken.intersection(disk.places):
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
