# SPDX-License-Identifier: Apache-2.0
"""TLS on an accepted socket, for one task. anyio's own does not send the alert that says why a handshake has
failed: the other side would only see that it is cut off."""

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from vhostsync.control import sockets

T = TypeVar("T")


class TlsConnection:
    """Every method raises OSError (ssl.SSLError is one)."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self._connection = connection
        self._come, self._going = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._come, self._going, server_side=True)

    async def shake_hands(self) -> None:
        await self._do(self._tls.do_handshake)

    async def receive(self) -> bytes:
        """What has arrived, waiting for something; empty at the end."""
        try:
            return await self._do(lambda: self._tls.read(sockets.READ_BYTES))
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    async def send_all(self, data: bytes) -> None:
        await self._do(lambda: self._tls.write(data))

    @property
    def peer_name(self) -> str | None:
        """What its certificate calls it."""
        certificate: Any = self._tls.getpeercert() or {}
        pairs = [pair for part in certificate.get("subject", ()) for pair in part]
        return next((str(value) for key, value in pairs if key == "commonName"), None)

    async def _do(self, step: Callable[[], T]) -> T:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._flush()
                if data := await sockets.receive(self._connection):
                    self._come.write(data)
                else:
                    self._come.write_eof()
            except ssl.SSLError:
                with suppress(OSError):
                    await self._flush()
                raise
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        while data := self._going.read():
            await sockets.send_all(self._connection, data)
