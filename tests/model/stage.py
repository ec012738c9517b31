# SPDX-License-Identifier: Apache-2.0
"""The real Mirror and engine on test disks, with a guest, for scenes that one test plays on them."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from tests.engine_driver import MemoryDisk
from tests.engine_options import engine_options
from tests.frontend import Frontend
from tests.guest_ring import GuestMemory, Region, RingAddresses
from tests.sizes import MIB
from vhostsync.engine.engine import Engine, EngineConfig
from vhostsync.engine.engine_attachment import EngineAttachment
from vhostsync.events import EventHub
from vhostsync.host.owned_fd import OwnedFd
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.record_store import Prepared
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord, Worth
from vhostsync.storage import local as disks
from vhostsync.storage.native import probe
from vhostsync.vhost_user.attachment import MemoryRegion

SIZE = 4 * MIB
WAIT_S = 10.0


class HeldStateFile(StateFile):
    """While `hold` is set, the next record waits for `release` between its prepare and its commit."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.hold = False
        self.reached = threading.Event()
        self.release = threading.Event()

    def prepare(self, record: StateRecord) -> Prepared:
        prepared = super().prepare(record)
        if self.hold:
            self.hold = False
            self.reached.set()
            assert self.release.wait(WAIT_S)
        return prepared


class AsyncTransport:
    """A frontend's way into the asynchronous engine, from a worker thread."""

    def __init__(self, attachment: EngineAttachment) -> None:
        self._to = attachment

    def set_features(self, features: int) -> None:
        anyio.from_thread.run(self._to.set_features, features)

    def set_memory(self, regions: Sequence[Region]) -> None:
        table = [
            (MemoryRegion(r.guest_addr, r.bytes, r.user_addr, r.mmap_offset), OwnedFd(os.dup(r.fd)))
            for r in regions
        ]
        anyio.from_thread.run(self._to.set_mem_table, table)

    def start_ring(
        self, queue: int, size: int, addresses: RingAddresses, base: int, kick: int, call: int, err: int
    ) -> None:
        run, to = anyio.from_thread.run, self._to
        run(to.set_vring_num, queue, size)
        run(to.set_vring_addr, queue, addresses.desc, addresses.used, addresses.avail, None)
        run(to.set_vring_base, queue, base)
        run(to.set_vring_call, queue, OwnedFd(os.dup(call)))
        run(to.set_vring_err, queue, OwnedFd(os.dup(err)))
        run(to.set_vring_kick, queue, OwnedFd(os.dup(kick)))

    def enable_ring(self, queue: int, enabled: bool) -> None:
        anyio.from_thread.run(self._to.set_vring_enable, queue, enabled)

    def stop_ring(self, queue: int) -> int:
        return anyio.from_thread.run(self._to.stop_vring, queue)

    def close(self) -> None:
        anyio.from_thread.run(self._to.close)


@dataclass
class Stage:
    """A guest on `first`; `mirror` has `second` to go to."""

    engine: Engine
    mirror: Mirror
    guest: Frontend
    state_file: HeldStateFile
    paths: tuple[Path, Path]
    first: MemoryDisk
    second: MemoryDisk

    async def attach(self) -> None:
        await self.mirror.start(MirrorTarget(str(self.paths[1]), cache="writeback"))
        await until(lambda: self.mirror.state is MirrorState.STEADY)

    async def steady(self) -> None:
        await self.attach()
        await until(lambda: self.record().peer_worth is Worth.UP_TO_DATE)

    def record(self) -> StateRecord:
        record = self.state_file.load()
        assert record is not None
        return record

    async def guest_does(self, work: Callable[[], Any]) -> Any:
        with anyio.fail_after(2 * WAIT_S):
            return await anyio.to_thread.run_sync(work)


async def until(condition: Callable[[], bool]) -> None:
    """For what has no event of its own."""
    with anyio.fail_after(WAIT_S):
        while not condition():
            await anyio.sleep(0.005)


@asynccontextmanager
async def stage(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Stage]:
    paths = folder / "a.img", folder / "b.img"
    held = {}
    for path in paths:
        with path.open("wb") as file:
            file.truncate(SIZE)
        held[path] = MemoryDisk(SIZE)

    def test_disk(disk: disks.LocalDisk) -> Any:
        disk.fd.close()
        return held[disk.path].hand_over()

    monkeypatch.setattr(disks.LocalDisk, "to_engine", test_disk)
    config = EngineConfig(
        capacity_bytes=SIZE, block_bytes=512, num_queues=1,
        options=engine_options(**{"destination_timeout_s": 30, "max_lag_ms": 30_000, **options}),
    )  # fmt: skip
    source = disks.open_disk(paths[0], read_only=False, cache="writeback", lock_timeout_s=1, probe=probe)
    state_file = HeldStateFile(folder / "record.json")
    engine = await Engine.create(config, source)
    mirror = Mirror(engine, source, EventHub(), state_file, None)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.pump)
            tasks.start_soon(mirror.run)
            guest = Frontend(AsyncTransport(await engine.attach()), memory=GuestMemory((8 * MIB,)))
            await anyio.to_thread.run_sync(guest.start)
            try:
                yield Stage(engine, mirror, guest, state_file, paths, *held.values())
            finally:
                with anyio.CancelScope(shield=True):
                    state_file.release.set()
                    for disk in held.values():
                        disk.release_all()
                    await anyio.to_thread.run_sync(guest.close)
                    tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await engine.close()
    for disk in held.values():
        disk.drop()


def play(
    scene: Callable[[Stage], Awaitable[None]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def perform() -> None:
        async with stage(folder, monkeypatch) as it:
            await scene(it)

    anyio.run(perform)
