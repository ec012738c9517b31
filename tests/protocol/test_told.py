# SPDX-License-Identifier: Apache-2.0
"""What a frontend has said is said again to a successor: the last of each, nothing that is over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostsync.host.owned_fd import OwnedFd
from vhostsync.vhost_user.attachment import MemoryRegion
from vhostsync.vhost_user.messages import Message, ProtocolFeature, Request
from vhostsync.vhost_user.payloads import (
    FEATURE_PROTOCOL_FEATURES,
    U64,
    Empty,
    InflightArea,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostsync.vhost_user.rules import Ring, State
from vhostsync.vhost_user.told import Told, duplicates
from vhostsync.vhost_user.virtio_blk import Feature

FEATURES = int(Feature.CONFIG_WCE) | FEATURE_PROTOCOL_FEATURES
ONE, TWO = MemoryRegion(0, 4096, 0x1000, 0), MemoryRegion(4096, 4096, 0x2000, 4096)
RUNNING = State(
    (Ring(64, True, True, True), Ring(64, True, False, True)), FEATURES, ProtocolFeature.CONFIG, (ONE, TWO)
)


class Frontend:
    def __init__(self) -> None:
        self.told = Told()

    def say(
        self, request: Request, payload: Payload, after: State, fds: int = 0, answer: int | None = None
    ) -> None:
        message = Message(request, payload, need_reply=True)
        came = [OwnedFd(os.eventfd(0)) for _ in range(fds)]
        self.told.note(message, duplicates(message, came), after, answer)
        for fd in came:
            fd.close()

    def start(self) -> None:
        self.say(Request.SET_PROTOCOL_FEATURES, U64(int(ProtocolFeature.CONFIG)), RUNNING)
        self.say(Request.SET_FEATURES, U64(FEATURES), RUNNING)
        self.say(Request.SET_MEM_TABLE, MemoryTable((ONE, TWO)), RUNNING, 2)
        self.say(Request.SET_INFLIGHT_FD, InflightArea(4096, 0, 2, 64, 24), RUNNING, 1)
        for queue in (0, 1):
            self.say(Request.SET_VRING_NUM, VringState(queue, 64), RUNNING)
            self.say(Request.SET_VRING_ADDR, VringAddress(queue, 0, 0, 0, None), RUNNING)
            self.say(Request.SET_VRING_BASE, VringState(queue, 0), RUNNING)
            self.say(Request.SET_VRING_CALL, VringFile(queue, True), RUNNING, 1)
            self.say(Request.SET_VRING_KICK, VringFile(queue, True), RUNNING, 1)
            self.say(Request.SET_VRING_ENABLE, VringState(queue, 1), RUNNING)
        self.say(Request.GET_VRING_BASE, VringState(1, 0), RUNNING, answer=17)

    def again(self, state: State = RUNNING, bases: dict[int, int] | None = None) -> list[tuple[Request, int]]:
        """Which requests, each with how many descriptors."""
        said = list(self.told.again(state, bases if bases is not None else {0: 42}, writeback=False))
        assert not any(message.need_reply for message, _ in said)
        return [(message.request, len(fds)) for message, fds in said]


@pytest.fixture
def frontend() -> Iterator[Frontend]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    made = Frontend()
    made.start()
    yield made
    made.told.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "a descriptor is left open"


def test_all_that_holds_in_an_order_that_the_rules_allow(frontend: Frontend) -> None:
    ring = [(Request.SET_VRING_NUM, 0), (Request.SET_VRING_BASE, 0), (Request.SET_VRING_ADDR, 0),
            (Request.SET_VRING_CALL, 1)]  # fmt: skip
    assert frontend.again() == [
        (Request.SET_PROTOCOL_FEATURES, 0), (Request.SET_FEATURES, 0), (Request.SET_MEM_TABLE, 2),
        (Request.SET_INFLIGHT_FD, 1), (Request.SET_CONFIG, 0),
        *ring, (Request.SET_VRING_KICK, 1), (Request.SET_VRING_ENABLE, 0),
        *ring, (Request.SET_VRING_ENABLE, 0),  # it was stopped, and stays so
    ]  # fmt: skip
    bases = {
        message.payload.queue: message.payload.num
        for message, _ in frontend.told.again(RUNNING, {0: 42}, writeback=True)
        if message.request is Request.SET_VRING_BASE and isinstance(message.payload, VringState)
    }
    assert bases == {0: 42, 1: 17}


def test_the_last_word_counts(frontend: Frontend) -> None:
    frontend.say(Request.SET_VRING_CALL, VringFile(0, False), RUNNING)
    frontend.say(Request.SET_MEM_TABLE, MemoryTable((ONE,)), State(RUNNING.rings, regions=(ONE,)), 1)
    said = frontend.again()
    assert (Request.SET_VRING_CALL, 0) in said and (Request.SET_MEM_TABLE, 1) in said


def test_memory_that_is_gone_is_not_named(frontend: Frontend) -> None:
    frontend.say(Request.REM_MEM_REG, SingleRegion(TWO), State(RUNNING.rings, regions=(ONE,)))
    assert (Request.SET_MEM_TABLE, 1) in frontend.again()
    frontend.say(Request.ADD_MEM_REG, SingleRegion(TWO), RUNNING, 1)
    assert (Request.SET_MEM_TABLE, 2) in frontend.again()


def test_a_reset_leaves_the_memory_and_the_connection(frontend: Frontend) -> None:
    after = State((Ring(), Ring()), None, ProtocolFeature.CONFIG, (ONE, TWO))
    frontend.say(Request.RESET_DEVICE, Empty(), after)
    assert frontend.again(after, {}) == [
        (Request.SET_PROTOCOL_FEATURES, 0), (Request.SET_MEM_TABLE, 2), (Request.SET_INFLIGHT_FD, 1)
    ]  # fmt: skip


def test_another_session_on_the_connection_begins_anew(frontend: Frontend) -> None:
    after = State((Ring(), Ring()), protocol_features=ProtocolFeature.CONFIG)
    frontend.say(Request.SET_OWNER, Empty(), after)
    assert frontend.again(after, {}) == [(Request.SET_PROTOCOL_FEATURES, 0)]
