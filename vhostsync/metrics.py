# SPDX-License-Identifier: Apache-2.0
"""The metrics of a disk, made of what query-status, query-mirror and query-stats return. Pure, but for
`serve_metrics`. FAMILIES are all that there are; docs/metrics.md is made of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc

from vhostsync.engine.snapshot import DISK_OPS, REQUEST_OPS, ROLES, EngineFigures, QueueFigures
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import MirrorStatus
from vhostsync.record.state_record import Worth

from .control.command import dashed
from .control.commands import Backend
from .control.scrape import serve_page
from .metrics_page import FINE_BUCKETS, Family, Latency, Page, families_of
from .option_values import TcpAddress

Shown = Mapping[str, Any]


def _count_of(key: str) -> Callable[[Shown], int | None]:
    return lambda shown: None if shown.get(key) is None else len(shown[key])


def _value_of(key: str) -> Callable[[Shown], Any]:
    return lambda shown: shown.get(key)


OF_STATUS: Final = (
    (Family("capacity_bytes", "gauge", "Size of the disk as the guest sees it."), _value_of("capacity")),
    (Family("frontends", "gauge", "Frontends connected."), _value_of("frontends")),
    (Family("active", "gauge", "1 while a frontend runs rings."), _value_of("active")),
    (Family("frontends_waiting", "gauge", "Frontends that wait until the active one has stopped its rings."),
     _count_of("waiting-frontends")),
    (Family("epoch", "gauge", "The epoch of the state record."), _value_of("epoch")),
    (Family("log_lines_dropped_total", "counter", "Lines of the log that stderr did not take in time."),
     _value_of("log-lines-dropped")),
)  # fmt: skip
# What a limit is of, by the end of its name in query-status.
LIMITED: Final = {"": "all", "-rd": "reads", "-wr": "writes"}
OF_LIMITS: Final = tuple(
    (name, Family(f"limit_{unit}_per_second", "gauge",
                  f"What the guest may do: {unit} a second; no sample where there is no limit.", ("of",)))
    for name, unit in (("bps", "bytes"), ("iops", "requests"))
)  # fmt: skip
DISK_INFO: Final = Family(
    "disk_info", "gauge", "1; the labels are the paths of the guest's disk and of its destination.",
    ("source", "destination"),
)  # fmt: skip
STATE: Final = Family("mirror_state", "gauge", "1 for the state that the mirror is in.", ("state",))
WORTH: Final = Family(
    "mirror_worth", "gauge", "1 for what the destination is worth; all 0 without one.", ("worth",)
)
# Gauges, because they are undefined until the state is steady and start anew with a destination.
OF_COUNTS: Final = tuple(
    (Family(key.replace("-", "_"), "gauge", text), _value_of(key))
    for key, text in (
        ("source-generation", "Guest writes completed on the source."),
        ("source-flushed", "Guest writes that the source holds durably."),
        ("writes-mirrored", "Guest writes that the destination holds."),
        ("flush-request", "The newest write that a guest's flush has asked for."),
        ("writes-flushed", "Guest writes that the destination holds durably."),
    )
)
REQUEST_LATENCY: Final = Family(
    # By operation only: a histogram for each of 64 queues would be twelve thousand lines.
    "request_latency_seconds", "histogram", "Guest requests, from taken up to answered.", ("operation",),
)  # fmt: skip
DISK_IN_FLIGHT: Final = Family(
    "disk_in_flight", "gauge", "Requests that the disk has not completed.", ("disk",)
)
DISK_REPLACED: Final = Family(
    "disk_replaced", "gauge",
    "1 while the disk's name leads to another file, or to none; no sample where that cannot be told.",
    ("disk",),
)  # fmt: skip
DISK_LATENCY: Final = Family(
    "disk_latency_seconds", "histogram", "Requests to the disk.", ("disk", "operation")
)
LOG_BYTES: Final = Family("log_bytes", "gauge", "Size of the replication log.")


def _operation_families(prefix: str, what: str) -> tuple[tuple[str, Family], ...]:
    return tuple(
        (key, Family(f"{prefix}_{key}_total", "counter", f"{text} {what}.", (prefix, "operation")))
        for key, text in (("operations", "Completed"), ("bytes", "Bytes of completed"), ("errors", "Failed"))
    )


OF_REQUESTS: Final = _operation_families("queue", "guest requests")
OF_DISK_REQUESTS: Final = _operation_families("disk", "requests to the disk")

FAMILIES: Final = (
    *(family for family, _ in OF_STATUS),
    *(family for _, family in OF_LIMITS),
    DISK_INFO, STATE, WORTH,
    *(family for family, _ in OF_COUNTS),
    *families_of(MirrorStatus),
    *families_of(QueueFigures, "queue"),
    *(family for _, family in OF_REQUESTS),
    REQUEST_LATENCY, DISK_IN_FLIGHT, DISK_REPLACED,
    *(family for _, family in OF_DISK_REQUESTS),
    DISK_LATENCY,
    *families_of(EngineFigures),
    LOG_BYTES,
)  # fmt: skip


def page_of(
    status: Shown, mirror: Shown, stats: Shown, *, name: str | None = None, buckets: range = FINE_BUCKETS
) -> Page:
    """What the three queries return, as a page. `name`: the label `vm`, else what the backend is called."""
    name = name or status.get("name")
    page = Page({"vm": name} if name else None)
    for family, value in OF_STATUS:
        page.one(family, value(status))
    for limit, family in OF_LIMITS:
        for end, of in LIMITED.items():
            page.family(family)(status.get("limits", {}).get(limit + end) or None, of)
    _mirror(page, mirror)
    _queues(page, stats.get("queues", ()), buckets)
    _disks(page, stats.get("disks", {}), buckets)
    engine = stats.get("engine", {})
    page.statistics(EngineFigures, [((), engine)])
    page.one(LOG_BYTES, engine.get("log-bytes"))
    return page


def _mirror(page: Page, mirror: Shown) -> None:
    if mirror:
        page.family(DISK_INFO)(1, str(mirror.get("source") or ""), str(mirror.get("destination") or ""))
    state = page.family(STATE)
    for each in MirrorState:
        state(int(mirror.get("state") == each), each)
    worth = page.family(WORTH)
    for value in Worth:
        worth(int(mirror.get("worth") == value), value)
    for family, count in OF_COUNTS:
        page.one(family, count(mirror.get("counts", {})))
    page.statistics(MirrorStatus, [((), mirror)])


def _queues(page: Page, queues: Any, buckets: range) -> None:
    page.statistics(QueueFigures, [((str(int(queue["index"])),), queue) for queue in queues], "queue")
    rows = [
        ((str(int(queue["index"])), name), queue["operations"][name])
        for queue in queues
        for name in REQUEST_OPS
        if name in queue.get("operations", {})
    ]
    _operations(page, OF_REQUESTS, rows)
    latencies: dict[tuple[str, ...], Latency] = {}
    for (_, name), operation in rows:
        latencies.setdefault((name,), Latency()).add(operation)
    page.histogram(REQUEST_LATENCY, latencies, buckets)


def _disks(page: Page, disks: Shown, buckets: range) -> None:
    present = {role: disks[role] for role in ROLES if disks.get(role) is not None}
    in_flight = page.family(DISK_IN_FLIGHT)
    for role, disk in present.items():
        in_flight(disk.get("in-flight"), role)
    replaced = page.family(DISK_REPLACED)
    for role, disk in present.items():
        replaced(disk.get("replaced"), role)
    rows = [
        ((role, name), disk["operations"][name])
        for role, disk in present.items()
        for name in DISK_OPS
        if name in disk.get("operations", {})
    ]
    _operations(page, OF_DISK_REQUESTS, rows)
    latencies: dict[tuple[str, ...], Latency] = {}
    for labels, operation in rows:
        latencies.setdefault(labels, Latency()).add(operation)
    page.histogram(DISK_LATENCY, latencies, buckets)


def _operations(
    page: Page, families: tuple[tuple[str, Family], ...], rows: list[tuple[tuple[str, str], Shown]]
) -> None:
    for key, declared in families:
        family = page.family(declared)
        for labels, operation in rows:
            family(operation.get(key), *labels)


async def serve_metrics(
    where: Path | TcpAddress,
    backend: Backend,
    *,
    task_status: anyio.abc.TaskStatus[Path | TcpAddress] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """See scrape.serve_page."""

    async def page() -> str:
        status = dashed(await backend.query_status())
        mirror = dashed(await backend.mirror.status())
        return page_of(status, mirror, dashed(await backend.query_stats())).text()

    await serve_page(where, page, task_status=task_status)
