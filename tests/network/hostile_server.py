# SPDX-License-Identifier: Apache-2.0
"""An NBD server of the tests' own, which does with a request what no real server would: it does not keep to
the protocol, or not to what it has said. One thread a connection."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.sizes import MIB

FLAGS = 1 | 1 << 2 | 1 << 3 | 1 << 6  # has flags, flush, FUA, write zeroes
MULTI_CONN = 1 << 8
READ, WRITE, DISCONNECT, FLUSH, TRIM, _CACHE, ZERO, STATUS = range(8)
EIO, EINVAL, ENOSPC = 5, 22, 28
GO, INFO, STRUCTURED, META = 7, 6, 8, 10
ACK, INFO_REPLY, UNSUPPORTED, META_REPLY = 1, 3, (1 << 31) + 1, 4


class Silence(Enum):
    """What is answered to a command: nothing."""

    NO_ANSWER = auto()
    DEAF = auto()  # and nothing more is taken: the client sees that when it sends again, and not before


# (type, offset, length) of a command -> its error, or silence; or bytes, sent as they are.
Behaviour = Callable[[int, int, int], int | bytes | Silence]


def well(kind: int, offset: int, length: int) -> int:
    return 0


class HostileServer:
    """`behave` says what becomes of each command. `extents`: base:allocation is offered, with these entries
    (length, flags) for whatever is asked."""

    def __init__(
        self, path: Path, *, size: int = 16 * MIB, flags: int = FLAGS, behave: Behaviour = well,
        extents: bytes | None = None,
    ) -> None:  # fmt: skip
        self.path = path
        self.size = size
        self.flags = flags
        self.behave = behave
        self.extents = extents
        self.content = bytearray(size)
        self.is_deaf = False
        self._end = threading.Event()
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def cut(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _start(self, run: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=run, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
            _take(connection, 4)
            while not self._option(connection):
                pass
            while self._command(connection):
                pass
            connection.shutdown(socket.SHUT_RDWR)

    def _option(self, connection: socket.socket) -> bool:
        """True: the export was chosen."""
        _, option, length = struct.unpack(">8sII", _take(connection, 16))
        _take(connection, length)

        def reply(kind: int, data: bytes = b"") -> None:
            connection.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)

        if option == STRUCTURED and self.extents is not None:
            reply(ACK)
        elif option == META and self.extents is not None:
            reply(META_REPLY, struct.pack(">I", 1) + b"base:allocation")
            reply(ACK)
        elif option in (GO, INFO):
            reply(INFO_REPLY, struct.pack(">HQH", 0, self.size, self.flags))
            reply(ACK)
            return bool(option == GO)
        else:
            reply(UNSUPPORTED)
        return False

    def _command(self, connection: socket.socket) -> bool:
        """False: it was the last one."""
        _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", _take(connection, 28))
        data = _take(connection, length) if kind == WRITE else b""
        if kind == DISCONNECT:
            return False
        answer = self.behave(kind, offset, length)
        if answer is Silence.DEAF:
            connection.shutdown(socket.SHUT_RD)
            self.is_deaf = True
            self._end.wait()
            return False
        if answer == 0 and kind == WRITE:
            self.content[offset : offset + length] = data
        if answer == 0 and kind == ZERO:
            self.content[offset : offset + length] = bytes(length)
        if isinstance(answer, bytes):
            connection.sendall(answer)
        elif not isinstance(answer, Silence):
            connection.sendall(self._answer(kind, cookie, offset, length, answer))
        return True

    def _answer(self, kind: int, cookie: bytes, offset: int, length: int, error: int) -> bytes:
        if self.extents is None or kind not in (READ, STATUS):
            data = bytes(self.content[offset : offset + length]) if kind == READ and not error else b""
            return struct.pack(">IIQ", 0x67446698, error, cookie) + data

        def chunk(what: int, body: bytes) -> bytes:
            return struct.pack(">IHHQI", 0x668E33EF, 1, what, cookie, len(body)) + body

        if error:
            return chunk((1 << 15) + 1, struct.pack(">IH", error, 0))
        if kind == READ:
            return chunk(1, struct.pack(">Q", offset) + self.content[offset : offset + length])
        return chunk(5, struct.pack(">I", 1) + self.extents)


def _take(connection: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        piece = connection.recv(length - len(found))
        if not piece:
            raise EOFError
        found += piece
    return found
