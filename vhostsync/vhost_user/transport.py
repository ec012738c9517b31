# SPDX-License-Identifier: Apache-2.0
"""The vhost-user socket: whole messages with their descriptors in, replies out.

A message is read as exactly the rest of its 12-byte header, then exactly its payload, so that bytes and
descriptors of the next message never mix with this one's. Descriptors count as part of a message only where
the specification has them: with its header. They are owned (`OwnedFd`) from the moment they arrive.
"""

import array
import errno
import socket
from typing import Final

import anyio

from vhostsync.host.owned_fd import OwnedFd

from ..errors import FrontendError
from .foreign_fd import close_foreign
from .messages import HEADER, BackendRequest, Message, encode_request, parse_header, parse_message
from .payloads import MEM_TABLE_REGIONS_MAX

MESSAGE_TIMEOUT_S: Final = 30.0
"""How long a message may take from its first byte to its last. Frontends send each in one go; one that does
not ends, and gives its place to another. Between messages a frontend may be silent for ever."""

_INT_BYTES: Final = array.array("i").itemsize
# Room for what any message may carry. Where more come, the kernel closes the surplus and sets MSG_CTRUNC.
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MEM_TABLE_REGIONS_MAX * _INT_BYTES)


class Connection:
    """One frontend's connection over a stream socket, which it owns. Used by one task.

    Writing to a frontend that is gone raises FrontendError and no signal.
    """

    def __init__(self, sock: socket.socket, *, message_timeout_s: float = MESSAGE_TIMEOUT_S) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._message_timeout_s = message_timeout_s
        self._between: anyio.CancelScope | None = None  # while the next message is waited for
        self._to_stop = False
        self.stopped = False
        """`receive` has returned None because of `stop_between_messages`, and not at the end."""

    def stop_between_messages(self) -> None:
        """`receive` returns None once the message that is there is dealt with: the next stays unread."""
        self._to_stop = True
        if self._between is not None:
            self._between.cancel()

    async def receive(self) -> tuple[Message, list[OwnedFd]] | None:
        """The next message and its descriptors, which the caller closes or hands over; None at the end, and
        where it was stopped.

        FrontendError for a message that is not in order, for descriptors where none belong and for an end in
        the middle of a message. No descriptor is left open then, nor when the call is cancelled.
        """
        fds: list[OwnedFd] = []
        try:
            if not await self._begins():
                return None
            with anyio.fail_after(self._message_timeout_s):
                data = await self._read(HEADER.size, fds)
                if not data:
                    close_foreign(fds)
                    return None
                header = parse_header(data)
                payload = await self._read_payload(header.payload_bytes, header.request.name)
            return parse_message(header, payload, len(fds)), fds
        except TimeoutError:
            close_foreign(fds)
            raise FrontendError(f"a message took more than {self._message_timeout_s:g} s to arrive") from None
        except BaseException:
            close_foreign(fds)
            raise

    async def _begins(self) -> bool:
        """There is a message, or the end of the connection; False: it was stopped before."""
        begins = False
        if not self._to_stop:
            with anyio.CancelScope() as self._between:
                await anyio.wait_readable(self._sock)
                begins = True
            self._between = None
        self.stopped = not begins
        return begins

    async def send(self, data: bytes, share: OwnedFd | None = None) -> None:
        """Send all of it, and the descriptor `share` with its first byte, waiting for room as long as it
        takes; closes `share`. FrontendError if the frontend is gone."""
        view = memoryview(data)
        try:
            while view:
                try:
                    view = view[self._send_some(view, share) :]
                except BlockingIOError:
                    await anyio.wait_writable(self._sock)
                    continue
                except OSError as error:
                    reason = f"the frontend went away before its reply: {error.strerror}"
                    raise FrontendError(reason) from error
                if share is not None:
                    share.close()
                    share = None
        finally:
            if share is not None:
                share.close()

    def _send_some(self, view: memoryview, share: OwnedFd | None) -> int:
        if share is None:
            return self._sock.send(view, socket.MSG_NOSIGNAL)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [share.fileno()]))]
        return self._sock.sendmsg([view], rights, socket.MSG_NOSIGNAL)

    def detach(self) -> socket.socket:
        """The socket, which is the caller's from here on."""
        return self._sock

    def leave_open(self) -> None:
        """Until the process has ended."""
        self._sock.detach()

    def close(self) -> None:
        """Close the socket. No task may be waiting on it."""
        self._sock.close()

    async def _read_payload(self, size: int, name: str) -> bytes:
        late: list[OwnedFd] = []
        try:
            data = await self._read(size, late)
            if late:
                raise FrontendError(f"{name} came with descriptors in the middle of its payload")
        finally:
            close_foreign(late)
        if len(data) < size:
            raise FrontendError(f"the connection ended within {name}")
        return data

    async def _read(self, size: int, fds: list[OwnedFd]) -> bytes:
        """Exactly `size` bytes; b"" if the connection ended before the first. Descriptors go into `fds`."""
        data = bytearray()
        while len(data) < size:
            try:
                part, ancillary, flags, _ = self._sock.recvmsg(
                    size - len(data), _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await anyio.wait_readable(self._sock)
                continue
            except OSError as error:
                if error.errno == errno.ECONNRESET:  # closed with our reply unread: an end like any other
                    part, ancillary, flags = b"", [], 0
                else:
                    raise FrontendError(f"reading from the frontend failed: {error.strerror}") from error
            _collect(ancillary, fds)
            if flags & socket.MSG_CTRUNC:
                raise FrontendError(f"a message with more than {MEM_TABLE_REGIONS_MAX} descriptors")
            if not part:
                if data:
                    raise FrontendError("the connection ended within a message")
                break
            data += part
        return bytes(data)


def _collect(ancillary: list[tuple[int, int, bytes]], fds: list[OwnedFd]) -> None:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % _INT_BYTES])
            fds.extend(OwnedFd(number) for number in numbers)


class BackendChannel:
    """The socket on which the backend sends requests of its own (SET_BACKEND_REQ_FD).

    Its only request is CONFIG_CHANGE_MSG, without NEED_REPLY, and it never waits for a frontend that may be
    waiting for it. If the socket is full, the frontend still has such a message to read, and reads the config
    space after that: nothing is lost by not sending another.
    """

    def __init__(self, fd: OwnedFd) -> None:
        """Takes `fd`. FrontendError if it is no Unix stream socket (it is then the caller's): closing another
        one may take its time."""
        try:
            sock = socket.socket(fileno=fd.fileno())
        except OSError as error:
            raise FrontendError(
                f"SET_BACKEND_REQ_FD brought a descriptor that is no socket: {error.strerror}"
            ) from error
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            sock.detach()
            raise FrontendError("SET_BACKEND_REQ_FD brought a socket that is no Unix stream")
        fd.take()
        self._sock = sock

    def config_changed(self) -> None:
        """Tell the frontend to read the config space again."""
        if self._sock.fileno() < 0:
            return
        message = encode_request(BackendRequest.CONFIG_CHANGE_MSG)
        try:
            sent = self._sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            sent = 0  # the frontend closed its end
        if sent < len(message):  # gone, or half a message: nothing that followed would be understood
            self._sock.close()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
