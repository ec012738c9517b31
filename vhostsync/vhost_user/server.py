# SPDX-License-Identifier: Apache-2.0
"""Frontends' connections: each has a session, an attachment and a task; none can harm another.

Several frontends may be connected at once (during a local live migration the incoming QEMU negotiates while
the outgoing one still runs); which of them may run rings is the engine's business. The end of a connection,
whatever its reason, first closes its attachment, which waits for its last request, then its socket.
"""

import errno
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import anyio
import structlog
from anyio.abc import TaskGroup

from vhostsync.vhost_user.virtio_blk import BlkDevice

from ..errors import EngineError, FrontendError
from ..events import FRONTEND_CONNECTED, FRONTEND_DISCONNECTED
from .attachment import Attachment
from .foreign_fd import close_foreign
from .listener import Endpoint
from .messages import Request
from .ring_watch import Look, RingsSeen, watch_rings
from .session import Session
from .transport import BackendChannel, Connection

ATTACHMENTS_MAX: Final = 8
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ACCEPT_PAUSE_S: Final = 0.5
_PEER_CREDENTIALS: Final = struct.Struct("=iII")

log = structlog.get_logger()

Publish = Callable[[str, Mapping[str, Any]], None]


@dataclass
class _Frontend:
    """One connection. `reason` says why it is being ended from this side."""

    number: int
    connection: Connection
    session: Session
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    attachment: Attachment | None = None
    reason: str | None = None
    peer: Mapping[str, int] = field(default_factory=dict)
    before: RingsSeen | None = None  # the rings before it has started any
    rings_since: str | None = None  # when the first of its rings was started and enabled, ISO; None: none is
    watch: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class FrontendServer:
    """Serves one device to its frontends.

    `make_attachment` gives a new connection its attachment or raises EngineError (when cancelled, it undoes
    what it began); `publish` gets FRONTEND_CONNECTED and FRONTEND_DISCONNECTED (EventHub.publish fits);
    `look` tells of the rings (without it nobody watches them).
    """

    def __init__(
        self,
        device: BlkDevice,
        make_attachment: Callable[[], Awaitable[Attachment]],
        publish: Publish,
        look: Look | None = None,
    ) -> None:
        self._device = device
        self._make_attachment = make_attachment
        self._publish = publish
        self._look = look
        self._frontends: dict[int, _Frontend] = {}
        self._last_number = 0

    @property
    def frontends(self) -> int:
        """How many are connected (or still have requests under way)."""
        return len(self._frontends)

    @property
    def active(self) -> bool:
        """Whether any frontend has a started ring."""
        return any(one.started for each in self._frontends.values() for one in each.session.state.rings)

    def number_of(self, attachment: Attachment | None) -> int | None:
        """The frontend of this attachment."""
        numbers = (each.number for each in self._frontends.values() if each.attachment is attachment)
        return next(numbers, None) if attachment is not None else None

    def waiting(self, active: Attachment | None) -> list[dict[str, Any]]:
        """The frontends that have started rings and wait until `active` has stopped its own."""
        return [
            {"frontend": each.number, **each.peer, "since": each.rings_since}
            for each in self._frontends.values()
            if each.rings_since is not None and active is not None and each.attachment is not active
        ]

    async def serve(self, endpoint: Endpoint) -> None:
        """Serve until cancelled; with a connection instead of a listening socket, until that frontend goes.

        When this returns or is cancelled, every attachment has been closed. The endpoint is the caller's to
        close (a connection is closed already).
        """
        async with anyio.create_task_group() as tasks:
            if endpoint.listening:
                await self._accept(endpoint.sock, tasks)
            else:
                self._start(endpoint.sock, tasks)

    def config_changed(self) -> None:
        """The config space changed: tell every frontend that can be told."""
        for frontend in self._frontends.values():
            frontend.session.config_changed()

    def disconnect(self, attachment: Attachment, reason: str) -> None:
        """End the connection of this attachment (the engine lost its memory, for example), if there still is
        one."""
        for frontend in self._frontends.values():
            if frontend.attachment is attachment:
                frontend.reason = reason
                frontend.scope.cancel()

    async def _accept(self, listener: socket.socket, tasks: TaskGroup) -> None:
        while True:
            await anyio.wait_readable(listener)
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                log.warning("accepting a frontend failed", error=error.strerror)
                if error.errno in _OUT_OF_DESCRIPTORS:  # it stays readable: do not spin
                    await anyio.sleep(_ACCEPT_PAUSE_S)
                continue
            self._start(sock, tasks)

    def _start(self, sock: socket.socket, tasks: TaskGroup) -> None:
        """Give the connection a task. Owns `sock`."""
        self._last_number += 1
        if len(self._frontends) >= ATTACHMENTS_MAX:
            log.warning(
                "frontend refused: too many are connected", frontend=self._last_number, limit=ATTACHMENTS_MAX
            )
            sock.close()
            return
        session = Session(self._device, BackendChannel)
        frontend = _Frontend(self._last_number, Connection(sock), session, peer=_peer(sock))
        self._frontends[frontend.number] = frontend
        tasks.start_soon(self._serve_one, frontend, tasks)

    async def _serve_one(self, frontend: _Frontend, tasks: TaskGroup) -> None:
        """One connection from its first message to the end of its last request. Raises nothing: a fault in
        the handling of one frontend must not stop the others' disk."""
        number = frontend.number
        log.info("frontend connected", frontend=number, **frontend.peer)
        self._publish(FRONTEND_CONNECTED, {"frontend": number, **frontend.peer})
        reason: str | None = "the backend stops"  # what it is when nothing below says otherwise
        try:
            with frontend.scope:
                try:
                    frontend.attachment = await self._make_attachment()
                    await self._converse(frontend, frontend.attachment, tasks)
                    reason = None
                except (FrontendError, EngineError) as error:
                    reason = str(error)
            if frontend.scope.cancelled_caught:
                reason = frontend.reason
        except Exception as error:
            reason = f"a fault in the backend: {error!r}"
            log.exception("a fault in the handling of a frontend", frontend=number)
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(frontend, reason)

    async def _end(self, frontend: _Frontend, reason: str | None) -> None:
        # First the requests, then the connection: a frontend that sees it end takes up at the used index,
        # and what were answered after that would be answered twice.
        frontend.watch.cancel()
        try:
            if frontend.attachment is not None:
                await frontend.attachment.close()
        except EngineError as error:
            log.error("detaching a frontend failed", frontend=frontend.number, error=str(error))
        except Exception:
            log.exception("a fault in detaching a frontend", frontend=frontend.number)
        frontend.session.close()
        frontend.connection.close()
        del self._frontends[frontend.number]
        if reason is None:
            log.info("frontend disconnected", frontend=frontend.number)
        else:
            log.warning("frontend's connection ended", frontend=frontend.number, reason=reason)
        self._publish(FRONTEND_DISCONNECTED, {"frontend": frontend.number, "reason": reason})

    async def _converse(self, frontend: _Frontend, attachment: Attachment, tasks: TaskGroup) -> None:
        """Messages in order, the next one only when the one before is dealt with, until there are no more."""
        connection, session = frontend.connection, frontend.session
        while (received := await connection.receive()) is not None:
            message, fds = received
            log.debug("received", frontend=frontend.number, what=message, fds=len(fds))
            try:
                if message.request is Request.SET_VRING_KICK and frontend.before is None and self._look:
                    frontend.before = await self._look()
                outcome = await session.handle(message, fds, attachment)
            finally:
                close_foreign(fds)
            self._note_rings(frontend, attachment, tasks)
            if outcome.refusal is not None:
                log.warning("frontend refused", frontend=frontend.number, reason=outcome.refusal)
            if outcome.reply is not None:
                await connection.send(outcome.reply, outcome.share)


    def _note_rings(self, frontend: _Frontend, attachment: Attachment, tasks: TaskGroup) -> None:
        """Watch the rings from when the first of them should run until none should."""
        should_run = any(ring.running for ring in frontend.session.state.rings)
        if should_run == (frontend.rings_since is not None):
            return
        if not should_run:
            frontend.watch.cancel()
            frontend.rings_since = frontend.before = None
            return
        frontend.rings_since = datetime.now(UTC).isoformat(timespec="seconds")
        frontend.watch = anyio.CancelScope()
        if self._look is not None and frontend.before is not None:
            tasks.start_soon(self._watch, frontend, attachment, frontend.before, self._look, frontend.watch)

    async def _watch(
        self,
        frontend: _Frontend,
        attachment: Attachment,
        before: RingsSeen,
        look: Look,
        scope: anyio.CancelScope,
    ) -> None:
        with scope:
            await watch_rings(frontend.number, attachment, before, look, self.number_of)


def _peer(sock: socket.socket) -> dict[str, int]:
    """Who is at the other end: {"pid", "uid"}, for logs and events."""
    pid, uid, _ = _PEER_CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    )
    return {"pid": pid, "uid": uid}
