# SPDX-License-Identifier: Apache-2.0
"""Limits of the guest (c_shim/guest/limited_rings.c): what waits for one stays in its ring, in its turn, and
nobody else waits for it. Rates are kept in tests/c/test_rate_limit.c."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.engine_driver import DiskOp, Reason, State
from tests.frontend import DEFAULT_FEATURES, Feature, Request
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.sizes import MIB
from vhostsync._shim import ffi, lib
from vhostsync.limits import KINDS

PACKED = DEFAULT_FEATURES | Feature.RING_PACKED
LAYOUTS = pytest.mark.parametrize("features", [DEFAULT_FEATURES, PACKED], ids=["split", "packed"])
FOR_EVER = 1
"""A byte a second: the first request goes, and the next one would in an hour."""


def limit(r: Rig, *, iops_size: int = 0, expect: int = 0, **rates: int) -> None:
    r.driver.call(
        lib.VS_CMD_LIMIT,
        limits={"rate": [(rates.get(kind, 0), 0, 1) for kind in KINDS], "iops_size": iops_size},
        expect=expect,
    )


def limited(r: Rig) -> tuple[int, int, int]:
    """Requests and bytes that have waited, and for how many nanoseconds."""
    r.snapshot()
    raw = ffi.new("struct vs_snapshot *")
    lib.vs_engine_snapshot(r.driver.engine, raw)
    return raw.limited_requests, raw.limited_bytes, raw.limited_ns


@LAYOUTS
def test_what_waits_is_in_the_ring_and_goes_on_elsewhere(features: int) -> None:
    """As at a migration, or a reconnect: the ring stops at once, its base is that of the waiting request, and
    whoever begins there takes it up."""
    with rig(features=features) as r:
        limit(r, bps_wr=FOR_EVER)
        r.write_now(0, 1)
        waiting = [r.write(block, block + 1) for block in (1, 2)]
        flush = r.guest.flush()
        assert r.unconfirmed(*waiting, flush)
        before = r.guest.queues[0].ring
        used = before.next_used if features == PACKED else before.used_index()  # type: ignore[attr-defined]
        began = time.monotonic()
        bases = r.guest.stop()
        assert time.monotonic() - began < r.driver.timeout_s / 2
        assert bases[0] == (used | used << 16 if features == PACKED else used)
        limit(r)
        for queue in range(2):
            r.guest.start_queue(queue)
        r.guest.wait(*waiting, flush)
        assert all(each.ok for each in (*waiting, flush))
        assert r.durable(r.source, 1, 2) == pattern(2) + pattern(3)


@LAYOUTS
def test_a_frontend_that_leaves_is_let_go_at_once(features: int) -> None:
    with rig(features=features) as r:
        limit(r, iops=1)
        for seed in range(2):
            waiting = r.write(0, seed)
        assert r.unconfirmed(waiting)
        r.driver.call(lib.VS_CMD_DETACH, attachment=0, timeout_s=r.driver.timeout_s / 2)
        r.driver.call(lib.VS_CMD_ATTACH, attachment=0)


def test_no_limit_and_another_one_hold_at_once() -> None:
    with rig() as r:
        limit(r, bps=FOR_EVER)
        r.write_now(0, 1)
        waiting = r.write(1, 2)
        assert r.unconfirmed(waiting)
        limit(r, iops_rd=1)
        r.guest.wait(waiting)
        assert waiting.ok
        limit(r, bps_wr=FOR_EVER)
        r.write_now(2, 3)
        waiting = r.write(3, 4)
        assert r.unconfirmed(waiting)
        limit(r)
        r.guest.wait(waiting)
        assert waiting.ok


def test_impossible_limits_are_refused_and_change_nothing() -> None:
    with rig() as r:
        limit(r, bps_wr=FOR_EVER)
        r.write_now(0, 1)
        limit(r, bps=10**15 + 1, expect=22)
        assert r.unconfirmed(r.write(1, 2))


def test_each_direction_waits_for_its_own() -> None:
    with rig() as r:
        limit(r, bps_wr=FOR_EVER)
        r.write_now(0, 1)
        waiting = r.write(1, 2)
        assert r.guest.read_now(0, BLOCK, queue=1) == pattern(1)
        assert r.guest.flush_now(queue=1).ok and r.unconfirmed(waiting)
        limit(r, bps_rd=FOR_EVER)
        r.guest.wait(waiting)
        r.guest.read_now(0, BLOCK)
        assert r.unconfirmed(r.guest.read(0, BLOCK))
        r.write_now(2, 3, queue=1)


@pytest.mark.parametrize("what", ["discard", "write_zeroes"])
def test_discards_and_zeroes_are_writes_of_their_bytes(what: str) -> None:
    with rig() as r:
        limit(r, bps_wr=FOR_EVER)
        first = getattr(r.guest, what)(0, MIB)
        r.guest.wait(first)
        assert first.ok
        assert r.unconfirmed(r.write(0, 1))
        assert limited(r)[:2] == (1, BLOCK)


def test_a_request_larger_than_the_bucket_goes() -> None:
    """Whatever the limit, each request goes; those after it wait."""
    with rig() as r:
        limit(r, bps=FOR_EVER, bps_wr=FOR_EVER, iops=1000, iops_size=512)
        r.write_now(0, 1, blocks=256)
        assert r.source.read(0, MIB) == pattern(1, 256)
        limit(r, bps_wr=MIB)  # holds a tenth of that
        for seed in range(2, 4):
            r.write_now(0, seed, blocks=256)
        assert limited(r)[:2] == (2, 2 * MIB) or limited(r)[:2] == (1, MIB)


def test_time_in_which_nothing_was_asked_for_is_not_saved_up() -> None:
    """The guest has asked for nothing for longer than its next requests need: all but the first wait."""
    with rig() as r:
        limit(r, iops=4)
        r.write_now(0, 1)
        time.sleep(1.5)
        requests = [r.write(i, i, kick=False) for i in range(4)]
        r.guest.kick(0)
        r.guest.wait(*requests)
        assert limited(r)[0] >= 1


def test_what_is_malformed_does_not_count() -> None:
    with rig() as r:
        limit(r, iops=1)
        for _ in range(20):
            bad = r.guest.request(99)
            r.guest.wait(bad)
        r.write_now(0, 1)


# ---- turns ---------------------------------------------------------------------


def answered(requests: list[Request]) -> int:
    return sum(request.done for request in requests)


def counts_of(r: Rig, *each: list[Request]) -> Iterator[list[int]]:
    """How many are answered of each, all at one moment, again and again until all are: whenever this test is
    let run, for a busy machine may have it wait."""
    while not all(request.done for requests in each for request in requests):
        most = max((requests for requests in each if not requests[-1].done), key=answered)
        r.guest.wait(most[answered(most)])
        while r.guest.poll():  # something was answered while the other rings were looked at
            pass
        yield [answered(requests) for requests in each]


def hold_back(r: Rig, *kinds: str) -> None:
    """Before anything is in a ring: the first look at one may be late, and needs no kick."""
    limit(r, **dict.fromkeys(kinds, 1))


def assert_turns(r: Rig, *each: list[Request], **rates: int) -> None:
    """Each in a ring of its own, which hardly any has left yet (`hold_back`); under this limit once all wait.
    What the bucket lets go at once, a tenth of a second, may be one's alone."""
    for queue in range(len(each)):
        r.guest.kick(queue)
    r.snapshot()
    limit(r, **rates)
    (rate,) = rates.values()
    counts = list(counts_of(r, *each))
    assert any(min(count) >= 3 and max(count) < len(each[0]) for count in counts), counts
    assert max(max(count) - min(count) for count in counts) <= rate // 10 + 2, counts


