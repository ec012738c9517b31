# SPDX-License-Identifier: Apache-2.0
"""From one process of `serve` to the next, while the guest runs and its connections stay.

    successor                                      predecessor
    its modules are loaded, its options are read
    listens at CONTROL.successor
    the command hand-over                    ──▶   refuses, or connects there
                                                   lets go: of its frontends between two messages, their rings
                                                   stopped and empty; of the mirror, brought up to date; of
                                                   both disks, the record, the bitmap, the control socket
    all of it, or (the end) nothing          ◀──   the listening socket, the connections, what was said there
    opens, locks, records; the mirror; the rings
    a byte                                   ──▶   ends with 0; without that byte: with 1

Who has the disks is a matter of their locks and of the record, as in every start: one process at a time, also
if either is killed anywhere. Before the command a successor's death changes nothing. After it the predecessor
does not come back; it ends, and a start (the service manager's, or the successor's own where the predecessor
dies first) serves as after any restart, to frontends that connect again.
"""

import json
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from vhostsync.control import qmp
from vhostsync.control.client import RefusedError, connect
from vhostsync.errors import FrontendError, HandOverError
from vhostsync.host.owned_fd import OwnedFd, close_all
from vhostsync.host.parcel import receive_parcel, send_parcel
from vhostsync.host.peer import peer_process, peer_uid
from vhostsync.host.unix_socket import BoundSocket, bind_unix_socket
from vhostsync.vhost_user.heritage import Heritage
from vhostsync.vhost_user.messages import HEADER, encode_request, parse_header, parse_message
from vhostsync.vhost_user.payloads import MESSAGE_FDS_MAX, encode_payload
from vhostsync.vhost_user.server import ATTACHMENTS_MAX
from vhostsync.vhost_user.told import Saying

log = structlog.get_logger(__name__)

ANSWER_S: Final = 10.0
"""How long the other side may take for what it does at once."""
LETTING_GO_S: Final = 120.0
"""How long the predecessor may take to bring the mirror up to date; --destination-timeout ends that."""
STARTING_S: Final = 60.0
ENVIRONMENT: Final = ("NOTIFY_SOCKET", "CEPH_CONF", "CEPH_ARGS", "STATE_DIRECTORY")
PARCEL_BYTES_MAX: Final = 1 << 16
PARCEL_FDS_MAX: Final = max(MESSAGE_FDS_MAX, 2 + ATTACHMENTS_MAX)
_SERVING: Final = b"S"


def meeting_place(control: Path) -> Path:
    """Where the successor of the backend with this control socket listens for it."""
    return control.with_name(control.name + ".successor")


@dataclass
class Inheritance:
    """What is handed over. `file_is_ours`: of the listening socket; else somebody outside has made it.
    `equal`: both disks of the mirror hold the same, durably, and nobody has written to either since.
    `log`: the predecessor's stderr. `environment`: what a start goes by, where the record is above all."""

    log: OwnedFd
    environment: Mapping[str, str]
    listener: socket.socket | None
    file_is_ours: bool
    frontends: Sequence[Heritage]
    equal: bool


# ---- the predecessor -----------------------------------------------------------------------------------


class Successor:
    """The process that goes on, as the one that leaves sees it. All of it blocks."""

    def __init__(self, control: Path) -> None:
        """HandOverError: it is not there, and nothing has changed."""
        place = meeting_place(control)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(ANSWER_S)
        try:
            self._socket.connect(os.fspath(place))
            if peer_uid(self._socket) not in (0, os.geteuid()):
                raise HandOverError(f"Whoever listens at {place} is another user, who gets nothing.")
        except OSError as error:
            self._socket.close()
            raise HandOverError(f"No successor listens at {place}: {error.strerror or error}.") from error
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """It gets nothing."""
        self._socket.close()

    def give(self, estate: Inheritance) -> None:
        """Returns when the successor serves. HandOverError: it does not, and has perhaps begun to."""
        try:
            with self._socket:
                self._give(estate)
                self._socket.settimeout(STARTING_S)
                serves = self._socket.recv(1) == _SERVING
        except OSError as error:
            raise HandOverError(f"The successor was lost: {error.strerror or error}; start again.") from error
        if not serves:
            raise HandOverError("The successor has ended before it served; its log says why. Start again.")

    def _give(self, estate: Inheritance) -> None:
        listeners = [] if estate.listener is None else [estate.listener]
        connections = [each.connection.fileno() for each in estate.frontends]
        fds = [estate.log.fileno(), *(each.fileno() for each in listeners), *connections]
        described = {
            "environment": dict(estate.environment),
            "listening": bool(listeners),
            "file-is-ours": estate.file_is_ours,
            "said": [len(each.said) for each in estate.frontends],
            "equal": estate.equal,
        }
        send_parcel(self._socket, json.dumps(described).encode(), fds)
        for frontend in estate.frontends:
            for message, brought in frontend.said:
                data = encode_request(message.request, encode_payload(message.payload))
                send_parcel(self._socket, data, [fd.fileno() for fd in brought])


