# SPDX-License-Identifier: Apache-2.0
"""How frontends come back to a backend that was killed: the messages in the order and with the values that
QEMU and cloud-hypervisor send, and the record of requests in flight that outlives the backend.

    QEMU              asks for the features again, SET_INFLIGHT_FD before memory and rings, BASE is the used
                      index (what virtio_queue_restore_last_avail_idx leaves; of
                      a packed ring, what it was before), KICK before ENABLE before CALL,
                      and hardly ever waits for an acknowledgement
    cloud-hypervisor  SET_PROTOCOL_FEATURES without GET, memory and sizes before the region, BASE is the
                      *available* index, CALL before KICK, every message acknowledged, tries every 100 ms
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

from tests.frontend import Feature, Frontend, Queue
from tests.vhost_client import (
    HEADER,
    INFLIGHT,
    STATE,
    ConnectionLostError,
    Message,
    ProtocolFeature,
    VhostUserClient,
    VhostUserTransport,
    pack_addresses,
    pack_memory,
)

PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.INFLIGHT_SHMFD
)


@dataclass(frozen=True)
class InflightRegion:
    """The descriptor with its place: what a frontend keeps from one backend to the next."""

    fd: int
    mmap_bytes: int
    mmap_offset: int
    queues: int
    queue_size: int

    def close(self) -> None:
        os.close(self.fd)

    def describe(self) -> bytes:
        return INFLIGHT.pack(self.mmap_bytes, self.mmap_offset, self.queues, self.queue_size)


def get_inflight(client: VhostUserClient, queues: int, queue_size: int) -> InflightRegion:
    """GET_INFLIGHT_FD: a region of the backend's making, for the caller to close."""
    client.send(Message.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, queue_size))
    header, fds, _, _ = socket.recv_fds(client.socket, HEADER.size, 1)
    if not header:
        raise ConnectionLostError("the backend closed the connection")
    try:
        answered, _, size = HEADER.unpack(header)
        assert answered == Message.GET_INFLIGHT_FD and size == INFLIGHT.size
        place = INFLIGHT.unpack(client._exactly(size))
        (fd,) = fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return InflightRegion(fd, *place)


def _pack_regions(frontend: Frontend) -> bytes:
    return pack_memory(frontend.memory.regions)


def _pack_address(number: int, queue: Queue) -> bytes:
    return pack_addresses(number, queue.ring.addresses())


@dataclass
class Kept:
    """What a frontend keeps beside memory and rings; None: it has not got a region yet."""

    region: InflightRegion | None = None

    def or_ask(self, client: VhostUserClient, frontend: Frontend) -> InflightRegion:
        if self.region is None:
            self.region = get_inflight(client, len(frontend.queues), frontend.queues[0].ring.size)
        return self.region

    def marked(self, queue: int) -> list[int]:
        """The heads that the record has as in flight (vhost-user specification, QueueRegionSplit), or the
        entries (QueueRegionPacked, whose part is twice as large)."""
        if self.region is None:
            return []
        ring_bytes = self.region.mmap_bytes // self.region.queues
        part = os.pread(self.region.fd, ring_bytes, self.region.mmap_offset + queue * ring_bytes)
        entry = 32 if ring_bytes > 32 * 1024 else 16
        return [head for head in range(self.region.queue_size) if part[entry + entry * head] == 1]

    def close(self) -> None:
        if self.region is not None:
            self.region.close()
            self.region = None


Handshake = Callable[[VhostUserClient, Frontend, Kept], None]
"""Brings a connection up to running rings."""


