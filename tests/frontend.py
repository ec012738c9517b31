# SPDX-License-Identifier: Apache-2.0
"""A virtio-blk driver for tests: what a guest does, in Python over a memfd and eventfds.

It keeps the guest's side of the device (virtio 1.2, 5.2) and knows nothing of how the backend is reached: a
`Transport` does that, either straight into the engine (tests/engine_driver.py) or over a vhost-user socket
(tests/vhost_client.py).

One thread uses a `Frontend`. It waits with poll on the call descriptors, never with a sleep.

For rubbish on purpose: `SplitRing.write_descriptor`, `SplitRing.publish`, `Frontend.submit_raw`;
`Request.scribble` overwrites a buffer in flight.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Protocol

from tests.guest_ring import TIMEOUT_S, GuestMemory, PackedRing, Region, RingAddresses, Segment, SplitRing

SECTOR_BYTES = 512
HEADER = struct.Struct("<IIQ")
ZERO_SEGMENT = struct.Struct("<QII")


class FrontendTimeout(AssertionError):  # noqa: N818 -- a test's failure, named for what happened
    """What the test waits for did not happen in time."""


class Op(IntEnum):
    """Request types (virtio 1.2, 5.2.6)."""

    READ = 0
    WRITE = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(IntEnum):
    """Status bytes; PENDING is what a test puts there before it submits, never a backend's answer."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    PENDING = 0xAA


class Feature(IntEnum):
    """Feature bits, as masks (virtio 1.2, 5.2.3 and 6)."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34


DEFAULT_FEATURES = (
    Feature.VERSION_1
    | Feature.SEG_MAX
    | Feature.BLK_SIZE
    | Feature.FLUSH
    | Feature.CONFIG_WCE
    | Feature.MQ
    | Feature.DISCARD
    | Feature.WRITE_ZEROES
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
)


class Transport(Protocol):
    """How a frontend reaches its backend. Descriptors stay the caller's: a transport duplicates them."""

    def set_features(self, features: int) -> None: ...
    def set_memory(self, regions: Sequence[Region]) -> None: ...
    def start_ring(
        self, queue: int, size: int, addresses: RingAddresses, base: int, kick: int, call: int, err: int
    ) -> None: ...
    def enable_ring(self, queue: int, enabled: bool) -> None: ...
    def stop_ring(self, queue: int) -> int: ...
    def close(self) -> None: ...


@dataclass(eq=False)
class Request:
    """One request in flight or over. `offset` and `length` in bytes; `status` PENDING until it is reaped."""

    op: int
    queue: int
    offset: int = 0
    length: int = 0
    status: int = Status.PENDING
    data: bytes = b""
    """What a read or GET_ID returned; what a write was given."""
    written: int = 0
    head: int = -1
    status_addr: int = 0
    header_addr: int = 0
    payload_addr: int = 0
    payload_bytes: int = 0
    payload_align: int = 4096
    """Below a sector: it is aligned to that and to no more (large pieces of guest memory would be)."""
    memory: GuestMemory | None = None
    chain: list[Segment] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.head == -2

    @property
    def ok(self) -> bool:
        return self.done and self.status == Status.OK

    @property
    def payload_shift(self) -> int:
        return self.payload_align if self.payload_align < SECTOR_BYTES else 0

    def scribble(self, data: bytes, at: int = 0) -> None:
        """Overwrites the payload in guest memory, as a guest may do while the request is in flight."""
        assert self.memory is not None and at + len(data) <= self.payload_bytes
        self.memory.write(self.payload_addr + at, data)


class Queue:
    """A ring, its eventfds and what is in flight on it."""

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool, packed: bool = False) -> None:
        self.ring = (PackedRing if packed else SplitRing)(memory, size, event_idx=event_idx)
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.base = self.ring.first_base
        """Where the device is to go on when the ring is started."""
        self.in_flight: dict[int, Request] = {}
        self.raw_done: dict[int, int] = {}

    def close(self) -> None:
        self.ring.release()
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


