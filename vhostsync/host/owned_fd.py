# SPDX-License-Identifier: Apache-2.0
"""A file descriptor with exactly one owner."""

import fcntl
import os
from collections.abc import Iterable
from types import TracebackType


class OwnedFd:
    """Owns one descriptor until `take` hands it over or `close` closes it; closing twice does nothing.

    Descriptors that arrive over a socket live in these from the moment of their arrival, so that whatever
    nobody took is closed, whatever goes wrong between.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError(f"{fd} is no file descriptor")
        self._fd = fd

    @property
    def owned(self) -> bool:
        """False once it was taken or closed."""
        return self._fd >= 0

    def fileno(self) -> int:
        """The descriptor, still owned by this object. ValueError once it was taken or closed."""
        if self._fd < 0:
            raise ValueError("the descriptor was taken or closed")
        return self._fd

    def take(self) -> int:
        """The descriptor, which the caller owns from now on. ValueError once it was taken or closed."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Close the descriptor if it is still owned."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> "OwnedFd":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})" if self._fd >= 0 else "OwnedFd(gone)"


def new_memory(name: str, size_bytes: int) -> OwnedFd:
    """Zeroed memory of a fixed size, to be shared. OSError."""
    fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(fd.fileno(), size_bytes)
        # Nobody can make it smaller under those who have mapped it.
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        fd.close()
        raise
    return fd


def close_all(fds: Iterable[OwnedFd]) -> None:
    """Close every one that is still owned."""
    for fd in fds:
        fd.close()
