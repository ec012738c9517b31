# SPDX-License-Identifier: Apache-2.0
"""Answers `GET /metrics` with a page (metrics_page.py), on a unix socket or a TCP port: a few lines of
HTTP/1.1 that close after each answer, because that is all that a scraper needs.

To a port every user of the host can connect, and so can a page in a browser on it. So nobody can keep others
waiting by holding connections (beyond CONNECTIONS_MAX the oldest is closed). On a loopback address a request
that names another host is refused: a web site whose name was made to mean 127.0.0.1 (DNS rebinding) would
read the answer. On any other address everybody who reaches it may read, by whatever name."""

import ipaddress
import re
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import structlog

from vhostsync.host import unix_socket

from ..errors import ConfigError, VhostsyncError
from ..option_values import TcpAddress
from . import sockets

log = structlog.get_logger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

REQUEST_BYTES_MAX: Final = 8 * 1024
CONNECTION_S: Final = 10.0
CONNECTIONS_MAX: Final = 32
# Blanks around the value are cut off afterwards: a search for them, too, takes the cube of a line's length.
HOST_LINE: Final = re.compile(rb"^host[ \t]*:([^\n]*)$", re.IGNORECASE | re.MULTILINE)
HOST_AND_PORT: Final = re.compile(r"(?:\[(.*)\]|([^:]*))(?::\d*)?")


async def serve_page(
    where: Path | TcpAddress,
    page: Callable[[], Awaitable[str]],
    page_s: float = 0.0,
    *,
    task_status: anyio.abc.TaskStatus[Path | TcpAddress] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; `task_status` tells the place, with the port that the kernel chose. `page_s`:
    how long the page itself may take. ConfigError."""
    bound: unix_socket.BoundSocket | None = None
    if isinstance(where, Path):
        bound = await anyio.to_thread.run_sync(unix_socket.bind_unix_socket, where, 0o660)
        listener = bound.listener
    else:
        listener, where = _listen_tcp(where)
    is_loopback = isinstance(where, TcpAddress) and where.is_loopback
    try:
        log.info("metrics ready", where=str(where))
        task_status.started(where)
        async with anyio.create_task_group() as tasks:
            open_now: deque[anyio.CancelScope] = deque()  # the oldest first
            while True:
                connection = await sockets.accept(listener)
                if len(open_now) == CONNECTIONS_MAX:
                    open_now.popleft().cancel()
                open_now.append(anyio.CancelScope(deadline=anyio.current_time() + CONNECTION_S + page_s))
                tasks.start_soon(_answer, connection, page, open_now, is_loopback)
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
    connection: socket.socket, page: Callable[[], Awaitable[str]], open_now: deque[anyio.CancelScope],
    is_loopback: bool,
) -> None:
    """The newest of `open_now` is this connection's."""
    scope = open_now[-1]
    try:
        with connection, scope:
            request = b""
            while b"\r\n\r\n" not in request and len(request) <= REQUEST_BYTES_MAX:
                data = await sockets.receive(connection)
                if not data:
                    return
                request += data
            await sockets.send_all(connection, await _response(request, page, is_loopback))
    except OSError:
        return  # the scraper went away
    except VhostsyncError as error:
        log.warning("metrics could not be made", reason=str(error))
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


async def _response(request: bytes, page: Callable[[], Awaitable[str]], is_loopback: bool) -> bytes:
    method, target = ([*request.split(b"\r\n", 1)[0].split(b" "), b"", b""])[:2]
    if b"\r\n\r\n" not in request:
        code, body = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request is too long.\n"
    elif is_loopback and not _names_this_host(request):
        code, body = HTTPStatus.MISDIRECTED_REQUEST, "Only localhost and 127.0.0.1 are answered for here.\n"
    elif method not in (b"GET", b"HEAD"):
        code, body = HTTPStatus.METHOD_NOT_ALLOWED, "Only GET is answered here.\n"
    elif target.split(b"?")[0] != b"/metrics":
        code, body = HTTPStatus.NOT_FOUND, "The metrics are at /metrics.\n"
    else:
        code, body = HTTPStatus.OK, await page()
    content = body.encode()
    head = (
        f"HTTP/1.1 {code.value} {code.phrase}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + (b"" if method == b"HEAD" else content)