# ---- the successor -------------------------------------------------------------------------------------


@dataclass
class Predecessor:
    """The process that leaves, as the one that goes on sees it."""

    _socket: socket.socket = field(repr=False)

    def inherit(self) -> Inheritance | None:
        """Waits until it has let go of everything, and takes that over; None: it has died before. Blocks."""
        self._socket.settimeout(LETTING_GO_S)
        unowned: list[OwnedFd] = []
        try:
            data, fds = receive_parcel(self._socket, PARCEL_BYTES_MAX, PARCEL_FDS_MAX)
            unowned += fds
            described: dict[str, Any] = json.loads(data)
            said = [[self._saying(unowned) for _ in range(count)] for count in described["said"]]
            if len(fds) != 1 + described["listening"] + len(said):
                raise ValueError("a descriptor is missing")
        except (EOFError, OSError, ValueError, KeyError, FrontendError) as error:
            close_all(unowned)
            log.error("the predecessor has ended and left nothing", error=str(error))
            return None
        former_log, *connected = fds
        sockets = [socket.socket(fileno=fd.take()) for fd in connected]
        for each in sockets:
            each.setblocking(False)
        listener = sockets.pop(0) if described["listening"] else None
        frontends = [Heritage(*each) for each in zip(sockets, said, strict=True)]
        told = described["environment"]
        environment = {name: str(told[name]) for name in ENVIRONMENT if name in told}
        return Inheritance(
            former_log, environment, listener, described["file-is-ours"], frontends,
            described["equal"],
        )  # fmt: skip

    def _saying(self, unowned: list[OwnedFd]) -> Saying:
        data, fds = receive_parcel(self._socket, PARCEL_BYTES_MAX, PARCEL_FDS_MAX)
        unowned += fds
        header = parse_header(data[: HEADER.size])
        return parse_message(header, data[HEADER.size :], len(fds)), fds

    def tell_serving(self) -> None:
        with self._socket, suppress(OSError):  # it has ended already
            self._socket.send(_SERVING, socket.MSG_NOSIGNAL)


async def ask(
    control: Path, socket_path: Path | None, disk: str, get_ready: Callable[[object], None]
) -> Predecessor | None:
    """The backend with this control socket begins to hand over, if it serves this disk. `get_ready` is told
    its record, before anything changes; it blocks, and nobody else has anything of this event loop. None: it
    is of an older version that hands nothing over, and has ended. HandOverError, ControlError: it goes on."""
    async with connect(control) as client:
        status = await client.execute("query-status")
        served = str(status["disk"])
        _check_disk(disk, served)
        get_ready(status.get("record"))
        with _meeting(control, client.user) as listener:
            try:
                told = {"disk": served} | ({} if socket_path is None else {"socket": str(socket_path)})
                await client.execute("hand-over", told)
            except RefusedError as error:
                if error.kind != qmp.COMMAND_NOT_FOUND:
                    raise HandOverError(str(error)) from error
                log.info("the predecessor is of a version that hands nothing over: it is ended")
                await client.execute_to_the_end("quit", {})
                return None
            return Predecessor(_accept(listener, client.process))


def _check_disk(own: str, served: str) -> None:
    """Before anything has changed: with another disk than the guest's (the one that it has left by a switch)
    a start is refused, and nobody serves; or, without a record, the guest finds its disk as it was before."""
    paths = own.startswith("/") and served.startswith("/")
    if own != served and not (paths and os.path.realpath(own) == os.path.realpath(served)):
        raise HandOverError(
            f"The guest is on {served}, and the successor was told to serve {own}; start it with --blk-file "
            f"{served} (vhostsync upgrade takes the options of `serve` after --)."
        )


@contextmanager
def _meeting(control: Path, user: int) -> Iterator[socket.socket]:
    """A socket to which only this user can connect, and root."""
    bound = bind_unix_socket(meeting_place(control))
    try:
        if user != os.geteuid():
            _give_away(bound, user)
        yield bound.listener
    except OSError as error:
        raise HandOverError(f"{bound.path} cannot be given to user {user}: {error.strerror}.") from error
    finally:
        bound.close()


def _give_away(bound: BoundSocket, user: int) -> None:
    """By a descriptor: whose directory it is could put a link in its place, and get what that leads to.
    OSError, HandOverError."""
    fd = os.open(bound.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        made = (found.st_dev, found.st_ino) == (bound.device, bound.inode) and found.st_nlink == 1
        if not made or not stat.S_ISSOCK(found.st_mode):
            raise HandOverError(f"Somebody has put something else in the place of {bound.path}; try again.")
        os.chown(f"/proc/self/fd/{fd}", user, -1)
    finally:
        os.close(fd)


def _accept(listener: socket.socket, process: int) -> socket.socket:
    """The predecessor, which has connected before it answered."""
    try:
        connection, _ = listener.accept()
    except OSError as error:
        raise HandOverError("The backend has agreed to hand over and did not come.") from error
    if peer_process(connection) != process:
        connection.close()
        raise HandOverError("Another process has come in the place of the backend; nothing is taken over.")
    return connection
