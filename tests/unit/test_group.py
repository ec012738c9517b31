# SPDX-License-Identifier: Apache-2.0
"""The coordinator of several disks, with backends that are played: each step on all before the next one, and
what follows where one says no."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.unit.control_fakes import FakeBackend, running
from vhostsync.cli import group
from vhostsync.cli.group import Action, GroupError, LateError, Plan, coordinate
from vhostsync.errors import UnreachableError

pytestmark = pytest.mark.anyio

ALL = ["close", "carry-out", "open"]


@asynccontextmanager
async def backends(folder: Path) -> AsyncIterator[tuple[list[Path], list[FakeBackend]]]:
    played = [FakeBackend(), FakeBackend()]
    paths = [folder / "b.control", folder / "a.control"]  # not in the order in which they are asked
    for each in played:
        each.mirror.now = replace(each.mirror.now, state="steady", destination="/b.img")
    async with running(paths[0], played[0]), running(paths[1], played[1]):
        yield paths, played


def plan(action: Action = "switch", *, deadline_s: float = 5.0) -> Plan:
    return Plan(action, 0.5, deadline_s)


@pytest.mark.parametrize("action", ["switch", "snapshot"])
async def test_each_step_is_taken_on_all(tmp_path: Path, action: Action) -> None:
    async with backends(tmp_path) as (paths, played):
        done = await coordinate(paths, plan(action))
        first = "switch 500 False" if action == "switch" else "snapshot 500"
        assert [each.members[-1].steps for each in played] == [[first, *ALL]] * 2
        assert done.attempts == 1 and done.pause_us >= 1000
        assert [member.control for member in done.members] == sorted(paths)
        for each in played:
            with anyio.fail_after(5):
                await each.members[-1].left.wait()


async def test_one_that_cannot_begin_leaves_all_as_they_were(tmp_path: Path) -> None:
    async with backends(tmp_path) as (paths, played):
        played[0].mirror.now = replace(played[0].mirror.now, state="syncing")
        with pytest.raises(GroupError, match=r"All is as it was: .*b.control: The mirror is syncing"):
            await coordinate(paths, plan())
        assert played[1].members[-1].steps == ["switch 500 False", "take-back"]
        assert played[0].members[-1].steps == []


@pytest.mark.parametrize("step", ALL[:2])
async def test_where_one_step_is_refused_all_is_taken_back_and_tried_again(tmp_path: Path, step: str) -> None:
    async with backends(tmp_path) as (paths, played):
        played[0].refused_steps = {step: 2}
        done = await coordinate(paths, plan())
        assert done.attempts == 3
        for each in played:
            steps = each.members[-1].steps
            assert steps.count("take-back") == 2 and steps.count("open") == 1 and steps[-1] == "open"


async def test_it_tries_no_longer_than_it_may(tmp_path: Path) -> None:
    async with backends(tmp_path) as (paths, played):
        played[0].refused_steps = {"close": 1000}
        with pytest.raises(LateError, match=r"within 0.3 s, and all is as it was; .*b.control: No close now"):
            await coordinate(paths, plan(deadline_s=0.3))
        assert all("open" not in each.members[-1].steps for each in played)


@pytest.mark.parametrize(
    ("action", "then"),
    [("switch", r"do the rest: vhostsync switch --control .*b.control"), ("snapshot", "take another one")],
)
async def test_where_one_does_not_open_it_is_said_what_is_left(
    tmp_path: Path, action: Action, then: str
) -> None:
    async with backends(tmp_path) as (paths, played):
        played[0].refused_steps = {"open": 1}
        with pytest.raises(GroupError, match=rf"done on .*a.control, and not on all: .*No open now.*{then}"):
            await coordinate(paths, plan(action))


@pytest.mark.parametrize("step", ["prepare", *ALL])
async def test_one_that_does_not_answer_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A backend that was stopped. The others are asked to take it back, unless they have opened."""
    monkeypatch.setattr(group, "LATE_S", 0.2)
    monkeypatch.setattr(group, "OPEN_S", 0.5)
    async with backends(tmp_path) as (paths, played):
        played[0].silent_steps = {step}
        with anyio.fail_after(10), pytest.raises(GroupError, match="does not answer") as said:
            await coordinate(paths, plan(deadline_s=0.5))
        assert isinstance(said.value, LateError) == (step == "prepare")
        assert ("done on" in str(said.value)) == (step == "open")
        assert played[1].members[-1].steps[-1] == ("open" if step == "open" else "take-back")
        assert played[0].members[-1].steps[-1] == ("switch 500 False" if step == "prepare" else step)


async def test_what_one_could_not_take_back_is_said(tmp_path: Path) -> None:
    async with backends(tmp_path) as (paths, played):
        played[0].kept_steps = {"take-back"}
        played[1].refused_steps = {"carry-out": 1}
        rest = r"done on .*b.control, and not on all: .*do the rest: vhostsync switch --control .*a.control"
        with pytest.raises(GroupError, match=rest):
            await coordinate(paths, plan())


async def test_a_backend_that_is_not_there_stops_nobody(tmp_path: Path) -> None:
    async with backends(tmp_path) as (paths, played):
        with pytest.raises(UnreachableError, match="no control socket"):
            await coordinate([*paths, tmp_path / "c.control"], plan())
        assert all(member.steps == [] for each in played for member in each.members)


async def test_one_that_is_named_twice_is_asked_once(tmp_path: Path) -> None:
    (tmp_path / "link.control").symlink_to(tmp_path / "a.control")
    async with backends(tmp_path) as (paths, _):
        done = await coordinate([*paths, tmp_path / "link.control"], plan())
        assert len(done.members) == 2