class Frontend:
    """A guest's driver with its memory and queues. `start` first; a context manager does that and `close`."""

    def __init__(
        self,
        transport: Transport,
        *,
        queues: int = 1,
        queue_size: int = 128,
        features: int = DEFAULT_FEATURES,
        memory: GuestMemory | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.transport = transport
        self.features = features
        self.memory = memory or GuestMemory()
        self.indirect = bool(features & Feature.INDIRECT_DESC)
        self.timeout_s = timeout_s
        self.queues = [
            Queue(
                self.memory,
                queue_size,
                event_idx=bool(features & Feature.EVENT_IDX),
                packed=bool(features & Feature.RING_PACKED),
            )
            for _ in range(queues)
        ]
        self.started = False
        self._closed = False

    # -- life ---------------------------------------------------------------

    def start(self) -> None:
        self.transport.set_features(self.features)
        self.transport.set_memory(self.memory.regions)
        for number in range(len(self.queues)):
            self.start_queue(number)
        self.started = True

    def start_queue(self, number: int) -> None:
        queue = self.queues[number]
        self.transport.start_ring(
            number,
            queue.ring.size,
            queue.ring.addresses(),
            queue.base,
            queue.kick,
            queue.call,
            queue.err,
        )
        self.transport.enable_ring(number, True)

    def stop(self) -> list[int]:
        """Stops all rings (each drains) and returns their bases."""
        self.started = False
        for number, queue in enumerate(self.queues):
            queue.base = self.transport.stop_ring(number)
        return [queue.base for queue in self.queues]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.transport.close()
        for queue in self.queues:
            queue.close()
        self.memory.close()

    def __enter__(self) -> Frontend:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- requests -----------------------------------------------------------

    def write(
        self,
        offset: int,
        data: bytes,
        *,
        queue: int = 0,
        segments: int = 1,
        kick: bool = True,
        align: int = 4096,
    ) -> Request:
        request = Request(Op.WRITE, queue, offset, len(data), data=data)
        return self._build(request, data, device_writes=0, segments=segments, kick=kick, align=align)

    def read(
        self,
        offset: int,
        length: int,
        *,
        queue: int = 0,
        segments: int = 1,
        kick: bool = True,
        align: int = 4096,
    ) -> Request:
        request = Request(Op.READ, queue, offset, length)
        return self._build(request, b"", device_writes=length, segments=segments, kick=kick, align=align)

    def flush(self, *, queue: int = 0, kick: bool = True) -> Request:
        return self._build(Request(Op.FLUSH, queue), b"", device_writes=0, segments=1, kick=kick)

    def get_id(self, *, queue: int = 0) -> Request:
        return self._build(Request(Op.GET_ID, queue, 0, 20), b"", device_writes=20, segments=1, kick=True)

    def discard(self, offset: int, length: int, *, queue: int = 0, kick: bool = True) -> Request:
        segment = ZERO_SEGMENT.pack(offset // SECTOR_BYTES, length // SECTOR_BYTES, 0)
        request = Request(Op.DISCARD, queue, offset, length)
        return self._build(request, segment, device_writes=0, segments=1, kick=kick)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, queue: int = 0, kick: bool = True
    ) -> Request:
        segment = ZERO_SEGMENT.pack(offset // SECTOR_BYTES, length // SECTOR_BYTES, int(unmap))
        request = Request(Op.WRITE_ZEROES, queue, offset, length)
        return self._build(request, segment, device_writes=0, segments=1, kick=kick)

    def request(
        self, op: int, *, sector: int = 0, payload: bytes = b"", device_writes: int = 0, queue: int = 0
    ) -> Request:
        """A well-formed chain with any type, sector and lengths at all."""
        length = len(payload) or device_writes
        request = Request(op, queue, sector * SECTOR_BYTES, length, data=payload)
        return self._build(
            request, payload, device_writes=device_writes, segments=1, kick=True, sector=sector
        )

    def _build(
        self,
        request: Request,
        payload: bytes,
        *,
        device_writes: int,
        segments: int,
        kick: bool,
        align: int = 4096,
        sector: int | None = None,
    ) -> Request:
        memory = self.memory
        request.memory = memory
        request.header_addr = memory.alloc(16)
        request.status_addr = memory.alloc(1)
        if sector is None:
            sector = request.offset // SECTOR_BYTES if request.op in (Op.READ, Op.WRITE) else 0
        memory.write(request.header_addr, HEADER.pack(request.op, 0, sector))
        memory.write(request.status_addr, bytes([Status.PENDING]))
        chain = [Segment(request.header_addr, 16)]
        size = len(payload) or device_writes
        if size:
            request.payload_bytes = size
            request.payload_align = align
            shift = request.payload_shift
            request.payload_addr = memory.alloc(size + shift, align=align) + shift
            if payload:
                memory.write(request.payload_addr, payload)
            for start, end in _split(size, segments):
                chain.append(Segment(request.payload_addr + start, end - start, write=bool(device_writes)))
        chain.append(Segment(request.status_addr, 1, write=True))
        request.chain = chain
        return self._submit(request, kick=kick)

    def _submit(self, request: Request, *, kick: bool) -> Request:
        queue = self.queues[request.queue]
        request.head = queue.ring.add(request.chain, indirect=self.indirect)
        queue.in_flight[request.head] = request
        queue.ring.publish(request.head)
        if kick:
            self.kick(request.queue)
        return request

    def submit_raw(self, *heads: int, queue: int = 0) -> None:
        """Publishes heads whose descriptors the test wrote itself, and kicks."""
        self.queues[queue].ring.publish(*heads)
        self.kick(queue, force=True)

    def kick(self, queue: int, *, force: bool = False) -> None:
        if self.queues[queue].ring.wants_kick() or force:
            os.eventfd_write(self.queues[queue].kick, 1)

    # -- completions --------------------------------------------------------

    def poll(self) -> list[Request]:
        """What has completed by now, without waiting."""
        done: list[Request] = []
        for queue in self.queues:
            for head, written in queue.ring.reap():
                request = queue.in_flight.pop(head, None)
                if request is None:
                    queue.raw_done[head] = written
                    continue
                self._finish(request, written)
                done.append(request)
        return done

    def _finish(self, request: Request, written: int) -> None:
        memory = self.memory
        request.head = -2
        request.written = written
        request.status = memory.read(request.status_addr, 1)[0]
        if request.op in (Op.READ, Op.GET_ID):
            request.data = memory.read(request.payload_addr, request.payload_bytes)
        memory.free(request.header_addr, 16)
        memory.free(request.status_addr, 1)
        # The payload stays allocated, as a test may still scribble on it, until `recycle`.

    def recycle(self, request: Request) -> None:
        """Gives a finished request's payload back to the allocator."""
        assert request.done
        if request.payload_bytes:
            shift = request.payload_shift
            self.memory.free(
                request.payload_addr - shift, request.payload_bytes + shift, align=request.payload_align
            )
            request.payload_bytes = 0

    def wait(self, *requests: Request, timeout_s: float | None = None) -> list[Request]:
        """Waits until all given are done and returns all that completed meanwhile. FrontendTimeout."""
        done = self.poll()
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while not all(request.done for request in requests):
            self._await_call(deadline, requests)
            done += self.poll()
        return done

    def wait_raw(self, head: int, *, queue: int = 0, timeout_s: float | None = None) -> int:
        """Waits for a head that the test published itself; how many bytes the device says it wrote."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        self.poll()
        while head not in self.queues[queue].raw_done:
            self._await_call(deadline, ())
            self.poll()
        return self.queues[queue].raw_done.pop(head)

    def wait_broken(self, queue: int, *, timeout_s: float | None = None) -> None:
        """Waits for VRING_ERR of a queue."""
        timeout = self.timeout_s if timeout_s is None else timeout_s
        if not _readable([self.queues[queue].err], timeout):
            raise FrontendTimeout(f"queue {queue} was not marked broken within {timeout} s")
        os.eventfd_read(self.queues[queue].err)

    def _await_call(self, deadline: float, requests: Iterable[Request]) -> None:
        armed = [queue.ring.arm() for queue in self.queues]
        if not all(armed):
            return
        left = deadline - time.monotonic()
        ready = _readable([queue.call for queue in self.queues], max(left, 0))
        for fd in ready:
            os.eventfd_read(fd)
        if not ready and left <= 0:
            waiting = [f"type {r.op} at {r.offset}" for r in requests if not r.done]
            raise FrontendTimeout(f"not completed in time: {', '.join(waiting) or 'raw head'}")

    # -- one call each, for simple tests -------------------------------------

    def write_now(self, offset: int, data: bytes, **options: int) -> Request:
        request = self.write(offset, data, **options)  # type: ignore[arg-type]
        self.wait(request)
        self.recycle(request)
        return request

    def read_now(self, offset: int, length: int, **options: int) -> bytes:
        request = self.read(offset, length, **options)  # type: ignore[arg-type]
        self.wait(request)
        assert request.ok, f"read at {offset} ended with status {request.status}"
        self.recycle(request)
        return request.data

    def flush_now(self, queue: int = 0) -> Request:
        request = self.flush(queue=queue)
        self.wait(request)
        return request


def _readable(fds: Sequence[int], timeout_s: float) -> list[int]:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(timeout_s * 1000)]


def _split(size: int, pieces: int) -> list[tuple[int, int]]:
    """Cuts `size` bytes into `pieces` parts on sector borders where that is possible."""
    step = -(-size // pieces)
    if size % SECTOR_BYTES == 0 and size >= pieces * SECTOR_BYTES:
        step = -(-step // SECTOR_BYTES) * SECTOR_BYTES
    return [(start, min(start + step, size)) for start in range(0, size, step)]
