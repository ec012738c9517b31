# SPDX-License-Identifier: Apache-2.0
"""One disk of a group, ordered step by step: which step may follow, and what ends an attempt: the client's
word, its end, the pause that is used up, a step that does not come, a destination that is lost."""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest

from tests.engine_driver import Cut, DiskOp, MemoryDisk
from tests.model import stage
from tests.model.rig import BLOCK, pattern
from tests.model.stage import Stage, play, until
from vhostsync.errors import MirrorError, StateRecordError, VhostsyncError
from vhostsync.mirror import group_member
from vhostsync.mirror.group_member import GroupMember
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.record.files import RealFileSystem
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord, Worth


class FullFileSystem(RealFileSystem):
    def write_durable(self, path: Path, text: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


ACTIONS = ["switch", "snapshot"]
STEPS = ["close", "carry-out"]


@asynccontextmanager
async def client(it: Stage) -> AsyncIterator[GroupMember]:
    """Gone at the end."""
    async with anyio.create_task_group() as tasks:
        yield GroupMember(it.mirror, tasks)
        tasks.cancel_scope.cancel()


async def prepared(member: GroupMember, action: str, *, max_pause_ms: float = 5000) -> None:
    if action == "switch":
        await member.prepare_switch(max_pause_ms=max_pause_ms, keep_mirror=False)
    else:
        await member.prepare_snapshot(max_pause_ms=max_pause_ms)


async def as_before(it: Stage, before: StateRecord) -> None:
    """The guest goes on, on its disk, in step with the destination."""
    assert (await it.guest_does(partial(it.guest.write_now, BLOCK, pattern(9)))).ok
    assert (await it.guest_does(it.guest.flush_now)).ok
    assert it.first.read(BLOCK, BLOCK) == pattern(9) and it.second.read(BLOCK, BLOCK) == pattern(9)
    assert it.record() == before
    assert it.mirror.state is MirrorState.STEADY and it.mirror.source_path == str(it.paths[0])


def passthrough(it: Stage) -> None:
    assert it.mirror.state is MirrorState.PASSTHROUGH


Scene = Callable[[Stage, StateRecord], Awaitable[None]]


def steady(scene: Scene, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def perform(it: Stage) -> None:
        await it.steady()
        await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        await scene(it, it.record())

    play(perform, folder, monkeypatch)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("steps", range(3))
@pytest.mark.parametrize("end", ["said", "gone", "silent"])
def test_what_was_not_opened_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, steps: int, end: str
) -> None:
    """By the client's word, by its end, and by its silence."""

    async def scene(it: Stage, before: StateRecord) -> None:
        if end == "silent":
            monkeypatch.setattr(group_member, "IDLE_S", 0.2)
        async with client(it) as member:
            await prepared(member, action, max_pause_ms=300 if end == "silent" else 60_000)
            for step in STEPS[:steps]:
                assert await member.take(step) == {}
            if end == "said":
                assert await member.take("take-back") == {}
            elif end == "silent":
                await it.mirror.turns.free()
                with pytest.raises(MirrorError, match="all was taken back before: "):
                    await member.take((*STEPS, "open")[steps])
        await as_before(it, before)
        async with client(it) as member:
            await prepared(member, action)
            for step in STEPS:
                await member.take(step)
            assert (await member.take("open")).pause_us > 0
        passthrough(it)
        assert it.record().peer_worth is Worth.OUTDATED

    steady(scene, tmp_path, monkeypatch)


def test_the_guest_is_held_no_longer_than_the_coordinator_has_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage, before: StateRecord) -> None:
        async with client(it) as member:
            await prepared(member, "switch", max_pause_ms=500)
            began = time.monotonic()
            for step in STEPS:
                await member.take(step)
            late = it.guest.write(2 * BLOCK, pattern(2))
            await it.guest_does(partial(it.guest.wait, late))
            assert 0.4 < time.monotonic() - began < 5
        assert it.first.read(2 * BLOCK, BLOCK) == pattern(2)
        await as_before(it, before)

    steady(scene, tmp_path, monkeypatch)


