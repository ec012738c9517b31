# SPDX-License-Identifier: Apache-2.0
"""Which disk is which, at random (docs/durability.md, section 5): the real start, Mirror and record over the
real engine, on three test disks; a guest that writes and flushes; an operator who starts mirrors, switches,
cancels, renames disks and promotes old ones; a record that cannot be written at times; and ends, kills and
reboots, after which the devices have other numbers.

After every step this process is killed, and the power taken: of all disks at most one may be started with
unasked, and it has what the guest was told is flushed; so has its peer if the record calls that up to date;
and whichever may be promoted is a moment of the guest's disk (lineage_world.py). What a disk that fails does
to a mirror is test_policy.py's.

VHOSTSYNC_LINEAGE_SEEDS=1000 plays longer; a failure names its seed."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest

from tests.frontend import Frontend
from tests.guest_ring import GuestMemory
from tests.model.lineage_world import STORAGES, Image, Storage, World, arrange
from tests.model.random_guest import BLOCKS, Guest, end_process, let_go
from tests.model.stage import AsyncTransport
from tests.sizes import MIB
from vhostsync.config import ServeConfig
from vhostsync.device.device import engine_config
from vhostsync.device.opening import Opened, open_device
from vhostsync.engine.engine import Engine
from vhostsync.errors import EngineError, StateRecordError, VhostsyncError
from vhostsync.events import EventHub
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror_target import MirrorTarget
from vhostsync.option_values import Answer
from vhostsync.storage import identify
from vhostsync.storage.local import LocalDisk

STEPS = 30
RUNS = 3
PATIENCE_S = 60.0
SEEDS = int(os.environ.get("VHOSTSYNC_LINEAGE_SEEDS", "2"))
FIRST = int(os.environ.get("VHOSTSYNC_LINEAGE_FIRST", "0"))


class KilledError(Exception):
    """The process is gone at this instant."""


def open_as_serve_does(world: World, image: Image, answer: Answer | None) -> tuple[Opened, ServeConfig]:
    """StateRecordError."""
    config = ServeConfig(
        blk_file=str(image.path), fd=0, cache="writeback", poll_us=0, bitmap=world.bits, al_extents=256,
        num_queues=1, answer=answer, log_bytes=8 * MIB, stop_timeout_s=0.2, copy_depth=4,
    )  # fmt: skip
    return open_device(config, world.state, lambda: None), config


class Run:
    """One process."""

    def __init__(self, world: World, mirror: Mirror, guest: Guest, tasks: anyio.abc.TaskGroup) -> None:
        self._world = world
        self._chance = world.chance
        self.mirror = mirror
        self._guest = guest
        self._tasks = tasks

    def step(self) -> str:
        weights: dict[Callable[[], str], int] = {
            self._write: 12, self._flush: 10, self._start: 6, self._switch: 5, self._cancel: 2,
            self._record: 3 if self._world.record_fails else 1, self._world.rename: 1,
        }  # fmt: skip
        return self._chance.choices(list(weights), list(weights.values()))[0]()

    def listen(self) -> None:
        self._guest.listen()

    def _write(self) -> str:
        for block in self._chance.sample(range(BLOCKS), self._chance.randint(1, 6)):
            self._guest.write(block)
        return "write"

    def _flush(self) -> str:
        self._guest.flush()
        return "flush"

    def _start(self) -> str:
        # That of the source has its lock: the test disk in its place has none.
        source = self._world.source
        image = self._chance.choice([each for each in self._world.there if each is not source])
        target = MirrorTarget(str(image.path), cache="writeback", full=self._chance.random() < 0.2)
        return self._command(f"start {image}", partial(self.mirror.start, target))

    def _switch(self) -> str:
        keep = self._chance.random() < 0.5
        switch = partial(self.mirror.switch, deadline_s=1.0, max_pause_ms=200, keep_mirror=keep)
        return self._command(f"switch keep={keep}", switch)

    def _cancel(self) -> str:
        force = self._chance.random() < 0.5
        return self._command(f"cancel force={force}", partial(self.mirror.cancel, force=force))

    def _record(self) -> str:
        self._world.record_fails = not self._world.record_fails
        return f"the record {'cannot' if self._world.record_fails else 'can'} be written"

    def _command(self, name: str, do: Callable[[], Any]) -> str:
        async def obey() -> None:
            try:
                await do()
            except VhostsyncError as error:
                self._world.story.append(f"  {name}: {error}")
            else:
                self._world.story.append(f"  {name}: done")

        self._tasks.start_soon(obey)
        return name

    async def until_steady(self) -> None:
        """So that a switch finds what it needs, more often than by chance."""
        with anyio.move_on_after(PATIENCE_S):
            while self.mirror.state is MirrorState.SYNCING:
                await self.mirror.changed.wait()


@asynccontextmanager
async def run_of(world: World, image: Image, answer: Answer | None) -> AsyncIterator[Run]:
    found, config = open_as_serve_does(world, image, answer)
    if answer is Answer.PROMOTE:
        world.promote(image)
    assert found.record is not None
    assert found.store is not None
    told = engine_config(config, found.shape)
    told = replace(
        told, options={**told.options, "checkpoint_us": 50_000}, doubt=found.record.doubt, spared=found.spared
    )
    engine = await Engine.create(told, found.disk, found.bitmap, peer_known=found.peer_known)
    mirror = Mirror(
        engine, found.disk, EventHub(), found.store, found.record, found.bitmap, found.peer_left,
        found.shape.guest, found.peer_until_ns,
    )  # fmt: skip
    try:
        async with anyio.create_task_group() as lasting:
            lasting.start_soon(engine.pump)
            lasting.start_soon(mirror.run)
            frontend = Frontend(AsyncTransport(await engine.attach()), memory=GuestMemory((8 * MIB,)))
            await anyio.to_thread.run_sync(frontend.start)
            guest = Guest(frontend, world.allowed, world.seeds)
            async with anyio.create_task_group() as serving:
                yield Run(world, mirror, guest, serving)
                serving.cancel_scope.cancel()
            world.record_fails = False
            if not world.killed:
                await let_go(guest, PATIENCE_S)
                await mirror.detach(force=False)
            lasting.cancel_scope.cancel()
    finally:
        await end_process(engine, mirror, guest, found.bitmap, killed=world.killed)
        found.store.close()
    world.note_moment()
    world.check()


def between(world: World) -> tuple[Image, Answer | None]:
    """What happens to the machine between two runs, and with which disk the operator starts the next one."""
    chance = world.chance
    if chance.random() < 0.5:
        world.reboot()
        world.story.append(f"a reboot: {world.boot.id}")
    if chance.random() < 0.4:
        world.story.append(world.rename())
    if chance.random() < 0.4:
        replace_one(world)
    world.check()
    served, other = world.source, chance.choice(world.there)
    if chance.random() < 0.25 and other is not served and starts(world, other, Answer.PROMOTE):
        return other, Answer.PROMOTE
    if starts(world, served, None):
        return served, None
    # It cannot be recognised, and the operator knows it.
    assert not world.storage.is_certain, "the current disk is refused"
    return served, Answer.SAME_DISK


def replace_one(world: World) -> None:
    """One of the disks, for good; in the place of the current one the operator sees the mistake."""
    image, source = world.chance.choice(world.there), world.source
    if not world.would_be_missed(image):
        return
    other = world.replace(image)
    world.story.append(f"another file in the place of {image.letter}")
    if image is source:
        record = world.record()
        # A file under a name that no record knows is a disk of its own.
        known = record.at_stake and record.current.path == str(other.path)
        assert not (known and starts(world, other, None)), "another file is taken for it"
        world.put_back(image, other)


def starts(world: World, image: Image, answer: Answer | None) -> bool:
    try:
        world.would_start(image, answer)
    except StateRecordError as error:
        world.story.append(f"  start with {image}, {answer}: {error}")
        return False
    return True


async def play(world: World) -> None:
    image, answer = world.at(world.folder / "disks" / "a.img"), None
    for number in range(RUNS):
        world.killed = world.chance.random() < 0.4 and number < RUNS - 1
        world.story.append(f"run {number} on {image}, {answer}, {'killed' if world.killed else 'ended'}")
        async with run_of(world, image, answer) as run:
            for _ in range(STEPS):
                if world.chance.random() < 0.1:
                    await run.until_steady()
                world.story.append(run.step())
                world.note_moment()
                await anyio.sleep(world.chance.choice((0, 0, 0.001, 0.005, 0.03)))
                run.listen()
                world.note_moment()
                world.check()
        image, answer = between(world)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    world = World(tmp_path, chance, chance.choice(STORAGES), with_bitmap=chance.random() < 0.5)
    arrange(world, monkeypatch)
    try:
        anyio.run(play, world)
    except BaseException:
        print(f"seed {seed}, bitmap {world.with_bitmap}, {world.storage}:", *world.story, sep="\n  ")
        raise
    world.close()


def fuse_with_marks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[World, Image, Image, str]:
    """The current disk, its former peer, and the mark that this bears; it has another name since, after a
    boot, and is not certainly recognised any more: what is to be a destination then gets a new mark."""
    world = World(folder, random.Random(1), Storage("fuse with marks", marks=True), with_bitmap=False)
    arrange(world, monkeypatch)
    current, former, _ = world.images.values()

    async def mirrored() -> None:
        async with run_of(world, current, None) as run:
            await run.mirror.start(MirrorTarget(str(former.path), cache="writeback"))
            await run.until_steady()

    anyio.run(mirrored)
    mark = world.look(former).mark
    assert mark
    world.reboot()
    world.move(former, folder / "disks" / "renamed.img")
    return world, current, former, mark


def test_no_disk_bears_a_mark_that_no_record_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start would take it for a disk of its own: so the record is told of a mark first, and where that
    cannot be written, or the engine does not take the disk, the disk bears what it has borne."""
    world, current, former, mark = fuse_with_marks(tmp_path, monkeypatch)
    target = MirrorTarget(str(former.path), cache="writeback", force=True)

    async def refused(disk: LocalDisk, **_: bool) -> None:
        disk.close()
        assert world.look(former).mark != mark
        raise EngineError("attaching failed", errno.EBUSY)

    async def attached_again() -> None:
        async with run_of(world, current, None) as run:
            with monkeypatch.context() as engine:
                engine.setattr(run.mirror._engine, "mirror_start", refused)
                with pytest.raises(EngineError, match="attaching failed"):
                    await run.mirror.start(target)
            assert world.look(former).mark == mark
            world.record_fails = True
            with pytest.raises(StateRecordError, match="cannot be written"):
                await run.mirror.start(target)

    anyio.run(attached_again)
    assert world.look(former).mark == mark
    world.record_fails = True
    with pytest.raises(StateRecordError, match="cannot be written"):
        open_as_serve_does(world, former, Answer.PROMOTE)
    assert world.look(former).mark == mark
    world.check()
    world.close()


