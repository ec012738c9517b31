# SPDX-License-Identifier: Apache-2.0
"""Hostile frontends against the real server, session and engine (tests/fuzz/sessions.py)."""

from __future__ import annotations

import os

import pytest

from tests.fuzz import sessions
from tests.fuzz.odd_descriptors import ODD
from tests.fuzz.python_targets import run
from tests.fuzz.sessions import Bench, Frontend, Gone
from vhostsync.vhost_user.messages import Request
from vhostsync.vhost_user.payloads import InflightArea, LogArea, MemoryTable, Payload, VringFile
from vhostsync.vhost_user.rules import INFLIGHT_RING_BYTES

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


async def test_conversations_made_from_numbers() -> None:
    """Always the same ones; `./run fuzz` makes others."""
    assert await run("sessions", 6, 1, lambda seed: None) > 20


def with_descriptors(frontend: Frontend) -> dict[str, tuple[Request, Payload, int]]:
    """Every message that brings descriptors which the engine uses, and how many of them."""
    log, inflight = LogArea(64, 0), InflightArea(2 * INFLIGHT_RING_BYTES, 0, 2, 16, 24)
    return {
        "memory": (Request.SET_MEM_TABLE, MemoryTable(frontend.regions), 2),
        "kick": (Request.SET_VRING_KICK, VringFile(0, True), 1),
        "call": (Request.SET_VRING_CALL, VringFile(0, True), 1),
        "err": (Request.SET_VRING_ERR, VringFile(0, True), 1),
        "log": (Request.SET_LOG_BASE, log, 1),
        "inflight": (Request.SET_INFLIGHT_FD, inflight, 1),
    }


async def offer(it: Bench, kind: str, what: str) -> None:
    """A frontend whose rings run brings that; the backend may refuse it, and end the connection."""

    async def conversation(frontend: Frontend) -> None:
        await frontend.introduce()
        request, payload, count = with_descriptors(frontend)[what]
        fd = ODD[kind]()
        try:
            await frontend.say(request, payload, [fd] * count, need_reply=True)
        finally:
            os.close(fd)
        for slot in range(3):
            frontend.put(0, 1, 8 * slot, 4096)
            frontend.kick(0)
        # Whatever it is, it may not keep the engine busy: each look is a wake-up or two of its own.
        before = (await it.engine.snapshot()).wakeups
        for _ in range(100):
            after = (await it.engine.snapshot()).wakeups
        assert after - before < 1000

    async def tolerant(frontend: Frontend) -> None:
        try:
            await conversation(frontend)
        except Gone:
            return

    await it.hold(tolerant, None)


@pytest.mark.parametrize("what", ["memory", "kick", "call", "err", "log", "inflight"])
async def test_descriptors_of_every_odd_kind(what: str) -> None:
    async with sessions.bench() as it:
        before = sessions.open_descriptors()
        for kind in ODD:
            await offer(it, kind, what)
            await sessions.wait_descriptors(it, before)
        await it.hold(sessions.good, None)
        assert it.faults == []
        assert it.disconnected == len(ODD) + 1