@pytest.mark.parametrize("queues", [2, 4])
def test_rings_take_turns(queues: int) -> None:
    """All of them want to go for as long as it lasts."""
    with rig(queues=queues) as r:
        hold_back(r, "iops_wr")
        each = [[r.write(i, i, queue=queue, kick=False) for i in range(25)] for queue in range(queues)]
        assert_turns(r, *each, iops_wr=40)


def test_reads_and_writes_take_turns_at_what_they_share() -> None:
    with rig() as r:
        hold_back(r, "iops")
        writes = [r.write(i, i, kick=False) for i in range(25)]
        reads = [r.guest.read(0, BLOCK, queue=1, kick=False) for _ in range(25)]
        assert_turns(r, writes, reads, iops=40)


def test_who_comes_later_waits_behind_who_waits() -> None:
    """One ring is always full, the other has one request at a time: it gets its share, and is not left until
    the first one has nothing more."""
    with rig(queue_size=512, features=DEFAULT_FEATURES & ~Feature.INDIRECT_DESC) as r:
        limit(r, iops_wr=20)
        full = [r.write(i % 64, i, kick=False) for i in range(120)]  # six seconds
        r.guest.kick(0)
        for i in range(8):
            r.write_now(100 + i, i, queue=1)
        assert answered(full) < len(full)


