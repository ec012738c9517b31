# SPDX-License-Identifier: Apache-2.0
"""Conversations of hostile frontends with the real server, session and engine, made from a number.

Each is a good conversation (negotiation, memory, rings, requests in them) in which every message, field,
descriptor and byte of memory is now and then something else: a descriptor of an odd kind, memory that
shrinks, regions that overlap or wrap, messages left out, doubled, or out of place, rings rewritten.

What is required: no fault of the backend, an answer or an end to every message that wants one, every
attachment let go, no descriptor left open, and a good frontend served afterwards.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from tests.engine_options import engine_options
from tests.fuzz.odd_descriptors import ODD, memory
from tests.sizes import MIB
from vhostsync.engine.engine import Engine, EngineConfig
from vhostsync.engine.engine_event import EngineEvent, EventKind
from vhostsync.events import FRONTEND_DISCONNECTED
from vhostsync.storage import local as disks
from vhostsync.storage.native import probe
from vhostsync.vhost_user.attachment import MemoryRegion
from vhostsync.vhost_user.listener import Endpoint
from vhostsync.vhost_user.messages import HEADER, Request
from vhostsync.vhost_user.payloads import (
    U64,
    ConfigAccess,
    Empty,
    InflightArea,
    LogArea,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
    encode_payload,
)
from vhostsync.vhost_user.rules import INFLIGHT_RING_BYTES, OFFERED
from vhostsync.vhost_user.server import FrontendServer
from vhostsync.vhost_user.virtio_blk import BlkDevice, DeviceShape, Feature

DISK_BYTES = 8 * MIB
MEMORY_BYTES = 2 * MIB
QUEUES = 2
RING_SIZE = 16
USER_ADDR = 0x7F00_0000_0000
REPLY_S = 20.0
EDGES = (
    0,
    1,
    0xFFF,
    0x1000,
    0xFFFF,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)


class Choices:
    """A row of choices that a number stands for."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def rarely(self, one_in: int = 16) -> bool:
        return self.random.randrange(one_in) == 0

    def number(self, right: int) -> int:
        """Something off by a little, an edge, or anything."""
        return self.random.choice(
            (right + 1, max(right - 1, 0), self.random.choice(EDGES), right ^ 1 << self.random.randrange(64),
             self.random.getrandbits(64), right & ~0xFFF)
        )  # fmt: skip


# ---- a frontend ------------------------------------------------------------------------------------------


class Gone(Exception):  # noqa: N818 -- no error: the backend ended the conversation, which it may
    """The backend has ended the connection."""


