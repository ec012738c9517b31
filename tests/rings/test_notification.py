# SPDX-License-Identifier: Apache-2.0
"""Descriptors that the frontend shares with the engine, and makes blocking, full, empty or slow to close:
nothing of that stops the engine, and the guest is told all the same."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.frontend import DEFAULT_FEATURES, Feature
from tests.guest_ring import TIMEOUT_S
from tests.model.rig import Rig, pattern, rig
from vhostsync._shim import lib

ALWAYS_TOLD = DEFAULT_FEATURES & ~Feature.EVENT_IDX
FULL = (1 << 64) - 2
ONE = struct.pack("=Q", 1)


@contextlib.contextmanager
def descriptors(kind: str) -> Iterator[tuple[int, int]]:
    """The end that is read and the one that is written, of one eventfd, pipe or socket; neither blocks."""
    if kind == "eventfd":
        read = write = os.eventfd(0, os.EFD_NONBLOCK)
    elif kind == "pipe":
        read, write = os.pipe2(os.O_NONBLOCK)
    else:
        pair = socket.socketpair()
        read, write = (each.detach() for each in pair)
        for fd in (read, write):
            os.set_blocking(fd, False)
    try:
        yield read, write
    finally:
        for fd in {read, write}:
            os.close(fd)


def fill(fd: int, kind: str) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, struct.pack("=Q", FULL) if kind == "eventfd" else bytes(4096))
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, ONE)


def empty(fd: int) -> None:
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 1 << 16):
            pass


def take(fd: int, kind: str) -> None:
    """What is there, whatever the descriptor's flags are."""
    with contextlib.suppress(BlockingIOError):
        if kind == "socket":
            with socket.socket(fileno=os.dup(fd)) as ours:
                ours.recv(4096, socket.MSG_DONTWAIT)
        else:
            os.preadv(fd, [bytearray(4096)], -1, os.RWF_NOWAIT)


def used_index(r: Rig, queue: int = 0) -> int:
    ring = r.guest.queues[queue].ring
    return r.guest.memory.u16(ring.used + 2).value


def readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(TIMEOUT_S * 1000))


KINDS = pytest.mark.parametrize("kind", ["eventfd", "pipe", "socket"])


@KINDS
def test_a_call_that_is_full_and_blocks_stops_nobody(kind: str) -> None:
    with rig(queues=2, features=ALWAYS_TOLD) as r, descriptors(kind) as (read, write):
        r.driver.call(lib.VS_CMD_VRING_CALL, attachment=0, queue=0, fd=os.dup(write))
        empty(read)
        fill(write, kind)
        os.set_blocking(write, True)  # of the open file, so also the engine's
        r.write(1, 1)
        r.driver.until(lambda: used_index(r) == 1, "the completion is shown")
        r.write_now(2, 2, queue=1)
        r.snapshot()
        empty(read)
        os.set_blocking(write, True)
        r.write(3, 3)
        assert readable(read)
        r.driver.until(lambda: used_index(r) == 2, "the next completion is shown")
        assert r.seen(r.source, 3) == pattern(3)


@KINDS
def test_an_error_descriptor_that_is_full_and_blocks_stops_nobody(kind: str) -> None:
    with rig(queues=2) as r, descriptors(kind) as (_, write):
        r.driver.call(lib.VS_CMD_VRING_ERR, attachment=0, queue=0, fd=os.dup(write))
        fill(write, kind)
        os.set_blocking(write, True)
        ring = r.guest.queues[0].ring
        r.guest.submit_raw(ring.size + 1)  # no such head: the queue breaks
        r.write_now(2, 2, queue=1)
        r.snapshot()


@KINDS
def test_a_kick_that_somebody_else_has_taken_stops_nobody(kind: str) -> None:
    """The frontend empties the descriptor, sometimes between the engine's look and its read."""
    with rig(queues=2) as r, descriptors(kind) as (read, write):
        r.driver.call(lib.VS_CMD_VRING_KICK, attachment=0, queue=0, fd=os.dup(read))
        os.set_blocking(read, True)
        for _ in range(2000):
            os.write(write, ONE)
            take(read, kind)
        r.write_now(2, 2, queue=1)
        request = r.write(1, 1, kick=False)
        os.write(write, ONE)
        r.guest.wait(request)
        assert request.ok


def test_a_descriptor_that_is_slow_to_close_stops_nobody() -> None:
    """A TCP socket that lingers: its last close waits for the other side to take what was sent."""
    listener = socket.create_server(("127.0.0.1", 0))
    with rig() as r, listener, socket.create_connection(listener.getsockname()) as ours:
        theirs, _ = listener.accept()
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
            ours.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    ours.send(bytes(1 << 16))
            r.driver.call(lib.VS_CMD_VRING_ERR, attachment=0, queue=0, fd=ours.detach())
            r.driver.call(lib.VS_CMD_VRING_ERR, attachment=0, queue=0, fd=-1)
            r.write_now(1, 1)
            r.snapshot()
