# SPDX-License-Identifier: Apache-2.0
"""Whatever is begun and ended again leaves nothing behind: not a descriptor, mapping, thread or memory.

VHOSTSYNC_LEAK_CYCLES is how many cycles (20 unless told). By hand: 1000.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.habits import HABITS, Habits, Kept, Returning, Unconnected
from tests.daemon.rig import Served, await_true, flush, image, write_block
from tests.frontend import DEFAULT_FEATURES, Feature, Frontend
from tests.guest.qmp_client import QmpError
from tests.guest_ring import GuestMemory
from tests.holding import Holding, holding
from tests.sizes import MIB
from tests.vhost_client import LOG, ConnectionLostError, Message, VhostUserClient

CYCLES = int(os.environ.get("VHOSTSYNC_LEAK_CYCLES", "20"))
WARM_UP = 12
ROUNDS = 3
MEMORY_KIB_PER_100_CYCLES = 1 << 10
BESIDE_LOG_MAX_KIB = 60 << 10
LOG_KIB = 64 << 10
GUEST_BYTES = 8 * MIB

pytestmark = pytest.mark.timeout(60 + CYCLES)


def look_for_leaks(served: Served, cycle: Callable[[int], None]) -> None:
    """Same state before and after; the first cycles make what is kept and used again."""
    for number in range(WARM_UP):
        cycle(number)
    for _ in range(ROUNDS):
        before, after = one_round(served, cycle)
        if after.mappings <= before.mappings + CYCLES // 200:
            return
    # Now and then the allocator maps one more area; whatever is mapped and not unmapped shows in each round.
    raise AssertionError(f"more mappings after each of {ROUNDS} rounds, at last {before} to {after}")


def one_round(served: Served, cycle: Callable[[int], None]) -> tuple[Holding, Holding]:
    begin = holding(served.process.pid)
    for number in range(CYCLES):
        cycle(number)
    await_true(
        lambda: holding(served.process.pid).descriptors <= begin.descriptors, "descriptors are closed", 5
    )
    end = holding(served.process.pid)
    print(f"{CYCLES} cycles: {begin} to {end}")
    assert end.descriptors <= begin.descriptors
    assert end.threads <= begin.threads
    assert end.memory_kib - begin.memory_kib <= MEMORY_KIB_PER_100_CYCLES * max(CYCLES / 100, 1)
    assert end.memory_kib + end.areas_kib <= BESIDE_LOG_MAX_KIB + LOG_KIB
    return begin, end


def test_mirrors_begun_and_ended(work: Path) -> None:
    disks = [image(work / name, 2, filled_mib=1) for name in ("a.img", "b.img")]
    small = image(work / "small.img", 1, filled_mib=1)
    options = ("--bitmap", work / "bits", "--threads", "3")
    with Served(work, disks[0], *options) as served, served.guest() as guest:
        current = 0

        def cycle(number: int) -> None:
            nonlocal current
            served.start_mirror(disks[1 - current])
            write_block(guest, number % 256, number)
            flush(guest)
            match number % 4:
                case 0:
                    served.qmp.execute("verify")
                    assert served.qmp.wait_event("VERIFY_COMPLETED")["state"] == "equal"
                    served.qmp.execute("mirror-cancel")
                case 1:
                    served.qmp.execute("mirror-cancel", force=True)
                case 2:
                    served.qmp.execute("switch", keep_mirror=True)
                    served.qmp.execute("switch", keep_mirror=True)
                    served.qmp.execute("mirror-cancel")
                case 3:
                    served.qmp.execute("switch")
                    current = 1 - current
            served.client().close()
            with pytest.raises(QmpError, match="small"):
                served.qmp.execute("mirror-start", destination=str(small))

        look_for_leaks(served, cycle)
        guest.close()
        served.stop()


@pytest.mark.parametrize("habits", HABITS, ids=lambda habits: habits.name)
def test_frontends_that_come_and_go(work: Path, habits: Habits) -> None:
    """Each with memory, a region of requests in flight and a dirty log of its own; every other one is gone
    without a word, and each is followed by one whose descriptors are of no use."""
    with Served(work, image(work / "a.img")) as served:
        served.start_mirror(image(work / "b.img"))

        def cycle(number: int) -> None:
            kept = Kept()
            memory = GuestMemory((GUEST_BYTES,))
            guest = Frontend(Unconnected(), queues=2, memory=memory)
            try:
                connection = Returning(served.socket)
                connection.connect(guest, habits, kept)
                set_log(connection)
                write_block(guest, number % 256, number)
                flush(guest)
                if number % 2:
                    guest.stop()
            finally:
                guest.close()
                kept.close()
            talk_nonsense(served)
            await_true(lambda: served.qmp.execute("query-status")["frontends"] == 0, "they are gone")

        look_for_leaks(served, cycle)
        served.stop()


def set_log(connection: Returning) -> None:
    """A dirty log, set twice as for a memory that has grown, and logging switched on."""
    client = connection.client
    for length in (4096, 8192):
        log = os.memfd_create("log")
        try:
            os.truncate(log, length)
            client.send(Message.SET_LOG_BASE, LOG.pack(length, 0), [log])
            answered, _, _ = client.receive()
            assert answered == Message.SET_LOG_BASE
        finally:
            os.close(log)
    features = client.ask_u64(Message.GET_FEATURES) & DEFAULT_FEATURES
    features |= Feature.PROTOCOL_FEATURES | Feature.LOG_ALL
    client.tell_u64(Message.SET_FEATURES, features)


def talk_nonsense(served: Served) -> None:
    client = VhostUserClient(served.socket)
    empty = os.memfd_create("empty")
    try:
        client.send(Message.SET_OWNER)
        client.send(Message.SET_VRING_CALL, bytes(8), [empty])
        memory = struct.pack("<IIQQQQ", 1, 0, 0, GUEST_BYTES, 0, 0)
        client.send(Message.SET_MEM_TABLE, memory, [empty])  # a file shorter than it says
        with pytest.raises(ConnectionLostError):
            client.receive()
    finally:
        os.close(empty)
        client.close()