def test_a_mark_that_is_recorded_and_missing_is_given_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the record and the mark: of the source, and of a destination. One whose mark was set
    and is missing is another file, perhaps."""
    world = World(tmp_path, random.Random(1), Storage("fuse with marks", marks=True), with_bitmap=False)
    arrange(world, monkeypatch)
    current, peer, _ = world.images.values()

    async def mirrored() -> None:
        async with run_of(world, current, None) as run:
            await run.mirror.start(MirrorTarget(str(peer.path), cache="writeback"))
            await run.until_steady()

    def killed_before_its_mark(image: Image, start: Callable[[], Any]) -> str | None:
        """The mark that the record has."""
        with monkeypatch.context() as kill, pytest.raises(KilledError):
            kill.setattr(os, "setxattr", killed)
            start()
        assert world.look(image).mark is None
        of_it = [disk for disk in world.record().disks if disk.path == str(image.path)]
        assert [disk.mark_is_set for disk in of_it] == [False]
        return of_it[0].mark

    def killed(*_: Any) -> None:
        raise KilledError

    async def killed_in_mirror_start() -> None:
        async with run_of(world, current, None) as run:
            world.killed = True
            try:
                await run.mirror.start(MirrorTarget(str(peer.path), cache="writeback"))
            except KilledError as error:
                died.append(error)

    def start_a_mirror() -> None:
        anyio.run(killed_in_mirror_start)
        raise died.pop()

    died: list[KilledError] = []
    marks = [killed_before_its_mark(current, lambda: open_as_serve_does(world, current, None))]
    opened, _ = open_as_serve_does(world, current, None)
    opened.close()
    marks.append(killed_before_its_mark(peer, start_a_mirror))
    world.killed = False
    assert not starts(world, peer, None)
    anyio.run(mirrored)
    assert [world.look(image).mark for image in (current, peer)] == marks
    assert all(disk.mark and disk.mark_is_set for disk in world.record().disks)
    world.check()
    for image in (current, peer):
        os.removexattr(image.path, identify.MARK_NAME)
        assert not starts(world, image, None)
    world.close()


def test_a_first_record_that_is_written_later_knows_of_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, random.Random(1), Storage("fuse with marks", marks=True), with_bitmap=False)
    arrange(world, monkeypatch)
    current = next(iter(world.images.values()))
    world.record_fails = True
    opened, _ = open_as_serve_does(world, current, None)
    assert opened.record is not None and opened.record.current.mark is None
    assert world.look(current).mark is None
    opened.close()
    world.record_fails = False
    opened, _ = open_as_serve_does(world, current, None)
    assert opened.record is not None and opened.record.current.mark == world.look(current).mark is not None
    opened.close()
    world.close()
