# SPDX-License-Identifier: Apache-2.0
"""A source that fails while a command has the mirror: the switch from it goes first, whatever the command
waits for, and the guest sees no error. The real Mirror and engine, on test disks."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.engine_driver import DiskOp, MemoryDisk
from tests.frontend import Request
from tests.model.rig import BLOCK, pattern
from tests.model.stage import SIZE, Stage, stage, until
from vhostsync.errors import MirrorError
from vhostsync.events import EventHub
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.resize import Resizer
from vhostsync.mirror.source_failover import SourceFailover
from vhostsync.mirror.turns import Turns
from vhostsync.mirror.verify import Verifier
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.state_record import GuestDisk
from vhostsync.vhost_user.virtio_blk import BlkDevice, DeviceShape

READ, WRITE, FLUSH = DiskOp.READ, DiskOp.WRITE, DiskOp.FLUSH
ROOM = 2 * SIZE

DEADLINE_S = 60.0  # far beyond what any of these tests may take


@asynccontextmanager
async def guarded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    """Steady, and a source that fails is left."""
    async with stage(folder, monkeypatch, switch_on_source_error=True) as it:
        failover = SourceFailover(it.engine, it.mirror, EventHub(), DEADLINE_S)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(failover.run)
            await it.steady()
            yield it
            tasks.cancel_scope.cancel()


def play(scene: Callable[[Stage], Awaitable[None]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def perform() -> None:
        async with guarded(folder, monkeypatch) as it:
            await scene(it)

    anyio.run(perform)


async def given_up(command: Callable[[], Awaitable[Any]], over: anyio.Event) -> None:
    with pytest.raises(MirrorError, match="was given up: the source has failed"):
        await command()
    over.set()


async def moved(it: Stage) -> None:
    """The guest may have its answer before the control plane knows."""
    await until(lambda: it.mirror.source_path == str(it.paths[1]))


async def a_write_fails(
    it: Stage, command: Callable[[], Awaitable[Any]], held: MemoryDisk, op: DiskOp
) -> None:
    """The source fails a write while the command waits for `held`: the command is given up, and the guest,
    which sees no error, is on the other disk."""
    over = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(given_up, command, over)
        await until(lambda: held.held(op) > 0)
        it.first.fault(WRITE, errno.EIO, count=-1)
        write = it.guest.write(0, pattern(1))
        await over.wait()
        held.release_all()
        await it.guest_does(partial(it.guest.wait, write))
        assert write.ok
    await moved(it)


@pytest.mark.parametrize("op", [WRITE, FLUSH])
def test_before_a_switch_that_keeps_the_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: DiskOp
) -> None:
    """It drains both disks, and the source is flushed no more."""

    async def scene(it: Stage) -> None:
        switch = partial(it.mirror.switch, deadline_s=30, max_pause_ms=500, keep_mirror=True)
        over = anyio.Event()
        await it.guest_does(partial(it.guest.write_now, BLOCK, pattern(2)))
        it.first.hold(FLUSH)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(given_up, switch, over)
            await until(lambda: it.first.held(FLUSH) > 0)
            if op is FLUSH:
                it.first.fault(FLUSH, errno.EIO, count=-1)
            it.first.hold(FLUSH, False)
            if op is FLUSH:
                it.first.release(FLUSH)
                assert (await it.guest_does(it.guest.flush_now)).ok
                await over.wait()
            else:
                it.first.fault(WRITE, errno.EIO, count=-1)
                write: Request = it.guest.write(0, pattern(1))
                await until(lambda: it.first.held(WRITE) == 0)
                it.first.release(FLUSH)
                await it.guest_does(partial(it.guest.wait, write))
                assert write.ok
                await over.wait()
        await moved(it)
        assert it.mirror.state is MirrorState.PASSTHROUGH

    play(scene, tmp_path, monkeypatch)


def test_before_a_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which waits for the destination: had it come further, the guest would have no disk to go to."""

    async def scene(it: Stage) -> None:
        await it.guest_does(partial(it.guest.write_now, BLOCK, pattern(2)))
        it.second.hold(FLUSH)
        await a_write_fails(it, partial(it.mirror.cancel, force=False), it.second, FLUSH)

    play(scene, tmp_path, monkeypatch)


class Frontends:
    def config_changed(self) -> None:
        raise AssertionError("the disk has not grown")


