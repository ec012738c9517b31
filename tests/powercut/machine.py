# SPDX-License-Identifier: Apache-2.0
"""A machine that can be cut off: two disks, a bitmap's file and a state record, and the backend's own code
over them (opening.open_device's decisions, Engine, Mirror).

Two empty image files stand for the disks, so that opening, locking and recognising them is the real thing;
the engine is given test disks in their place. The bitmap is a real file: `folder` should lie in memory.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import anyio.to_thread

from tests.engine_driver import MemoryDisk
from tests.engine_options import engine_options
from tests.frontend import DEFAULT_FEATURES, Frontend
from tests.guest_ring import GuestMemory
from tests.model.stage import AsyncTransport
from tests.powercut.media import image_bytes
from tests.powercut.recorder import Recorder, Replaced, Settled
from tests.sizes import MIB
from tests.testing_library import lib
from vhostsync.device import opening
from vhostsync.device.opening import Opened
from vhostsync.engine import engine as engine_module
from vhostsync.engine.engine import Engine, EngineConfig, bitmap_file_bytes
from vhostsync.events import EventHub
from vhostsync.host import kernel
from vhostsync.mirror.bad_ranges import within
from vhostsync.mirror.fence import Fence, Means
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.resize import Resizer
from vhostsync.mirror.source_failover import SourceFailover
from vhostsync.mirror.verify import Verifier
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.bitmap import BitmapFile, Shape
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord, decode_record
from vhostsync.storage import local as disks
from vhostsync.storage.disk import Disk
from vhostsync.storage.local import LocalDisk
from vhostsync.storage.native import probe
from vhostsync.vhost_user.server import FrontendServer
from vhostsync.vhost_user.virtio_blk import BlkDevice, DeviceShape

SIZE = 1 * MIB
SECTORS = SIZE // 512
REGION = 4096
IN_REGION = REGION // 512
EXTENT = 128 << 10
SLOTS = 3  # of the 8 extents that the disk has
SHAPE = Shape(SIZE, REGION, EXTENT, 4100)
STOP_TIMEOUT_S = 0.05
QUEUES = 3
FAILOVER_DEADLINE_S = 5.0


class Servers(Fence):
    """Of disks of another machine: what makes it certain that a lost connection's writes are over."""

    def __init__(self, site: Site, held: Sequence[MemoryDisk]) -> None:
        super().__init__(Means.COMMAND)
        self._disks = dict(zip(map(str, site.paths), held, strict=True))

    async def make_certain(self, disk: str) -> None:
        self._disks[disk].land()


class RecordFiles:
    """files.FileSystem in memory, every change of the record noted."""

    def __init__(self, text: bytes | None, recorder: Recorder | None = None) -> None:
        self.text = text
        self._recorder = recorder
        self._other: dict[Path, bytes] = {}

    def read(self, path: Path) -> bytes:
        if self.text is None:
            raise FileNotFoundError(2, "no record", str(path))
        return self.text

    def read_version(self, path: Path) -> tuple[bytes, None]:
        return self.read(path), None

    def write_durable(self, path: Path, text: bytes) -> None:
        self._other[path] = text

    def rename(self, old: Path, new: Path) -> None:
        self.text = self._other.pop(old)
        if self._recorder is not None:
            self._recorder.note(Replaced(self.text))

    def sync_directory(self, path: Path) -> None:
        if self._recorder is not None:
            self._recorder.note(Settled())

    def unlink(self, path: Path) -> None:
        self._other.pop(path, None)

    def names(self, path: Path) -> list[str]:
        return [each.name for each in self._other]

    def versions(self, path: Path, suffix: str) -> dict[str, None]:
        return dict.fromkeys(name for name in self.names(path) if name.endswith(suffix))


@dataclass(frozen=True)
class Remains:
    """What a machine starts from: the tags of both disks, the bitmap's file, the state record, and which
    boot it is. `capacity_bytes`: what the disks have; of each disk, `spoilt` sectors cannot be read until
    they are written, and `rotten` ones are not what it was given."""

    images: tuple[list[int], list[int]]
    bitmap: bytes = b""
    record: bytes | None = None
    boot: str = "boot 1"
    capacity_bytes: int = SIZE
    spoilt: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    rotten: tuple[dict[int, int], dict[int, int]] = field(default_factory=lambda: ({}, {}))

    @property
    def shape(self) -> Shape:
        return replace(SHAPE, capacity_bytes=self.capacity_bytes)

    def disk(self, number: int) -> MemoryDisk:
        """As it was left; to be dropped."""
        disk = MemoryDisk(SIZE)
        disk.load(0, image_bytes(self.images[number]))
        for sector in self.spoilt[number]:
            disk.spoil(sector * 512, 512)
        return disk


