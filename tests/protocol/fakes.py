# SPDX-License-Identifier: Apache-2.0
"""An attachment that records, and a frontend's side of the socket."""

import array
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from tests.sizes import MIB
from vhostsync.errors import EngineError
from vhostsync.host.owned_fd import OwnedFd
from vhostsync.vhost_user.attachment import MemoryRegion
from vhostsync.vhost_user.messages import HEADER, Message, Request, encode_request
from vhostsync.vhost_user.payloads import Empty, Payload, encode_payload
from vhostsync.vhost_user.virtio_blk import BlkDevice, DeviceShape, Feature

SHAPE = DeviceShape(capacity_bytes=64 * MIB, num_queues=4)
WANTED = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.FLUSH | Feature.CONFIG_WCE | Feature.SEG_MAX
REGION = MemoryRegion(guest_addr=0, bytes=16 * MIB, user_addr=0x7F00_0000_0000, mmap_offset=0)
FD = "fd"
BACKEND_REQ = int(Request.SET_BACKEND_REQ_FD).to_bytes(4, sys.byteorder)


def device(num_queues: int = 4) -> BlkDevice:
    return BlkDevice(DeviceShape(capacity_bytes=64 * MIB, num_queues=num_queues))


def region(number: int) -> MemoryRegion:
    """The number-th of regions that do not overlap."""
    return MemoryRegion(number * 16 * MIB, 16 * MIB, 0x7F00_0000_0000 + number * 32 * MIB, 0)


@dataclass
class RecordingAttachment:
    """Takes and closes descriptors as the engine does and remembers the calls; can refuse some by name, or
    hold them until an event."""

    base: int = 7
    writeback: bool = True
    writeback_after_reset: bool = True
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)  # name: errno
    hold: dict[str, anyio.Event] = field(default_factory=dict)
    closed: bool = False

    async def _done(self, name: str, *arguments: object, fds: Sequence[OwnedFd | None] = ()) -> None:
        for fd in fds:
            if fd is not None:
                os.close(fd.take())
        assert not self.closed
        self.calls.append((name, *arguments))
        if name in self.hold:
            await self.hold[name].wait()
        if name in self.refuse:
            raise EngineError.from_errno(name, self.refuse[name])

    async def reset(self) -> None:
        await self._done("reset")
        self.writeback = self.writeback_after_reset

    async def renew(self) -> None:
        await self._done("renew")
        self.writeback = self.writeback_after_reset

    async def set_features(self, features: int) -> None:
        await self._done("set_features", features)

    async def set_log_base(self, fd: OwnedFd, size_bytes: int, offset: int) -> None:
        await self._done("set_log_base", FD, size_bytes, offset, fds=[fd])

    async def set_log_fd(self, fd: OwnedFd) -> None:
        await self._done("set_log_fd", FD, fds=[fd])

    async def set_mem_table(self, regions: Sequence[tuple[MemoryRegion, OwnedFd]]) -> None:
        await self._done("set_mem_table", *(one for one, _ in regions), fds=[fd for _, fd in regions])

    async def add_mem_region(self, region: MemoryRegion, fd: OwnedFd) -> None:
        await self._done("add_mem_region", region, fds=[fd])

    async def remove_mem_region(self, region: MemoryRegion) -> None:
        await self._done("remove_mem_region", region)

    async def set_vring_num(self, queue: int, num: int) -> None:
        await self._done("set_vring_num", queue, num)

    async def set_vring_addr(self, queue: int, desc: int, used: int, avail: int, log: int | None) -> None:
        await self._done("set_vring_addr", queue, desc, used, avail, log)

    async def set_vring_base(self, queue: int, base: int) -> None:
        await self._done("set_vring_base", queue, base)

    async def set_vring_kick(self, queue: int, fd: OwnedFd) -> None:
        await self._done("set_vring_kick", queue, FD, fds=[fd])

    async def set_vring_call(self, queue: int, fd: OwnedFd | None) -> None:
        await self._done("set_vring_call", queue, FD if fd else None, fds=[fd])

    async def set_vring_err(self, queue: int, fd: OwnedFd | None) -> None:
        await self._done("set_vring_err", queue, FD if fd else None, fds=[fd])

    async def set_vring_enable(self, queue: int, enabled: bool) -> None:
        await self._done("set_vring_enable", queue, enabled)

    async def stop_vring(self, queue: int) -> int:
        await self._done("stop_vring", queue)
        return self.base

    async def set_inflight(self, fd: OwnedFd, size_bytes: int, offset: int, queues: int) -> None:
        await self._done("set_inflight", FD, size_bytes, offset, queues, fds=[fd])

    async def write_cache(self) -> bool:
        return self.writeback

    async def set_write_cache(self, writeback: bool) -> None:
        await self._done("set_write_cache", writeback)
        self.writeback = writeback

    async def close(self) -> None:
        await self._done("close")
        self.closed = True


@dataclass
class RecordingChannel:
    """In place of the channel for the backend's own requests."""

    sent: int = 0
    closed: bool = False

    def config_changed(self) -> None:
        self.sent += 1

    def close(self) -> None:
        self.closed = True


def some_fds(count: int) -> list[OwnedFd]:
    """Descriptors like those of a frontend, of no use in particular."""
    return [OwnedFd(os.eventfd(0, os.EFD_CLOEXEC)) for _ in range(count)]


def wire(request: Request, payload: Payload | None = None, *, need_reply: bool = False) -> bytes:
    """What a frontend sends."""
    return encode_request(request, encode_payload(payload or Empty()), need_reply=need_reply)


def wire_of(message: Message) -> bytes:
    return wire(message.request, message.payload, need_reply=message.need_reply)


class WireFrontend:
    """A frontend's end of the socket, for use on the event loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def send(self, data: bytes, fd_count: int = 0) -> None:
        """Sends `data` with that many new descriptors."""
        fds = some_fds(fd_count)
        if data[:4] == BACKEND_REQ:  # the one that must be a socket
            for fd in fds:
                fd.close()
            ours, theirs = socket.socketpair()
            theirs.close()
            fds = [OwnedFd(ours.detach())]
        try:
            while True:
                try:
                    numbers = array.array("i", [fd.fileno() for fd in fds])
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []
                    sent = self.sock.sendmsg([data], ancillary)
                    assert sent == len(data)
                    return
                except BlockingIOError:
                    await anyio.wait_writable(self.sock)
        finally:
            for fd in fds:
                fd.close()

    async def read(self, size: int) -> bytes:
        """Exactly `size` bytes, or fewer at the end of the connection."""
        data = b""
        while len(data) < size:
            await anyio.wait_readable(self.sock)
            try:
                part = self.sock.recv(size - len(data))
            except ConnectionResetError:
                break
            if not part:
                break
            data += part
        return data

    async def reply(self) -> tuple[int, int, bytes]:
        """Request number, flags and payload of the next reply."""
        number, flags, size = HEADER.unpack(await self.read(HEADER.size))
        return number, flags, await self.read(size)

    async def ask(
        self, request: Request, payload: Payload | None = None, fd_count: int = 0, *, need_reply: bool = False
    ) -> bytes:
        """Sends a request and returns its reply's payload."""
        await self.send(wire(request, payload, need_reply=need_reply), fd_count)
        number, flags, content = await self.reply()
        assert (number, flags) == (request, 5)
        return content

    async def at_end(self) -> bool:
        """Waits until the backend ends the connection or says something; True for the former."""
        return await self.read(1) == b""

    def open(self) -> bool:
        """The backend has neither ended the connection nor said anything."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self.sock.close()
