# SPDX-License-Identifier: Apache-2.0
"""A device: one guest's disk with all that belongs to it. The daemon makes one; nothing here is the
process's, so several could be in one.

    run ── engine.pump, mirror.run, verifier.report, failover.run  (to the very end)
    serve ─ frontends, one task a connection; the mirror's retries (until the end begins)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup

from vhostsync import events
from vhostsync.config import ServeConfig
from vhostsync.confine.privileges import Reach
from vhostsync.device.device_limits import DeviceLimits
from vhostsync.device.device_view import DeviceView
from vhostsync.device.opening import Opened
from vhostsync.engine.engine import LOSSES, Engine, EngineConfig
from vhostsync.engine.engine_event import EngineEvent, EventKind
from vhostsync.engine.snapshot import BREACHES
from vhostsync.errors import HandOverError
from vhostsync.events import EventHub
from vhostsync.mirror.bad_ranges import within
from vhostsync.mirror.group_member import GroupMember
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.pause import DestinationPause, warn_of_a_lost_pause
from vhostsync.mirror.resize import Resizer
from vhostsync.mirror.retry import DestinationRetry
from vhostsync.mirror.source_failover import SourceFailover
from vhostsync.mirror.verify import Verifier
from vhostsync.vhost_user import listener
from vhostsync.vhost_user.heritage import Heritage
from vhostsync.vhost_user.server import FrontendServer
from vhostsync.vhost_user.virtio_blk import BlkDevice, DeviceShape

log = structlog.get_logger(__name__)

CHECKPOINT_US = 3_000_000  # of the difference map: two flushes in this time, if the guest writes unflushed

STEADY_AT_ONCE_S = 1.0  # the guest waits meanwhile

AHEAD_BACKOFF_US = 1_000_000  # before a destination that was too slow again catches up, then twice as long


class Process(Protocol):
    """What a device asks of the process that it is in (daemon.py)."""

    def stop(self, *, force: bool = False) -> None: ...
    async def hand_over(self, check: Callable[[], None]) -> None: ...


class Device:
    """Of a disk that was opened, its record followed and its engine started. Its own: the disk, the record
    and its store, the bitmap, the engine, the mirror with its policy, the frontends, the events, what
    control and metrics show."""

    def __init__(
        self, config: ServeConfig, opened: Opened, engine: Engine, reach: Reach, process: Process
    ) -> None:
        self.config = config
        self.opened = opened
        self.engine = engine
        self.events = hub = EventHub()
        self.mirror = mirror = Mirror(
            engine, opened.disk, hub, opened.store, opened.record, opened.bitmap, opened.peer_left,
            opened.shape.guest, opened.peer_until_ns, opened.fence, peer_equal=opened.peer_equal,
        )  # fmt: skip
        mirror.reach = reach
        self.verifier = Verifier(engine, mirror, hub)
        shown = BlkDevice(opened.shape)
        self.frontends = FrontendServer(shown, engine.attach, hub.publish, engine.rings)
        self._resizer = Resizer(engine, mirror, shown, self.frontends, hub)
        self.limits = DeviceLimits(engine, config.limits)
        place = opened.store.place if opened.store is not None else None
        self._view = DeviceView(config, engine, mirror, self.frontends, self.limits, place)
        self._process = process
        engine.on_event(self._on_event)
        self._failover = SourceFailover(engine, mirror, hub, config.destination_timeout_s)
        DestinationPause(engine, mirror, hub)
        if config.on_destination_error == "pause":
            warn_of_a_lost_pause(opened.record)
        resume = config.resume_mirror and not config.read_only
        self._retry = DestinationRetry(mirror, hub, config.destination_retry_s, resume=resume)

    # ---- its life --------------------------------------------------------------

    async def run(self) -> None:
        """As long as anything of it is used; until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.engine.pump)
            tasks.start_soon(self.mirror.run)
            tasks.start_soon(self.verifier.report)
            tasks.start_soon(self._failover.run)

    async def serve(
        self, endpoint: listener.Endpoint | None, gone: Callable[[], None], inherited: Sequence[Heritage] = ()
    ) -> None:
        """Frontends, until cancelled: then those that are there are let go. `gone`: the only one that there
        could be has left. `inherited`: those of the predecessor, whose mirror comes back first."""
        async with anyio.create_task_group() as tasks:
            if self.opened.peer_equal:
                await self._bring_mirror_back()
            tasks.start_soon(self._retry.run)
            await self.frontends.serve(endpoint, inherited)
            gone()

    async def _bring_mirror_back(self) -> None:
        """There is nothing to copy: it is steady at once, unless something is wrong with it."""
        with anyio.move_on_after(STEADY_AT_ONCE_S):
            await self._retry.resume()
            while self.mirror.state is MirrorState.SYNCING:
                await self.mirror.changed.wait()

    async def detach(self, *, force: bool) -> None:
        """After `serve`: the mirror is left, worth what the record says."""
        await self.mirror.detach(force=force)
        self.events.close()

    def _on_event(self, event: EngineEvent) -> None:
        if event.kind is EventKind.QUEUE_BROKEN:
            data = {"attachment": event.attachment, "queue": event.queue, "reason": BREACHES[event.reason]}
            log.warning("a queue is broken", **data)
            self.events.publish(events.QUEUE_BROKEN, data)
        elif event.kind is EventKind.ATTACHMENT_LOST:
            attachment = self.engine.attachment(event.attachment)
            if attachment is not None:
                self.frontends.disconnect(attachment, LOSSES[event.value])

    # ---- what others are told of it ----------------------------------------------

    def status_line(self) -> str:
        """What `systemctl status` shows. A path may hold a line break, which would begin another field."""
        mirror = self.mirror
        line = f"serving {mirror.source_path}"
        if mirror.state is not MirrorState.PASSTHROUGH:
            line += f", mirror {mirror.state}"
        if mirror.destination_path is not None:
            line += f" to {mirror.destination_path}"
        return line.replace("\n", "\\n")

    # ---- what the control socket and the metrics ask ---------------------------------

    async def query_status(self) -> dict[str, Any]:
        return await self._view.query_status()

    async def query_stats(self) -> dict[str, Any]:
        return await self._view.query_stats()

    async def limit(self, given: Mapping[str, int | None]) -> None:
        await self.limits.change(given)

    async def resize(self, wanted_bytes: int | None) -> int:
        return await self._resizer.resize(wanted_bytes)

    async def hand_over(self, socket: Path | None, disk: str | None) -> None:
        """Leave the guest to a successor. HandOverError, MirrorError: this goes on."""
        self._check_hand_over(socket, disk)
        if not await anyio.to_thread.run_sync(self.mirror.source_is_named):
            raise HandOverError(
                f"{self.mirror.source_path} does not lead to the guest's disk any more, and no successor "
                f"would find it; give it its name back first."
            )
        await self._process.hand_over(lambda: self._check_hand_over(socket, disk))

    def _check_hand_over(self, socket: Path | None, disk: str | None) -> None:
        """HandOverError, MirrorError."""
        if self.frontends.migrates:
            raise HandOverError("The guest is being migrated; try again when that is over.")
        if disk is not None and disk != self.mirror.source_path:
            raise HandOverError(
                f"The successor was told to serve {disk}, and the guest is on {self.mirror.source_path} by "
                f"now."
            )
        if socket is not None and self.config.socket_path not in (None, socket):
            raise HandOverError(
                f"The successor was told to serve {socket}, and the guest is connected to "
                f"{self.config.socket_path}; start it with the same --socket-path."
            )
        self.mirror.turns.check_free("hand-over")

    async def quit(self, *, force: bool) -> None:
        self._process.stop(force=force)

    def group_member(self, tasks: TaskGroup, is_there: Callable[[], bool]) -> GroupMember:
        return GroupMember(self.mirror, tasks, is_there)


def start_engine(config: ServeConfig, opened: Opened) -> Engine:
    """Before there is an event loop. Blocks. EngineError. It owns the disk's descriptor then."""
    wanted = _with_doubt(engine_config(config, opened.shape), opened)
    return Engine.create_blocking(wanted, opened.disk, opened.bitmap, opened.peer_known)


def engine_config(config: ServeConfig, shape: DeviceShape) -> EngineConfig:
    return EngineConfig(
        capacity_bytes=shape.capacity_bytes,
        block_bytes=shape.block_bytes,
        num_queues=config.num_queues,
        serial=config.serial,
        limits=config.limits,
        options=config.for_engine()
        | {
            "checkpoint_us": CHECKPOINT_US,
            "ahead_backoff_us": AHEAD_BACKOFF_US,
            "dirty_region_bytes": config.region_bytes(shape.capacity_bytes),
        },
    )


def _with_doubt(config: EngineConfig, opened: Opened) -> EngineConfig:
    """And with what an earlier run has left in doubt."""
    doubt = opened.record.doubt if opened.record is not None else ()
    size = config.capacity_bytes
    return replace(config, doubt=within(doubt, size), spared=within(opened.spared, size))
