# SPDX-License-Identifier: Apache-2.0
"""The argument of `--group-freeze`, with the real GroupCut of each disk and guests, engines and connections
that are played: whatever is lost when, and however messages and writes interleave, if all disks record the
same cut, their destinations are what a power cut at one instant could have left."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostsync.engine.engine import Engine
from vhostsync.errors import ControlError, EngineError, VhostsyncError
from vhostsync.mirror import group_cut
from vhostsync.mirror.group_cut import CutStep, GroupCut, Loss
from vhostsync.record.names import Member

WRITES = 30


class BrokenError(AssertionError):
    """No power cut leaves this."""


@dataclass(frozen=True)
class Scene:
    """`losses`: how many lose their destinations by themselves. Messages: how likely one is not answered
    (and carried out all the same, now or much later), or is not answered for ever. `again`: how likely a
    mirror that was lost is started once more."""

    disks: int = 3
    losses: int = 1
    unanswered: float = 0.0
    hangs: float = 0.0
    again: float = 0.0


class Disk:
    """A disk and its destination; the engine of GroupCut, too. `writes`: for each, which flushes were
    confirmed before it. The destination has the first `there` of them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.steady = True
        self.held = False  # flushes wait for the record
        self.writes: list[tuple[int, ...]] = []
        self.there = 0
        self.cut: str | None = None  # in the record
        self.why_no_copy: str | None = None
        self.released = anyio.Event()
        self.errors: list[str] = []
        self.group = GroupCut(
            self._engine(), lambda: self.steady, self._why_no_copy, lambda: self.cut, self.errors.append
        )

    def _engine(self) -> Engine:
        return self  # type: ignore[return-value]

    async def _why_no_copy(self) -> str | None:
        await self.world.wait()
        return self.why_no_copy

    async def mirror_leave(self) -> None:
        await self.world.wait()
        if not self.steady:
            raise EngineError.from_errno("leaving", errno.ENOTCONN)
        self.lose()

    def lose(self) -> None:
        if self.steady:
            self.steady, self.held = False, True
            self.released = anyio.Event()
            self.group.note_lost(differed=False)
            self.world.tasks.start_soon(self._record)

    async def _record(self) -> None:
        await self.world.wait()
        loss = await self.group.decide()
        await self.world.wait()
        self.cut, loss.held, self.held = loss.cut, False, False
        self.released.set()
        self.world.look()
        if self.world.happens(self.world.scene.again):
            await self.world.wait()
            self.start()

    def start(self) -> None:
        """The mirror, and all is copied."""
        self.cut, self.there, self.steady = None, len(self.writes), True

    def write(self) -> None:
        self.writes.append(tuple(self.world.flushed))
        if self.steady:
            self.there = len(self.writes)

    async def flush(self, place: int) -> None:
        covers = len(self.writes)
        await self.world.wait()
        while self.held:
            await self.released.wait()
        self.world.flushed[place] = max(self.world.flushed[place], covers)


class Connection:
    def __init__(self, world: World, to: Disk) -> None:
        self._world, self._to = world, to

    async def cut(self, step: CutStep) -> Any:
        world, scene = self._world, self._world.scene
        await world.wait()
        if world.happens(scene.hangs):
            await anyio.sleep_forever()
        if world.happens(scene.unanswered):
            world.tasks.start_soon(self._carry_out_late, step)
            raise ControlError("it has ended")
        answer = await self._carry_out(step)
        await world.wait()
        return answer

    async def _carry_out(self, step: str) -> Any:
        if step == "let-go":
            return await self._to.group.let_go()
        await self._to.group.check()
        return {}

    async def _carry_out_late(self, step: str) -> None:
        for _ in range(self._world.chance.randrange(12)):
            await self._world.wait()
        with suppress(VhostsyncError):
            await self._carry_out(step)


class Links:
    def __init__(self, world: World, own: int) -> None:
        self._world, self._own = world, own

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Mapping[str, Connection]]:
        disks = enumerate(self._world.disks)
        yield {f"disk{place}": Connection(self._world, disk) for place, disk in disks if place != self._own}


class World:
    def __init__(self, seed: int, scene: Scene, tasks: anyio.abc.TaskGroup) -> None:
        self.chance = random.Random(seed)
        self.scene = scene
        self.tasks = tasks
        self.cuts = 0
        self.flushed = [0] * scene.disks
        self.disks = [Disk(self) for _ in range(scene.disks)]
        for place, disk in enumerate(self.disks):
            disk.group.join(Member("vm1", f"record{place}"), Links(self, place))

    def happens(self, likely: float) -> bool:
        return likely > 0 and self.chance.random() < likely

    async def wait(self) -> None:
        for _ in range(self.chance.randrange(8)):
            await anyio.lowlevel.checkpoint()

    async def play(self) -> None:
        async with anyio.create_task_group() as guests:
            for _ in range(3):
                guests.start_soon(self._guest)
            for place in self.chance.sample(range(len(self.disks)), self.scene.losses):
                guests.start_soon(self._lose, self.disks[place])

    async def _lose(self, disk: Disk) -> None:
        for _ in range(self.chance.randrange(12)):
            await self.wait()
        disk.lose()

    async def _guest(self) -> None:
        for _ in range(WRITES):
            place = self.chance.randrange(len(self.disks))
            self.disks[place].write()
            if self.chance.random() < 0.5:
                await self.disks[place].flush(place)
            await self.wait()

    def look(self) -> bool:
        """Whether the set is called one of one instant (`vhostsync list`). BrokenError where it is none."""
        cuts = {disk.cut for disk in self.disks}
        if len(cuts) > 1 or None in cuts:
            return False
        for disk in self.disks:
            for flushed in disk.writes[: disk.there]:
                for place, covers in enumerate(flushed):
                    if covers > self.disks[place].there:
                        raise BrokenError(f"a write after a flush of disk {place} that is not there")
        self.cuts += 1
        return True


