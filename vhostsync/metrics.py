# SPDX-License-Identifier: Apache-2.0
"""Metrics in Prometheus' text exposition format (version 0.0.4), made of what query-mirror and query-stats
return.

`render` is pure. `serve_metrics` answers `GET /metrics` on a unix socket or a loopback port; it is a few
lines of HTTP/1.1 that close after each answer, because that is all that a scraper needs.

To a port every user of the host can connect, and so can a page in a browser on it. So nobody can keep others
waiting by holding connections (beyond CONNECTIONS_MAX the oldest is closed), and a request that names another
host is refused: a web site whose name was made to mean 127.0.0.1 (DNS rebinding) would read the answer."""

import ipaddress
import math
import re
import socket
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import structlog

from vhostsync.engine.snapshot import EngineFigures, QueueFigures
from vhostsync.host import unix_socket
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import MirrorStatus
from vhostsync.record.state_record import Worth

from .config import TcpAddress
from .control import sockets
from .control.commands import Backend, dashed
from .errors import ConfigError
from .statistic import MetricKind, statistics_of

log = structlog.get_logger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

REQUEST_BYTES_MAX: Final = 8 * 1024
CONNECTION_S: Final = 10.0
CONNECTIONS_MAX: Final = 32
# Blanks around the value are cut off afterwards: a search for them, too, takes the cube of a line's length.
HOST_LINE: Final = re.compile(rb"^host[ \t]*:([^\n]*)$", re.IGNORECASE | re.MULTILINE)
HOST_AND_PORT: Final = re.compile(r"(?:\[(.*)\]|([^:]*))(?::\d*)?")

_Labels = Mapping[str, str]


class _Page:
    """Collects samples by family, because a family's samples must stand together."""

    def __init__(self, common: _Labels | None = None) -> None:
        """`common`: labels that every sample has."""
        self._families: dict[str, list[str]] = {}
        self._common = dict(common or {})

    def family(self, name: str, kind: MetricKind, text: str) -> Callable[[Any, _Labels], None]:
        """Begin a family; the result adds a sample, or nothing where the value is None."""
        lines = self._families.setdefault(
            name, [f"# HELP vhostsync_{name} {text}", f"# TYPE vhostsync_{name} {kind}"]
        )

        def add(value: Any, labels: _Labels) -> None:
            if value is not None:
                inner = _inner({**self._common, **labels})
                lines.append(f"vhostsync_{name}{'{' + inner + '}' if inner else ''} {_number(value)}")

        return add

    def one(self, name: str, kind: MetricKind, text: str, value: Any) -> None:
        """A family of one sample."""
        self.family(name, kind, text)(value, {})

    def statistics(self, shown: type, *rows: tuple[_Labels, Mapping[str, Any]]) -> None:
        """The metrics that are declared of `shown`, of each row: its labels, and what a query shows."""
        for each, declared in statistics_of(shown):
            if (metric := declared.metric) is None:
                continue
            add = self.family(metric.name, metric.kind, metric.help)
            for labels, row in rows:
                if (key := each.name.replace("_", "-")) in row:
                    add(metric.value(row[key]), labels)

    def histogram(self, name: str, text: str, rows: Mapping[tuple[tuple[str, str], ...], "_Latency"]) -> None:
        """A histogram in seconds from counts by powers of two of nanoseconds."""
        self.family(name, "histogram", text)
        lines = self._families[name]
        for labels, row in rows.items():
            inner = _inner({**self._common, **dict(labels)})
            before = inner + "," if inner else ""
            total = 0
            for power, count in enumerate(row.counts[:-1]):
                total += count
                lines.append(
                    f'vhostsync_{name}_bucket{{{before}le="{2.0 ** (power + 1) / 1e9:.9g}"}} {total}'
                )
            total += row.counts[-1]
            lines.append(f'vhostsync_{name}_bucket{{{before}le="+Inf"}} {total}')
            tail = "{" + inner + "}" if inner else ""
            lines.append(f"vhostsync_{name}_sum{tail} {_number(row.seconds)}")
            lines.append(f"vhostsync_{name}_count{tail} {total}")

    def text(self) -> str:
        """The page, without the families that have no sample."""
        return "".join("\n".join(lines) + "\n" for lines in self._families.values() if len(lines) > 2)


class _Latency:
    """Latencies of some operations, summed up."""

    def __init__(self) -> None:
        self.counts = [0] * 32
        self.seconds = 0.0

    def add(self, operation: Mapping[str, Any]) -> None:
        for power, count in enumerate(operation["latency-log2-ns"]):
            self.counts[power] += count
        mean_us = operation["latency-us"]["mean"]
        self.seconds += (mean_us or 0.0) / 1e6 * operation["operations"]


