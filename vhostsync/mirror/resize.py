# SPDX-License-Identifier: Apache-2.0
"""The disk grows while the guest runs (c_shim/mirror/grow.c). In this order, so that nothing is promised
too early:

1. what was asked for is checked against what both disks have;
2. the bitmap's file becomes long enough; its header still says the old size, so after a crash it is not
   believed, and everything is copied;
3. the state record says the new size: should the backend die in what follows, the next start shows it;
4. the engine copies the new range to the destination, and takes requests for it from then on;
5. once its new bits are durable, the bitmap's header and the device say the new size, and the frontends are
   told.

The disks themselves are made larger by whoever owns them (truncate, lvextend, …), before this.
"""

from dataclasses import replace

import anyio
import anyio.to_thread
import structlog

from vhostsync import events
from vhostsync.engine.engine import Engine, bitmap_file_bytes
from vhostsync.errors import ConfigError, EngineError, MirrorError, StateRecordError
from vhostsync.events import EventHub
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.record.bitmap import BitmapFile
from vhostsync.vhost_user.server import FrontendServer
from vhostsync.vhost_user.virtio_blk import BlkDevice

log = structlog.get_logger(__name__)

POSSIBLE_IN = frozenset({MirrorState.PASSTHROUGH, MirrorState.DEGRADED, MirrorState.STEADY})


class Resizer:
    """Makes one device larger."""

    def __init__(
        self, engine: Engine, mirror: Mirror, device: BlkDevice, frontends: FrontendServer, hub: EventHub
    ) -> None:
        self._engine = engine
        self._mirror = mirror
        self._device = device
        self._frontends = frontends
        self._hub = hub

    async def resize(self, wanted_bytes: int | None) -> int:
        """Grow to `wanted_bytes`, or to all that the disk has; returns the new capacity. MirrorError: nothing
        was changed."""
        async with self._mirror.turns.take("resize"):
            source_bytes = await self._engine.disk_bytes("source")
            capacity = await self._new_capacity(wanted_bytes, source_bytes)
            destination_bytes = await self._check_destination(capacity)
            bitmap = self._mirror.bitmap
            if bitmap is not None:
                await anyio.to_thread.run_sync(_lengthen, bitmap, capacity)
            await self._mirror.record_capacity(capacity)
            try:
                await self._engine.grow(capacity, source_bytes, destination_bytes)
            except EngineError as error:
                await self._take_back()
                raise MirrorError(f"the disk stays as large as it is: {error}") from error
            except anyio.get_cancelled_exc_class():  # by a switch from a failed source, or the end
                await self._take_back()
                raise
            with anyio.CancelScope(shield=True):  # the engine takes requests for it already
                await self._tell(capacity, bitmap)
            return capacity

    async def _take_back(self) -> None:
        """The record says the old size, or the next start would show the guest the new one. One that cannot
        be written leaves it so: both disks have the room."""
        with anyio.CancelScope(shield=True):
            try:
                await self._mirror.record_capacity(self._device.shape.capacity_bytes)
            except StateRecordError as error:
                log.error("after a restart the guest's disk will have grown", error=str(error))

    async def _tell(self, capacity: int, bitmap: BitmapFile | None) -> None:
        if bitmap is not None:
            await anyio.to_thread.run_sync(bitmap.note_capacity, capacity)
        self._device.shape = replace(self._device.shape, capacity_bytes=capacity)
        self._frontends.config_changed()
        log.info("the disk has grown", capacity_bytes=capacity)
        self._hub.publish(events.CAPACITY_CHANGE, {"capacity": capacity})

    async def _new_capacity(self, wanted_bytes: int | None, source_bytes: int) -> int:
        shape = self._device.shape
        if shape.read_only:
            raise MirrorError("a disk that is served read-only cannot grow")
        if self._mirror.state not in POSSIBLE_IN:
            state = self._mirror.state
            raise MirrorError(f"the disk cannot grow while the mirror is {state}; wait for its end")
        capacity = source_bytes - source_bytes % shape.block_bytes if wanted_bytes is None else wanted_bytes
        path = self._mirror.source_path
        named = await anyio.to_thread.run_sync(self._mirror.source_is_named)
        disk = f"{path}" if named else f"the disk that was {path} when it was opened"
        if capacity % shape.block_bytes:
            raise MirrorError(f"{capacity} bytes are no whole number of blocks of {shape.block_bytes} bytes")
        if capacity > source_bytes:
            raise MirrorError(f"{disk} has {source_bytes} bytes, not {capacity}; enlarge it first")
        if capacity < shape.capacity_bytes:
            raise MirrorError(f"the guest's disk has {shape.capacity_bytes} bytes and cannot shrink")
        if capacity == shape.capacity_bytes:
            raise MirrorError(f"the guest's disk has {capacity} bytes already; enlarge {disk} first")
        return capacity

    async def _check_destination(self, capacity: int) -> int:
        path = self._mirror.destination_path
        if path is None:
            return 0
        found = await self._engine.disk_bytes("destination")
        if found < capacity:
            raise MirrorError(
                f"the destination {path} has {found} bytes, not {capacity}; enlarge it first, or cancel the "
                f"mirror"
            )
        return found


def _lengthen(bitmap: BitmapFile, capacity: int) -> None:
    shape = replace(bitmap.header.shape, capacity_bytes=capacity)
    try:
        bitmap.lengthen(bitmap_file_bytes(shape))
    except ConfigError as error:
        raise MirrorError(str(error)) from error