def plays(seed: int, scene: Scene) -> World:
    """Until nothing more happens."""

    async def run() -> World:
        async with anyio.create_task_group() as tasks:
            world = World(seed, scene, tasks)
            await world.play()
        world.look()
        return world

    try:
        return anyio.run(run)
    except ExceptionGroup as group:
        broken, _ = group.split(BrokenError)
        if broken is None:
            raise
        raise BrokenError from broken


def are_cut(seed: int, scene: Scene) -> bool:
    return plays(seed, scene).look()


@pytest.mark.timeout(240)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), disks=st.integers(2, 4), data=st.data())
def test_what_all_record_as_one_cut_is_one(seed: int, disks: int, data: st.DataObject) -> None:
    rarely = st.sampled_from([0.0, 0.0, 0.1])
    scene = Scene(
        disks,
        losses=data.draw(st.integers(1, disks), label="losses"),
        unanswered=data.draw(rarely, label="unanswered"),
        hangs=data.draw(rarely, label="hangs"),
        again=data.draw(st.sampled_from([0.0, 0.5]), label="again"),
    )
    with pytest.MonkeyPatch.context() as patch:
        if scene.hangs:
            patch.setattr(group_cut, "CUT_S", 0.01)
        plays(seed, scene)


def test_one_loss_and_nobody_silent_is_a_cut() -> None:
    assert all(are_cut(seed, Scene()) for seed in range(30))


@pytest.mark.parametrize("losses", [2, 3])
def test_so_is_the_loss_of_several_at_once(losses: int) -> None:
    """However far one has got when another one is lost."""
    assert all(are_cut(seed, Scene(losses=losses)) for seed in range(60))


def test_one_that_does_not_answer_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_cut, "CUT_S", 0.05)
    world = plays(1, Scene(hangs=1.0))
    assert world.cuts == 0 and [disk.steady for disk in world.disks].count(False) == 1
    (errors,) = [disk.errors for disk in world.disks if disk.errors]
    why = "not all disks of the group have answered within 0.05 s"
    assert errors == [f"the destinations of the group are no consistent set: {why}"]


async def _of_three(look: Any) -> None:
    async with anyio.create_task_group() as tasks:
        await look(World(1, Scene(), tasks))


def test_one_whose_destination_is_no_copy_is_asked_in_vain() -> None:
    """The others keep theirs."""

    async def look(world: World) -> None:
        world.disks[1].why_no_copy = "the destination differs"
        world.disks[0].lose()
        await world.disks[0].released.wait()
        assert [disk.steady for disk in world.disks] == [False, True, True]
        assert world.disks[0].cut is None
        assert world.disks[0].errors[0].endswith("disk1: the destination differs")

    anyio.run(_of_three, look)


@pytest.mark.parametrize("own", [True, False], ids=["its own loss", "with the group"])
def test_one_whose_destination_was_no_copy_ends_it(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tells so of the very moment, whatever was known before."""

    async def look(world: World) -> None:
        differs = world.disks[1]
        note_lost = differs.group.note_lost
        monkeypatch.setattr(differs.group, "note_lost", lambda **_: note_lost(differed=True))
        (differs if own else world.disks[0]).lose()
        for disk in world.disks:
            while disk.held:
                await disk.released.wait()
        assert all(disk.cut is None for disk in world.disks)
        assert any("its destination was no copy" in each for disk in world.disks for each in disk.errors)

    anyio.run(_of_three, look)


def test_who_has_recorded_the_cut_says_so_until_its_mirror_is_started() -> None:
    async def look(world: World) -> None:
        first, second = world.disks[:2]
        first.lose()
        for disk in world.disks:
            await disk.released.wait()
        assert first.cut is not None
        await second.group.check()
        assert (await second.group.let_go())["cut"] == first.cut
        second.cut = None  # its mirror is started, and copies
        with pytest.raises(VhostsyncError, match="its mirror is not steady"):
            await second.group.let_go()

    anyio.run(_of_three, look)


def test_who_ends_asks_nobody_and_is_asked_in_vain() -> None:
    async def look(world: World) -> None:
        world.disks[0].group.part()
        world.disks[0].lose()
        world.disks[1].lose()
        for disk in world.disks[:2]:
            await disk.released.wait()
        assert world.disks[2].steady and not world.disks[0].errors
        assert "disk0: its backend is not started with --group-freeze" in world.disks[1].errors[0]

    anyio.run(_of_three, look)


# ---- what the argument needs -----------------------------------------------------------------


def broken_at_last(scene: Scene) -> None:
    with pytest.raises(BrokenError):
        for seed in range(600):
            plays(seed, scene)


def test_who_lets_go_has_to_hold_flushes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lose = Disk.lose

    def lose_and_confirm(disk: Disk) -> None:
        lose(disk)
        disk.held = False

    monkeypatch.setattr(Disk, "lose", lose_and_confirm)
    broken_at_last(Scene())


def test_who_asks_has_to_wait_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(_: GroupCut, __: Loss, others: Any) -> str:
        async def later() -> None:
            await group_cut._all(there, "let-go")

        async with others.connected() as there:
            there[min(there)]._world.tasks.start_soon(later)
        return "cut"

    monkeypatch.setattr(GroupCut, "_cut", at_once)
    broken_at_last(Scene())


def test_the_cut_has_to_be_called_by_all_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who lets go anew is taken for one who has let go with the others."""
    monkeypatch.setattr(group_cut, "_name_of", lambda *_: "cut")
    broken_at_last(Scene(losses=2, again=0.5))