@dataclass
class Site:
    """The folder with what is the same for all machines: the files that stand for the disks."""

    folder: Path
    paths: tuple[Path, Path] = field(init=False)

    def __post_init__(self) -> None:
        self.paths = (self.folder / "a.img", self.folder / "b.img")
        for path in self.paths:
            if not path.exists():
                with path.open("wb") as file:
                    file.truncate(SIZE)

    @property
    def bitmap(self) -> Path:
        return self.folder / "bits"

    @property
    def record(self) -> Path:
        return self.folder / "record.json"

    def number_of(self, path: str | Path) -> int:
        return self.paths.index(Path(path))

    def open_disk(self, number: int) -> LocalDisk:
        return disks.open_disk(
            self.paths[number], read_only=False, cache="writeback", lock_timeout_s=1, probe=probe
        )


@lru_cache(maxsize=256)
def decoded(text: bytes | None, boot: str | None = None) -> StateRecord | None:
    """As it is understood in this boot; None: in a later one."""
    return None if text is None else decode_record(text, boot)


def current_disk(site: Site, text: bytes | None, boot: str | None = None) -> int:
    """Which disk an operator starts: the one that the record names, the first where there is none."""
    record = decoded(text, boot)
    return 0 if record is None else site.number_of(record.current.path)


def open_machine(site: Site, remains: Remains, disk: Disk, state_file: StateFile) -> Opened:
    """opening.open_device for disks that are open already: the same decisions in the same order."""
    found, record = opening.check_record(state_file, disk)
    spared = record.spared if record is not None else ()
    shape = remains.shape
    known = found.current if found is not None else None
    bitmap = BitmapFile.open(site.bitmap, shape, bitmap_file_bytes(shape), record, remains.boot, known=known)
    device = DeviceShape(shape.capacity_bytes)
    disk, record = opening.begin_record(disk, state_file, found, record, bitmap, device.guest)
    left = found.peer if found is not None and found.clean else None
    return Opened(disk, device, state_file, record, bitmap, left, spared)


@contextmanager
def booted(boot: str) -> Iterator[None]:
    with mock.patch.object(kernel, "this_boot", lambda: boot):
        yield


@dataclass
class Running:
    """The backend with a guest on it, which knows of `sectors`."""

    site: Site
    engine: Engine
    mirror: Mirror
    hub: EventHub
    verifier: Verifier
    resizer: Resizer
    guest: Frontend
    recorder: Recorder
    disks: tuple[MemoryDisk, MemoryDisk]
    sectors: int

    @property
    def current(self) -> int:
        return self.site.number_of(self.mirror.source_path)

    @property
    def other(self) -> MemoryDisk:
        return self.disks[1 - self.current]

    @property
    def recorded_doubt(self) -> tuple[tuple[int, int], ...]:
        return self.mirror._keeper.record.doubt

    async def attach(self, *, full: bool = False) -> None:
        path = self.site.paths[1 - self.current]
        await self.mirror.start(MirrorTarget(str(path), cache="writeback", full=full))

    async def until(self, state: MirrorState) -> None:
        with anyio.fail_after(20):
            while self.mirror.state is not state:
                await anyio.sleep(0.001)


def _synced(recorder: Recorder, bitmap: BitmapFile) -> Any:
    """os.fdatasync for the control plane's own syncs of the bitmap's file."""
    real = os.fdatasync
    identity = os.fstat(bitmap.fd)

    def sync(fd: int) -> None:
        if not os.path.samestat(os.fstat(fd), identity):
            real(fd)
            return
        begun = recorder.sync_begun()
        real(fd)
        recorder.synced(begun)

    return sync


@contextmanager
def _in_memory(site: Site, held: Sequence[MemoryDisk], recorder: Recorder) -> Iterator[None]:
    """The engine gets test disks, and its bitmap is recorded."""
    engine_bitmap, opened_by_engine = engine_module._engine_bitmap, BitmapFile.opened_by_engine

    def test_disk(disk: LocalDisk) -> Any:
        disk.fd.close()
        test_disk = held[site.number_of(disk.path)]
        test_disk.connect()
        return test_disk.hand_over()

    def test_bitmap(file: BitmapFile) -> Any:
        handle = engine_bitmap(file)
        lib.vs_test_bitmap_slots(handle, SLOTS)
        lib.vs_test_record_bitmap(recorder.handle, handle)
        return handle

    def synced_by_engine(file: BitmapFile) -> None:
        recorder.synced(recorder.sync_begun())  # vs_bitmap_open() has
        opened_by_engine(file)

    with (
        mock.patch.object(LocalDisk, "to_engine", test_disk),
        mock.patch.object(engine_module, "_engine_bitmap", test_bitmap),
        mock.patch.object(BitmapFile, "opened_by_engine", synced_by_engine),
    ):
        yield


