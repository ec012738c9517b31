# SPDX-License-Identifier: Apache-2.0
"""Frontends' connections: each has a session, an attachment and a task; none can harm another.

Several frontends may be connected at once (during a local live migration the incoming QEMU negotiates while
the outgoing one still runs); which of them may run rings is the engine's business. The end of a connection,
whatever its reason, first closes its attachment, which waits for its last request, then its socket.
"""

import errno
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
from .heritage import Heritage
from .listener import Endpoint
from .messages import Request
from .ring_watch import Look, RingsSeen, watch_rings
from .session import Session
from .transport import BackendChannel, Connection

ATTACHMENTS_MAX: Final = 8
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NOT_OVER: Final = frozenset({errno.ETIMEDOUT, errno.EINVAL})  # none waits any longer, or a renewal did
_ACCEPT_PAUSE_S: Final = 0.5
_PEER_CREDENTIALS: Final = struct.Struct("=iII")

HANDED_OVER: Final = "its connection was handed over to the backend's successor"

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
    inherited: Heritage | None = None  # what it has said to the predecessor
    left: Heritage | None = None  # for the successor
    ended: anyio.Event = field(default_factory=anyio.Event)

    def keep_from_successor(self) -> None:
        """Nobody knows what becomes of its requests: it is to connect again."""
        if self.left is not None:
            self.left.close()
            self.left = None


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
        self._accepting = anyio.CancelScope()

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

    @property
    def migrates(self) -> bool:
        """A frontend has a dirty log: its guest is being moved to another host, or another process."""
        return any(each.session.told.logs for each in self._frontends.values())

    async def release(self) -> list[Heritage]:
        """For a successor, while `serve` runs: accept nobody any more, and let go of every frontend between
        two of its messages, its requests answered, its rings stopped and its connection open."""
        self._accepting.cancel()
        leaving = list(self._frontends.values())
        for frontend in leaving:
            frontend.connection.stop_between_messages()
        for frontend in leaving:
            await frontend.ended.wait()
        return [frontend.left for frontend in leaving if frontend.left is not None]

    async def serve(self, endpoint: Endpoint | None, inherited: Sequence[Heritage] = ()) -> None:
        """Serve until cancelled; with a connection instead of a listening socket, until that frontend goes.
        `inherited`: the predecessor's frontends, which this goes on with; with no endpoint they alone.

        When this returns or is cancelled, every attachment has been closed. The endpoint is the caller's to
        close (a connection is closed already).
        """
        async with anyio.create_task_group() as tasks:
            for each in inherited:
                self._start(each.connection, tasks, each)
            if endpoint is not None and endpoint.listening:
                with self._accepting:
                    await self._accept(endpoint.sock, tasks)
            elif endpoint is not None:
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

    def _start(self, sock: socket.socket, tasks: TaskGroup, inherited: Heritage | None = None) -> None:
        """Give the connection a task. Owns `sock`."""
        self._last_number += 1
        if len(self._frontends) >= ATTACHMENTS_MAX:
            log.warning(
                "frontend refused: too many are connected", frontend=self._last_number, limit=ATTACHMENTS_MAX
            )
            sock.close()
            return
        session = Session(self._device, BackendChannel)
        frontend = _Frontend(
            self._last_number, Connection(sock), session, peer=_peer(sock), inherited=inherited
        )
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
                    if frontend.inherited is not None:
                        await self._take_over(frontend, frontend.attachment, frontend.inherited, tasks)
                    await self._converse(frontend, frontend.attachment, tasks)
                    reason = None
                    if frontend.connection.stopped:
                        frontend.left = await self._leave(frontend, frontend.attachment)
                        reason = HANDED_OVER
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
        # and what were answered after that would be answered twice. So where they may not be over, it ends
        # with the process, whose end in the kernel waits for what a disk of this host still has of them.
        frontend.watch.cancel()
        over = True
        try:
            if frontend.attachment is not None:
                await frontend.attachment.close()
        except EngineError as error:
            over = error.errno not in _NOT_OVER
            frontend.keep_from_successor()
            log.error("detaching a frontend failed", frontend=frontend.number, error=str(error))
        except Exception:
            frontend.keep_from_successor()
            log.exception("a fault in detaching a frontend", frontend=frontend.number)
        frontend.session.close()
        if not over:
            frontend.connection.leave_open()
        elif frontend.left is None:
            frontend.connection.close()
        if frontend.inherited is not None:
            frontend.inherited.close()
        del self._frontends[frontend.number]
        frontend.ended.set()
        if reason == HANDED_OVER:
            log.info("frontend handed over", frontend=frontend.number)
        elif reason is None:
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

    async def _take_over(
        self, frontend: _Frontend, attachment: Attachment, heritage: Heritage, tasks: TaskGroup
    ) -> None:
        """What the frontend has said to the predecessor is said once more, by that. FrontendError."""
        for message, fds in heritage.said:
            outcome = await frontend.session.handle(message, fds, attachment)
            close_foreign(fds)
            if outcome.refusal is not None:
                raise FrontendError(f"it cannot be taken over: {outcome.refusal}")
        self._note_rings(frontend, attachment, tasks)
        heritage.taken.set()

    async def _leave(self, frontend: _Frontend, attachment: Attachment) -> Heritage:
        """All that it has asked for is answered, and no ring is looked at any more. FrontendError,
        EngineError: it is not handed over."""
        session = frontend.session
        if session.told.logs:
            raise FrontendError("its guest is being migrated, so it is not handed over")
        bases = {
            queue: await attachment.stop_vring(queue)
            for queue, ring in enumerate(session.state.rings)
            if ring.started
        }
        writeback = await attachment.write_cache()
        told = session.leave_told()
        said = list(told.again(session.state, bases, writeback=writeback))
        return Heritage(frontend.connection.detach(), said, told.close)

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
