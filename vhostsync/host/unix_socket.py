# SPDX-License-Identifier: Apache-2.0
"""Listening unix sockets: made without a race, and removed by nobody but their maker."""

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostsync.errors import ConfigError
from vhostsync.host.own_file import ForeignFileError, kind_of, open_regular, seems_to_be

BACKLOG: Final = 16
LOCK_S: Final = 3.0


@dataclass(frozen=True)
class BoundSocket:
    """A listening, non-blocking unix socket and the file that it made."""

    listener: socket.socket
    path: Path
    device: int
    inode: int

    def close(self) -> None:
        """Listen no more, and remove the file unless another took its place. It goes first: as long as
        somebody listens, no other start takes it for a leftover and puts its own there."""
        if self.listener.fileno() < 0:
            return
        with suppress(OSError):
            now = self.path.lstat()
            if (now.st_dev, now.st_ino) == (self.device, self.inode):
                self.path.unlink()
        self.listener.close()


def bind_unix_socket(path: Path, mode: int = 0o600) -> BoundSocket:
    """A listening unix socket at `path` with `mode` less the umask. May block for LOCK_S.

    The mode is set on the socket before it is bound: Linux gives the file the mode of the socket
    (unix_bind_bsd in net/unix/af_unix.c), so there is no instant at which others could connect. A socket left
    by a process that is gone is replaced; one that somebody listens on, and anything else, is not. Raises
    ConfigError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), mode)
        with _alone(path):
            try:
                listener.bind(os.fspath(path))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_leftover(path)
                listener.bind(os.fspath(path))
            made = path.lstat()
            listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"Cannot make the socket {path}: {error.strerror or error}.") from error
    except BaseException:
        listener.close()
        raise
    return BoundSocket(listener, path, made.st_dev, made.st_ino)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other start looks at this path meanwhile: between bind and listen it would take the socket for a
    leftover. The lock is a file of our own that is there as long as this takes; what others may open (the
    directory) they could lock, and keep every start from going on. OSError, ConfigError."""
    lock = Path(f"{path}.making")
    until = time.monotonic() + LOCK_S
    while (fd := _try_lock(lock, path)) is None:
        if time.monotonic() > until:
            raise ConfigError(
                f"Cannot make the socket {path}: another process is making it and has locked {lock}; try "
                f"again."
            )
        time.sleep(0.01)  # this runs where nobody else waits
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(fd)


def _try_lock(lock: Path, path: Path) -> int | None:
    try:
        fd = open_regular(lock, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ConfigError(f"Cannot make the socket {path}: {lock}: {error.strerror}.") from error
    try:
        if os.fstat(fd).st_size:
            raise ForeignFileError(f"{lock}, {seems_to_be(fd)}")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), lock.lstat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass  # somebody has it, or had it when it was opened and has removed it
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _remove_leftover(path: Path) -> None:
    """Remove the socket of a process that is gone. ConfigError where it is in use, or is no socket."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISSOCK(mode):
            raise ConfigError(f"Cannot make the socket {path}: {kind_of(mode)} is there, which is no socket.")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            # ECONNREFUSED is the one answer that says that nobody listens (EAGAIN: somebody who is busy).
            if probe.connect_ex(os.fspath(path)) not in (errno.ECONNREFUSED, errno.ENOENT):
                raise ConfigError(f"Cannot make the socket {path}: another process listens on it.")
        path.unlink()
