# SPDX-License-Identifier: Apache-2.0
"""The backends of the other disks of a group, found by their names, for `--group-freeze` (group_cut.py)."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio.to_thread

from vhostsync.control.client import ControlClient, connect
from vhostsync.errors import ControlError
from vhostsync.lineage_name import control_below
from vhostsync.record.names import Names, state_directories


class OtherMembers:
    """Of the disk that is called so, and listens at `control`. They are looked for each time: a disk may join
    its group meanwhile. Where they listen is told by where this one does: by now it may be another user, who
    would look elsewhere."""

    def __init__(self, name: str, group: str, directory: Path, control: Path) -> None:
        self._name = name
        self._runtime = control.parent.parent
        self._group = group
        self._directory = directory

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Mapping[str, ControlClient]]:
        """VhostsyncError: one cannot be reached, or it cannot be told which there are. Nobody is waited for
        who was cancelled: the directory's disk may hang."""
        names = await anyio.to_thread.run_sync(self._names, abandon_on_cancel=True)
        async with AsyncExitStack() as stack:
            places = {name: control_below(self._runtime, name) for name in names}
            yield {name: await stack.enter_async_context(connect(place)) for name, place in places.items()}

    def _names(self) -> list[str]:
        found = []
        for directory in state_directories(self._directory):
            names = Names(directory)
            if damaged := names.damaged():
                raise ControlError("; ".join(damaged))
            found += [each.name for each in names.all() if each.group == self._group]
        others = sorted(name for name in found if name != self._name)
        if not others:
            raise ControlError(f"the group {self._group} has no other disk")
        return others
