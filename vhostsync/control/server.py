# SPDX-License-Identifier: Apache-2.0
"""The control socket's server: a unix socket, several clients, none of which can hold up another.

Each client has three tasks: one reads requests, one carries them out in order (as QEMU does), one forwards
events. They share a lock for writing. What can pile up for a client is bounded: requests by REQUESTS_MAX
(then its socket is read no further), events by its buffer in the EventHub (then the oldest are lost, and it
is told how many). A client that takes nothing for SEND_TIMEOUT_S is disconnected.

A command runs in the server's task group and not in its client's: a client that goes away in the middle of
a `switch` does not cancel it. What several commands of a client do together (the steps of a group) ends with
its last command. A client that closes its sending side still gets the answers to what it had
sent.

When the server is cancelled, replies and events that are already there are still sent, for CLOSING_S at most.
"""

import os
import select
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import structlog
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from vhostsync.host import peer
from vhostsync.host.unix_socket import bind_unix_socket

from ..events import EVENTS_LOST, Event, EventHub, Subscription
from . import qmp, sockets
from .command import Dispatcher, dashed

log = structlog.get_logger(__name__)

CLIENTS_MAX: Final = 32
REQUESTS_MAX: Final = 8
SEND_TIMEOUT_S: Final = 30.0
CLOSING_S: Final = 1.0


