# SPDX-License-Identifier: Apache-2.0
"""A server of disks in memory, reached by a Unix socket: to a backend they are disks of another machine.

One connection at a time owns a disk; another one is told that it is taken. An owner's requests are carried
out one after the other, and the next one may own the disk only once all of them are over, so nothing lands
late. The words of a connection are one line of JSON each way; an owner's requests are those of
c_shim/testing/served_disk.c."""

from __future__ import annotations

import errno
import json
import secrets
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.engine_driver import DiskOp, Errand

QUESTION = struct.Struct("=IIQQ")
ANSWER = struct.Struct("=iIQ")


@dataclass
class HeldDisk:
    """A disk; `token` is its own for good, whatever it is called."""

    content: bytearray
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    owned: bool = False
    fails: bool = False  # writes
    flushes: int = 0


class DiskServer:
    """A context manager; runs in threads of this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.disks: dict[str, HeldDisk] = {}
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut_off()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def cut_off(self) -> None:
        """Every connection there is."""
        with self._lock:
            for connection in self._connections:
                connection.shutdown(socket.SHUT_RDWR)

    def _start(self, run: Any, *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=run, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # the end
            with self._lock:
                self._connections.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        held = None
        with connection.makefile("rwb") as file:
            try:
                words = json.loads(file.readline())
                answer, held = self._answer(words)
                file.write(json.dumps(answer).encode() + b"\n")
                file.flush()
                while held is not None and (head := file.read(QUESTION.size)):
                    self._carry_out(held, file, *QUESTION.unpack(head))
                    file.flush()
            except (OSError, ValueError, struct.error):
                pass  # it was cut off
        with self._lock:
            self._connections.remove(connection)
            if held is not None:
                held.owned = False
        connection.close()

    def _answer(self, words: dict[str, Any]) -> tuple[dict[str, Any], HeldDisk | None]:
        """And the disk that the connection owns from here on."""
        name, wish = words["name"], words["wish"]
        with self._lock:
            if wish == "create" and name not in self.disks:
                self.disks[name] = HeldDisk(bytearray(words["bytes"]))
                return {"token": self.disks[name].token}, None
            if wish == "create":
                return {"error": "exists"}, None
            held = self.disks.get(name)
            if held is None:
                return {"error": "missing"}, None
            if wish == "remove" and held.token == words["token"] and not held.owned:
                del self.disks[name]
            shown = {"token": held.token, "bytes": len(held.content), "owned": held.owned}
            if wish != "own" or held.owned:
                return shown, None
            held.owned = True
            return shown, held

    def _carry_out(self, held: HeldDisk, file: Any, kind: int, _: int, offset: int, length: int) -> None:
        data = file.read(length) if kind == DiskOp.WRITE else bytes(length)
        result = -errno.EIO if held.fails and kind != DiskOp.READ else 0
        answer, found = ANSWER.pack(result, 0, len(held.content)), b""
        if kind == DiskOp.READ:
            found = bytes(held.content[offset : offset + length])
        elif kind in (DiskOp.WRITE, DiskOp.ZERO) and result == 0:
            held.content[offset : offset + length] = data
        elif kind == DiskOp.FLUSH:
            held.flushes += 1
        else:
            assert kind == Errand.SIZE or result
        file.write(answer + found)
