# SPDX-License-Identifier: Apache-2.0
"""The disks of a group (`vhostsync create --group`): those of one machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio

from vhostsync.errors import ControlError
from vhostsync.fleet.disks import HostDisk, host_disks

_BEST_FIRST: Final = ("up-to-date", "outdated", "inconsistent", None)


def controls_of_group(group: str) -> list[Path]:
    """The control sockets of all its backends. Blocks. ControlError where one cannot be had: then nothing can
    be done to all."""
    found = [disk for disk in anyio.run(host_disks) if disk.group == group]
    if not found:
        raise ControlError(
            f"No disk of this host is in a group {group}; `vhostsync create --group {group}` puts one there, "
            f"and `vhostsync list` shows them."
        )
    missing = [disk for disk in found if not disk.running]
    if missing:
        reasons = "; ".join(f"{each.shown_name}: {each.problem or 'no backend runs'}" for each in missing)
        raise ControlError(f"Not all disks of the group {group} can be asked, and nothing was done: {reasons}.")
    return [disk.control for disk in found if disk.control is not None]


def worth_of_group(disks: Sequence[HostDisk]) -> str | None:
    """What the other disks together are worth: as much as the worst of them. Several that are outdated are each
    of a moment of their own, so together they are none that there ever was: inconsistent."""
    worths = [disk.worth for disk in disks]
    worst = max(worths, key=_BEST_FIRST.index)
    if worst == "outdated" and len(disks) > 1:
        return "inconsistent"
    return worst
