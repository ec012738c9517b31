# SPDX-License-Identifier: Apache-2.0
"""The task tree of `serve`: what starts and stops in which order.

Beginning: the disk is opened and locked (nothing is touched before the lock is held), the state record says
whether it is the right one, the engine starts, the sockets open. End (SIGTERM, SIGINT, `quit`, or the only
frontend of --fd gone): frontends are let go first, which finishes their requests; the mirror is brought up to
date; the engine ends; the record notes the clean end.

What the process may do shrinks on the way (privileges.py); that is why all of the beginning happens before
there is an event loop, in the only thread.

    run ── engine.pump, mirror.run, verifier.report, failover.run, signals  (to the very end)
        └─ frontends ─ one task a connection   (until the end begins)
        └─ control socket, metrics, retry       (until the end begins)
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from vhostsync import events
from vhostsync import log as logging
from vhostsync.bad_ranges import within
from vhostsync.config import ServeConfig
from vhostsync.control.server import serve_control
from vhostsync.engine import LOSSES, Engine, EngineConfig
from vhostsync.engine_event import EngineEvent, EventKind
from vhostsync.errors import VhostsyncError
from vhostsync.events import EventHub
from vhostsync.metrics import serve_metrics
from vhostsync.mirror import Mirror
from vhostsync.opening import Opened, open_device
from vhostsync.pause import DestinationPause, warn_of_a_lost_pause
from vhostsync.printable import printable
from vhostsync.privileges import Confinement, change_user, find_user, places_of
from vhostsync.resize import Resizer
from vhostsync.retry import DestinationRetry
from vhostsync.service_manager import ServiceManager
from vhostsync.signals import watch_signals
from vhostsync.snapshot import BREACHES, EngineFigures, OpStats, QueueFigures
from vhostsync.source_failover import SourceFailover
from vhostsync.state_index import default_directory, make_directory
from vhostsync.statistic import figures_of
from vhostsync.storage.signatures import load_library
from vhostsync.verify import Verifier
from vhostsync.vhost_user import listener
from vhostsync.vhost_user.server import FrontendServer
from vhostsync.virtio_blk import BlkDevice, DeviceShape

log = structlog.get_logger(__name__)

CHECKPOINT_US = 3_000_000  # of the difference map: two flushes in this time, if the guest writes unflushed

AHEAD_BACKOFF_US = 1_000_000  # before a destination that was too slow again catches up, then twice as long


def run(config: ServeConfig) -> int:
    """Serve until told to stop; the exit code. Errors at the start are one sentence on stderr, and 1."""
    logging.configure(config.log_format, config.log_level)
    failures: list[BaseException] = []
    try:
        anyio.run(_serve, config, _start(config))
    except* VhostsyncError as group:
        failures = _leaves(group)
    for failure in failures:
        logging.say(f"vhostsync: {printable(str(failure))}")
    logging.end()
    return 1 if failures else 0


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


@dataclass(frozen=True)
class Started:
    """All that `_serve` needs, before the event loop begins."""

    opened: Opened
    shape: DeviceShape
    endpoint: listener.Endpoint
    engine: Engine
    confinement: Confinement
    manager: ServiceManager


def _load_modules() -> None:
    """What is loaded when it is first used: now, while every file can still be read."""
    for name in dir(anyio):
        getattr(anyio, name)
    anyio.run(anyio.sleep, 0)  # and its event loop
    load_library()


def _start(config: ServeConfig) -> Started:
    """Steps 1 to 4 of privileges.py. Blocks. VhostsyncError: nothing is left open."""
    user = find_user(config.user) if config.user is not None else None
    _load_modules()
    state_directory = None
    if config.state_file is None and not config.no_state_file:
        state_directory = default_directory()  # of whoever started it, before the user is changed
        make_directory(state_directory, (user.uid, user.gid) if user is not None else None)
    with ExitStack() as undo:
        manager = ServiceManager()
        undo.callback(manager.close)
        opened = open_device(
            config, state_directory, lambda: change_user(user) if user is not None else None
        )
        undo.callback(opened.close)
        shape = opened.shape
        endpoint = _open_endpoint(config)
        undo.callback(endpoint.close)
        peer = opened.record.peer if opened.record is not None else None
        disks_known = [opened.disk.identity] if peer is None else [opened.disk.identity, peer]
        confinement = Confinement(config, places_of(config, disks_known, state_directory))
        confinement.confine()
        engine = Engine.create_blocking(
            _with_doubt(engine_config(config, shape), opened), opened.disk, opened.bitmap, opened.peer_known
        )
        undo.pop_all()
    return Started(opened, shape, endpoint, engine, confinement, manager)


def engine_config(config: ServeConfig, shape: DeviceShape) -> EngineConfig:
    return EngineConfig(
        capacity_bytes=shape.capacity_bytes,
        block_bytes=shape.block_bytes,
        num_queues=config.num_queues,
        serial=config.serial,
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


class Backend:
    """What the control socket and the metrics see of the process."""

    def __init__(self, config: ServeConfig, engine: Engine, mirror: Mirror, hub: EventHub) -> None:
        self.config = config
        self.engine = engine
        self.mirror = mirror
        self.verifier = Verifier(engine, mirror, hub)
        self.events = hub
        self.frontends: FrontendServer | None = None
        self.resizer: Resizer | None = None
        self._quit = anyio.Event()
        self._forced = anyio.Event()

    async def query_status(self) -> dict[str, Any]:
        snapshot = await self.engine.snapshot()
        index, frontends = snapshot.active_attachment, self.frontends
        active = None if index is None else self.engine.attachment(index)
        return {
            "status": "running",
            "name": self.config.label,
            "frontends": frontends.frontends if frontends else 0,
            "active": index is not None,
            "active-frontend": frontends.number_of(active) if frontends else None,
            "waiting-frontends": frontends.waiting(active) if frontends else [],
            "disk": str(self.mirror.source_path),
            "capacity": self.engine.config.capacity_bytes,
            "block-size": self.engine.config.block_bytes,
            "queues": self.engine.config.num_queues,
            "read-only": self.config.read_only,
            "write-cache": snapshot.write_cache,
            "mirror": str(self.mirror.state),
            "epoch": self.mirror.epoch,
            "log-lines-dropped": logging.dropped_lines(),
        }

    async def query_stats(self) -> dict[str, Any]:
        snapshot = await self.engine.snapshot()
        queues = await self.engine.queue_stats()
        status = await self.mirror.status()
        attached = status.state in ("syncing", "steady", "ahead")
        paths = {"source": status.source, "destination": status.destination if attached else None}
        return {
            "queues": [
                {
                    "index": index,
                    **figures_of(QueueFigures, queue),
                    "operations": _operations(queue.operations),
                }
                for index, queue in enumerate(queues)
            ],
            "disks": {
                role: {
                    "path": path,
                    "in-flight": snapshot.disks_in_flight[role],
                    "operations": _operations(snapshot.disks[role]),
                }
                if path
                else None
                for role, path in paths.items()
            },
            "engine": {
                "threads": self.config.threads,
                **figures_of(EngineFigures, snapshot),
                "log-bytes": self.config.log_bytes,
            },
        }

    async def resize(self, wanted_bytes: int | None) -> int:
        assert self.resizer is not None, "the control socket opens after it"
        return await self.resizer.resize(wanted_bytes)

    async def quit(self, *, force: bool) -> None:
        self.stop(force=force)

    def stop(self, *, force: bool = False) -> None:
        """Begin the end. May be called again, with force."""
        if force:
            self._forced.set()
        self._quit.set()

    @property
    def stopping(self) -> bool:
        return self._quit.is_set()

    @property
    def forced(self) -> bool:
        return self._forced.is_set()

    async def wait_stopped(self) -> None:
        await self._quit.wait()

    async def wait_forced(self) -> None:
        """The end is to be without waiting for the destination."""
        await self._forced.wait()


def _operations(stats: dict[str, OpStats]) -> dict[str, Any]:
    return {name: _operation(each) for name, each in stats.items()}


def _operation(stats: OpStats) -> dict[str, Any]:
    return {
        "operations": stats.operations,
        "bytes": stats.bytes,
        "errors": stats.errors,
        "latency-us": {
            "mean": stats.latency_ns_total / stats.operations / 1000 if stats.operations else 0.0,
            "p50": percentile_us(stats, 0.5),
            "p99": percentile_us(stats, 0.99),
            "p999": percentile_us(stats, 0.999),
        },
        "latency-log2-ns": list(stats.latency_ns_log2),
    }


def percentile_us(stats: OpStats, share: float) -> float:
    """The latency below which `share` of the operations lie: the upper bound of its power of two, so never
    more than twice too much; 0.0 when there were none."""
    wanted, seen = share * stats.operations, 0
    for bucket, count in enumerate(stats.latency_ns_log2):
        seen += count
        if count and seen >= wanted:
            return float(2 ** (bucket + 1)) / 1000
    return 0.0


async def _serve(config: ServeConfig, started: Started) -> None:
    opened = started.opened
    try:
        try:
            try:
                started.confinement.seal(started.engine.check_rings_restricted)
                logging.write_in_background()
                mirror = await _serve_device(config, started)
            finally:
                with anyio.CancelScope(shield=True):
                    await started.engine.close()
        finally:
            started.endpoint.close()
        await anyio.to_thread.run_sync(mirror.record_clean)
    finally:
        await anyio.to_thread.run_sync(opened.close)
        started.manager.close()
    log.info("ended", disk=mirror.source_path)


def _open_endpoint(config: ServeConfig) -> listener.Endpoint:
    if config.fd is not None:
        return listener.adopt(config.fd)
    assert config.socket_path is not None
    return listener.listen_at(config.socket_path)


async def _serve_device(config: ServeConfig, started: Started) -> Mirror:
    opened, shape, engine = started.opened, started.shape, started.engine
    hub = EventHub()
    mirror = Mirror(
        engine, opened.disk, hub, opened.store, opened.record, opened.bitmap, opened.peer_left,
        shape.guest, opened.peer_until_ns,
    )  # fmt: skip
    mirror.reach = started.confinement.reach
    backend = Backend(config, engine, mirror, hub)
    device = BlkDevice(shape)
    frontends = FrontendServer(device, engine.attach, hub.publish, engine.rings)
    backend.frontends = frontends
    backend.resizer = Resizer(engine, mirror, device, frontends, hub)
    engine.on_event(lambda event: _on_event(event, engine, frontends, hub))
    failover = SourceFailover(engine, mirror, hub, config.destination_timeout_s)
    DestinationPause(engine, mirror, hub)
    if config.on_destination_error == "pause":
        warn_of_a_lost_pause(opened.record)
    async with anyio.create_task_group() as lasting:
        lasting.start_soon(engine.pump)
        lasting.start_soon(mirror.run)
        lasting.start_soon(backend.verifier.report)
        lasting.start_soon(failover.run)
        await lasting.start(watch_signals, backend)
        async with anyio.create_task_group() as serving:
            await _start_control(config, backend, serving)
            serving.start_soon(_serve_frontends, frontends, started.endpoint, backend)
            resume = config.resume_mirror and not config.read_only
            serving.start_soon(DestinationRetry(mirror, hub, config.destination_retry_s, resume=resume).run)
            log.info(
                "serving",
                disk=opened.disk.name,
                capacity_bytes=shape.capacity_bytes,
                block_bytes=shape.block_bytes,
                direct=opened.disk.direct,
                socket=str(config.socket_path) if config.socket_path else f"fd {config.fd}",
            )
            await serving.start(started.manager.follow, mirror, hub)
            await backend.wait_stopped()
            hub.publish(events.SHUTDOWN, {"force": backend.forced})
            started.manager.tell(STOPPING=1, STATUS="bringing the mirror up to date")
            lasting.start_soon(_abandon_if_forced, backend)
            serving.cancel_scope.cancel()
        await mirror.detach(force=backend.forced)
        hub.close()
        lasting.cancel_scope.cancel()
    return mirror


async def _abandon_if_forced(backend: Backend) -> None:
    await backend.wait_forced()
    await backend.mirror.abandon()


async def _start_control(config: ServeConfig, backend: Backend, tasks: anyio.abc.TaskGroup) -> None:
    if config.control_socket is not None:

        async def control(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            assert config.control_socket is not None
            await serve_control(
                config.control_socket,
                backend,
                destination_cache=config.destination_cache,
                task_status=task_status,
            )

        await tasks.start(control)
    if config.metrics is not None:
        await tasks.start(serve_metrics, config.metrics, backend)


async def _serve_frontends(frontends: FrontendServer, endpoint: listener.Endpoint, backend: Backend) -> None:
    await frontends.serve(endpoint)
    backend.stop()  # the only frontend of --fd has gone


def _on_event(event: EngineEvent, engine: Engine, frontends: FrontendServer, hub: EventHub) -> None:
    if event.kind is EventKind.QUEUE_BROKEN:
        data = {"attachment": event.attachment, "queue": event.queue, "reason": BREACHES[event.reason]}
        log.warning("a queue is broken", **data)
        hub.publish(events.QUEUE_BROKEN, data)
    elif event.kind is EventKind.ATTACHMENT_LOST:
        attachment = engine.attachment(event.attachment)
        if attachment is not None:
            frontends.disconnect(attachment, LOSSES[event.value])
