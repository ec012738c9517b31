# SPDX-License-Identifier: Apache-2.0
"""The argument of `--group-freeze`, with the real GroupCut of each disk and guests, engines and connections
that are played: whatever is lost when, and however messages and writes interleave, if all disks record the
same cut, their destinations are what a power cut at one instant could have left."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostsync.engine.engine import Engine
from vhostsync.engine.engine_event import Reason
from vhostsync.errors import ControlError, EngineError
from vhostsync.mirror import group_cut
from vhostsync.mirror.group_cut import Cut, GroupCut, _Followed

WRITES = 30


class BrokenError(AssertionError):
    """No power cut leaves this."""


class Disk:
    """A disk and its destination; the engine of GroupCut, too. `there`: of each write on the destination,
    which flushes were confirmed before it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.steady = True
        self.held = False  # flushes wait for the record
        self.written = 0
        self.there: list[tuple[int, ...]] = []
        self.cut: str | None = None
        self.released = anyio.Event()
        self.group = GroupCut(self._engine(), lambda: self.cut, lambda: self.steady)

    def _engine(self) -> Engine:
        return self  # type: ignore[return-value]

    async def mirror_leave(self) -> None:
        await self.world.wait()
        if not self.steady:
            raise EngineError.from_errno("leaving", errno.ENOTCONN)
        self.lose(Reason.GROUP)

    def lose(self, reason: Reason) -> None:
        if self.steady:
            self.steady, self.held = False, True
            self.group.note_lost()
            self.world.tasks.start_soon(self._record, reason)

    async def _record(self, reason: Reason) -> None:
        await self.world.wait()
        async with self.group.recording(reason) as cut:
            await self.world.wait()
            self.cut, self.held = cut.name, False
            self.released.set()

    def write(self) -> None:
        self.written += 1
        if self.steady:
            self.there.append(tuple(self.world.flushed))

    async def flush(self, place: int) -> None:
        covers = self.written
        await self.world.wait()
        if self.held:
            await self.released.wait()
        self.world.flushed[place] = max(self.world.flushed[place], covers)


class Connection:
    def __init__(self, world: World, to: Disk, tasks: anyio.abc.TaskGroup) -> None:
        self._world, self._to, self._tasks = world, to, tasks

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        await self._world.wait()
        if self._world.chance.random() < self._world.silence:
            raise ControlError("it has ended")
        step, name = arguments["step"], arguments["cut"]
        answer = {}
        if step == "ask":
            self._to.group.check(name)
        elif step == "let-go":
            answer = {"cut": await self._to.group.let_go(name, self._tasks)}
        else:
            self._to.group.go_on(name)
        await self._world.wait()
        return answer


class Links:
    def __init__(self, world: World, own: int) -> None:
        self._world, self._own = world, own

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Sequence[Connection]]:
        world = self._world
        conversation = Conversation(world.tasks)
        try:
            yield [
                Connection(world, disk, conversation)  # type: ignore[arg-type]
                for place, disk in enumerate(world.disks)
                if place != self._own
            ]
        finally:
            conversation.end()


class Conversation:
    """As a task group of a client, whose end is not waited for."""

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self._tasks = tasks
        self._scopes: list[anyio.CancelScope] = []

    def start_soon(self, work: Any, *arguments: Any) -> None:
        scope = anyio.CancelScope()
        self._scopes.append(scope)

        async def run() -> None:
            with scope:
                await work(*arguments)

        self._tasks.start_soon(run)

    def end(self) -> None:
        for scope in self._scopes:
            scope.cancel()


class World:
    def __init__(
        self, seed: int, disks: int, losses: int, silence: float, tasks: anyio.abc.TaskGroup
    ) -> None:
        self.chance = random.Random(seed)
        self.silence = silence
        self.tasks = tasks
        self.flushed = [0] * disks
        self.disks = [Disk(self) for _ in range(disks)]
        for place, disk in enumerate(self.disks):
            disk.group.join(Links(self, place))
        self._losses = losses

    async def wait(self) -> None:
        for _ in range(self.chance.randrange(8)):
            await anyio.lowlevel.checkpoint()

    async def play(self) -> None:
        async with anyio.create_task_group() as guests:
            for _ in range(3):
                guests.start_soon(self._guest)
            for place in self.chance.sample(range(len(self.disks)), self._losses):
                guests.start_soon(self._lose, self.disks[place])

    async def _lose(self, disk: Disk) -> None:
        for _ in range(self.chance.randrange(12)):
            await self.wait()
        disk.lose(Reason.DESTINATION_LOST)

    async def _guest(self) -> None:
        for _ in range(WRITES):
            place = self.chance.randrange(len(self.disks))
            self.disks[place].write()
            if self.chance.random() < 0.5:
                await self.disks[place].flush(place)
            await self.wait()

    def is_cut(self) -> bool:
        """As `vhostsync list` has it; BrokenError where it is none."""
        cuts = {disk.cut for disk in self.disks}
        if len(cuts) > 1 or None in cuts:
            return False
        for disk in self.disks:
            for flushed in disk.there:
                for place, covers in enumerate(flushed):
                    if covers > len(self.disks[place].there):
                        raise BrokenError(f"a write after a flush of disk {place} that is not there")
        return True


def happens(seed: int, *, disks: int = 3, losses: int = 1, silence: float = 0.0) -> bool:
    """Whether there was a cut."""

    async def run() -> bool:
        async with anyio.create_task_group() as tasks:
            world = World(seed, disks, losses, silence, tasks)
            await world.play()
        return world.is_cut()

    return anyio.run(run)


@pytest.mark.timeout(240)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), disks=st.integers(2, 4), data=st.data())
def test_what_all_record_as_one_cut_is_one(seed: int, disks: int, data: st.DataObject) -> None:
    losses = data.draw(st.integers(1, disks), label="losses")
    silence = data.draw(st.sampled_from([0.0, 0.0, 0.1]), label="silence")
    happens(seed, disks=disks, losses=losses, silence=silence)


def test_one_loss_and_nobody_silent_is_a_cut() -> None:
    assert all(happens(seed) for seed in range(30))


def test_the_loss_of_all_at_once_mostly_is() -> None:
    assert sum(happens(seed, losses=3) for seed in range(30)) >= 20


async def _not_held(_: GroupCut, followed: _Followed) -> str | None:
    await anyio.sleep(0)
    return followed.first


def test_who_follows_has_to_hold_flushes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupCut, "_follow", _not_held)
    with pytest.raises(BrokenError):
        for seed in range(400):
            happens(seed)


def test_who_asks_has_to_wait_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(group: GroupCut, others: Any, cut: Cut) -> Sequence[Any]:
        group._own = cut.name = "cut"
        there = await cut.ends.enter_async_context(others.connected())

        async def later() -> None:
            await group_cut._all(there, "let-go", "cut")
            await group_cut._all(there, "go-on", "cut")

        there[0]._world.tasks.start_soon(later)
        return ()

    monkeypatch.setattr(GroupCut, "_cut_all", at_once)
    monkeypatch.setattr(Conversation, "end", lambda _: None)
    with pytest.raises(BrokenError):
        for seed in range(400):
            happens(seed)
