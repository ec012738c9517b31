# SPDX-License-Identifier: Apache-2.0
"""Unix sockets made without a race, and plain sockets awaited on the event loop.

anyio's own streams are not used: their receive, cancelled in the very iteration of the loop in which data
arrives, leaves an InvalidStateError for the loop's exception handler (seen with anyio 4.16 on asyncio).
wait_readable does not."""

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import structlog

from ..errors import ConfigError

log = structlog.get_logger(__name__)

BACKLOG: Final = 16
READ_BYTES: Final = 16 * 1024
DIRECTORY_LOCK_S: Final = 3.0


@dataclass(frozen=True)
class BoundSocket:
    """A listening, non-blocking unix socket and the file that it made."""

    listener: socket.socket
    path: Path
    device: int
    inode: int

    def close(self) -> None:
        """Listen no more, and remove the file unless another took its place."""
        self.listener.close()
        with suppress(OSError):
            now = self.path.lstat()
            if (now.st_dev, now.st_ino) == (self.device, self.inode):
                self.path.unlink()


def bind_unix_socket(path: Path, mode: int = 0o600) -> BoundSocket:
    """A listening unix socket at `path` with `mode` less the umask. May block for DIRECTORY_LOCK_S.

    The mode is set on the socket before it is bound: Linux gives the file the mode of the socket
    (unix_bind_bsd in net/unix/af_unix.c), so there is no instant at which others could connect. A file left
    by a process that is gone is replaced; one that somebody listens on is not. A lock on the directory
    keeps two processes that start at once from taking each other's for a leftover. Raises ConfigError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), mode)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(directory, path)
            try:
                listener.bind(str(path))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_leftover(path)
                listener.bind(str(path))
            made = path.lstat()
            listener.listen(BACKLOG)
        finally:
            os.close(directory)
    except OSError as error:
        listener.close()
        raise ConfigError(f"Cannot make the socket {path}: {error.strerror}.") from error
    except BaseException:
        listener.close()
        raise
    return BoundSocket(listener, path, made.st_dev, made.st_ino)


def _lock(directory: int, path: Path) -> None:
    """Take the lock that closing `directory` gives back. ConfigError where another process keeps it."""
    until = time.monotonic() + DIRECTORY_LOCK_S
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise ConfigError(
                    f"Cannot make the socket {path}: another process has locked {path.parent}; try again."
                ) from None
            time.sleep(0.02)  # this runs in a thread of its own
        else:
            return


def _remove_leftover(path: Path) -> None:
    """Remove the socket of a process that is gone. ConfigError where it is in use, or is no socket."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(f"Cannot make the socket {path}: there is a file of that name that is no socket.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # ECONNREFUSED is the one answer that says that nobody listens (EAGAIN: somebody who is busy).
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise ConfigError(f"Cannot make the socket {path}: another process listens on it.")
    path.unlink()


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end when it connected, or listened (SO_PEERCRED, unix(7))."""
    return _peer(connection)[1]


def peer_process(connection: socket.socket) -> int:
    """The process at the other end when it connected, or listened; 0 where it is in a namespace of its
    own."""
    return _peer(connection)[0]


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, group = struct.unpack("3i", credentials)
    return process, user, group


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


async def connect(path: Path) -> socket.socket:
    """A connection to the unix socket at `path`, waiting while its backlog is full. OSError."""
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