def _config(capacity: int, opened: Opened, **options: Any) -> EngineConfig:
    doubt = opened.record.doubt if opened.record is not None else ()
    told = {
        "destination_timeout_s": 30, "stop_timeout_s": 10, "max_lag_ms": 30_000, "checkpoint_s": 0.02,
        "dirty_region_bytes": REGION, **options,
    }  # fmt: skip
    return EngineConfig(
        capacity_bytes=capacity, block_bytes=512, num_queues=QUEUES, options=engine_options(**told),
        doubt=within(doubt, capacity), spared=within(opened.spared, capacity),
    )  # fmt: skip


@asynccontextmanager
async def _serving(
    site: Site,
    engine: Engine,
    opened: Opened,
    recorder: Recorder,
    held: tuple[MemoryDisk, MemoryDisk],
    features: int,
    fence: Fence,
) -> AsyncIterator[Running]:
    """The control plane and a guest, until both have ended in order."""
    capacity = engine.config.capacity_bytes
    hub = EventHub()
    mirror = Mirror(
        engine, opened.disk, hub, opened.store, opened.record, opened.bitmap, opened.peer_left, fence=fence
    )
    failover = SourceFailover(engine, mirror, hub, FAILOVER_DEADLINE_S)
    verifier = Verifier(engine, mirror, hub)
    device = BlkDevice(DeviceShape(capacity))
    resizer = Resizer(engine, mirror, device, FrontendServer(device, engine.attach, hub.publish), hub)
    async with anyio.create_task_group() as tasks:
        for task in (engine.pump, mirror.run, failover.run, verifier.report):
            tasks.start_soon(task)
        transport = AsyncTransport(await engine.attach())
        guest = Frontend(transport, queues=QUEUES, features=features, memory=GuestMemory((8 * MIB,)))
        await anyio.to_thread.run_sync(guest.start)
        try:
            yield Running(
                site, engine, mirror, hub, verifier, resizer, guest, recorder, held, capacity // 512
            )  # fmt: skip
            await anyio.to_thread.run_sync(guest.close)
            await mirror.detach(force=False)
        finally:
            with anyio.CancelScope(shield=True):
                for disk in held:
                    disk.release_all()
                await anyio.to_thread.run_sync(guest.close)
                tasks.cancel_scope.cancel()


@asynccontextmanager
async def machine(
    site: Site, remains: Remains, recorder: Recorder, *, features: int = DEFAULT_FEATURES,
    remote: bool = False, **options: Any,
) -> AsyncIterator[Running]:  # fmt: skip
    """The backend started on `remains`, everything recorded until its end in order. `options`: of the
    engine."""
    held = (remains.disk(0), remains.disk(1))
    for number, disk in enumerate(held):
        recorder.watch_disk(disk, number)
    site.bitmap.write_bytes(remains.bitmap)
    state_file = StateFile(site.record, files=RecordFiles(remains.record, recorder))
    fence = Servers(site, held) if remote else Fence()
    with (
        booted(remains.boot),
        _in_memory(site, held, recorder),
        mock.patch.object(disks.Local, "fences_itself", not remote),
    ):
        source = site.open_disk(current_disk(site, remains.record, remains.boot))
        opened = open_machine(site, remains, source, state_file)
        assert opened.bitmap is not None
        recorder.watch_file(opened.bitmap.fd)
        recorder.synced(recorder.sync_begun())  # its header is durable
        with mock.patch.object(os, "fdatasync", _synced(recorder, opened.bitmap)):
            config = _config(remains.capacity_bytes, opened, **options)
            engine = await Engine.create(config, source, opened.bitmap, peer_known=opened.peer_known)
            try:
                async with _serving(site, engine, opened, recorder, held, features, fence) as running:
                    yield running
            except BaseException:
                opened.close()
                raise
            finally:
                with anyio.CancelScope(shield=True):
                    await engine.close()
            running.mirror.record_clean()
            opened.close()
    for disk in held:
        recorder.forget_disk(disk)
        disk.drop()


def blank(initial: Sequence[int], other: Sequence[int] = (0,) * SECTORS) -> Remains:
    """A machine that never ran: the guest's disk, and another one."""
    return Remains((list(initial), list(other)))
