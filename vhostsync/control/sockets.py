# SPDX-License-Identifier: Apache-2.0
"""Plain sockets awaited on the event loop, and who is at their other end.

anyio's own streams are not used: their receive, cancelled in the very iteration of the loop in which data
arrives, leaves an InvalidStateError for the loop's exception handler (seen with anyio 4.16 on asyncio).
wait_readable does not."""

import errno
import os
import socket
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import structlog

from ..host.errands import bring_unless_cancelled
from ..host.owned_fd import OwnedFd

log = structlog.get_logger(__name__)

READ_BYTES: Final = 16 * 1024


async def accept(listener: socket.socket) -> socket.socket:
    """The next connection, non-blocking. Never fails: out of descriptors it logs and tries again."""
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            await anyio.wait_readable(listener)
        except ConnectionAbortedError:
            continue
        except OSError as error:
            # Out of descriptors or memory: the socket stays readable, so wait a little rather than spin.
            log.error("cannot accept a connection", reason=error.strerror)
            await anyio.sleep(0.5)
        else:
            connection.setblocking(False)
            return connection


async def connect(path: Path, *, follow: bool = True) -> socket.socket:
    """A connection to the unix socket at `path`, waiting while its backlog is full. `follow`: also where that
    is a link to one. OSError."""
    if not follow:
        with await bring_unless_cancelled(partial(_open_itself, path), OwnedFd.close) as place:
            return await connect(Path(f"/proc/self/fd/{place.fileno()}"))
    connection = socket.socket(
        socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
    try:
        while True:
            try:
                connection.connect(str(path))
            except BlockingIOError:
                await anyio.sleep(0.02)  # connect(2): nothing tells when there is room
            else:
                return connection
    except BaseException:
        connection.close()
        raise


def _open_itself(path: Path) -> OwnedFd:
    """What is there now, whatever is put there meanwhile. Blocks, for as long as the file system hangs on
    which somebody has put it. OSError where it is a link."""
    place = OwnedFd(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
    if stat.S_ISLNK(os.fstat(place.fileno()).st_mode):
        place.close()
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return place


async def receive(connection: socket.socket) -> bytes:
    """What has arrived, waiting for something; empty at the end. OSError; closed meanwhile by another task
    is one."""
    while True:
        try:
            return connection.recv(READ_BYTES)
        except BlockingIOError:
            with suppress(anyio.ClosedResourceError):  # then recv says so
                await anyio.wait_readable(connection)


async def send_all(connection: socket.socket, data: bytes) -> None:
    """Send all of it. OSError. When cancelled, some of it may have been sent."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[connection.send(rest, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            with suppress(anyio.ClosedResourceError):
                await anyio.wait_writable(connection)
