# SPDX-License-Identifier: Apache-2.0
"""The control plane's policy at random: the real Mirror, record, retry, failover and pause over the real
engine, on three test disks that fail, hang and lose what was not flushed; a guest that writes and flushes; an
operator who starts, cancels and switches; a state file that cannot be written at times; and restarts.

After every step the power is taken: what the guest was told is flushed has to be on the disk that the record
names, and on its peer if the record calls that up to date. At the end, with all faults over, everything has
to come to rest: each command and request is answered, and a new mirror makes two equal disks.

VHOSTSYNC_POLICY_SEEDS=1000 plays longer; a failure names its seed."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest

from tests.engine_driver import Cut, DiskOp, MemoryDisk
from tests.engine_options import engine_options
from tests.frontend import Frontend
from tests.guest_ring import GuestMemory
from tests.model.random_guest import BLOCKS, SIZE, Guest, check_flushed, end_process, let_go
from tests.model.rig import BLOCK
from tests.model.stage import AsyncTransport
from tests.sizes import MIB
from vhostsync.device.opening import Opened, begin_record, check_record
from vhostsync.engine.engine import Engine, EngineConfig, bitmap_file_bytes
from vhostsync.errors import StateRecordError, VhostsyncError
from vhostsync.events import EventHub
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.pause import DestinationPause
from vhostsync.mirror.retry import DestinationRetry
from vhostsync.mirror.source_failover import SourceFailover
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.bitmap import BitmapFile, Shape
from vhostsync.record.record_store import Prepared, RecordStore
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord, Worth, decode_record
from vhostsync.storage import local as disks
from vhostsync.storage.disk import Disk
from vhostsync.storage.native import probe
from vhostsync.vhost_user.virtio_blk import DeviceShape

STEPS = 60
RUNS = 3
PATIENCE_S = 20.0
SEEDS = int(os.environ.get("VHOSTSYNC_POLICY_SEEDS", "2"))
FIRST = int(os.environ.get("VHOSTSYNC_POLICY_FIRST", "0"))

WRITE, FLUSH = DiskOp.WRITE, DiskOp.FLUSH


class UnrulyStateFile(StateFile):
    fails = False

    def prepare(self, record: StateRecord) -> Prepared:
        if self.fails:
            raise StateRecordError("the state record cannot be written: No space left on device")
        return super().prepare(record)


@dataclass
class World:
    folder: Path
    chance: random.Random
    held: dict[Path, MemoryDisk]
    options: dict[str, Any]
    retry_s: float | None
    bitmap: bool
    killed: bool = False  # this run ends without a word
    allowed: dict[int, list[int]] = field(default_factory=lambda: {block: [0] for block in range(BLOCKS)})
    seeds: list[int] = field(default_factory=lambda: [0])
    story: list[str] = field(default_factory=list)

    @property
    def record_path(self) -> Path:
        return self.folder / "record.json"

    def open_store(self) -> RecordStore:
        return UnrulyStateFile(self.record_path)

    def end_the_stores_faults(self, store: RecordStore) -> None:
        assert isinstance(store, UnrulyStateFile)
        store.fails = False

    def record(self) -> StateRecord:
        return decode_record(self.record_path.read_bytes())

    def check(self) -> None:
        """A power cut now."""
        if self.record_path.exists():
            self.check_named(self.record())

    def check_named(self, record: StateRecord) -> None:
        self.check_disk(Path(record.current.path), "the current disk")
        if record.peer_worth is Worth.UP_TO_DATE:
            assert record.peer is not None
            self.check_disk(Path(record.peer.path), "the peer that is up to date")

    def check_disk(self, path: Path, what: str) -> None:
        check_flushed(self.held[path], self.allowed, f"{what}, {path.name},", Cut.EVERYTHING)


@dataclass
class Run:
    world: World
    engine: Engine
    mirror: Mirror
    store: RecordStore
    guest: Guest
    commands: list[anyio.Event] = field(default_factory=list)

    @property
    def source(self) -> MemoryDisk:
        return self.world.held[Path(self.mirror.source_path)]

    def others(self) -> list[Path]:
        return [path for path in self.world.held if path != Path(self.mirror.source_path)]


@asynccontextmanager
async def run_of(world: World, path: Path, *, resume: bool) -> AsyncIterator[tuple[Run, anyio.abc.TaskGroup]]:
    config = EngineConfig(
        capacity_bytes=SIZE, block_bytes=512, num_queues=1,
        options=engine_options(stop_timeout_s=0.2, checkpoint_s=0.05, ahead_backoff_s=0.05, **world.options),
    )  # fmt: skip
    source: Disk = disks.open_disk(path, read_only=False, cache="writeback", lock_timeout_s=1, probe=probe)
    store = world.open_store()
    found, record = check_record(store, source)
    bitmap = None
    if world.bitmap:
        shape = Shape(SIZE, 65536, 4 * MIB, 256)
        known = found.current if found is not None else None
        bitmap = BitmapFile.open(world.folder / "bits", shape, bitmap_file_bytes(shape), record, known=known)
    spared = record.spared if record is not None else ()
    device = DeviceShape(SIZE)
    source, record = begin_record(source, store, found, record, bitmap, device.guest)
    left = found.peer if found is not None and found.clean else None
    opened = Opened(source, device, store, record, bitmap, left)
    doubt = record.doubt if record is not None else ()
    config = replace(config, doubt=doubt, spared=spared)
    engine = await Engine.create(config, source, bitmap, peer_known=opened.peer_known)
    hub = EventHub()
    mirror = Mirror(engine, source, hub, store, record, bitmap, opened.peer_left, device.guest)
    failover = SourceFailover(engine, mirror, hub, 5.0)
    DestinationPause(engine, mirror, hub)
    retry = DestinationRetry(mirror, hub, world.retry_s, resume=resume)
    try:
        async with anyio.create_task_group() as lasting:
            for task in (engine.pump, mirror.run, failover.run):
                lasting.start_soon(task)
            frontend = Frontend(AsyncTransport(await engine.attach()), memory=GuestMemory((8 * MIB,)))
            await anyio.to_thread.run_sync(frontend.start)
            guest = Guest(frontend, world.allowed, world.seeds)
            async with anyio.create_task_group() as serving:
                serving.start_soon(retry.run)
                try:
                    yield Run(world, engine, mirror, store, guest), serving
                finally:
                    serving.cancel_scope.cancel()
                    with anyio.CancelScope(shield=True):
                        world.end_the_stores_faults(store)
                        for disk in world.held.values():
                            disk.release_all()
                        if not world.killed:
                            await let_go(guest, PATIENCE_S)
            if not world.killed:
                await mirror.detach(force=False)
            lasting.cancel_scope.cancel()
    finally:
        await end_process(engine, mirror, guest, bitmap, killed=world.killed)
    world.check()


async def command(run: Run, name: str, do: Callable[[], Any], over: anyio.Event) -> None:
    try:
        await do()
    except VhostsyncError as error:
        run.world.story.append(f"  {name}: {error}")
    else:
        run.world.story.append(f"  {name}: done")
    finally:
        over.set()


def step(run: Run, tasks: anyio.abc.TaskGroup) -> str:
    chance, mirror, store = run.world.chance, run.mirror, run.store
    assert isinstance(store, UnrulyStateFile)
    disk = run.world.held[chance.choice(list(run.world.held))]
    name = next(path.name for path, each in run.world.held.items() if each is disk)

    def commanded(what: str, do: Callable[[], Any]) -> str:
        run.commands.append(anyio.Event())
        tasks.start_soon(command, run, what, do, run.commands[-1])
        return what

    def start() -> str:
        path = chance.choice(run.others())
        target = MirrorTarget(str(path), cache="writeback", full=chance.random() < 0.2)
        return commanded(f"start {path.name}", partial(mirror.start, target))

    def switch() -> str:
        keep = chance.random() < 0.5
        switch = partial(mirror.switch, deadline_s=1.0, max_pause_ms=200, keep_mirror=keep)
        return commanded(f"switch keep={keep}", switch)

    def cancel() -> str:
        force = chance.random() < 0.5
        return commanded(f"cancel force={force}", partial(mirror.cancel, force=force))

    def write() -> str:
        for block in chance.sample(range(BLOCKS), chance.randint(1, 6)):
            run.guest.write(block)
        return "write"

    def flush() -> str:
        run.guest.flush()
        return "flush"

    def fault() -> str:
        op = chance.choice((WRITE, FLUSH))
        disk.fault(op, errno.EIO, count=chance.choice((1, 1, 3)))
        return f"{name} fails {op.name}"

    def hold() -> str:
        op = chance.choice((WRITE, FLUSH))
        if disk is run.source:
            return "-"
        disk.hold(op)
        return f"{name} holds {op.name}"

    def let_go() -> str:
        for each in run.world.held.values():
            each.release_all()
        return "all is let go"

    def record() -> str:
        store.fails = not store.fails
        return f"the record {'cannot' if store.fails else 'can'} be written"

    weights = {
        write: 12, flush: 10, start: 6, switch: 3, cancel: 2, fault: 2, hold: 1, let_go: 3,
        record: 3 if store.fails else 1,
    }  # fmt: skip
    return chance.choices(list(weights), list(weights.values()))[0]()


async def settle(run: Run, tasks: anyio.abc.TaskGroup) -> None:
    """All that fails is over: everything is answered, and a mirror can be made."""
    run.world.story.append("the end of all faults")
    run.world.end_the_stores_faults(run.store)
    for disk in run.world.held.values():
        disk.release_all()
        for op in (WRITE, FLUSH):
            disk.fault(op, 0, count=0)
    with anyio.fail_after(PATIENCE_S):
        for over in run.commands:
            await over.wait()
        while not run.guest.is_idle():  # a pause may hold it: that is ended by whoever may
            run.guest.listen()
            if run.mirror.state in (MirrorState.DEGRADED, MirrorState.PASSTHROUGH):
                with suppress(VhostsyncError):
                    await run.mirror.cancel(force=True)
            await anyio.sleep(0.01)
        for path in (run.mirror.destination_path or run.others()[0],):
            while run.mirror.state is not MirrorState.STEADY:
                if run.mirror.state in (MirrorState.DEGRADED, MirrorState.PASSTHROUGH):
                    with suppress(VhostsyncError):
                        await run.mirror.start(MirrorTarget(str(path), cache="writeback"))
                await anyio.sleep(0.01)
        run.guest.flush()
        while not run.guest.is_idle() or run.world.record().peer_worth is not Worth.UP_TO_DATE:
            run.guest.listen()
            await anyio.sleep(0.005)
    run.world.check()
    destination = run.mirror.destination_path
    assert destination is not None
    status = await run.mirror.status()
    peer = run.world.held[Path(destination)]
    one, other = bytearray(run.source.read(0, SIZE)), bytearray(peer.read(0, SIZE))
    for row in status.doubt:
        at, length = row["offset"], row["length"]
        one[at : at + length] = other[at : at + length] = bytes(length)
    differ = [at // BLOCK for at in range(0, SIZE, BLOCK) if one[at : at + BLOCK] != other[at : at + BLOCK]]
    assert not differ, f"{destination} differs in blocks {differ}; {status.full_copy_reason=}"


async def play(world: World) -> None:
    path = next(iter(world.held))
    for number in range(RUNS):
        world.killed = world.chance.random() < 0.4 and number < RUNS - 1
        world.story.append(f"run {number} on {path.name}, {'killed' if world.killed else 'ended'}")
        async with run_of(world, path, resume=world.chance.random() < 0.7) as (run, tasks):
            for _ in range(STEPS):
                world.story.append(step(run, tasks))
                await anyio.sleep(world.chance.choice((0, 0, 0.001, 0.005, 0.03)))
                run.guest.listen()
                world.check()
            if world.chance.random() < 0.6 or number == RUNS - 1:
                await settle(run, tasks)
            for over in run.commands:
                over.set()
        path = Path(world.record().current.path)


def disks_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, MemoryDisk]:
    """Three, by the names of files that the engine takes for them."""
    held = {}
    for name in "abc":
        (folder / f"{name}.img").write_bytes(bytes(SIZE))
        held[folder / f"{name}.img"] = MemoryDisk(SIZE)

    def test_disk(disk: disks.LocalDisk) -> Any:
        disk.fd.close()
        return held[disk.path].hand_over()

    monkeypatch.setattr(disks.LocalDisk, "to_engine", test_disk)
    return held


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    held = disks_in(tmp_path, monkeypatch)
    options: dict[str, Any] = {
        "destination_timeout_s": chance.choice((0.1, 10.0)),
        "pause_on_destination_error": chance.random() < 0.5,
        "switch_on_source_error": chance.random() < 0.5,
    }
    if chance.random() < 0.4:
        options |= {"pull_ahead": True, "congestion_fill_bytes": MIB}
    world = World(tmp_path, chance, held, options, chance.choice((None, 0.02)), chance.random() < 0.5)
    try:
        anyio.run(play, world)
    except BaseException:
        how = f"seed {seed}, {options}, retry {world.retry_s}, bitmap {world.bitmap}:"
        print(how, *world.story, sep="\n  ")
        raise
    for disk in held.values():
        disk.drop()
