# SPDX-License-Identifier: Apache-2.0
"""The connections of owners: TLS with a certificate of theirs, then commands, one after the other.

Nobody can hold up anybody else: a handshake has HANDSHAKE_S, a silent connection IDLE_S, a line
MESSAGE_BYTES_MAX; when CONNECTIONS_MAX are there, the oldest that waits for its other side makes room. What
is no request ends the connection. A command runs on when its connection is cut: the owner asks again.
"""

import socket
import ssl
from collections import deque
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import structlog

from vhostsync.control import qmp, sockets
from vhostsync.control.command import Dispatcher
from vhostsync.errors import ConfigError
from vhostsync.host import tls
from vhostsync.printable import printable
from vhostsync.receive.owner_commands import OWNER_COMMANDS, Asked
from vhostsync.receive.receiver import Receiver
from vhostsync.receive.seldom import Seldom
from vhostsync.receive.tls_connection import TlsConnection

log = structlog.get_logger(__name__)

HANDSHAKE_S: Final = 10.0
IDLE_S: Final = 60.0
SEND_S: Final = 30.0
CONNECTIONS_MAX: Final = 64


class Certificates:
    """Those of a directory, read again when a file of it has changed. Blocks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: list[object] = []
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """ConfigError at the first time; later, what cannot be read leaves those that there are."""
        now = [_looks(path) for path in tls.files_of(self._folder, "server")]
        if self._context is None or now != self._seen:
            try:
                self._context = tls.server_context(self._folder)
            except ConfigError as error:
                if self._context is None:
                    raise
                log.error("the new certificates are not used", reason=str(error))
            self._seen = now
        return self._context


def _looks(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


class Owners:
    """Whoever connects to one listening socket."""

    def __init__(self, receiver: Receiver, certificates: Certificates) -> None:
        self._receiver = receiver
        self._certificates = certificates
        self._waiting: deque[anyio.CancelScope] = deque()  # connections that wait for their other side
        self._open = 0
        self._say_ended = Seldom(log.info)
        self._left = anyio.Event()  # the next one has ended

    async def run(self, listener: socket.socket) -> None:
        """Until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                connection = await sockets.accept(listener)
                while self._open >= CONNECTIONS_MAX:
                    if self._waiting:
                        self._waiting.popleft().cancel()
                    await self._left.wait()
                context = await anyio.to_thread.run_sync(self._certificates.context)
                self._open += 1
                tasks.start_soon(self._serve, connection, context)

    async def _serve(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        peer = _address(connection)
        try:
            with connection:
                stream = TlsConnection(connection, context)
                with self._patience(HANDSHAKE_S) as waiting:
                    await stream.shake_hands()
                if not waiting.cancelled_caught:
                    name = printable(stream.peer_name or "an owner without a name")
                    await self._converse(stream, f"{name} at {peer}")
        except OSError as error:
            self._say_ended("a connection has ended", peer=peer, reason=tls.why(error))
        except Exception:
            log.exception("a connection failed in a way that nobody foresaw", peer=peer)
        finally:
            self._open -= 1
            self._left.set()
            self._left = anyio.Event()

    async def _converse(self, stream: TlsConnection, owner: str) -> None:
        dispatcher = Dispatcher(OWNER_COMMANDS, Asked(self._receiver, owner))
        parser = qmp.Parser()
        while True:
            with self._patience(IDLE_S) as waiting:
                data = await stream.receive()
            if waiting.cancelled_caught or not data:
                return
            for item in parser.feed(data):
                request = qmp.request_of(item.value) if isinstance(item, qmp.Value) else item.reason
                if isinstance(request, str):
                    log.warning("an owner sends what is no request", peer=owner, reason=request)
                    await self._send(stream, qmp.error_line(request))
                    return
                await self._send(stream, await dispatcher.execute(request))

    async def _send(self, stream: TlsConnection, line: bytes) -> None:
        with self._patience(SEND_S) as waiting:
            await stream.send_all(line)
        if waiting.cancelled_caught:
            raise TimeoutError

    def _patience(self, seconds: float) -> "_Patience":
        return _Patience(self._waiting, seconds)


class _Patience:
    """Waits for the other side, for so long, and gives way to a newer connection before that."""

    def __init__(self, waiting: deque[anyio.CancelScope], seconds: float) -> None:
        self._waiting = waiting
        self._scope = anyio.move_on_after(seconds)

    def __enter__(self) -> anyio.CancelScope:
        self._waiting.append(self._scope)
        return self._scope.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        if self._scope in self._waiting:
            self._waiting.remove(self._scope)
        return self._scope.__exit__(*error)


def _address(connection: socket.socket) -> str:
    try:
        return printable(str(connection.getpeername()[0]))
    except OSError:
        return "?"