# ---- what has nothing to do with it ---------------------------------------------------


def test_a_limited_write_does_not_wait_for_the_destination() -> None:
    """Ten times as long as a destination may take: it is not given up, and no room was waited for."""
    with rig(mirrored=True, destination_timeout_us=50_000) as r:
        limit(r, bps_wr=2 * BLOCK)
        for seed in range(3):
            r.write_now(0, seed)
        assert r.snapshot().state is State.STEADY
        assert r.driver.engine_throttled_ns() == 0
        requests, byte_count, waited_ns = limited(r)
        assert (requests, byte_count) == (2, 2 * BLOCK) and waited_ns > 700_000_000


def test_a_destination_that_is_too_slow_is_given_up_under_a_limit_too() -> None:
    with rig(mirrored=True, destination_timeout_us=100_000, log_bytes=8 * MIB, size_bytes=16 * MIB) as r:
        limit(r, bps_wr=1000 * MIB)
        r.destination.hold(DiskOp.WRITE)
        r.write(0, 1)
        assert r.await_degraded() == Reason.DESTINATION_TIMEOUT
        r.record_written()


def test_a_write_that_waited_for_room_and_then_for_its_limit() -> None:
    """From when its limit holds it, it waits for no room any more, which the deadline is counted by."""
    with rig(mirrored=True, log_bytes=8 * MIB, size_bytes=16 * MIB) as r:
        r.destination.hold(DiskOp.WRITE)
        writes = [r.write(256 * i, i, blocks=256) for i in range(9)]
        r.driver.until(lambda: r.driver.engine_throttled_ns() > 0, "a write waits for room")
        limit(r, bps_wr=FOR_EVER)
        r.destination.hold(DiskOp.WRITE, False)
        r.destination.release(DiskOp.WRITE)
        r.driver.until(lambda: r.snapshot().log_bytes_used == 0, "the log is empty")
        waited_ns = r.driver.engine_throttled_ns()
        r.driver.settle()
        assert r.driver.engine_throttled_ns() == waited_ns
        limit(r)
        r.guest.wait(*writes)
        r.driver.until(lambda: r.snapshot().log_bytes_used == 0, "the log is empty")
        r.assert_same_content()


@pytest.mark.parametrize("keep", [False, True])
def test_a_switch_does_not_wait_for_a_limit(keep: bool) -> None:
    """The gate closes at once; what waits goes to the new disk when its turn comes."""
    with rig(mirrored=True) as r:
        limit(r, bps_wr=FOR_EVER)
        r.write_now(0, 1)
        waiting = r.write(1, 2)
        r.switch(keep=keep)
        assert r.unconfirmed(waiting)
        limit(r)
        r.guest.wait(waiting)
        assert r.seen(r.source, 0, 2) == pattern(1) + pattern(2)


@pytest.mark.parametrize("poll_us", [0, 200, lib.VS_POLL_AUTO])
def test_nobody_runs_in_circles_meanwhile(poll_us: int) -> None:
    with rig(poll_us=poll_us) as r:
        limit(r, bps_wr=2 * BLOCK)
        for seed in range(3):
            r.write(0, seed)
        r.driver.settle()
        first = r.snapshot()
        threading.Event().wait(0.25)
        last = r.snapshot()
        assert last.wakeups - first.wakeups <= 6 and last.polls - first.polls <= 6  # the snapshots' own


def test_a_ring_that_stops_while_it_waits_ends_the_wait() -> None:
    with rig() as r:
        limit(r, bps_wr=FOR_EVER)
        r.write_now(0, 1)
        r.write(1, 2)
        r.driver.settle()
        r.guest.stop()
        waited = limited(r)[2]
        assert waited > 0 and limited(r)[2] == waited
