# SPDX-License-Identifier: Apache-2.0
"""A frontend sends descriptors of a file system that hangs, as memory or where none belongs: its connection
ends, and meanwhile another one's guest and the control plane go on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.daemon.rig import WAIT_S, Served, await_true, image, overlay
from tests.daemon.test_hanging import assert_both_go_on, hanging, running
from tests.guest.images import new_image
from tests.guest_ring import Region
from tests.hanging_disk import HangingDisk, Op
from tests.sizes import MIB
from tests.vhost_client import (
    INFLIGHT,
    LOG,
    Message,
    ProtocolFeature,
    VhostUserClient,
    pack_memory,
    pack_slot,
)

__all__ = ["hanging"]

AREA = INFLIGHT.pack(65536, 0, 1, 128)
PROTOCOL = (
    ProtocolFeature.LOG_SHMFD | ProtocolFeature.INFLIGHT_SHMFD | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
REGION = Region(0, MIB, 0x7000_0000, 0, fd=-1)
MEMORY = {
    "the guest's memory": (Message.SET_MEM_TABLE, pack_memory([REGION])),
    "the guest's memory in a slot": (Message.ADD_MEM_REG, pack_slot(REGION)),
    "the dirty log": (Message.SET_LOG_BASE, LOG.pack(65536, 0)),
    "the record of requests in flight": (Message.SET_INFLIGHT_FD, AREA),
}


@contextmanager
def second(served: Served) -> Iterator[VhostUserClient]:
    """Another frontend, as far as to where it sends memory."""
    client = VhostUserClient(served.socket, timeout_s=WAIT_S)
    try:
        client.tell_u64(Message.SET_PROTOCOL_FEATURES, PROTOCOL)
        client.ask_u64(Message.GET_FEATURES)
        yield client
    finally:
        client.close()


def await_end(client: VhostUserClient) -> None:
    with pytest.raises(ConnectionError):
        client.receive()


def has_closed(served: Served, path: Path) -> bool:
    for each in Path(f"/proc/{served.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if each.readlink() == path:
                return False
    return True


@pytest.mark.parametrize("op", [Op.STATFS, Op.FLUSH])
@pytest.mark.parametrize("what", MEMORY)
def test_memory_that_hangs(work: Path, hanging: HangingDisk, what: str, op: Op) -> None:
    message, payload = MEMORY[what]
    with running(hanging, work, image(work / "a.img", 16)) as (served, guest), second(served) as client:
        fd = os.open(hanging.path, os.O_RDWR)
        try:
            hanging.hang(op)
            client.send(message, payload, [fd])
            hanging.await_hanging(op, WAIT_S)
            assert_both_go_on(served, guest, 1)
            await_end(client)
            reason = "has not answered for 5 s" if op is Op.STATFS else "lies on FUSE"
            await_true(lambda: reason in served.process.last_output(5), "the reason is logged")
            assert_both_go_on(served, guest, 100)
        finally:
            hanging.go_on()
            os.close(fd)


@pytest.mark.parametrize(
    "message", [Message.GET_FEATURES, Message.REM_MEM_REG, Message.SET_VRING_KICK, 21], ids=str
)
def test_descriptors_that_hang_where_none_belong(work: Path, hanging: HangingDisk, message: int) -> None:
    with running(hanging, work, image(work / "a.img", 16)) as (served, guest), second(served) as client:
        fds = [os.open(hanging.path, os.O_RDWR) for _ in range(2)]
        try:
            hanging.hang(Op.FLUSH)
            client.send(message, bytes(8), fds)
            hanging.await_hanging(Op.FLUSH, WAIT_S)
            assert_both_go_on(served, guest, 1)
            await_end(client)
            assert_both_go_on(served, guest, 100)
        finally:
            hanging.go_on()
            for fd in fds:
                os.close(fd)


def test_more_that_hang_than_there_are_threads(work: Path, hanging: HangingDisk) -> None:
    with running(hanging, work, image(work / "a.img", 16)) as (served, guest):
        fd = os.open(hanging.path, os.O_RDWR)
        try:
            hanging.hang(Op.FLUSH, Op.STATFS)
            for _ in range(24):
                with second(served) as client, suppress(ConnectionError):
                    client.send(Message.GET_FEATURES, b"", [fd])
                    client.receive()
            assert_both_go_on(served, guest, 1)
            with served.guest() as other:  # shared memory is looked at without them
                other.transport.set_memory(other.memory.regions)
            hanging.go_on()
            await_true(lambda: has_closed(served, hanging.path), "all of them are closed")
        finally:
            hanging.go_on()
            os.close(fd)


@pytest.fixture(params=["disk", "overlay"])
def local_folder(request: pytest.FixtureRequest, work: Path) -> Iterator[Path]:
    """On a disk of the host, and on the root file system that a container has."""
    with ExitStack() as undo:
        yield work if request.param == "disk" else undo.enter_context(overlay(work)).folder


def test_memory_in_a_file_of_a_local_file_system(work: Path, local_folder: Path) -> None:
    """QEMU's memory-backend-file."""
    with Served(work, image(work / "a.img", 16)) as served, second(served) as client:
        fd = os.open(new_image(local_folder / "memory", 1), os.O_RDWR)
        message, payload = MEMORY["the guest's memory"]
        try:
            client.send(message, payload, [fd])
            client.ask_u64(Message.GET_FEATURES)
        finally:
            os.close(fd)


def test_memory_in_a_device_that_is_none(work: Path) -> None:
    with Served(work, image(work / "a.img", 16)) as served, second(served) as client:
        message, payload = MEMORY["the guest's memory"]
        device = os.open("/dev/zero", os.O_RDWR)
        try:
            client.send(message, payload, [device])
            await_end(client)
        finally:
            os.close(device)
