# SPDX-License-Identifier: Apache-2.0
"""What a failed attempt to bring a mirror back does to the backend: nothing."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from vhostsync.events import EventHub
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.retry import DestinationRetry
from vhostsync.mirror_target import MirrorTarget

pytestmark = pytest.mark.anyio


class LostMirror:
    """One that is wanted; `resume` fails as nobody foresaw, then succeeds."""

    state = MirrorState.PASSTHROUGH
    wanted = MirrorTarget("/disks/b.img")
    fenced = False
    waits_for_hand = False

    def __init__(self) -> None:
        self.attempts = 0
        self.changed = anyio.Event()

    async def resume(self) -> None:
        self.attempts += 1
        if self.attempts < 3:
            raise OSError(5, "Input/output error")
        self.state = MirrorState.STEADY


@asynccontextmanager
async def tried(mirror: LostMirror, *, resume: bool) -> AsyncIterator[AsyncIterator[Mapping[str, Any]]]:
    """What is told of the tries, once the mirror is looked after. Fails after 10 s."""
    hub = EventHub()
    retry = DestinationRetry(cast(Mirror, mirror), hub, 0.001, resume=resume)
    async with hub.subscribe() as events, anyio.create_task_group() as tasks:
        tasks.start_soon(retry.run)
        if not resume:
            await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(10):
            yield (event.data async for event in events)
        tasks.cancel_scope.cancel()


async def test_an_error_that_nobody_foresaw_ends_neither_the_backend_nor_the_trying() -> None:
    told: list[Mapping[str, Any]] = []
    async with tried(LostMirror(), resume=True) as tellings:
        async for data in tellings:
            told.append(data)
            if data["what"] == "attached":
                break
    failures = [data["error"] for data in told if data["what"] == "failed"]
    assert len(failures) == 2 and "Input/output error" in failures[0]


class GivenUpMirror(LostMirror):
    """One whose former destination still has requests."""

    state = MirrorState.STEADY
    fenced = True

    def enter(self, state: MirrorState, *, fenced: bool) -> None:
        self.state, self.fenced = state, fenced
        former, self.changed = self.changed, anyio.Event()
        former.set()

    async def resume(self) -> None:
        assert not self.fenced
        self.attempts += 1
        self.state = MirrorState.STEADY


async def test_it_is_tried_at_once_when_the_requests_that_it_was_given_are_over() -> None:
    """However long that takes, and with no pause that has grown meanwhile."""
    mirror = GivenUpMirror()
    told: list[str] = []
    async with tried(mirror, resume=False) as tellings:
        mirror.enter(MirrorState.DEGRADED, fenced=True)
        async for data in tellings:
            told.append(data["what"])
            if told[-1] == "failed":
                assert "not over yet" in data["error"]
                await anyio.wait_all_tasks_blocked()
                mirror.enter(MirrorState.DEGRADED, fenced=False)
            elif told[-1] == "attached":
                break
    assert told == ["waiting", "failed", "attached"] and mirror.attempts == 1


class HandMirror(GivenUpMirror):
    """One at whose destination requests may be under way; it is known when the pause before a try is over."""

    fenced = False
    looks = 0

    @property
    def waits_for_hand(self) -> bool:  # type: ignore[override]
        self.looks += 1
        return self.looks > 1


async def test_nothing_is_tried_once_it_waits_for_the_operator() -> None:
    """A try would have the turn for a while, and the operator's own start would be refused."""
    mirror = HandMirror()
    told: list[str] = []
    async with tried(mirror, resume=False) as tellings:
        mirror.enter(MirrorState.DEGRADED, fenced=False)
        async for data in tellings:
            told.append(data["what"])
            if told[-1] in ("fence", "attached"):
                break
    assert told == ["waiting", "fence"] and mirror.attempts == 0
