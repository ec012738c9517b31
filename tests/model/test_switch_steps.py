# SPDX-License-Identifier: Apache-2.0
"""The steps of a switch as a coordinator of several disks would take them: two guests' disks in one process,
each with an engine, a mirror and a record of its own, on test disks."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest

from tests.engine_driver import DiskOp
from tests.model.rig import BLOCK, pattern
from tests.model.stage import Stage, stage
from vhostsync.errors import EngineError, SwitchError
from vhostsync.mirror.group_switch import GroupSwitchSteps
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import SwitchPlan
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.record.record_store import Prepared
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import Worth

PLAN = SwitchPlan(max_pause_ms=2000)


@asynccontextmanager
async def both_prepared(stages: list[Stage]) -> AsyncIterator[list[GroupSwitchSteps]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(it.mirror.switch_in_steps(PLAN)) for it in stages]


def play(
    scene: Callable[[list[Stage]], Awaitable[None]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    marks: bool = True,
) -> None:
    """`marks`: the records have memory for the mark of an exchange."""
    async def perform() -> None:
        async with AsyncExitStack() as stack:
            stages = []
            for name in ("one", "two"):
                (folder / name).mkdir()
                # Each stage names its disks to the engine; those of the first are attached before the second.
                stages.append(await stack.enter_async_context(stage(folder / name, monkeypatch)))
                if marks:
                    stages[-1].state_file.lock(1)
                    stack.callback(stages[-1].state_file.close)
                await stages[-1].steady()
                await stages[-1].guest_does(partial(stages[-1].guest.write_now, 0, pattern(1)))
            await scene(stages)

    anyio.run(perform)


@pytest.mark.parametrize("marks", [True, False])
def test_two_disks_are_switched_at_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: bool
) -> None:
    async def scene(stages: list[Stage]) -> None:
        async with both_prepared(stages) as attempts:
            for each in attempts:
                await each.prepare()
            for each in attempts:
                assert await each.close()
            late = [it.guest.write(BLOCK, pattern(2)) for it in stages]
            for it in stages:
                assert it.record().current.path == str(it.paths[0])
                assert (await it.engine.snapshot()).gated
            for each in attempts:
                await each.carry_out()
            for it in stages:
                assert it.record().current.path == str(it.paths[1]), "after a kill it would be served"
                assert (await it.engine.snapshot()).gated, "opened before all are exchanged"
            for each in attempts:
                assert (await each.open()).pause_us > 0
        for it, write in zip(stages, late, strict=True):
            await it.guest_does(partial(it.guest.wait, write))
            assert it.record().current.path == str(it.paths[1])
            assert it.mirror.source_path == str(it.paths[1]) and it.mirror.state is MirrorState.PASSTHROUGH
            assert it.second.read(BLOCK, BLOCK) == pattern(2) and it.first.read(BLOCK, BLOCK) == bytes(BLOCK)

    play(scene, tmp_path, monkeypatch, marks=marks)


def test_where_one_cannot_be_closed_all_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(stages: list[Stage]) -> None:
        one, two = stages
        before = [it.record() for it in stages]
        async with both_prepared(stages) as attempts:
            for each in attempts:
                await each.prepare()
            assert await attempts[0].close()
            late = one.guest.write(BLOCK, pattern(2))
            two.second.fault(DiskOp.FLUSH, errno.EIO, count=-1)
            two.second.fault(DiskOp.WRITE, errno.EIO, count=-1)
            two.guest.write(BLOCK, pattern(2))
            with pytest.raises(EngineError):
                assert await attempts[1].close()
                await attempts[1].carry_out()
        await one.guest_does(partial(one.guest.wait, late))
        assert one.first.read(BLOCK, BLOCK) == pattern(2), "it went to the new disk"
        assert one.record() == before[0] and two.record().current == before[1].current
        assert one.mirror.state is MirrorState.STEADY and one.mirror.source_path == str(one.paths[0])
        await one.mirror.switch(deadline_s=5, max_pause_ms=2000, keep_mirror=False)

    play(scene, tmp_path, monkeypatch)


@pytest.mark.parametrize("marks", [True, False])
def test_where_one_cannot_be_exchanged_those_that_were_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: bool
) -> None:
    """One disk is exchanged, and held; the other one's destination is lost before its turn comes."""

    killed_before: list[str] = []
    take_back = RecordKeeper.take_back

    async def seen(keeper: RecordKeeper, prepared: Prepared | None) -> None:
        assert isinstance(keeper._store, StateFile)
        record = StateFile(keeper._store.path).load()
        assert record is not None
        killed_before.append(record.current.path)
        await take_back(keeper, prepared)

    monkeypatch.setattr(RecordKeeper, "take_back", seen)

    async def scene(stages: list[Stage]) -> None:
        one, two = stages
        before = [it.record() for it in stages]
        with pytest.raises(SwitchError):
            async with both_prepared(stages) as attempts:
                for each in attempts:
                    await each.prepare()
                for each in attempts:
                    assert await each.close()
                late = one.guest.write(BLOCK, pattern(2))
                await attempts[0].carry_out()
                await two.engine.mirror_stop()
                await attempts[1].carry_out()
        await one.guest_does(partial(one.guest.wait, late))
        assert one.first.read(BLOCK, BLOCK) == pattern(2), "it went to the new disk"
        assert (await one.guest_does(one.guest.flush_now)).ok
        assert one.record() == before[0] and two.record().current == before[1].current
        assert one.mirror.state is MirrorState.STEADY and one.mirror.source_path == str(one.paths[0])
        assert one.second.read(BLOCK, BLOCK) == pattern(2), "it is the destination, as before"
        if marks:
            old = [str(it.paths[0]) for it in reversed(stages)]
            assert killed_before == old, "a restart would serve the other one"
        result = await one.mirror.switch(deadline_s=5, max_pause_ms=2000, keep_mirror=False)
        assert result.source_path == str(one.paths[1])

    play(scene, tmp_path, monkeypatch, marks=marks)


