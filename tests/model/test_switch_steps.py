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
from vhostsync.errors import EngineError
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import SwitchPlan
from vhostsync.mirror.switch_steps import SwitchSteps

PLAN = SwitchPlan(max_pause_ms=2000)


@asynccontextmanager
async def both_prepared(stages: list[Stage]) -> AsyncIterator[list[SwitchSteps]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(it.mirror.switch_in_steps(PLAN)) for it in stages]


def play(
    scene: Callable[[list[Stage]], Awaitable[None]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def perform() -> None:
        async with AsyncExitStack() as stack:
            stages = []
            for name in ("one", "two"):
                (folder / name).mkdir()
                # Each stage names its disks to the engine; those of the first are attached before the second.
                stages.append(await stack.enter_async_context(stage(folder / name, monkeypatch)))
                await stages[-1].steady()
                await stages[-1].guest_does(partial(stages[-1].guest.write_now, 0, pattern(1)))
            await scene(stages)

    anyio.run(perform)


def test_two_disks_are_switched_at_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
                assert (await each.exchange()).pause_ns > 0
            for each in attempts:
                await each.settle()
        for it, write in zip(stages, late, strict=True):
            await it.guest_does(partial(it.guest.wait, write))
            assert it.record().current.path == str(it.paths[1])
            assert it.mirror.source_path == str(it.paths[1]) and it.mirror.state is MirrorState.PASSTHROUGH
            assert it.second.read(BLOCK, BLOCK) == pattern(2) and it.first.read(BLOCK, BLOCK) == bytes(BLOCK)

    play(scene, tmp_path, monkeypatch)


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
                await attempts[1].exchange()
        await one.guest_does(partial(one.guest.wait, late))
        assert one.first.read(BLOCK, BLOCK) == pattern(2), "it went to the new disk"
        assert one.record() == before[0] and two.record().current == before[1].current
        assert one.mirror.state is MirrorState.STEADY and one.mirror.source_path == str(one.paths[0])
        await one.mirror.switch(deadline_s=5, max_pause_ms=2000, keep_mirror=False)

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