def test_steps_come_in_their_order_and_from_one_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage, before: StateRecord) -> None:
        async with client(it) as one, client(it) as other:
            with pytest.raises(MirrorError, match="nothing was prepared"):
                await one.take("close")
            await prepared(one, "switch")
            with pytest.raises(MirrorError, match="begun something already"):
                await prepared(one, "snapshot")
            for action in ACTIONS:
                with pytest.raises(MirrorError, match="switch is under way"):
                    await prepared(other, action)
            with pytest.raises(MirrorError, match="nothing was prepared"):
                await other.take("close")
            for wrong in ("carry-out", "open", "prepare"):
                with pytest.raises(MirrorError, match="cannot be the next step: prepare is done"):
                    await one.take(wrong)
            with pytest.raises(MirrorError, match="switch is under way"):
                await it.mirror.cancel(force=False)
            await one.take("close")
            with pytest.raises(MirrorError, match="cannot be the next step: close is done"):
                await one.take("open")
        await as_before(it, before)

    steady(scene, tmp_path, monkeypatch)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_destination_that_is_lost_meanwhile_holds_no_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """The record's lock is held from step to step, and its loss has to be recorded."""

    async def scene(it: Stage, before: StateRecord) -> None:
        async with client(it) as member:
            await prepared(member, action)
            it.second.fault(DiskOp.WRITE, errno.EIO, count=-1)
            assert (await it.guest_does(partial(it.guest.write_now, BLOCK, pattern(2)))).ok
            assert (await it.guest_does(it.guest.flush_now)).ok
            assert it.mirror.state is MirrorState.DEGRADED and it.record().peer_worth is Worth.OUTDATED
            with pytest.raises(VhostsyncError, match="did not stay steady"):
                await member.take("close")
        assert it.record().current == before.current

    steady(scene, tmp_path, monkeypatch)


def test_a_snapshot_holds_what_was_written_and_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(it: Stage, before: StateRecord) -> None:
        async with client(it) as member:
            await prepared(member, "snapshot")
            assert (await it.guest_does(partial(it.guest.write_now, BLOCK, pattern(2)))).ok
            assert it.record().peer_worth is Worth.OUTDATED and it.mirror.state is MirrorState.STEADY
            await member.take("close")
            late = it.guest.write(2 * BLOCK, pattern(3))
            await member.take("carry-out")
            counts = (await it.engine.snapshot()).counts
            assert counts.writes_flushed == counts.source_generation == 2
            opened = await member.take("open")
            assert (opened.source_path, opened.destination_path) == tuple(map(str, it.paths))
        await it.guest_does(partial(it.guest.wait, late))
        assert (await it.guest_does(it.guest.flush_now)).ok
        assert it.second.read(BLOCK, BLOCK, Cut.EVERYTHING) == pattern(2), "it was not durable there"
        assert it.second.read(2 * BLOCK, BLOCK) == bytes(BLOCK)
        passthrough(it)
        assert it.mirror.source_path == str(it.paths[0])
        assert it.record().peer_worth is Worth.OUTDATED and it.record().wanted is None

    steady(scene, tmp_path, monkeypatch)


def test_one_that_is_not_steady_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: Stage) -> None:
        async with client(it) as member:
            for action in ACTIONS:
                with pytest.raises(MirrorError, match="needs the mirror in the steady state"):
                    await prepared(member, action)
        await it.attach()
        await until(lambda: it.record().peer_worth is Worth.UP_TO_DATE)
        async with client(it) as member:
            await prepared(member, "snapshot")

    play(scene, tmp_path, monkeypatch)