def render(status: Mapping[str, Any], mirror: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """The page, from what query-status, query-mirror and query-stats return."""
    page = _Page({"vm": status["name"]} if status.get("name") else None)
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


def _mirror(page: _Page, mirror: Mapping[str, Any]) -> None:
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


def _queues(page: _Page, queues: Any) -> None:
    by_queue = [({"queue": str(queue["index"])}, queue) for queue in queues]
    page.statistics(QueueFigures, *by_queue)
    rows = [
        ({"queue": str(queue["index"]), "operation": name}, operation)
        for queue in queues
        for name, operation in queue.get("operations", {}).items()
    ]
    _operations(page, "queue", "guest requests", rows)
    # By operation only: a histogram for each of 64 queues would be twelve thousand lines.
    latencies: dict[tuple[tuple[str, str], ...], _Latency] = {}
    for labels, operation in rows:
        latencies.setdefault((("operation", labels["operation"]),), _Latency()).add(operation)
    page.histogram("request_latency_seconds", "Guest requests, from taken up to answered.", latencies)


def _disks(page: _Page, disks: Mapping[str, Any]) -> None:
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
    latencies: dict[tuple[tuple[str, str], ...], _Latency] = {}
    for labels, operation in rows:
        latencies.setdefault(tuple(labels.items()), _Latency()).add(operation)
    page.histogram("disk_latency_seconds", "Requests to the disk.", latencies)


def _operations(
    page: _Page, prefix: str, what: str, rows: list[tuple[dict[str, str], Mapping[str, Any]]]
) -> None:
    for key, text in (("operations", "Completed"), ("bytes", "Bytes of completed"), ("errors", "Failed")):
        family = page.family(f"{prefix}_{key}_total", "counter", f"{text} {what}.")
        for labels, operation in rows:
            family(operation.get(key), labels)


def _engine(page: _Page, engine: Mapping[str, Any]) -> None:
    page.statistics(EngineFigures, ({}, engine))
    page.one("log_bytes", "gauge", "Size of the replication log.", engine.get("log-bytes"))


def _inner(labels: _Labels) -> str:
    return ",".join(f'{key}="{_escaped(each)}"' for key, each in labels.items())


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
    return repr(value)


async def serve_metrics(
    where: Path | TcpAddress,
    backend: Backend,
    *,
    task_status: anyio.abc.TaskStatus[Path | TcpAddress] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; `task_status` tells the place, with the port that the kernel chose.
    ConfigError."""
    bound: unix_socket.BoundSocket | None = None
    if isinstance(where, Path):
        bound = await anyio.to_thread.run_sync(unix_socket.bind_unix_socket, where, 0o660)
        listener = bound.listener
    else:
        listener, where = _listen_tcp(where)
    try:
        log.info("metrics ready", where=str(where))
        task_status.started(where)
        async with anyio.create_task_group() as tasks:
            open_now: deque[anyio.CancelScope] = deque()  # the oldest first
            while True:
                connection = await sockets.accept(listener)
                if len(open_now) == CONNECTIONS_MAX:
                    open_now.popleft().cancel()
                open_now.append(anyio.CancelScope())
                tasks.start_soon(_answer, connection, backend, open_now, isinstance(where, TcpAddress))
                await anyio.lowlevel.checkpoint()  # what was cancelled closes before the next is taken
    finally:
        if bound is not None:
            bound.close()
        else:
            listener.close()


def _listen_tcp(where: TcpAddress) -> tuple[socket.socket, TcpAddress]:
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((where.host, where.port))
        listener.listen(unix_socket.BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot serve metrics on {where.host} port {where.port}: {error.strerror}."
        ) from error
    return listener, TcpAddress(where.host, listener.getsockname()[1])


async def _answer(
    connection: socket.socket, backend: Backend, open_now: deque[anyio.CancelScope], is_tcp: bool
) -> None:
    """The newest of `open_now` is this connection's."""
    scope = open_now[-1]
    scope.deadline = anyio.current_time() + CONNECTION_S
    try:
        with connection, scope:
            request = b""
            while b"\r\n\r\n" not in request and len(request) <= REQUEST_BYTES_MAX:
                data = await sockets.receive(connection)
                if not data:
                    return
                request += data
            await sockets.send_all(connection, await _response(request, backend, is_tcp))
    except OSError:
        return  # the scraper went away
    except Exception:
        log.exception("metrics could not be made")
    finally:
        if scope in open_now:
            open_now.remove(scope)


def _names_this_host(head: bytes) -> bool:
    """Whether each Host of the request (HTTP/1.0 has none) is localhost or a loopback address. The port may
    be another one: that of a tunnel to here."""
    for value in HOST_LINE.findall(head):
        match = HOST_AND_PORT.fullmatch(value.strip(b" \t\r").decode("ascii", "replace").lower())
        host = (match[1] or match[2]) if match is not None else ""
        try:
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                return False
        except ValueError:
            return False
    return True


async def _response(request: bytes, backend: Backend, is_tcp: bool) -> bytes:
    method, target = ([*request.split(b"\r\n", 1)[0].split(b" "), b"", b""])[:2]
    if b"\r\n\r\n" not in request:
        code, body = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request is too long.\n"
    elif is_tcp and not _names_this_host(request):
        code, body = HTTPStatus.MISDIRECTED_REQUEST, "Only localhost and 127.0.0.1 are answered for here.\n"
    elif method not in (b"GET", b"HEAD"):
        code, body = HTTPStatus.METHOD_NOT_ALLOWED, "Only GET is answered here.\n"
    elif target.split(b"?")[0] != b"/metrics":
        code, body = HTTPStatus.NOT_FOUND, "The metrics are at /metrics.\n"
    else:
        status = dashed(await backend.query_status())
        mirror = dashed(await backend.mirror.status())
        code, body = HTTPStatus.OK, render(status, mirror, dashed(await backend.query_stats()))
    content = body.encode()
    head = (
        f"HTTP/1.1 {code.value} {code.phrase}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + (b"" if method == b"HEAD" else content)
