# SPDX-License-Identifier: Apache-2.0
"""The whole backend, `vhostsync serve` on real files, driven by the tests' own driver over a socket."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.frontend import DEFAULT_FEATURES, Feature, Frontend
from tests.guest.backends import Vhostsync
from tests.guest_ring import GuestMemory
from tests.sizes import MIB
from tests.vhost_client import VhostUserTransport

DISK_BYTES = 16 * MIB
WRITEBACK_AT = 32
"""Where the config space has the byte that says write-back or write-through (virtio 1.2, 5.2.4)."""


def block(number: int) -> bytes:
    return struct.pack("<Q", number) * 512


@contextmanager
def backend(work: Path, **options: int) -> Iterator[Vhostsync]:
    disk = work / "source.img"
    if not disk.exists():
        disk.write_bytes(bytes(DISK_BYTES))
    with Vhostsync(work, disk, queues=2, **options) as running:  # type: ignore[arg-type]
        yield running


@contextmanager
def guest(
    running: Vhostsync, *, mem_slots: bool = False, features: int = DEFAULT_FEATURES
) -> Iterator[Frontend]:
    transport = VhostUserTransport(running.socket, mem_slots=mem_slots)
    frontend = Frontend(transport, queues=2, features=features, memory=GuestMemory((8 * MIB, 8 * MIB)))
    try:
        frontend.start()
        yield frontend
    finally:
        frontend.close()


@pytest.mark.parametrize("mem_slots", [False, True], ids=["table", "slots"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
def test_read_and_write_through_a_socket(work: Path, mem_slots: bool, event_idx: bool) -> None:
    features = DEFAULT_FEATURES if event_idx else DEFAULT_FEATURES & ~Feature.EVENT_IDX
    with backend(work) as running:
        with guest(running, mem_slots=mem_slots, features=features) as frontend:
            for number in range(20):
                assert frontend.write_now(number * 4096, block(number), queue=number % 2).ok
            assert frontend.flush_now().ok
            for number in range(20):
                assert frontend.read_now(number * 4096, 4096, queue=(number + 1) % 2) == block(number)
            assert frontend.stop() == [21, 20]
        running.stop()
    assert (work / "source.img").read_bytes()[: 20 * 4096] == b"".join(map(block, range(20)))


def test_the_config_space_and_the_write_mode(work: Path) -> None:
    with backend(work) as running, guest(running) as frontend:
        assert isinstance(frontend.transport, VhostUserTransport)
        client = frontend.transport.client
        config = client.get_config()
        assert int.from_bytes(config[:8], "little") * 512 == DISK_BYTES
        assert config[WRITEBACK_AT] == 1
        client.set_config(WRITEBACK_AT, b"\0")
        assert client.get_config()[WRITEBACK_AT] == 0
        assert frontend.write_now(0, block(1)).ok


def test_a_frontend_that_goes_without_a_word_and_comes_back(work: Path) -> None:
    with backend(work) as running:
        for round_ in range(3):
            with guest(running) as frontend:
                assert frontend.write_now(round_ * 4096, block(round_)).ok
                for number in range(30):  # left in flight
                    frontend.write((100 + number) * 4096, block(number), queue=1)
        with guest(running) as frontend:
            for round_ in range(3):
                assert frontend.read_now(round_ * 4096, 4096) == block(round_)
        running.stop()


def test_a_rude_client_does_not_disturb_the_one_that_works(work: Path) -> None:
    with backend(work) as running, guest(running) as frontend:
        rude = VhostUserTransport(running.socket).client
        rude.send_raw(b"\xff" * 64)
        with pytest.raises(ConnectionError):
            rude.receive()
        rude.close()
        assert frontend.write_now(0, block(7)).ok
        assert frontend.read_now(0, 4096) == block(7)


@pytest.mark.parametrize("keep", [False, True], ids=["leave", "keep"])
def test_mirror_and_switch_with_requests_in_flight(work: Path, keep: bool) -> None:
    source, destination = work / "source.img", work / "destination.img"
    destination.write_bytes(b"\xa5" * DISK_BYTES)
    with backend(work) as running, guest(running) as frontend:
        for number in range(64):
            assert frontend.write_now(number * 4096, block(number)).ok
        running.start_mirror(destination)
        running.wait_steady()
        assert frontend.write_now(0, block(1000)).ok
        assert frontend.flush_now().ok
        counts = running.status()["counts"]
        assert counts["writes-flushed"] == counts["source-generation"] == 65
        under_way = [frontend.write((200 + n) * 4096, block(n), queue=n % 2) for n in range(50)]
        pause_ms = running.switch(keep_mirror=keep)
        assert pause_ms is not None and pause_ms > 0
        frontend.wait(*under_way)
        assert all(request.ok for request in under_way)
        assert frontend.write_now(4096, block(2000)).ok
        assert frontend.flush_now().ok
        assert frontend.read_now(4096, 4096) == block(2000)
        assert frontend.stop()
        new, old = destination.read_bytes(), source.read_bytes()
        assert new[:8192] == block(1000) + block(2000)
        assert new[200 * 4096 : 250 * 4096] == b"".join(map(block, range(50)))
        assert old[4096:8192] == block(2000 if keep else 1)
        if keep:
            assert old == new
        running.stop()
