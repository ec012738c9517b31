# SPDX-License-Identifier: Apache-2.0
"""The metrics of `serve`, made of what query-mirror and query-stats return. `render` is pure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.abc

from vhostsync.engine.snapshot import EngineFigures, QueueFigures
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import MirrorStatus
from vhostsync.record.state_record import Worth

from .control.command import dashed
from .control.commands import Backend
from .control.scrape import serve_page
from .metrics_page import Latency, Page
from .option_values import TcpAddress


def render(status: Mapping[str, Any], mirror: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """The page, from what query-status, query-mirror and query-stats return."""
    page = Page({"vm": status["name"]} if status.get("name") else None)
    page.one("capacity_bytes", "gauge", "Size of the disk as the guest sees it.", status.get("capacity"))
    page.one("frontends", "gauge", "Frontends connected.", status.get("frontends"))
    page.one("active", "gauge", "1 while a frontend runs rings.", status.get("active"))
    waiting = status.get("waiting-frontends")
    help_text = "Frontends that wait until the active one has stopped its rings."
    page.one("frontends_waiting", "gauge", help_text, None if waiting is None else len(waiting))
    page.one("epoch", "gauge", "The epoch of the state record.", status.get("epoch"))
    page.one(
        "log_lines_dropped_total",
        "counter",
        "Lines of the log that stderr did not take in time.",
        status.get("log-lines-dropped"),
    )
    _mirror(page, mirror)
    _queues(page, stats.get("queues", ()))
    _disks(page, stats.get("disks", {}))
    _engine(page, stats.get("engine", {}))
    return page.text()


def _mirror(page: Page, mirror: Mapping[str, Any]) -> None:
    state = page.family("mirror_state", "gauge", "1 for the state that the mirror is in.")
    for each in MirrorState:
        state(int(mirror.get("state") == each), {"state": each})
    worth = page.family("mirror_worth", "gauge", "1 for what the destination is worth; all 0 without one.")
    for value in Worth:
        worth(int(mirror.get("worth") == value), {"worth": value})
    for key, text in (
        ("source-generation", "Guest writes completed on the source."),
        ("source-flushed", "Guest writes that the source holds durably."),
        ("writes-mirrored", "Guest writes that the destination holds."),
        ("flush-request", "The newest write that a guest's flush has asked for."),
        ("writes-flushed", "Guest writes that the destination holds durably."),
    ):
        # Gauges, because they are undefined until the state is steady and start anew with a destination.
        page.one(key.replace("-", "_"), "gauge", text, mirror.get("counts", {}).get(key))
    page.statistics(MirrorStatus, ({}, mirror))


def _queues(page: Page, queues: Any) -> None:
    by_queue = [({"queue": str(queue["index"])}, queue) for queue in queues]
    page.statistics(QueueFigures, *by_queue)
    rows = [
        ({"queue": str(queue["index"]), "operation": name}, operation)
        for queue in queues
        for name, operation in queue.get("operations", {}).items()
    ]
    _operations(page, "queue", "guest requests", rows)
    # By operation only: a histogram for each of 64 queues would be twelve thousand lines.
    latencies: dict[tuple[tuple[str, str], ...], Latency] = {}
    for labels, operation in rows:
        latencies.setdefault((("operation", labels["operation"]),), Latency()).add(operation)
    page.histogram("request_latency_seconds", "Guest requests, from taken up to answered.", latencies)


def _disks(page: Page, disks: Mapping[str, Any]) -> None:
    present = {role: disk for role, disk in disks.items() if disk is not None}
    in_flight = page.family("disk_in_flight", "gauge", "Requests that the disk has not completed.")
    for role, disk in present.items():
        in_flight(disk.get("in-flight"), {"disk": role})
    rows = [
        ({"disk": role, "operation": name}, operation)
        for role, disk in present.items()
        for name, operation in disk.get("operations", {}).items()
    ]
    _operations(page, "disk", "requests to the disk", rows)
    latencies: dict[tuple[tuple[str, str], ...], Latency] = {}
    for labels, operation in rows:
        latencies.setdefault(tuple(labels.items()), Latency()).add(operation)
    page.histogram("disk_latency_seconds", "Requests to the disk.", latencies)


def _operations(
    page: Page, prefix: str, what: str, rows: list[tuple[dict[str, str], Mapping[str, Any]]]
) -> None:
    for key, text in (("operations", "Completed"), ("bytes", "Bytes of completed"), ("errors", "Failed")):
        family = page.family(f"{prefix}_{key}_total", "counter", f"{text} {what}.")
        for labels, operation in rows:
            family(operation.get(key), labels)


def _engine(page: Page, engine: Mapping[str, Any]) -> None:
    page.statistics(EngineFigures, ({}, engine))
    page.one("log_bytes", "gauge", "Size of the replication log.", engine.get("log-bytes"))


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
        return render(status, mirror, dashed(await backend.query_stats()))

    await serve_page(where, page, task_status=task_status)