@pytest.mark.parametrize("end", ["said", "silent"])
def test_an_exchange_that_cannot_be_taken_back_is_opened_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The old disk is lost while the guest is held on the new one."""

    class RemoteDisk(MemoryDisk):
        def __init__(self, size_bytes: int) -> None:
            super().__init__(size_bytes)
            self.make_remote()

    monkeypatch.setattr(stage, "MemoryDisk", RemoteDisk)

    async def scene(it: Stage, before: StateRecord) -> None:
        async with client(it) as member:
            await prepared(member, "switch", max_pause_ms=300 if end == "silent" else 60_000)
            for step in STEPS:
                await member.take(step)
            it.first.cut()
            if end == "silent":
                await it.mirror.turns.free()
            assert (await member.take("take-back")).source_path == str(it.paths[1])
        assert (await it.guest_does(partial(it.guest.write_now, BLOCK, pattern(2)))).ok
        assert it.second.read(BLOCK, BLOCK) == pattern(2)
        assert it.record().current.path == str(it.paths[1]) and it.record().peer_worth is Worth.OUTDATED

    steady(scene, tmp_path, monkeypatch)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("end", ["said", "gone", "silent"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_record_whose_disk_hangs_holds_no_guest_when_all_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, end: str, steps: int
) -> None:
    """The record follows later, and names the guest's disk to a restart all the time."""

    async def scene(it: Stage, before: StateRecord) -> None:
        it.state_file.lock(1)
        async with client(it) as member:
            await prepared(member, action, max_pause_ms=300 if end == "silent" else 60_000)
            for step in STEPS[:steps]:
                await member.take(step)
            it.state_file.hold = True
            late = it.guest.write(2 * BLOCK, pattern(3))
            async with anyio.create_task_group() as tasks:
                if end == "said":
                    tasks.start_soon(member.take, "take-back")
                elif end == "gone":
                    member._tasks.cancel_scope.cancel()
                try:
                    with anyio.CancelScope(shield=True):
                        await it.guest_does(partial(it.guest.wait, late))
                        assert await it.guest_does(partial(it.state_file.reached.wait, 5))
                        assert it.first.read(2 * BLOCK, BLOCK) == pattern(3)
                        assert StateFile(it.state_file.path).load() in (before, outdated(it, before))
                finally:
                    it.state_file.release.set()
        await it.mirror.turns.free()
        await as_before(it, before)

    steady(scene, tmp_path, monkeypatch)


def outdated(it: Stage, record: StateRecord) -> StateRecord:
    """As a snapshot has it, before anything was let go."""
    return record.with_worth(Worth.OUTDATED, it.record().outdated_since)


def test_a_snapshot_that_is_cut_short_leaves_the_mirror_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart after a kill at each step finds what is wanted, until the destination is let go; what was
    answered stays a copy: no restart mirrors to it."""

    async def scene(it: Stage, before: StateRecord) -> None:
        assert before.wanted is not None
        async with client(it) as member:
            await prepared(member, "snapshot")
            for step in STEPS:
                assert it.record().wanted == before.wanted, f"before {step}"
                await member.take(step)
            assert it.record().wanted == before.wanted
            await member.take("open")
            assert it.record().wanted is None

    steady(scene, tmp_path, monkeypatch)


def test_a_snapshot_whose_record_cannot_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart would mirror to it again, so nobody is told that it is one."""

    async def scene(it: Stage, before: StateRecord) -> None:
        async with client(it) as member:
            await prepared(member, "snapshot")
            for step in STEPS:
                await member.take(step)
            with monkeypatch.context() as broken:
                broken.setattr(it.state_file, "_files", FullFileSystem())
                with pytest.raises(StateRecordError, match="a restart would mirror to it again"):
                    await member.take("open")
            assert (await it.guest_does(it.guest.flush_now)).ok
            assert it.mirror.state is MirrorState.PASSTHROUGH and it.mirror.wanted is None
            await until(lambda: it.record().wanted is None)

    steady(scene, tmp_path, monkeypatch)
