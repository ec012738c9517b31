# SPDX-License-Identifier: Apache-2.0
"""The backends of the other disks of a group, found by their names, for `--group-freeze` (group_cut.py).

Two state directories may have one runtime directory. Then another disk's backend may listen in the place of
the one that is meant, so each is told for which disk it is taken, and refuses where it serves another one. A
backend of an older version cannot: it refuses to be told so.
"""

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from vhostsync.control import qmp
from vhostsync.control.client import ControlClient, RefusedError, connect
from vhostsync.errors import ControlError
from vhostsync.host.errands import ask_unless_cancelled
from vhostsync.lineage_name import control_below
from vhostsync.record.names import Lineage, Member, all_names


class OtherMember:
    """One of them."""

    def __init__(self, client: ControlClient, meant: Member) -> None:
        self._client = client
        self._meant = meant

    async def cut(self, step: str) -> Any:
        """What it has answered. VhostsyncError."""
        meant = self._meant
        try:
            return await self._client.execute(
                "group-cut", {"step": step, "group": meant.group, "record": meant.record}
            )
        except RefusedError as refused:
            if refused.kind != qmp.COMMAND_NOT_FOUND and str(refused) != "Parameter 'group' is unexpected":
                raise
            raise ControlError(
                "its backend is of an older version, which cannot tell whether it is meant; bring all "
                "backends of the group to one version (vhostsync upgrade)"
            ) from refused


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
    async def connected(self) -> AsyncIterator[Mapping[str, OtherMember]]:
        """VhostsyncError: one cannot be reached, or it cannot be told which there are. Nobody is waited for
        who was cancelled: the directory's disk may hang."""
        lineages = await ask_unless_cancelled(self._lineages)
        async with AsyncExitStack() as stack:
            members = {}
            for each in lineages:
                client = await stack.enter_async_context(connect(control_below(self._runtime, each.name)))
                members[each.name] = OtherMember(client, Member(self._group, each.record.name))
            yield members

    def _lineages(self) -> list[Lineage]:
        found = []
        for names in all_names(self._directory):
            if damaged := names.damaged():
                raise ControlError("; ".join(damaged))
            found += [each for each in names.all() if each.group == self._group]
        if twice := [name for name, often in Counter(each.name for each in found).items() if often > 1]:
            records = " and ".join(str(each.record) for each in found if each.name == twice[0])
            raise ControlError(
                f"two disks of the group {self._group} are called {twice[0]}, so nobody can tell which of "
                f"them listens by that name: {records}; forget the one that is not in use (vhostsync record "
                f"RECORD --forget)"
            )
        others = [each for each in found if each.name != self._name]
        if not others:
            raise ControlError(f"the group {self._group} has no other disk")
        return others
