# SPDX-License-Identifier: Apache-2.0
"""Where frontends come from: a socket made at --socket-path, or one inherited with --fd.

Source: QEMU docs/interop/vhost-user.rst, "Backend program conventions". An inherited socket may listen, or be
connected to its one frontend already. All of this is short and happens before the event loop serves anybody.
"""

import errno
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vhostsync.host.unix_socket import BoundSocket, bind_unix_socket

from ..errors import ConfigError


@dataclass(frozen=True)
class Endpoint:
    """A socket to serve on: a listening one, or (`listening` False) the only frontend's connection. `bound`:
    the same, with the file that goes away with it (None: somebody else's)."""

    sock: socket.socket
    listening: bool
    bound: BoundSocket | None = None

    def close(self) -> None:
        """Close the socket and remove its file, unless somebody has put another one there."""
        if self.bound is not None:
            self.bound.close()
        self.sock.close()


def listen_at(path: Path) -> Endpoint:
    """Make a listening socket at `path`, whose mode follows the umask. One that a dead process left there is
    removed; one on which somebody listens, and anything that is no socket, is left alone: ConfigError."""
    bound = bind_unix_socket(path, 0o777)
    return Endpoint(bound.listener, True, bound)


def inherit(sock: socket.socket, path: Path | None) -> Endpoint:
    """The predecessor's listening socket, with the file `path` that it has made for it (None: somebody else
    has made it)."""
    bound = None
    if path is not None:
        with suppress(OSError):  # somebody has removed it
            made = path.lstat()
            bound = BoundSocket(sock, path, made.st_dev, made.st_ino)
    return Endpoint(sock, True, bound)


def adopt(number: int) -> Endpoint:
    """Take over the inherited descriptor `number` (--fd). ConfigError if it is no Unix stream socket, or one
    that is neither listening nor connected."""
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            raise ConfigError(f"--fd={number}: that descriptor is no socket")
        os.set_inheritable(number, False)
        sock = socket.socket(fileno=number)
    except OSError as error:
        raise ConfigError(f"--fd={number}: {error.strerror}") from error
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise ConfigError(f"--fd={number}: a Unix stream socket is needed")
        listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if not listening:
            sock.getpeername()
        # Credentials would come with each message and take the room that its descriptors need.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        sock.setblocking(False)
    except OSError as error:
        sock.detach()
        why = "neither listening nor connected" if error.errno == errno.ENOTCONN else error.strerror
        raise ConfigError(f"--fd={number}: {why}") from error
    except ConfigError:
        sock.detach()  # whoever gave it keeps it
        raise
    return Endpoint(sock, listening)