async def serve_control(
    path: Path,
    events: EventHub,
    dispatcher: Dispatcher,
    *,
    task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control socket at `path` until cancelled; `task_status` tells when it can be connected to.
    ConfigError."""
    bound = await anyio.to_thread.run_sync(bind_unix_socket, path)
    try:
        log.info("control socket ready", path=str(path))
        task_status.started()
        await ControlServer(events, dispatcher).run(bound.listener)
    finally:
        bound.close()


class ControlServer:
    """The clients of one listening socket."""

    def __init__(self, events: EventHub, dispatcher: Dispatcher) -> None:
        self._events = events
        self._dispatcher = dispatcher
        self._clients: set[_Client] = set()
        self.closing = False

    async def run(self, listener: socket.socket) -> None:
        """Accept clients until cancelled."""
        async with anyio.create_task_group() as tasks:
            try:
                while True:
                    connection = await sockets.accept(listener)
                    if self._welcome(connection):
                        client = _Client(connection, self)
                        self._clients.add(client)
                        tasks.start_soon(self._serve, client, tasks)
                    else:
                        connection.close()
            finally:
                self.closing = True
                for client in self._clients:
                    client.hurry()

    def _welcome(self, connection: socket.socket) -> bool:
        uid = peer.peer_uid(connection)
        if uid not in (0, os.geteuid()):
            log.warning("control client refused: another user", uid=uid)
            return False
        if len(self._clients) >= CLIENTS_MAX:
            log.warning("control client refused: too many", clients=len(self._clients))
            return False
        return True

    async def _serve(self, client: "_Client", tasks: anyio.abc.TaskGroup) -> None:
        """One client, from greeting to goodbye."""
        put, take = anyio.create_memory_object_stream[qmp.Request | qmp.Reply](REQUESTS_MAX)
        finished = anyio.Event()
        tasks.start_soon(self._carry_out, client, take, finished)
        try:
            async with put:
                await client.send(qmp.greeting_line())
                async with anyio.create_task_group() as own:
                    own.start_soon(self._forward_events, client)
                    await client.read_into(put)
                    put.close()
                    await finished.wait()  # the client may have closed its sending side only
                    own.cancel_scope.cancel()
        except Exception:
            log.exception("a control client failed in a way that nobody foresaw")
        finally:
            with anyio.move_on_after(CLOSING_S, shield=True):
                await finished.wait()  # when the server ends: the last reply
            self._clients.discard(client)
            client.close()

    async def _carry_out(
        self,
        client: "_Client",
        requests: MemoryObjectReceiveStream[qmp.Request | qmp.Reply],
        finished: anyio.Event,
    ) -> None:
        """The client's requests, one after the other, also of a client that has gone meanwhile."""
        try:
            async with requests, self._dispatcher.conversation(client.is_there) as dispatcher:
                while (item := await _next(requests)) is not None:
                    if isinstance(item, qmp.Request):
                        await client.send(await self._execute(dispatcher, client, item))
                        continue
                    await client.send(item.line)
                    if item.negotiated:
                        client.negotiated.set()
        finally:
            finished.set()

    async def _execute(self, dispatcher: Dispatcher, client: "_Client", request: qmp.Request) -> bytes:
        try:
            return await dispatcher.execute(request)
        except anyio.get_cancelled_exc_class():
            done = request.command in ("quit", "hand-over")  # it ends the server, and with it this task
            await client.send(
                qmp.return_line({}, request.id)
                if done
                else qmp.error_line(qmp.GOING_DOWN, request.id)
            )
            raise

    async def _forward_events(self, client: "_Client") -> None:
        await client.negotiated.wait()
        async with self._events.subscribe() as events:
            try:
                async for event in events:
                    await client.send(_event_lines(event))
            finally:
                if self.closing:
                    await self._send_rest(client, events)

    async def _send_rest(self, client: "_Client", events: Subscription) -> None:
        """What was published before the server was told to end: SHUTDOWN, above all."""
        events.close()
        with anyio.CancelScope(shield=True):
            async for event in events:
                await client.send(_event_lines(event))


async def _next(
    requests: MemoryObjectReceiveStream[qmp.Request | qmp.Reply],
) -> qmp.Request | qmp.Reply | None:
    """None: there are no more. One that is there already is taken without a turn of the event loop."""
    try:
        return requests.receive_nowait()
    except anyio.WouldBlock:
        with suppress(anyio.EndOfStream):
            return await requests.receive()
    except anyio.EndOfStream:
        pass
    return None


def _event_lines(event: Event) -> bytes:
    lost = qmp.event_line(EVENTS_LOST, {"count": event.lost}, event.wall_ns) if event.lost else b""
    return lost + qmp.event_line(event.name, dashed(event.data), event.wall_ns)


class _Client:
    """A connection and the state of its conversation."""

    def __init__(self, connection: socket.socket, server: ControlServer) -> None:
        self._connection = connection
        self._server = server
        self._session = qmp.Session()
        self._writing = anyio.Lock()
        self._sending: anyio.CancelScope | None = None
        self._gone = False
        self.negotiated = anyio.Event()

    async def read_into(self, requests: "MemoryObjectSendStream[qmp.Request | qmp.Reply]") -> None:
        """Read until the client sends no more."""
        while not self._gone:
            try:
                data = await sockets.receive(self._connection)
            except OSError:
                self.leave()
                return
            if not data:
                return
            for item in self._session.receive(data):
                try:
                    requests.send_nowait(item)
                except anyio.WouldBlock:
                    await requests.send(item)
            if len(data) == sockets.READ_BYTES:  # it may send faster than is read, and no request
                await anyio.lowlevel.checkpoint()

    async def send(self, data: bytes) -> None:
        """Send all of `data`, or find that the client is gone. Not cancelled half-way: a half line would
        spoil the next. Nearly always there is room for it, and nobody waits."""
        if not self._gone and not self._writing.locked():
            data = data[self._send_now(data) :]
        if self._gone or not data:
            return
        with anyio.CancelScope(shield=True) as scope:
            scope.deadline = anyio.current_time() + (CLOSING_S if self._server.closing else SEND_TIMEOUT_S)
            async with self._writing:
                self._sending = scope
                try:
                    if not self._gone:
                        await sockets.send_all(self._connection, data)
                except OSError:
                    self.leave()
                finally:
                    self._sending = None
        if scope.cancelled_caught and not self._gone:
            log.warning("control client disconnected: it takes nothing", seconds=SEND_TIMEOUT_S)
            self.leave()

    def _send_now(self, data: bytes) -> int:
        """How much of it there was room for."""
        try:
            return self._connection.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self.leave()
            return 0

    def hurry(self) -> None:
        """The server ends: what is being sent now has CLOSING_S left."""
        if self._sending is not None:
            self._sending.deadline = min(self._sending.deadline, anyio.current_time() + CLOSING_S)

    def leave(self) -> None:
        """Nothing more can be sent or read; wakes the task that reads."""
        self._gone = True
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def is_there(self) -> bool:
        """It has not closed its sending side. Asked of the kernel: what it had sent may not be read yet."""
        if self._gone:
            return False
        asked = select.poll()
        asked.register(self._connection, select.POLLRDHUP)
        return not asked.poll(0)

    def close(self) -> None:
        """Give the descriptor back."""
        self._gone = True
        anyio.notify_closing(self._connection)
        self._connection.close()
