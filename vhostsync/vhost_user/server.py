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
from typing import Any, Final

import anyio
import structlog
from anyio.abc import TaskGroup

from ..errors import EngineError, FrontendError
from ..events import FRONTEND_CONNECTED, FRONTEND_DISCONNECTED
from ..virtio_blk import BlkDevice
from .attachment import Attachment
from .listener import Endpoint
from .owned_fd import close_all
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


class FrontendServer:
    """Serves one device to its frontends.

    `make_attachment` gives a new connection its attachment or raises EngineError (when cancelled, it undoes
    what it began); `publish` gets FRONTEND_CONNECTED and FRONTEND_DISCONNECTED (EventHub.publish fits).
    """

    def __init__(
        self, device: BlkDevice, make_attachment: Callable[[], Awaitable[Attachment]], publish: Publish
    ) -> None:
        self._device = device
        self._make_attachment = make_attachment
        self._publish = publish
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
        frontend = _Frontend(self._last_number, Connection(sock), session)
        self._frontends[frontend.number] = frontend
        tasks.start_soon(self._serve_one, frontend, _peer(sock))

    async def _serve_one(self, frontend: _Frontend, peer: dict[str, int]) -> None:
        """One connection from its first message to the end of its last request. Raises nothing: a fault in
        the handling of one frontend must not stop the others' disk."""
        number = frontend.number
        log.info("frontend connected", frontend=number, **peer)
        self._publish(FRONTEND_CONNECTED, {"frontend": number, **peer})
        reason: str | None = "the backend stops"  # what it is when nothing below says otherwise
        try:
            with frontend.scope:
                try:
                    frontend.attachment = await self._make_attachment()
                    await self._converse(frontend, frontend.attachment)
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

    async def _converse(self, frontend: _Frontend, attachment: Attachment) -> None:
        """Messages in order, the next one only when the one before is dealt with, until there are no more."""
        connection, session = frontend.connection, frontend.session
        while (received := await connection.receive()) is not None:
            message, fds = received
            log.debug("received", frontend=frontend.number, what=message, fds=len(fds))
            try:
                outcome = await session.handle(message, fds, attachment)
            finally:
                close_all(fds)
            if outcome.refusal is not None:
                log.warning("frontend refused", frontend=frontend.number, reason=outcome.refusal)
            if outcome.reply is not None:
                await connection.send(outcome.reply, outcome.share)


def _peer(sock: socket.socket) -> dict[str, int]:
    """Who is at the other end: {"pid", "uid"}, for logs and events."""
    pid, uid, _ = _PEER_CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    )
    return {"pid": pid, "uid": uid}
