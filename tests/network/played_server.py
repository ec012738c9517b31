# SPDX-License-Identifier: Apache-2.0
"""An NBD server of the tests' own, which does with a request what no real server would."""

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

MAGIC, OPTIONS = b"NBDMAGIC", b"IHAVEOPT"
REPLY = 0x3E889045565A9
EXPORT_NAME, ABORT, GO = 1, 2, 7
ACK, INFO, UNSUPPORTED = 1, 3, 0x80000001
READ, WRITE, DISCONNECT = 0, 1, 2
FLAGS = 1 | 1 << 2 | 1 << 3  # there are flags; FLUSH; FUA
REQUEST = struct.Struct(">IHHQQI")


class Answer(Enum):
    SUCCESS = auto()
    DEAF = auto()  # none, and nothing more is taken: the client sees that when it sends again, and not before


class PlayedServer:
    """On a Unix socket, with a disk of zeroes. `answer` is asked of each request: its command and offset."""

    def __init__(self, path: Path, size_bytes: int, answer: Callable[[int, int], Answer]) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self._bytes = size_bytes
        self._answer = answer
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self._end = threading.Event()
        self.is_deaf = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def __enter__(self) -> Self:
        self._begin(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _begin(self, run: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=run, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                self._begin(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            if self._negotiate(connection):
                while self._obey(connection):
                    pass

    def _negotiate(self, connection: socket.socket) -> bool:
        connection.sendall(MAGIC + OPTIONS + struct.pack(">H", 3))
        _take(connection, 4)
        while True:
            _, option, length = struct.unpack(">8sII", _take(connection, 16))
            _take(connection, length)
            if option == GO:
                about = struct.pack(">HQH", 0, self._bytes, FLAGS)
                for kind, data in ((INFO, about), (ACK, b"")):
                    connection.sendall(struct.pack(">QIII", REPLY, option, kind, len(data)) + data)
                return True
            if option in (EXPORT_NAME, ABORT):
                return False
            connection.sendall(struct.pack(">QIII", REPLY, option, UNSUPPORTED, 0))

    def _obey(self, connection: socket.socket) -> bool:
        _, _, command, cookie, offset, length = REQUEST.unpack(_take(connection, REQUEST.size))
        if command == WRITE:
            _take(connection, length)
        if command == DISCONNECT:
            return False
        if self._answer(command, offset) is Answer.DEAF:
            connection.shutdown(socket.SHUT_RD)
            self.is_deaf = True
            self._end.wait()
            return False
        data = bytes(length) if command == READ else b""
        connection.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + data)
        return True


def _take(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data
