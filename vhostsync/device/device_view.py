# SPDX-License-Identifier: Apache-2.0
"""What the control socket and the metrics show of one device."""

from typing import Any

from vhostsync import log as logging
from vhostsync.config import ServeConfig
from vhostsync.device.device_limits import DeviceLimits
from vhostsync.engine.engine import Engine
from vhostsync.engine.snapshot import EngineFigures, OpStats, QueueFigures
from vhostsync.mirror.disk_names import DiskNames
from vhostsync.mirror.mirror import Mirror
from vhostsync.statistic import figures_of
from vhostsync.vhost_user.server import FrontendServer


class DeviceView:
    def __init__(
        self, config: ServeConfig, engine: Engine, mirror: Mirror, frontends: FrontendServer,
        limits: DeviceLimits, record_place: str | None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._mirror = mirror
        self._frontends = frontends
        self._disk_names = DiskNames()
        self._record_place = record_place
        self._limits = limits

    async def query_status(self) -> dict[str, Any]:
        snapshot = await self._engine.snapshot()
        index, frontends = snapshot.active_attachment, self._frontends
        active = None if index is None else self._engine.attachment(index)
        return {
            "status": "running",
            "name": self._config.label,
            "frontends": frontends.frontends,
            "active": index is not None,
            "active-frontend": frontends.number_of(active),
            "waiting-frontends": frontends.waiting(active),
            "disk": self._mirror.source_path,
            "capacity": self._engine.config.capacity_bytes,
            "block-size": self._engine.config.block_bytes,
            "queues": self._engine.config.num_queues,
            "read-only": self._config.read_only,
            "write-cache": snapshot.write_cache,
            "mirror": str(self._mirror.state),
            "record": self._record_place,
            "epoch": self._mirror.epoch,
            "limits": self._limits.now.shown(),
            "log-lines-dropped": logging.dropped_lines(),
        }

    async def query_stats(self) -> dict[str, Any]:
        snapshot, queues = await self._engine.snapshot_with_queues()
        places = {"source": self._mirror.source, "destination": self._mirror.destination}
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
                    "path": place.name,
                    "replaced": await self._disk_names.is_replaced(place),
                    "in-flight": snapshot.disks_in_flight[role],
                    "operations": _operations(snapshot.disks[role]),
                }
                if place
                else None
                for role, place in places.items()
            },
            "engine": {
                "threads": self._config.threads,
                **figures_of(EngineFigures, snapshot),
                "log-bytes": self._config.log_bytes,
            },
        }


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
    if not stats.operations:
        return 0.0
    wanted, seen = share * stats.operations, 0
    for bucket, count in enumerate(stats.latency_ns_log2):
        seen += count
        if count and seen >= wanted:
            return float(2 ** (bucket + 1)) / 1000
    return 0.0
