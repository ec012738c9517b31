# SPDX-License-Identifier: Apache-2.0
"""The record of requests in flight between frontend and backend: what a new backend takes up, what it
refuses, and what the frontend may do with the region."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.habits import (
    HABITS,
    PROTOCOL,
    Habits,
    InflightRegion,
    Kept,
    Returning,
    Unconnected,
    cloud_hypervisor,
    get_inflight,
)
from tests.frontend import Frontend, Queue, _readable
from tests.guest.backends import Vhostsync
from tests.guest.images import new_image
from tests.vhost_client import NEED_REPLY, VERSION, ConnectionLostError, Message, VhostUserClient

BLOCK = 4096
WRITEBACK_OFFSET = 32
ANY = HABITS[0]


class Rig:
    """A disk, its backend of the moment, and a frontend that outlives it."""

    def __init__(self, work: Path, *, queues: int = 2) -> None:
        self.work = work
        self.disk = new_image(work / "disk.img", 4)
        self.backend: Vhostsync | None = None
        self.kept = Kept()
        self.frontend = Frontend(Unconnected(), queues=queues, queue_size=64)
        self.connection: Returning | None = None
        self.serve(queues)

    def serve(self, queues: int = 2) -> None:
        self.backend = Vhostsync(self.work, self.disk, queues=queues)

    def connect(self, habits: Habits = ANY) -> Returning:
        assert self.backend is not None and self.connection is None
        self.connection = Returning(self.backend.socket)
        self.connection.connect(self.frontend, habits, self.kept)
        return self.connection

    def kill(self) -> None:
        """The backend dies; returns when its socket says so."""
        assert self.backend is not None
        self.backend.process.kill()
        self.backend.__exit__(None, None, None)
        self.backend = None
        if self.connection is not None:
            assert self.connection.lost()
            self.connection.close()
            self.connection = None

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        if self.backend is not None:
            self.backend.__exit__(None, None, None)
        self.kept.close()
        self.frontend.close()


@pytest.fixture
def rig(work: Path) -> Iterator[Rig]:
    rig = Rig(work)
    try:
        yield rig
    finally:
        rig.close()


def _set_inflight(client: VhostUserClient, region: InflightRegion) -> int:
    """What a SET_INFLIGHT_FD that asks for an acknowledgement is answered: 0 is success."""
    client.send(Message.SET_INFLIGHT_FD, region.describe(), [region.fd], flags=VERSION | NEED_REPLY)
    answered, _, reply = client.receive()
    assert answered == Message.SET_INFLIGHT_FD
    return int.from_bytes(reply, "little")


@pytest.mark.parametrize("habits", HABITS, ids=lambda habits: habits.name)
def test_answered_but_not_told(rig: Rig, habits: Habits) -> None:
    """Killed between the used index and the call: the next backend calls without being asked anything."""
    rig.connect(habits)
    queue = rig.frontend.queues[1]
    request = rig.frontend.write(0, b"\1" * BLOCK, queue=1)
    while queue.ring.used_index() == 0:
        assert _readable([queue.call], 10)
        os.eventfd_read(queue.call)
    rig.kill()
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(queue.call)
    rig.serve()
    rig.connect(habits)
    assert _readable([queue.call], 10)
    rig.frontend.wait(request)
    assert request.ok and queue.ring.used_index() == 1


def test_killed_before_the_record_was_begun(rig: Rig) -> None:
    """The region is new, and the available index has gone on: nothing is skipped."""
    assert rig.backend is not None
    client = VhostUserClient(rig.backend.socket)
    client.send(Message.SET_PROTOCOL_FEATURES, int(PROTOCOL).to_bytes(8, "little"))
    rig.kept.region = get_inflight(client, 2, 64)
    rig.kill()
    client.close()
    requests = [rig.frontend.write(i * BLOCK, bytes([i]) * BLOCK, queue=i % 2) for i in range(8)]
    rig.serve()
    rig.connect(Habits("", cloud_hypervisor, None))
    rig.frontend.wait(*requests)
    assert all(request.ok for request in requests)


def test_region_again_after_a_stop(rig: Rig) -> None:
    """Stop, SET_INFLIGHT_FD with the same region, start (QEMU's stop and cont), and a crash after it."""
    connection = rig.connect()
    region = rig.kept.region
    assert region is not None
    for round_ in range(3):
        assert rig.frontend.write_now(0, bytes([round_]) * BLOCK).ok
        assert rig.frontend.stop() == [round_ + 1, 0]
        assert _set_inflight(connection.client, region) == 0
        assert rig.frontend.stop() == [round_ + 1, 0]  # a base that was not used yet stays what it is
        for number in range(2):
            rig.frontend.start_queue(number)
    assert rig.kept.marked(0) == []
    rig.kill()
    request = rig.frontend.write(BLOCK, b"\7" * BLOCK)
    rig.serve()
    rig.connect()
    rig.frontend.wait(request)
    assert rig.frontend.read_now(0, 2 * BLOCK) == b"\2" * BLOCK + b"\7" * BLOCK


def test_new_region_after_a_guest_reset(rig: Rig) -> None:
    """QEMU frees the region when the guest resets the device: new rings and a new, empty region."""
    connection = rig.connect()
    frontend = rig.frontend
    for number in range(70):  # the ring has wrapped
        frontend.write_now(number * BLOCK, b"\3" * BLOCK)
    frontend.stop()
    rig.kept.close()
    for number, old in enumerate(frontend.queues):
        frontend.queues[number] = Queue(frontend.memory, 64, event_idx=True)
        old.close()
    rig.kept.region = get_inflight(connection.client, 2, 64)
    assert _set_inflight(connection.client, rig.kept.region) == 0
    for number in range(2):
        frontend.start_queue(number)
    assert frontend.write_now(0, b"\4" * BLOCK).ok
    rig.kill()
    rig.serve()
    rig.connect()
    assert frontend.read_now(0, 2 * BLOCK) == b"\4" * BLOCK + b"\3" * BLOCK


@pytest.mark.parametrize("habits", HABITS, ids=lambda habits: habits.name)
def test_write_cache_mode_over_a_crash(rig: Rig, habits: Habits) -> None:
    """A guest that has chosen write-through sends no flushes, and no frontend tells a new backend of it."""

    def mode() -> tuple[bool, int]:
        """As the engine and the config space have it."""
        assert rig.backend is not None and rig.connection is not None
        status = rig.backend.qmp.execute("query-status")
        return status["write-cache"], rig.connection.client.get_config()[WRITEBACK_OFFSET]

    rig.connect(habits).client.set_config(WRITEBACK_OFFSET, b"\0")
    assert rig.frontend.write_now(0, b"\1" * BLOCK).ok
    assert mode() == (False, 0)
    for _ in range(2):
        rig.kill()
        rig.serve()
        rig.connect(habits)
        assert rig.frontend.write_now(0, b"\1" * BLOCK).ok
        assert mode() == (False, 0)
    assert rig.connection is not None
    rig.connection.client.set_config(WRITEBACK_OFFSET, b"\1")
    rig.kill()
    rig.serve()
    rig.connect(habits)
    assert rig.frontend.write_now(0, b"\1" * BLOCK).ok
    assert mode() == (True, 1)


def test_region_while_rings_run_is_refused(rig: Rig) -> None:
    connection = rig.connect()
    assert rig.kept.region is not None
    assert _set_inflight(connection.client, rig.kept.region) != 0
    assert rig.frontend.write_now(0, b"\5" * BLOCK).ok
    assert rig.kept.marked(0) == []


def test_foreign_region_is_refused(rig: Rig) -> None:
    """Another backend's layout (libvhost-user's for 64 descriptors) is smaller; one may also lie about the
    file, or lie askew."""
    connection = rig.connect()
    assert rig.kept.region is not None
    rig.frontend.stop()
    fd, whole = rig.kept.region.fd, rig.kept.region.mmap_bytes
    for wrong in (
        InflightRegion(fd, 2 * 1088, 0, 2, 64),
        InflightRegion(fd, 2 * whole, whole, 2, 64),
        InflightRegion(fd, whole, 4, 2, 64),
        InflightRegion(fd, whole, 1 << 63, 2, 64),
    ):
        assert _set_inflight(connection.client, wrong) != 0
    assert _set_inflight(connection.client, rig.kept.region) == 0
    rig.frontend.start_queue(0)
    assert rig.frontend.write_now(0, b"\6" * BLOCK).ok


def test_other_numbers_of_queues(rig: Rig) -> None:
    """A backend with fewer queues than the region is for ends the connection and says why; one with more
    goes on."""
    rig.connect()
    request = rig.frontend.write(0, b"\1" * BLOCK, queue=1)
    rig.kill()
    rig.serve(queues=1)
    assert rig.backend is not None and rig.kept.region is not None
    monitor = rig.backend.qmp
    client = VhostUserClient(rig.backend.socket)
    client.send(Message.SET_PROTOCOL_FEATURES, int(PROTOCOL).to_bytes(8, "little"))
    with pytest.raises(ConnectionLostError):
        _set_inflight(client, rig.kept.region)
    client.close()
    reason = monitor.wait_event("FRONTEND_DISCONNECTED")["reason"]
    assert reason == "SET_INFLIGHT_FD for 2 rings of a device with 1"
    rig.kill()
    rig.serve(queues=4)
    rig.connect()
    rig.frontend.wait(request)
    assert request.ok and rig.frontend.queues[1].ring.used_index() == 1
