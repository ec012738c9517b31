# SPDX-License-Identifier: Apache-2.0
"""A server of disks in memory, reached by a Unix socket: to a backend they are disks of another machine.

One connection at a time owns a disk; another one is told that it is taken. An owner's requests are carried
out one after the other, and the next one may own the disk only once all of them are over, so nothing lands
late. A disk can be worse than that: it may forget what was not flushed when its owner's connection is lost
(`forgets`), let the next owner in while requests of the lost one are still to be carried out (`hasty`), and
keep writes back until it is told to go on (`keep_back`). The words of a connection are one line of JSON each
way; an owner's requests are those of c_shim/testing/served_disk.c."""

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
    forgets: bool = False
    hasty: bool = False
    durable: bytearray = field(init=False)
    kept_back: int = 0  # writes that were read and are not carried out
    late: int = 0  # of these, those that were carried out after their connection was lost

    def __post_init__(self) -> None:
        self.durable = bytearray(self.content)
        self._go_on = threading.Event()
        self._go_on.set()
        self._ended = False

    def keep_back(self) -> None:
        """From here on writes are read and wait."""
        self._go_on.clear()

    def let_go(self) -> None:
        self._go_on.set()

    def end_process(self) -> None:
        """Whatever waits is never carried out: the process that had it is gone."""
        self._ended = True
        self._go_on.set()

    def begin_process(self) -> None:
        self._ended = False

    def forget(self) -> None:
        """What was not flushed, as a process does that begins anew."""
        if self.forgets:
            self.content[:] = self.durable + bytes(len(self.content) - len(self.durable))

    def await_turn(self) -> bool:
        """Of a write; False: it is never carried out."""
        if self._go_on.is_set():
            return True
        self.kept_back += 1
        self._go_on.wait()
        self.kept_back -= 1
        return not self._ended


class DiskServer:
    """A context manager; runs in threads of this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.disks: dict[str, HeldDisk] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # an owner has left
        self._owners: dict[socket.socket, HeldDisk] = {}
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
        for held in self.disks.values():
            held.let_go()
        self.cut_off()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def cut_off(self) -> None:
        """Every connection there is."""
        with self._lock:
            for connection in self._connections:
                connection.shutdown(socket.SHUT_RDWR)
            for held in self.disks.values():
                held.forget()

    def kill(self, held: HeldDisk) -> None:
        """The process that serves the disk, and its connection; one that begins at once takes its place."""
        held.end_process()
        with self._lock:
            owners = [connection for connection, owned in self._owners.items() if owned is held]
            for connection in owners:
                connection.shutdown(socket.SHUT_RDWR)
        with self._idle:
            self._idle.wait_for(lambda: not any(owner in self._owners for owner in owners))
            held.forget()
        held.begin_process()

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
        try:
            with connection.makefile("rwb") as file:
                words = json.loads(file.readline())
                answer, held = self._answer(words, connection)
                file.write(json.dumps(answer).encode() + b"\n")
                file.flush()
                while held is not None and (head := file.read(QUESTION.size)):
                    self._carry_out(held, connection, file, *QUESTION.unpack(head))
                    file.flush()
        except (OSError, ValueError, struct.error):
            pass  # it was cut off
        with self._idle:
            self._connections.remove(connection)
            if held is not None:
                del self._owners[connection]
                held.owned = held in self._owners.values()
            self._idle.notify_all()
        connection.close()

    def _answer(
        self, words: dict[str, Any], connection: socket.socket
    ) -> tuple[dict[str, Any], HeldDisk | None]:
        """And the disk that the connection owns from here on."""
        name, wish = words["name"], words["wish"]
        if wish == "kill":
            self.kill(self.disks[name])
            return {"token": self.disks[name].token}, None
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
            taken = held.owned and not held.hasty
            shown = {"token": held.token, "bytes": len(held.content), "owned": taken}
            if wish != "own" or taken:
                return shown, None
            held.owned = True
            self._owners[connection] = held
            return shown, held

    def _carry_out(
        self, held: HeldDisk, connection: socket.socket, file: Any,
        kind: int, _: int, offset: int, length: int,
    ) -> None:  # fmt: skip
        data = file.read(length) if kind == DiskOp.WRITE else bytes(length)
        result = -errno.EIO if held.fails and kind != DiskOp.READ else 0
        answer, found = ANSWER.pack(result, 0, len(held.content)), b""
        if kind == DiskOp.READ:
            found = bytes(held.content[offset : offset + length])
        elif kind in (DiskOp.WRITE, DiskOp.ZERO) and result == 0:
            if not held.await_turn():
                raise ConnectionResetError
            held.content[offset : offset + length] = data
            held.late += _is_lost(connection)
        elif kind == DiskOp.FLUSH:
            held.flushes += 1
            held.durable = bytearray(held.content)
        else:
            assert kind == Errand.SIZE or result
        file.write(answer + found)


def _is_lost(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
