# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of a unix socket, as the kernel knows it."""

import socket
import struct


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end when it connected, or listened (SO_PEERCRED, unix(7))."""
    return _peer(connection)[1]


def peer_process(connection: socket.socket) -> int:
    """The process at the other end when it connected, or listened; 0 where it is in a namespace of its
    own."""
    return _peer(connection)[0]


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, group = struct.unpack("3i", credentials)
    return process, user, group
