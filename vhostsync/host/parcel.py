# SPDX-License-Identifier: Apache-2.0
"""Bytes and descriptors over a unix socket: a parcel arrives whole or not at all. Blocks, as long as the
socket's timeout lets it."""

import array
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

from vhostsync.host.owned_fd import OwnedFd, close_all

_LENGTH: Final = struct.Struct("=I")
_INT_BYTES: Final = array.array("i").itemsize


def send_parcel(to: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    parcel = _LENGTH.pack(len(data)) + data
    sent = to.sendmsg([parcel], rights, socket.MSG_NOSIGNAL)
    if sent < len(parcel):  # else whoever has read it may be gone by now
        to.sendall(parcel[sent:], socket.MSG_NOSIGNAL)


def receive_parcel(
    of: socket.socket, bytes_max: int, fds_max: int, within_s: float | None = None
) -> tuple[bytes, list[OwnedFd]]:
    """EOFError, OSError: there is no whole parcel, and nothing is left open. `within_s`: all of it, for the
    socket's timeout begins anew with each byte."""
    until = None if within_s is None else time.monotonic() + within_s
    fds: list[OwnedFd] = []
    try:
        head = b""
        while len(head) < _LENGTH.size:
            _wait_until(of, until)
            part, ancillary, _, _ = of.recvmsg(
                _LENGTH.size - len(head), socket.CMSG_SPACE(fds_max * _INT_BYTES),
                socket.MSG_CMSG_CLOEXEC,
            )  # fmt: skip
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers = array.array("i")
                    numbers.frombytes(data[: len(data) - len(data) % _INT_BYTES])
                    fds.extend(map(OwnedFd, numbers))
            if not part:
                raise EOFError
            head += part
        (size,) = _LENGTH.unpack(head)
        if size > bytes_max:
            raise EOFError
        data = b""
        while len(data) < size:
            _wait_until(of, until)
            if not (part := of.recv(size - len(data))):
                raise EOFError
            data += part
    except BaseException:
        close_all(fds)
        raise
    return data, fds


def _wait_until(of: socket.socket, until: float | None) -> None:
    if until is None:
        return
    if (left_s := until - time.monotonic()) <= 0:
        raise TimeoutError("timed out")
    of.settimeout(left_s)
