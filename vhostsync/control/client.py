# SPDX-License-Identifier: Apache-2.0
"""A small QMP client for the command line: one task, one request at a time, events kept until they are
asked for."""

import errno
import json
import math
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.lowlevel

from ..errors import ControlError, UnreachableError
from ..host import peer
from . import qmp, sockets
from .found_socket import Control, FoundSocket, connect_to

LINE_BYTES_MAX: Final = 16 * 1024 * 1024
EVENTS_MAX: Final = 1024
CONNECT_S: Final = 10.0
RATION_BYTES: Final = 1024 * 1024
"""What is read of a backend that is asked once: the figures of 64 queues have 400 KiB at most."""
LEAST_BYTES: Final = 1024
"""As so many counts whatever is read at once, and each message: short ones cost no less time."""
SHOWN_MAX: Final = 2000
"""Of what a backend says, in a sentence of ours."""


class RefusedError(ControlError):
    """The backend answered with an error; the message is its text. `kind` is QMP's class."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class LostError(UnreachableError):
    """It has answered, and is gone."""


class ControlClient:
    """A negotiated connection; `connect` makes one. `ration_bytes`: how much is read of it."""

    def __init__(self, connection: socket.socket, path: Path, ration_bytes: float = math.inf) -> None:
        self._connection = connection
        self._path = path
        self._ration_bytes = ration_bytes
        self._buffer = bytearray()
        self._events: deque[Mapping[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._next_id = 1
        self.greeting: Mapping[str, Any] = {}

    @property
    def process(self) -> int:
        """The backend's, 0 where it is in a namespace of its own."""
        return peer.peer_process(self._connection)

    @property
    def user(self) -> int:
        """The backend's."""
        return peer.peer_uid(self._connection)

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What the command returns. RefusedError, UnreachableError, ControlError. Not to be used again when
        cancelled."""
        identity, self._next_id = self._next_id, self._next_id + 1
        request: dict[str, Any] = {"execute": command, "id": identity}
        if arguments:
            request["arguments"] = dict(arguments)
        line = json.dumps(request).encode("ascii") + b"\n"
        if len(line) > qmp.MESSAGE_BYTES_MAX:
            raise ControlError(f"The arguments of {command} are too long.")
        try:
            await sockets.send_all(self._connection, line)
        except OSError as error:
            raise self._lost() from error
        return await self._answer(identity)

    async def _answer(self, identity: int) -> Any:
        """To that request, which was sent."""
        while True:
            message = await self._read()
            if "event" in message:
                self._events.append(message)
            elif message.get("id") == identity and "return" in message:
                return message["return"]
            elif message.get("id") == identity and isinstance(message.get("error"), dict):
                refusal = message["error"]
                raise RefusedError(
                    _shown(refusal.get("desc", "?")), str(refusal.get("class", qmp.GENERIC_ERROR))
                )
            else:
                raise ControlError(
                    f"The backend at {self._path} answered with what is no reply: {_shown(message)}."
                )

    async def ask_at_once(self, *commands: str) -> list[Any]:
        """Before it was greeted: what each of these returns, or its RefusedError. All is sent at once, so the
        other side, which is woken for the connection, may find it there."""
        wanted = (qmp.CAPABILITIES, *commands)
        lines = (json.dumps({"execute": each, "id": at}) + "\n" for at, each in enumerate(wanted, start=1))
        try:
            await sockets.send_all(self._connection, "".join(lines).encode("ascii"))
        except OSError as error:
            raise self._lost() from error
        await self._be_greeted()
        await self._answer(1)
        answers: list[Any] = []
        for at in range(2, 2 + len(commands)):
            try:
                answers.append(await self._answer(at))
            except RefusedError as refused:
                answers.append(refused)
        return answers

    async def next_event(self) -> Mapping[str, Any]:
        """The next event ("event", "data", "timestamp"). Loses nothing when cancelled."""
        while not self._events:
            message = await self._read()
            if "event" not in message:
                raise ControlError(f"The backend at {self._path} sent a reply that nobody asked for.")
            self._events.append(message)
        return self._events.popleft()

    async def execute_to_the_end(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Execute what ends the backend, and wait until its process is over (it lets go of its control socket
        before that) or, where the kernel does not show the process, until the connection is closed."""
        process = peer.peer_process(self._connection)
        try:
            watched = os.pidfd_open(process) if process not in (0, os.getpid()) else None
        except OSError:
            watched = None
        try:
            await self.execute(command, arguments)
            try:
                while True:
                    await self.next_event()
            except UnreachableError:
                if watched is not None:
                    await anyio.wait_readable(watched)
        finally:
            if watched is not None:
                os.close(watched)

    async def _be_greeted(self) -> None:
        self.greeting = await self._read()
        if "QMP" not in self.greeting:
            raise ControlError(f"{self._path} is no control socket: its greeting is {_shown(self.greeting)}.")

    async def _read(self) -> dict[str, Any]:
        """The next message. The bytes of one that is not complete stay in the buffer. Of a backend that sends
        faster than it is read nobody would wait, and nothing else of this process would get its turn."""
        seen = 0
        while (end := self._buffer.find(b"\n", seen)) < 0:
            seen = len(self._buffer)
            if len(self._buffer) > LINE_BYTES_MAX:
                raise ControlError(f"{self._path} is no control socket: it sends lines without an end.")
            try:
                data = await sockets.receive(self._connection)
            except OSError as error:
                raise self._lost() from error
            if not data:
                raise self._lost()
            self._spend(len(data))
            self._buffer += data
            if len(data) == sockets.READ_BYTES:
                await anyio.lowlevel.checkpoint()
        self._spend(0)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ControlError(f"{self._path} is no control socket: it sends what is no JSON.") from error
        if not isinstance(message, dict):
            raise ControlError(f"{self._path} is no control socket: it sends what is no JSON object.")
        return message

    def _spend(self, read_bytes: int) -> None:
        """ControlError where that was too much: it sends on and on, and is no backend that could be asked."""
        self._ration_bytes -= max(read_bytes, LEAST_BYTES)
        if self._ration_bytes < 0:
            raise ControlError(f"The backend at {self._path} sends without an end, and no answer.")

    def _lost(self) -> LostError:
        return LostError(
            f"The backend at {self._path} closed the connection; it ended, or this user may not control it."
        )


