# SPDX-License-Identifier: Apache-2.0
"""The disks of a group (`vhostsync create --group`): those of one machine."""

from collections.abc import Sequence
from typing import Final

import anyio

from vhostsync.control.found_socket import Control
from vhostsync.errors import ControlError, StateRecordError
from vhostsync.fleet.disks import host_disks
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.record.names import all_names
from vhostsync.record.state_index import default_directory

_BEST_FIRST: Final = ("up-to-date", "outdated", "inconsistent", None)


def controls_of_group(group: str) -> list[Control]:
    """The control sockets of all its backends. Blocks. ControlError where one cannot be had, or it cannot be
    told which there are: then nothing can be done to all. StateRecordError."""
    if unread := _unread_names():
        raise ControlError(
            f"It cannot be told which disks are in the group {group}, and nothing was done: "
            f"{'; '.join(unread)}."
        )
    found = [disk for disk in anyio.run(host_disks) if disk.group == group]
    if not found:
        raise ControlError(
            f"No disk of this host is in a group {group}; `vhostsync create --group {group}` puts one there, "
            f"and `vhostsync list` shows them."
        )
    missing = [disk for disk in found if not disk.running]
    if missing:
        reasons = "; ".join(f"{each.shown_name}: {each.problem or 'no backend runs'}" for each in missing)
        raise ControlError(
            f"Not all disks of the group {group} can be asked, and nothing was done: {reasons}."
        )
    return [disk.control for disk in found if disk.control is not None]


def _unread_names() -> list[str]:
    """Why, for each that may be one of any group. StateRecordError."""
    unread = []
    for names in all_names(default_directory()):
        try:
            unread += names.damaged()
        except StateRecordError as error:
            unread.append(str(error))
    return unread


def groups_of(disks: Sequence[HostDisk]) -> dict[str, list[HostDisk]]:
    """By name."""
    groups: dict[str, list[HostDisk]] = {}
    for disk in disks:
        if disk.group is not None:
            groups.setdefault(disk.group, []).append(disk)
    return groups


def worth_of_group(disks: Sequence[HostDisk]) -> str | None:
    """What the other disks together are worth if the current ones were lost now: as much as the worst of
    them. None: one has no other disk, or nobody knows what that is worth."""
    return max((disk.worth for disk in disks), key=_BEST_FIRST.index)


def is_one_instant(disks: Sequence[HostDisk]) -> bool:
    """The other disks were let go of together: by a snapshot of the group, or as its destinations were lost
    (--group-freeze). Neither records a cut with a destination that is known to lack something; what could
    not be written to the guest's disk since concerns that one alone."""
    records = [disk.record for disk in disks]
    cuts = {None if each is None or each.different_since is not None else each.cut for each in records}
    return len(cuts) == 1 and None not in cuts


def what_is_left(disks: Sequence[HostDisk]) -> str | None:
    """Of a switch or a snapshot that was done on some of them and not on all; None: they are alike."""
    if len({disk.state for disk in disks}) == 1:
        return None
    steady = [disk.shown_name for disk in disks if disk.state == "steady"]
    alike = ", ".join(f"{disk.shown_name} is {disk.state}" for disk in disks)
    if not steady or any(disk.state not in ("steady", "passthrough") for disk in disks):
        return alike
    rest = " ".join(f"--name {name}" for name in steady)
    return f"{alike}; if a switch was left half done, switch the rest: vhostsync switch {rest}"