def test_the_old_disk_gets_nothing_more_unless_the_mirror_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stages: list[Stage]) -> None:
        kept, left = stages
        plans = [SwitchPlan(max_pause_ms=2000, keep_mirror=keep) for keep in (True, False)]
        async with AsyncExitStack() as stack:
            for it, plan in zip(stages, plans, strict=True):
                each = await stack.enter_async_context(it.mirror.switch_in_steps(plan))
                await each.prepare()
                assert await each.close()
                await each.carry_out()
                await each.open()
        for it in stages:
            assert (await it.guest_does(partial(it.guest.write_now, BLOCK, pattern(3)))).ok
            assert (await it.guest_does(it.guest.flush_now)).ok
            assert it.second.read(BLOCK, BLOCK) == pattern(3)
        assert kept.mirror.state is MirrorState.STEADY and left.mirror.state is MirrorState.PASSTHROUGH
        assert kept.first.read(BLOCK, BLOCK) == pattern(3) and left.first.read(BLOCK, BLOCK) == bytes(BLOCK)
        wanted = kept.record().wanted
        assert wanted is not None and wanted.path == str(kept.paths[0])
        assert kept.record().peer_worth is Worth.UP_TO_DATE
        assert left.record().peer_worth is Worth.OUTDATED and left.record().wanted is None
        for it in stages:
            assert it.record().current.path == str(it.paths[1]) and it.record().epoch == 2

    play(scene, tmp_path, monkeypatch)


def test_a_coordinator_that_gives_up_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled with both gates closed."""

    async def scene(stages: list[Stage]) -> None:
        closed = anyio.Event()

        async def coordinate() -> None:
            async with both_prepared(stages) as attempts:
                for each in attempts:
                    await each.prepare()
                    assert await each.close()
                closed.set()
                await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(coordinate)
            await closed.wait()
            tasks.cancel_scope.cancel()
        for it in stages:
            assert (await it.guest_does(it.guest.flush_now)).ok
            assert it.record().current.path == str(it.paths[0])

    play(scene, tmp_path, monkeypatch)