def may_come_back(control: Control, error: ControlError) -> bool:
    """Whether a process that held the record's lock has ended in order, it seems: then another one may go on
    in its place. Who only asks may ask again; a command was meant for the one that was there."""
    gone = isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError)
    ends = isinstance(error, LostError) or (isinstance(error, RefusedError) and str(error) == qmp.GOING_DOWN)
    return (gone or ends) and isinstance(control, FoundSocket) and control.lock is not None


@asynccontextmanager
async def connect(control: Control, patience_s: float = CONNECT_S) -> AsyncIterator[ControlClient]:
    """A client of that control socket. UnreachableError where nobody answers, in `patience_s`."""
    path = Path(control)
    try:
        with anyio.fail_after(patience_s):
            connection, control = await connect_to(control)
    except OSError as error:  # also TimeoutError
        raise UnreachableError(_why(Path(error.filename or path), error)) from error
    path = Path(control)
    with connection:
        client = ControlClient(connection, path)
        try:
            with anyio.fail_after(patience_s):
                await client._be_greeted()
                await client.execute(qmp.CAPABILITIES)
        except TimeoutError as error:
            raise UnreachableError(f"The backend at {path} does not answer.") from error
        yield client


async def ask_once(control: Control, *commands: str) -> list[Any]:
    """What each of them returns, or its RefusedError. Errors as of `ask_found`."""
    return (await ask_found(control, *commands))[1]


async def ask_found(control: Control, *commands: str) -> tuple[Control, list[Any]]:
    """Where it was asked, and what each of the commands returns, or its RefusedError, by a connection of
    their own. All are sent together, so the backend is woken as seldom as can be: this is for who asks many
    of them. So of one that was taken over by its guest no more than RATION_BYTES is read. UnreachableError,
    ControlError. Waits for as long as the caller lets it."""
    path = Path(control)
    try:
        connection, control = await connect_to(control)
    except OSError as error:
        raise UnreachableError(_why(Path(error.filename or path), error)) from error
    with connection:
        client = ControlClient(connection, Path(control), RATION_BYTES)
        return control, await client.ask_at_once(*commands)


def _shown(said: Any) -> str:
    text = str(said)
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}…"


def _why(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"There is no control socket {path}; is the backend running, and is that its --control?"
    if error.errno == errno.ECONNREFUSED and not path.is_socket():
        return f"{path} is no socket; name the one that `serve` has made (its socket's path and .control)."
    if error.errno == errno.ECONNREFUSED:
        return f"Nobody listens on {path}; the backend that made it has ended."
    if isinstance(error, PermissionError):
        return f"No permission to connect to {path}; be the user that the backend runs as, or root."
    if isinstance(error, TimeoutError):
        return f"The backend at {path} does not answer."
    return f"Cannot connect to {path}: {error.strerror or error}."
