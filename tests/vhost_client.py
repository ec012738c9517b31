# SPDX-License-Identifier: Apache-2.0
"""A small vhost-user frontend over a socket, for tests: the protocol's other side, blocking.

`VhostUserTransport` lets a `Frontend` of tests/frontend.py reach a backend the way QEMU does.
`VhostUserClient` is the wire itself, for tests that send messages out of order or broken.

The numbers and layouts of the protocol are here, once for all tests, those of requests and features in
tests/frontend.py, those of rings in tests/guest_ring.py. They were taken from the specifications and not from
vhostsync (vhost-user protocol specification, "Message Specification" and "Front-end message types"): a number
that is wrong in the product must not be wrong in its test, too.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from tests.frontend import Feature
from tests.guest_ring import Region, RingAddresses

HEADER = struct.Struct("<III")
VERSION = 1
REPLY = 4
NEED_REPLY = 8
NO_FD = 0x100
STATE = struct.Struct("<II")
ADDRESS = struct.Struct("<IIQQQQ")
REGION = struct.Struct("<QQQQ")
CONFIG = struct.Struct("<III")
LOG = struct.Struct("<QQ")
INFLIGHT = struct.Struct("<QQHH4x")


class Message(IntEnum):
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class ProtocolFeature(IntEnum):
    """As masks."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    CONFIGURE_MEM_SLOTS = 1 << 15


WANTED_PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


class ConnectionLostError(ConnectionError):
    """The backend ended the connection."""


class VhostUserClient:
    """One connection. Every call blocks until the backend has answered, at most `timeout_s`."""

    def __init__(self, path: Path, *, timeout_s: float = 10.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.socket.settimeout(timeout_s)
        try:
            self.socket.connect(os.fspath(path))
        except BaseException:
            self.socket.close()
            raise
        self.reply_ack = False

    def close(self) -> None:
        self.socket.close()

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Any bytes at all, with any descriptors."""
        ancillary = []
        if fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sent = self.socket.sendmsg([data], ancillary)
        if sent < len(data):  # an empty rest, too, would meet a socket that has been closed meanwhile
            self.socket.sendall(data[sent:])

    def send(
        self, message: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = VERSION
    ) -> None:
        self.send_raw(HEADER.pack(message, flags, len(payload)) + payload, fds)

    def receive(self) -> tuple[int, int, bytes]:
        """(message, flags, payload). ConnectionLostError at the end of the stream."""
        message, flags, size = HEADER.unpack(self._exactly(HEADER.size))
        return message, flags, self._exactly(size)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise ConnectionLostError("the backend closed the connection")
            data += part
        return data

    def ask(self, message: int, payload: bytes = b"") -> bytes:
        """A message that has an answer of its own."""
        self.send(message, payload)
        answered, flags, reply = self.receive()
        assert answered == message and flags & 7 == VERSION | REPLY, (
            f"{message}: answered {answered}, {flags:#x}"
        )
        return reply

    def ask_u64(self, message: int, payload: bytes = b"") -> int:
        return int.from_bytes(self.ask(message, payload), "little")

    def tell(self, message: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A message without an answer: with REPLY_ACK it asks for one, which must be success."""
        if not self.reply_ack:
            self.send(message, payload, fds)
            return
        self.send(message, payload, fds, flags=VERSION | NEED_REPLY)
        answered, _, reply = self.receive()
        code = int.from_bytes(reply, "little")
        assert (answered, code) == (message, 0), f"message {message}: answered {answered} with {code}"

    def tell_u64(self, message: int, value: int, fds: Sequence[int] = ()) -> None:
        self.tell(message, value.to_bytes(8, "little"), fds)

    def get_config(self, size: int = 60) -> bytes:
        reply = self.ask(Message.GET_CONFIG, CONFIG.pack(0, size, 0) + bytes(size))
        return reply[CONFIG.size :]

    def set_config(self, offset: int, value: bytes) -> None:
        self.tell(Message.SET_CONFIG, CONFIG.pack(offset, len(value), 0) + value)


class VhostUserTransport:
    """A frontend's way through a socket: SET_MEM_TABLE, or ADD_MEM_REG for each region with `mem_slots`."""

    def __init__(self, path: Path, *, timeout_s: float = 10.0, mem_slots: bool = False) -> None:
        self.client = VhostUserClient(path, timeout_s=timeout_s)
        self.mem_slots = mem_slots
        self.offered = 0
        self.protocol = 0

    def set_features(self, features: int) -> None:
        client = self.client
        client.tell(Message.SET_OWNER)
        self.offered = client.ask_u64(Message.GET_FEATURES)
        assert self.offered & Feature.PROTOCOL_FEATURES
        self.protocol = client.ask_u64(Message.GET_PROTOCOL_FEATURES) & WANTED_PROTOCOL
        client.tell_u64(Message.SET_PROTOCOL_FEATURES, self.protocol)
        client.reply_ack = bool(self.protocol & ProtocolFeature.REPLY_ACK)
        client.tell_u64(Message.SET_FEATURES, features & self.offered | Feature.PROTOCOL_FEATURES)

    def set_memory(self, regions: Sequence[Region]) -> None:
        if self.mem_slots:
            for region in regions:
                self.client.tell(Message.ADD_MEM_REG, pack_slot(region), [region.fd])
            return
        self.client.tell(Message.SET_MEM_TABLE, pack_memory(regions), [region.fd for region in regions])

    def remove_memory(self, region: Region) -> None:
        self.client.tell(Message.REM_MEM_REG, pack_slot(region))

    def start_ring(
        self, queue: int, size: int, addresses: RingAddresses, base: int, kick: int, call: int, err: int
    ) -> None:
        client = self.client
        client.tell(Message.SET_VRING_NUM, STATE.pack(queue, size))
        client.tell(Message.SET_VRING_ADDR, pack_addresses(queue, addresses))
        client.tell(Message.SET_VRING_BASE, STATE.pack(queue, base))
        client.tell_u64(Message.SET_VRING_CALL, queue, [call])
        client.tell_u64(Message.SET_VRING_ERR, queue, [err])
        client.tell_u64(Message.SET_VRING_KICK, queue, [kick])

    def enable_ring(self, queue: int, enabled: bool) -> None:
        self.client.tell(Message.SET_VRING_ENABLE, STATE.pack(queue, int(enabled)))

    def stop_ring(self, queue: int) -> int:
        _, base = STATE.unpack(self.client.ask(Message.GET_VRING_BASE, STATE.pack(queue, 0)))
        return int(base)

    def close(self) -> None:
        self.client.close()


def _pack_region(region: Region) -> bytes:
    return REGION.pack(region.guest_addr, region.bytes, region.user_addr, region.mmap_offset)


def pack_slot(region: Region) -> bytes:
    """Of ADD_MEM_REG and REM_MEM_REG."""
    return bytes(8) + _pack_region(region)


def pack_memory(regions: Sequence[Region]) -> bytes:
    """Of SET_MEM_TABLE."""
    return struct.pack("<II", len(regions), 0) + b"".join(map(_pack_region, regions))


def pack_addresses(queue: int, addresses: RingAddresses) -> bytes:
    """Of SET_VRING_ADDR."""
    return ADDRESS.pack(queue, 0, addresses.desc, addresses.used, addresses.avail, 0)
