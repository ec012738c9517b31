# SPDX-License-Identifier: Apache-2.0
"""A small blocking QMP client: one for QEMU, for qemu-storage-daemon and for vhostsync alike.

The control socket has its own tests with the public client (qemu.qmp); this one is for tests about
something else."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any


class QmpError(Exception):
    """The server answered with an error; the message is its sentence."""


class Qmp:
    """One connection. Events that arrive while something else is awaited are kept, in order, for
    `wait_event`."""

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(str(path))
            self._file = self._socket.makefile("rb")
            self.greeting = self._receive()
        except BaseException:
            self._socket.close()
            raise
        self.events: deque[dict[str, Any]] = deque()
        self.execute("qmp_capabilities")

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def process(self) -> int:
        """Who listens there."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], "little")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _receive(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise ConnectionError("the control socket was closed")
        message: dict[str, Any] = json.loads(line)
        return message

    def send(self, command: str, arguments: Mapping[str, Any]) -> None:
        """A command whose answer nobody waits for, if nothing else is executed afterwards."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = dict(arguments)
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def execute(self, command: str, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """Run a command and return its result; underscores in argument names stand for dashes. Raises
        QmpError."""
        given = {name.rstrip("_").replace("_", "-"): value for name, value in arguments.items()}
        return self.execute_as_given(command, given, timeout_s)

    def execute_as_given(
        self, command: str, arguments: Mapping[str, Any], timeout_s: float = 60.0
    ) -> Any:
        """The same with names as they stand."""
        self._socket.settimeout(timeout_s)
        self.send(command, arguments)
        while True:
            message = self._receive()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(f"{command}: {message['error'].get('desc')}")
            elif "return" in message:
                return message["return"]

    def wait_closed(self, timeout_s: float = 60.0) -> None:
        """Until the backend has closed the connection."""
        self._socket.settimeout(timeout_s)
        with suppress(ConnectionError):
            while True:
                self.events.append(self._receive())

    def wait_event(self, name: str, timeout_s: float = 60.0, **wanted: Any) -> dict[str, Any]:
        """The data of the next event of that name whose data has these values; earlier events are dropped."""
        deadline = time.monotonic() + timeout_s
        while True:
            while self.events:
                event = self.events.popleft()
                data: dict[str, Any] = event.get("data", {})
                if event["event"] == name and all(data.get(key) == value for key, value in wanted.items()):
                    return data
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            message = self._receive()
            if "event" in message:
                self.events.append(message)
