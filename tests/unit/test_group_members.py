# SPDX-License-Identifier: Apache-2.0
"""How the disks of a group find each other for `--group-freeze`: by their names, and each is told for which
disk it is taken."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.unit.test_names import recorded
from vhostsync.control.command import Argument, Arguments, Command, Dispatcher
from vhostsync.control.commands import COMMANDS
from vhostsync.control.server import serve_control
from vhostsync.errors import ControlError, MirrorError
from vhostsync.events import EventHub
from vhostsync.group_members import OtherMembers
from vhostsync.record.names import Lineage, Names

pytestmark = pytest.mark.anyio


class Played:
    """A backend to which a let-go has come, and for whom."""

    def __init__(self, refuses: str | None = None) -> None:
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.group = self
        self.refuses = refuses

    async def cut(self, step: str, group: str | None, record: str | None) -> Any:
        self.asked.append((step, group, record))
        if self.refuses is not None:
            raise MirrorError(self.refuses)
        return {}


async def _without_saying_for_whom(to: Played, given: Arguments) -> Any:
    return await to.cut(given["step"], None, None)


OLDER = Command("group-cut", "", _without_saying_for_whom, (Argument("step", "string", ""),))
"""As before a backend was told for which disk it is taken."""


@asynccontextmanager
async def others(folder: Path, *played: tuple[str, Played, Command | None]) -> AsyncIterator[OtherMembers]:
    """Of vm1-root. Each that is played has a name, and the command as it knows it."""
    names = {"vm1-root": "vm1", **{name: "vm1" for name, _, _ in played}, "vm2-root": "vm2"}
    for name, group in names.items():
        (folder / name).mkdir()
        Names(folder / name).give(Lineage(name, recorded(folder / name, None), group))
    async with anyio.create_task_group() as tasks:
        for name, backend, command in played:
            (folder / "run" / name).mkdir(parents=True)
            known = {} if command is None else {command.name: command}
            dispatcher = Dispatcher(known, backend)
            await tasks.start(serve_control, folder / "run" / name / "control", EventHub(), dispatcher)
        yield OtherMembers("vm1-root", "vm1", folder, folder / "run" / "vm1-root" / "control")
        tasks.cancel_scope.cancel()


async def test_each_is_told_for_which_disk_it_is_taken(tmp_path: Path) -> None:
    data, log = Played(), Played(refuses="not now")
    own = COMMANDS["group-cut"]
    played = ("vm1-data", data, own), ("vm1-log", log, own)
    async with others(tmp_path, *played) as members, members.connected() as there:
        assert set(there) == {"vm1-data", "vm1-log"}
        assert await there["vm1-data"].cut("ask") == {}
        with pytest.raises(ControlError, match="not now"):
            await there["vm1-log"].cut("let-go")
    for name, backend, step in (("vm1-data", data, "ask"), ("vm1-log", log, "let-go")):
        lineage = Names(tmp_path / name).find(name)
        assert lineage is not None
        assert backend.asked == [(step, "vm1", lineage.record.name)]


@pytest.mark.parametrize("name", ["vm1-root", "vm1-data"], ids=["this disk's", "another one's"])
async def test_two_of_one_name_are_not_taken_for_one(tmp_path: Path, name: str) -> None:
    """In a state directory below. One of them would be left out of the cut."""
    data = Played()
    async with others(tmp_path, ("vm1-data", data, COMMANDS["group-cut"])) as members:
        (tmp_path / "left").mkdir()
        Names(tmp_path / "left").give(Lineage(name, recorded(tmp_path / "left", None), "vm1"))
        with pytest.raises(ControlError, match=f"two disks of the group vm1 are called {name}"):
            async with members.connected():
                pass
    assert data.asked == []


@pytest.mark.parametrize("command", [OLDER, None], ids=["does not say for whom", "knows no group-cut"])
async def test_an_older_backend_lets_nothing_go(tmp_path: Path, command: Command | None) -> None:
    """It would do so for a disk of any group."""
    data = Played()
    async with others(tmp_path, ("vm1-data", data, command)) as members, members.connected() as there:
        with pytest.raises(ControlError, match=r"of an older version.*vhostsync upgrade"):
            await there["vm1-data"].cut("let-go")
    assert data.asked == []