def qemu(client: VhostUserClient, frontend: Frontend, kept: Kept) -> None:
    offered = client.ask_u64(Message.GET_FEATURES)
    protocol = client.ask_u64(Message.GET_PROTOCOL_FEATURES)
    client.send(Message.SET_PROTOCOL_FEATURES, (protocol & PROTOCOL).to_bytes(8, "little"))
    assert client.ask_u64(Message.GET_QUEUE_NUM) >= len(frontend.queues)
    assert client.ask_u64(Message.GET_MAX_MEM_SLOTS) >= 32
    client.send(Message.SET_OWNER)
    features = (frontend.features & offered | Feature.PROTOCOL_FEATURES).to_bytes(8, "little")
    client.send(Message.SET_FEATURES, features)
    region = kept.or_ask(client, frontend)
    client.send(Message.SET_INFLIGHT_FD, region.describe(), [region.fd])
    client.send(Message.SET_FEATURES, features)
    client.reply_ack = True  # SET_MEM_TABLE is what QEMU does ask an acknowledgement for
    client.tell(Message.SET_MEM_TABLE, _pack_regions(frontend), [r.fd for r in frontend.memory.regions])
    for number, queue in enumerate(frontend.queues):
        client.send(Message.SET_VRING_NUM, STATE.pack(number, queue.ring.size))
        client.send(Message.SET_VRING_BASE, STATE.pack(number, queue.ring.base_after_crash()))
        client.send(Message.SET_VRING_ADDR, _pack_address(number, queue))
        client.send(Message.SET_VRING_KICK, number.to_bytes(8, "little"), [queue.kick])
    for number in range(len(frontend.queues)):
        client.send(Message.SET_VRING_ENABLE, STATE.pack(number, 1))
    for number, queue in enumerate(frontend.queues):
        client.send(Message.SET_VRING_CALL, number.to_bytes(8, "little"), [queue.call])


def cloud_hypervisor(client: VhostUserClient, frontend: Frontend, kept: Kept) -> None:
    client.send(Message.SET_OWNER)
    offered = client.ask_u64(Message.GET_FEATURES)
    features = (frontend.features & offered | Feature.PROTOCOL_FEATURES).to_bytes(8, "little")
    client.send(Message.SET_FEATURES, features)
    client.send(Message.SET_PROTOCOL_FEATURES, int(PROTOCOL).to_bytes(8, "little"))
    client.reply_ack = True
    client.tell(Message.SET_FEATURES, features)
    client.tell(Message.SET_MEM_TABLE, _pack_regions(frontend), [r.fd for r in frontend.memory.regions])
    for number, queue in enumerate(frontend.queues):
        client.tell(Message.SET_VRING_NUM, STATE.pack(number, queue.ring.size))
    region = kept.or_ask(client, frontend)
    client.tell(Message.SET_INFLIGHT_FD, region.describe(), [region.fd])
    for number, queue in enumerate(frontend.queues):
        client.tell(Message.SET_VRING_ADDR, _pack_address(number, queue))
        client.tell(Message.SET_VRING_BASE, STATE.pack(number, queue.ring.next_avail))
        client.tell_u64(Message.SET_VRING_CALL, number, [queue.call])
        client.tell_u64(Message.SET_VRING_KICK, number, [queue.kick])
    for number in range(len(frontend.queues)):
        client.tell(Message.SET_VRING_ENABLE, STATE.pack(number, 1))


@dataclass(frozen=True)
class Habits:
    """One frontend's way. `retry_s`: how often it tries to connect; None: when the test tells it to."""

    name: str
    handshake: Handshake
    retry_s: float | None


HABITS = (Habits("qemu", qemu, None), Habits("cloud-hypervisor", cloud_hypervisor, 0.1))


class Unconnected(VhostUserTransport):
    """A frontend's before its first connection."""

    def __init__(self) -> None:
        pass

    def close(self) -> None:
        pass


class Returning(VhostUserTransport):
    """One connection of a frontend that keeps its memory, its rings and the region from one to the next.
    `connect` in place of `Frontend.start`. Raises OSError when the backend dies meanwhile."""

    def connect(self, frontend: Frontend, habits: Habits, kept: Kept) -> None:
        habits.handshake(self.client, frontend, kept)
        frontend.transport = self
        frontend.started = True

    def lost(self) -> bool:
        """Whether the backend has ended the connection. Does not wait."""
        poller = select.poll()
        poller.register(self.client.socket, select.POLLIN)
        if not poller.poll(0):
            return False
        try:
            data = self.client.socket.recv(1)
        except ConnectionError:
            return True
        assert not data, "the backend says something that it was not asked"
        return True
