# SPDX-License-Identifier: Apache-2.0
"""Where frontends come from: a socket made at --socket-path, or one inherited with --fd.

Source: QEMU docs/interop/vhost-user.rst, "Backend program conventions". An inherited socket may listen, or be
connected to its one frontend already. All of this is short and happens before the event loop serves anybody.
"""

import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

BACKLOG = 16


@dataclass(frozen=True)
class Endpoint:
    """A socket to serve on: a listening one, or (`listening` False) the only frontend's connection. `path`
    is the file that goes away with it (None: somebody else's), if it is still the one of this `inode`."""

    sock: socket.socket
    listening: bool
    path: Path | None = None
    inode: int = 0

    def close(self) -> None:
        """Close the socket and remove its file, unless somebody has put another one there."""
        self.sock.close()
        if self.path is not None:
            try:
                if os.lstat(self.path).st_ino == self.inode:
                    self.path.unlink()
            except (FileNotFoundError, PermissionError):
                pass  # a socket that stays is replaced by the next start


def listen_at(path: Path) -> Endpoint:
    """Make a listening socket at `path`. One that a dead process left there is removed; one on which somebody
    still listens, and anything that is no socket, is left alone: ConfigError."""
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(os.fspath(path))
        endpoint = Endpoint(sock, True, path, os.lstat(path).st_ino)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    sock.setblocking(False)
    return endpoint


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


def _remove_stale(path: Path) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot listen on {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"cannot listen on {path}: something that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        outcome = probe.connect_ex(os.fspath(path))
    if outcome in (errno.ECONNREFUSED, errno.ENOENT):
        path.unlink(missing_ok=True)
    elif outcome in (0, errno.EAGAIN):
        raise ConfigError(f"cannot listen on {path}: another process listens there")
    else:
        raise ConfigError(f"cannot listen on {path}: {os.strerror(outcome)}")