def resizer(it: Stage) -> Resizer:
    shape = DeviceShape(
        capacity_bytes=SIZE, block_bytes=512, physical_block_bytes=512, discard_bytes=512, num_queues=1,
        read_only=False, writeback=True,
    )  # fmt: skip
    frontends: Any = Frontends()
    return Resizer(it.engine, it.mirror, BlkDevice(shape), frontends, EventHub())


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks that are larger than what the guest has of them."""
    monkeypatch.setattr("tests.model.stage.MemoryDisk", lambda _: MemoryDisk(ROOM))


@pytest.mark.usefixtures("roomy")
def test_before_a_growth_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: Stage) -> None:
        it.first.load(SIZE, b"new" * 4096)
        it.first.hold(READ)
        keeper = it.mirror._keeper
        async with keeper.lock:
            keeper.record = replace(keeper.record, guest=GuestDisk(SIZE, 512, 512, 512))
        await a_write_fails(it, partial(resizer(it).resize, None), it.first, READ)
        assert it.engine.config.capacity_bytes == SIZE
        guest = it.record().guest
        assert guest is not None and guest.capacity_bytes == SIZE, "a restart would show the new size"
        beyond = await it.guest_does(partial(it.guest.write_now, SIZE, pattern(3)))
        assert not beyond.ok, "the disk has grown, though nobody was told"

    play(scene, tmp_path, monkeypatch)


@pytest.mark.usefixtures("roomy")
def test_a_new_range_that_cannot_be_read_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it listed as unreadable, a source that fails next could not be left any more."""

    async def scene(it: Stage) -> None:
        it.first.load(SIZE, b"new" * 4096)
        it.first.fault(READ, errno.EIO, count=-1)
        with pytest.raises(MirrorError, match=r"stays as large as it is: .*: Input/output"):
            await resizer(it).resize(None)
        status = await it.mirror.status()
        assert (status.state, status.unreadable) == ("steady", [])
        it.first.fault(WRITE, errno.EIO, count=-1)
        written = await it.guest_does(partial(it.guest.write_now, 0, pattern(1)))
        assert written.ok, "the failover is refused"
        await moved(it)
        assert it.record().current.path == str(it.paths[1])

    play(scene, tmp_path, monkeypatch)


def test_during_a_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no turn, and reads nothing more of a source that is left."""

    async def scene(it: Stage) -> None:
        verifier = Verifier(it.engine, it.mirror, EventHub())
        await it.guest_does(partial(it.guest.write_now, BLOCK, pattern(2)))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(verifier.report)
            it.first.hold(READ)
            await verifier.start(repair=False, speed_bytes_per_s=0)
            await until(lambda: it.first.held(READ) > 0)
            it.first.fault(WRITE, errno.EIO, count=-1)
            write = it.guest.write(0, pattern(1))
            await until(lambda: it.mirror.turns.first is not None)
            it.first.release_all()
            await it.guest_does(partial(it.guest.wait, write))
            assert write.ok
            while (await verifier.status()).state == "running":
                await anyio.sleep(0.005)
            assert (await verifier.status()).state == "aborted"
            tasks.cancel_scope.cancel()
        await moved(it)

    play(scene, tmp_path, monkeypatch)


def test_before_a_start_that_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror may be steady before its mirror-start has returned."""

    async def scene(it: Stage) -> None:
        await it.mirror.cancel(force=True)
        reached, go_on = anyio.Event(), anyio.Event()

        async def held(*_: object) -> None:
            reached.set()
            await go_on.wait()

        monkeypatch.setattr(it.mirror._keeper, "begin_bitmap", held)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.mirror.start, MirrorTarget(str(it.paths[1]), cache="writeback", full=True))
            await reached.wait()
            await until(lambda: it.mirror.state is MirrorState.STEADY)
            it.first.fault(WRITE, errno.EIO, count=-1)
            write = it.guest.write(0, pattern(1))
            await until(lambda: it.mirror.turns.first is not None)
            go_on.set()
            await it.guest_does(partial(it.guest.wait, write))
            assert write.ok
        await moved(it)

    play(scene, tmp_path, monkeypatch)


# ---- turns ----------------------------------------------------------------------------


def test_one_has_the_turn_and_a_second_one_is_refused() -> None:
    async def scene() -> None:
        turns = Turns()
        async with turns.take("switch"):
            with pytest.raises(MirrorError, match="resize has to wait: switch is under way"):
                async with turns.take("resize"):
                    raise AssertionError
        async with turns.take("resize"):
            pass

    anyio.run(scene)


def test_who_goes_first_waits_until_the_other_has_undone_it_and_no_third_comes_between() -> None:
    async def scene() -> None:
        turns, undone, order = Turns(), anyio.Event(), []

        async def command() -> None:
            with pytest.raises(MirrorError, match="switch was given up"):
                async with turns.take("switch"):
                    try:
                        await anyio.sleep_forever()
                    finally:
                        with anyio.CancelScope(shield=True):
                            await undone.wait()
                        order.append("undone")

        async def first() -> None:
            async with turns.take_first("a failover"):
                order.append("first")

        async def waits() -> None:
            await turns.free()
            order.append("free")

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(command)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(waits)
                tasks.start_soon(first)
                await anyio.wait_all_tasks_blocked()
                try:
                    with pytest.raises(MirrorError, match="resize has to wait: a failover is under way"):
                        async with turns.take("resize"):
                            raise AssertionError
                finally:
                    undone.set()
        assert order == ["undone", "first", "free"]

    anyio.run(scene)
