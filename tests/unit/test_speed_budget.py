# SPDX-License-Identifier: Apache-2.0
"""A bandwidth shared among copies: never more in all than was given."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.unit.control_fakes import FakeBackend, running, status
from vhostsync.fleet.speed_budget import SpeedBudget

pytestmark = pytest.mark.anyio


class Copies:
    """Backends that copy; the greatest sum of their limits that there ever was."""

    def __init__(self) -> None:
        self.backends: dict[Path, FakeBackend] = {}
        self.limits: dict[Path, int] = {}
        self.most = 0

    async def add(self, stack: AsyncExitStack, path: Path) -> Path:
        backend = FakeBackend()
        backend.mirror.now = status(state="steady", destination="/b.img")
        await stack.enter_async_context(running(path, backend))
        self.backends[path] = backend

        async def set_speed(bytes_per_s: int) -> None:
            self.note(path, bytes_per_s)

        backend.mirror.set_speed = set_speed  # type: ignore[method-assign]
        return path

    def note(self, path: Path, bytes_per_s: int) -> None:
        self.limits[path] = bytes_per_s
        self.most = max(self.most, sum(self.limits.values()))


async def test_each_has_a_part_and_all_never_more(tmp_path: Path) -> None:
    copies, budget = Copies(), SpeedBudget(900, 3)
    async with AsyncExitStack() as stack:
        paths = [await copies.add(stack, tmp_path / str(at)) for at in range(3)]
        for at, path in enumerate(paths, 1):
            copies.note(path, await budget.join(path))  # as mirror-start has it
            await budget.settle(path)
            assert {copies.limits[each] for each in paths[:at]} == {900 // at}
        await budget.leave(paths[1])
        assert (copies.limits[paths[0]], copies.limits[paths[1]], copies.limits[paths[2]]) == (450, 0, 450)
        assert copies.most == 900


async def test_a_copy_that_is_not_ours_keeps_its_limit(tmp_path: Path) -> None:
    """The evacuation has found that its disk is mirrored elsewhere, and leaves it alone."""
    copies, budget = Copies(), SpeedBudget(900, 2)
    async with AsyncExitStack() as stack:
        ours, other = [await copies.add(stack, tmp_path / name) for name in ("ours", "other")]
        copies.note(ours, await budget.join(ours))
        for _ in range(2):  # its backend was restarted meanwhile
            await budget.settle(ours)
        copies.note(other, 77)
        await budget.join(other)
        assert copies.limits == {ours: 450, other: 77}
        await budget.leave(other)
        assert copies.limits == {ours: 900, other: 77}
        await budget.leave(ours)
        assert copies.limits == {ours: 0, other: 77}
        copies.note(other, await budget.join(other))
        await budget.settle(other)
        assert copies.limits == {ours: 0, other: 900}


async def test_a_backend_that_is_gone_keeps_nobody_from_its_part(tmp_path: Path) -> None:
    copies, budget = Copies(), SpeedBudget(900, 2)
    async with AsyncExitStack() as stack:
        one = await copies.add(stack, tmp_path / "1")
        await budget.join(tmp_path / "gone")
        await budget.join(one)
        await budget.settle(one)
        assert copies.limits[one] == 450
        await budget.leave(tmp_path / "gone")
        assert copies.limits[one] == 900


async def test_without_a_limit_none_is_touched(tmp_path: Path) -> None:
    copies, budget = Copies(), SpeedBudget(0, 4)
    async with AsyncExitStack() as stack:
        one = await copies.add(stack, tmp_path / "1")
        assert await budget.join(one) == 0
        await budget.settle(one)
        await budget.leave(one)
        assert copies.limits == {}