class Frontend:
    """One conversation."""

    def __init__(self, sock: socket.socket, choices: Choices | None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.choices = choices  # None: a good one
        self.memory = memory(MEMORY_BYTES)
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(QUEUES)]
        self.calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(QUEUES)]
        self.published = [0] * QUEUES
        self.channel = socket.socket(socket.AF_UNIX)
        half = MEMORY_BYTES // 2
        self.regions = (
            MemoryRegion(0, half, USER_ADDR, 0),
            MemoryRegion(half, half, USER_ADDR + half, half),
        )

    def close(self) -> None:
        for fd in (self.memory, *self.kicks, *self.calls):
            os.close(fd)
        self.channel.close()
        self.sock.close()

    # -- the wire

    async def send(self, data: bytes, fds: list[int]) -> None:
        while True:
            try:
                socket.send_fds(self.sock, [data], fds) if fds else self.sock.send(data)
                return
            except BlockingIOError:
                await anyio.wait_writable(self.sock)
            except (BrokenPipeError, ConnectionResetError):
                raise Gone from None

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            await anyio.wait_readable(self.sock)
            try:
                part, fds, _, _ = socket.recv_fds(self.sock, size - len(data), 8)
            except ConnectionResetError:
                raise Gone from None
            for fd in fds:
                os.close(fd)
            if not part:
                raise Gone
            data += part
        return data

    async def say(self, request: Request, payload: Payload, fds: list[int], *, need_reply: bool) -> bytes:
        """Send it and read the reply, if there has to be one."""
        await self.send(_wire(request, payload, need_reply), fds)
        if need_reply or request.name.startswith("GET_") or request is Request.SET_LOG_BASE:
            with anyio.fail_after(REPLY_S):
                _, _, size = HEADER.unpack(await self.read(HEADER.size))
                return await self.read(size)
        return b""

    # -- the guest

    def put(self, queue: int, kind: int, sector: int, length: int) -> None:
        """A request of three descriptors, published. Written through the file, which may have shrunk."""
        slot = self.published[queue] % (RING_SIZE // 4)
        base, first = queue * 0x80000, 4 * slot
        header, data = base + 0x10000 + slot * 64, base + 0x20000 + slot * 0x8000
        reads = kind == 0
        self.write(header, struct.pack("<IIQ", kind, 0, sector) + b"\xaa")
        chain = (
            (header, 16, 1, first + 1),
            (data, length, 3 if reads else 1, first + 2),
            (header + 16, 1, 2, 0),
        )
        for index, one in enumerate(chain):
            self.write(base + 16 * (first + index), struct.pack("<QIHH", *self._maybe_other(one)))
        self.write(base + 0x1000 + 4 + 2 * (self.published[queue] % RING_SIZE), struct.pack("<H", first))
        self.published[queue] = self.published[queue] + 1 & 0xFFFF
        self.write(base + 0x1000 + 2, struct.pack("<H", self.published[queue]))

    def _maybe_other(self, one: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        if self.choices is None or not self.choices.rarely(24):
            return one
        changed = list(one)
        at = self.choices.random.randrange(4)
        changed[at] = self.choices.number(changed[at]) & (1 << (64, 32, 16, 16)[at]) - 1
        return changed[0], changed[1], changed[2], changed[3]

    def write(self, at: int, data: bytes) -> None:
        os.pwrite(self.memory, data, at)

    def status(self, queue: int, slot: int) -> int:
        return os.pread(self.memory, 1, queue * 0x80000 + 0x10000 + slot * 64 + 16)[0]

    # -- the conversation

    def script(self) -> list[tuple[Request, Payload, list[int]]]:
        """What a good frontend says until its rings run."""
        R = Request  # noqa: N806
        # Without EVENT_IDX every answer is notified, whatever lies in the ring.
        left_out = Feature.LOG_ALL | Feature.RING_PACKED  # its rings are split ones
        features = U64(device().features & ~left_out & ~(0 if self.choices else Feature.EVENT_IDX))
        words: list[tuple[Request, Payload, list[int]]] = [
            (R.SET_OWNER, Empty(), []),
            (R.GET_FEATURES, Empty(), []),
            (R.SET_PROTOCOL_FEATURES, U64(int(OFFERED)), []),
            (R.GET_QUEUE_NUM, Empty(), []),
            (R.GET_MAX_MEM_SLOTS, Empty(), []),
            (R.GET_CONFIG, ConfigAccess(0, 0, bytes(60)), []),
            (R.SET_FEATURES, features, []),
            (R.SET_MEM_TABLE, MemoryTable(self.regions), [self.memory, self.memory]),
        ]
        for queue in range(QUEUES):
            ring = USER_ADDR + queue * 0x80000
            words += [
                (R.SET_VRING_NUM, VringState(queue, RING_SIZE), []),
                (R.SET_VRING_BASE, VringState(queue, 0), []),
                (R.SET_VRING_ADDR, VringAddress(queue, ring, ring + 0x2000, ring + 0x1000, None), []),
                (R.SET_VRING_CALL, VringFile(queue, True), [self.calls[queue]]),
                (R.SET_VRING_KICK, VringFile(queue, True), [self.kicks[queue]]),
                (R.SET_VRING_ENABLE, VringState(queue, 1), []),
            ]
        return words

    async def introduce(self) -> None:
        for request, payload, fds in self.script():
            await self.say_something_like(request, payload, fds)

    async def say_something_like(self, request: Request, payload: Payload, fds: list[int]) -> None:
        """The message, or now and then one that is a little different; or none, or two."""
        choices = self.choices
        if choices is None:
            await self.say(request, payload, fds, need_reply=True)
            return
        if choices.rarely(40):
            return
        for _ in range(2 if choices.rarely(30) else 1):
            await self._say_with_faults(request, payload, list(fds), choices)

    async def _say_with_faults(
        self, request: Request, payload: Payload, fds: list[int], choices: Choices
    ) -> None:
        if choices.rarely(12):
            payload = other_payload(payload, choices)
        extra: list[int] = []
        if fds and choices.rarely(10):
            extra.append(odd_descriptor(choices))
            fds[choices.random.randrange(len(fds))] = extra[0]
        if choices.rarely(60):
            fds = (fds + [self.memory] * 8)[: choices.random.randrange(9)]
        try:
            with suppress(struct.error, OverflowError):  # no such message can be written
                await self.say(request, payload, fds, need_reply=choices.rarely(2))
        finally:
            for fd in extra:
                os.close(fd)

    async def misbehave(self) -> None:
        """Requests, kicks and whatever else, for a while."""
        choices = self.choices
        assert choices is not None
        for _ in range(choices.random.randrange(30)):
            queue = choices.random.randrange(QUEUES)
            match choices.random.randrange(12):
                case 0 | 1 | 2 | 3 | 4:
                    kind = choices.random.choice((0, 1, 1, 4, 8, 11, 13))
                    self.put(queue, kind, choices.random.randrange(DISK_BYTES // 512), 4096)
                    self.kick(queue)
                case 5:
                    at = choices.random.randrange(MEMORY_BYTES)
                    self.write(at, choices.random.randbytes(choices.random.randrange(1, 32)))
                case 6 if choices.rarely(4):
                    os.ftruncate(
                        self.memory, choices.random.choice((0, 4096, MEMORY_BYTES // 2, MEMORY_BYTES))
                    )
                case 7:
                    await anyio.lowlevel.checkpoint()
                case _:
                    await self.say_something_like(*self.any_message(queue, choices))

    def any_message(self, queue: int, choices: Choices) -> tuple[Request, Payload, list[int]]:
        R, pick = Request, choices.random.choice  # noqa: N806
        log = MEMORY_BYTES // 4096 // 8
        inflight = INFLIGHT_RING_BYTES * QUEUES
        asked: list[tuple[Request, Payload, list[int]]] = [
            *self.script(),
            (R.GET_VRING_BASE, VringState(queue, 0), []),
            (R.SET_VRING_ENABLE, VringState(queue, pick((0, 1))), []),
            (R.SET_VRING_ERR, VringFile(queue, True), [self.calls[queue]]),
            (R.SET_VRING_CALL, VringFile(queue, False), []),
            (R.ADD_MEM_REG, SingleRegion(MemoryRegion(4 * MIB, 4096, USER_ADDR + 4 * MIB, 0)), [self.memory]),
            (R.REM_MEM_REG, SingleRegion(pick(self.regions)), []),
            (R.SET_LOG_BASE, LogArea(log, 0), [self.memory]),
            (R.SET_LOG_FD, Empty(), [self.calls[queue]]),
            (R.SET_FEATURES, U64(device().features), []),
            (R.GET_INFLIGHT_FD, InflightArea(0, 0, QUEUES, RING_SIZE, 24), []),
            (R.SET_INFLIGHT_FD, InflightArea(inflight, 0x100000, QUEUES, RING_SIZE, 24), [self.memory]),
            (R.SET_CONFIG, ConfigAccess(32, 0, bytes([pick((0, 1))])), []),
            (R.RESET_DEVICE, Empty(), []),
            (R.SET_BACKEND_REQ_FD, Empty(), [self.channel.fileno()]),
        ]
        return pick(asked)

    def kick(self, queue: int) -> None:
        with suppress(BlockingIOError):
            os.eventfd_write(self.kicks[queue], 1)


def _wire(request: Request, payload: Payload, need_reply: bool) -> bytes:
    data = encode_payload(payload)
    return HEADER.pack(request, 1 | (8 if need_reply else 0), len(data)) + data


LENGTHS = ("wire_bytes", "padding_bytes")


def other_payload(payload: Payload, choices: Choices) -> Payload:
    """One number of it is another."""
    if isinstance(payload, MemoryTable):
        regions = list(payload.regions)
        at = choices.random.randrange(len(regions))
        regions[at] = _other_region(regions[at], choices)
        return MemoryTable(tuple(regions))
    if isinstance(payload, SingleRegion):
        return SingleRegion(_other_region(payload.region, choices))
    values: dict[str, Any] = {each.name: getattr(payload, each.name) for each in fields(payload)}
    # Not how long the payload is: so much would have to be sent.
    numbers = [name for name, value in values.items() if type(value) is int and name not in LENGTHS]
    if not numbers:
        return payload
    name = choices.random.choice(numbers)
    return type(payload)(**{**values, name: choices.number(values[name])})


def _other_region(region: MemoryRegion, choices: Choices) -> MemoryRegion:
    name = choices.random.choice(("guest_addr", "bytes", "user_addr", "mmap_offset"))
    return replace(region, **{name: choices.number(getattr(region, name)) & (1 << 64) - 1})


def odd_descriptor(choices: Choices) -> int:
    return ODD[choices.random.choice(sorted(ODD))]()


def device() -> BlkDevice:
    return BlkDevice(DeviceShape(capacity_bytes=DISK_BYTES, num_queues=QUEUES))


# ---- the backend -----------------------------------------------------------------------------------------


class Bench:
    """A running device, and what was noticed about it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.faults: list[str] = []
        self.disconnected = 0
        self.server = FrontendServer(device(), engine.attach, self._publish)
        engine.on_event(self._on_event)

    def _publish(self, name: str, data: Mapping[str, Any]) -> None:
        if name == FRONTEND_DISCONNECTED:
            self.disconnected += 1
            if "fault" in str(data["reason"]):
                self.faults.append(data["reason"])

    def _on_event(self, event: EngineEvent) -> None:
        if event.kind is EventKind.ATTACHMENT_LOST:
            attachment = self.engine.attachment(event.attachment)
            if attachment is not None:
                self.server.disconnect(attachment, "its memory is gone")

    async def hold(self, conversation: Callable[[Frontend], Any], choices: Choices | None) -> None:
        """A connection, this conversation on it, its end."""
        ours, theirs = socket.socketpair()
        frontend = Frontend(theirs, choices)
        try:
            with anyio.fail_after(2 * REPLY_S):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self.server.serve, Endpoint(ours, listening=False))
                    with suppress(Gone):
                        await conversation(frontend)
                    frontend.sock.close()
        finally:
            frontend.close()


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    """A device on a file, with the real engine, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="vhs-hostile-", dir="/var/tmp") as folder:
        path = Path(folder) / "disk.img"
        with path.open("wb") as file:
            file.truncate(DISK_BYTES)
        disk = disks.open_disk(path, read_only=False, cache="writeback", lock_timeout_s=1, probe=probe)
        engine = await Engine.create(CONFIG, disk)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine.pump)
                yield Bench(engine)
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await engine.close()


CONFIG = EngineConfig(
    capacity_bytes=DISK_BYTES, block_bytes=512, num_queues=QUEUES, serial="hostile", options=engine_options(),
)  # fmt: skip


async def hostile(frontend: Frontend) -> None:
    await frontend.introduce()
    await frontend.misbehave()


async def good(frontend: Frontend) -> None:
    """A guest that writes and reads back: what every frontend must find, whoever came before it."""
    await frontend.introduce()
    frontend.write(0x20000, b"G" * 4096)
    for slot, kind in enumerate((1, 0)):
        frontend.put(0, kind, 64, 4096)
        frontend.kick(0)
        with anyio.fail_after(REPLY_S):
            while frontend.status(0, slot) == 0xAA:
                await anyio.wait_readable(frontend.calls[0])
                os.eventfd_read(frontend.calls[0])
        assert frontend.status(0, slot) == 0
    assert os.pread(frontend.memory, 4096, 0x20000 + 0x8000) == b"G" * 4096
    base = await frontend.say(Request.GET_VRING_BASE, VringState(0, 0), [], need_reply=False)
    assert struct.unpack("=II", base) == (0, 2)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def wait_descriptors(it: Bench, at_most: int) -> None:
    """A kick's descriptor is closed when its poll has ended, which may be after the attachment has: the
    engine is given turns until then."""
    with anyio.fail_after(REPLY_S):
        while open_descriptors() > at_most:
            await it.engine.snapshot()


async def play(it: Bench, seed: int) -> None:
    """A hostile conversation, sometimes two at once; then, sometimes, a good one."""
    choices = Choices(seed)
    before = open_descriptors()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(it.hold, hostile, choices)
        if choices.rarely(4):
            tasks.start_soon(it.hold, hostile, Choices(seed ^ 1 << 40))
    if choices.rarely(8):
        await it.hold(good, None)
    assert it.faults == []
    await wait_descriptors(it, before)
