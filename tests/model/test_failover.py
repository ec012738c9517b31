# SPDX-License-Identifier: Apache-2.0
"""A source that fails in steady is left for the destination (on_source_error=switch): the guest sees no
error, and nothing confirmed is lost. The control plane's part is played here by `fail_over`."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine_driver import Cut, DiskOp, EventKind, State
from tests.frontend import Request, Status
from tests.model import rig as rigs
from tests.model.rig import BLOCK, Rig, pattern
from vhostsync._shim import lib

READ, WRITE, FLUSH, ZERO = DiskOp.READ, DiskOp.WRITE, DiskOp.FLUSH, DiskOp.ZERO


@contextmanager
def rig(**options: Any) -> Iterator[Rig]:
    with rigs.rig(mirrored=True, switch_on_source_error=True, **options) as r:
        yield r


def await_failure(r: Rig) -> DiskOp:
    """The operation for which the source is to be left."""
    event = r.driver.take_event(EventKind.SOURCE_FAILED)
    assert event.disk_role == lib.VS_SOURCE and event.result < 0
    return DiskOp(event.op)


def fail_over(r: Rig) -> None:
    r.gate()
    assert r.snapshot().failover_pending
    r.exchange(keep=False)
    r.source, r.destination = r.destination, r.source
    assert not r.snapshot().failover_pending


def give_up(r: Rig) -> None:
    r.driver.call(lib.VS_CMD_FAILOVER_GIVE_UP)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.ENODEV])
def test_a_failed_write_is_done_on_the_other_disk(error: int) -> None:
    with rig() as r:
        r.write_now(0, 1, blocks=4)
        r.source.fault(WRITE, error, count=-1)
        write = r.write(0, 2, blocks=4)
        assert await_failure(r) == WRITE
        assert r.unconfirmed(write)
        assert r.snapshot().doubt == ()
        generation = r.snapshot().counts.generation
        fail_over(r)
        r.guest.wait(write)
        assert write.ok
        assert r.snapshot().counts.generation == generation + 1
        assert r.guest.read_now(0, 4 * BLOCK) == pattern(2, 4)
        r.flush_now()
        assert r.durable(r.source, 0, 4) == pattern(2, 4)
        snapshot = r.driver.settle()
        assert (snapshot.state, snapshot.doubt, snapshot.source_failovers) == (State.PASSTHROUGH, (), 1)
        assert snapshot.log_bytes_used == 0


def test_a_failed_read_and_a_failed_zeroing() -> None:
    with rig() as r:
        r.write_now(0, 1, blocks=8)
        r.source.fault(READ, errno.EIO, count=-1)
        r.source.fault(ZERO, errno.EIO, count=-1)
        read = r.guest.read(0, BLOCK)
        assert await_failure(r) == READ
        discard = r.guest.discard(4 * BLOCK, BLOCK)  # stays in the ring
        assert r.unconfirmed(read, discard)
        fail_over(r)
        r.guest.wait(read, discard)
        assert read.ok and read.data == pattern(1, 8)[:BLOCK]
        assert discard.ok
        assert r.guest.read_now(4 * BLOCK, BLOCK) == bytes(BLOCK)


def test_the_bytes_are_those_of_the_moment_of_the_write() -> None:
    with rig() as r:
        r.source.fault(WRITE, errno.EIO)
        write = r.write(0, 1)
        await_failure(r)
        write.scribble(b"scribble" * (BLOCK // 8))
        fail_over(r)
        r.guest.wait(write)
        assert r.seen(r.source, 0) == pattern(1)


def test_what_was_captured_is_replicated_first() -> None:
    with rig() as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        r.write_now(1, 2)
        r.source.fault(WRITE, errno.EIO)
        write = r.write(0, 3)
        await_failure(r)
        token = r.driver.submit(lib.VS_CMD_GATE, value=5_000_000)
        r.driver.await_held(r.destination, WRITE)
        assert r.driver.settle().counts.mirrored < 2
        assert r.driver.done(token) is None, "the gate was answered before M = G"
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        assert r.driver.wait(token).result == 0
        r.exchange(keep=False)
        r.source, r.destination = r.destination, r.source
        r.guest.wait(write)
        assert r.guest.read_now(0, 2 * BLOCK) == pattern(3) + pattern(2)


def test_a_failed_flush_is_done_on_the_other_disk() -> None:
    """A flush that is answered after the exchange has to be durable on the new disk."""
    with rig() as r:
        r.write_now(0, 1)
        r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")
        r.destination.hold(FLUSH)
        r.source.fault(FLUSH, errno.EIO, count=-1)
        flush = r.guest.flush()
        assert await_failure(r) == FLUSH
        r.destination.hold(FLUSH, False)
        r.destination.release(FLUSH)
        assert r.unconfirmed(flush)
        fail_over(r)
        r.guest.wait(flush)
        assert flush.ok
        assert r.durable(r.source, 0) == pattern(1)


def test_a_flush_behind_a_parked_write_is_flushed_on_the_new_disk() -> None:
    with rig(queues=2) as r:
        r.source.hold(WRITE)
        write = r.write(0, 1)
        r.driver.await_held(r.source, WRITE)
        r.source.fault(WRITE, errno.EIO)
        r.source.release(WRITE)
        await_failure(r)
        flush = r.guest.flush(queue=1)
        assert r.unconfirmed(write, flush)
        fail_over(r)
        r.guest.wait(write, flush)
        assert write.ok and flush.ok
        r.flush_now()
        assert r.source.read(0, BLOCK, Cut.EVERYTHING) == pattern(1)


def test_write_through_writes() -> None:
    with rig() as r:
        r.transport.set_write_cache(False)
        r.source.fault(FLUSH, errno.EIO, count=-1)
        write = r.write(0, 1)
        assert await_failure(r) == FLUSH
        assert r.unconfirmed(write)
        fail_over(r)
        r.guest.wait(write)
        assert write.ok
        assert r.durable(r.source, 0) == pattern(1)


def test_overlapping_writes_keep_their_order() -> None:
    with rig() as r:
        r.source.hold(WRITE)
        first = r.write(0, 1, blocks=2)
        second = r.write(1, 2, blocks=2, queue=1)
        r.driver.await_held(r.source, WRITE)
        r.driver.settle()
        r.source.fault(WRITE, errno.EIO, count=-1)
        r.source.hold(WRITE, False)
        r.source.release(WRITE)
        await_failure(r)
        fail_over(r)
        r.guest.wait(first, second)
        assert first.ok and second.ok
        assert r.guest.read_now(0, 3 * BLOCK) == pattern(1) + pattern(2, 2)


def test_without_a_switch_it_is_the_guests_error() -> None:
    with rig() as r:
        r.write_now(0, 1)
        r.flush_now()
        r.source.fault(WRITE, errno.EIO)
        write = r.write(0, 2)
        await_failure(r)
        flush, read = r.guest.flush(), r.guest.read(9 * BLOCK, BLOCK)
        give_up(r)
        r.guest.wait(write, flush, read)
        assert write.status == Status.IOERR
        assert flush.ok and read.ok, "what has not failed goes on"
        snapshot = r.driver.settle()
        assert snapshot.doubt == ((0, BLOCK),)
        assert (snapshot.state, snapshot.failover_pending) == (State.STEADY, False)
        assert snapshot.log_bytes_used == 0


def test_without_a_switch_a_failed_flush_is_the_guests_error() -> None:
    with rig() as r:
        r.write_now(0, 1)
        r.source.fault(FLUSH, errno.EIO)
        flush = r.guest.flush()
        await_failure(r)
        give_up(r)
        r.guest.wait(flush)
        assert flush.status == Status.IOERR
        r.flush_now()


def test_a_mirror_that_is_lost_meanwhile() -> None:
    with rig() as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        r.driver.await_held(r.destination, WRITE)
        r.source.fault(WRITE, errno.EIO)
        write = r.write(5, 2)
        await_failure(r)
        r.destination.fault(WRITE, errno.EIO)
        r.destination.release(WRITE)
        r.await_degraded()
        r.guest.wait(write)
        assert write.status == Status.IOERR
        assert r.snapshot().doubt == ((5 * BLOCK, BLOCK),)
        r.record_written()
        r.write_now(5, 3)


def test_only_in_steady_and_not_where_a_switch_is_forbidden() -> None:
    with rigs.rig(switch_on_source_error=True) as r:
        r.source.fault(WRITE, errno.EIO)
        write = r.write(0, 1)
        r.guest.wait(write)
        assert write.status == Status.IOERR
        r.mirror()  # with a range in doubt
        r.source.fault(WRITE, errno.EIO)
        write = r.write(5, 1)
        r.guest.wait(write)
        assert write.status == Status.IOERR
        assert not any(event.kind == EventKind.SOURCE_FAILED for event in r.driver.events)


def test_not_to_a_destination_that_is_known_to_differ() -> None:
    with rig() as r:
        r.driver.call(lib.VS_CMD_PEER_DIFFERS, value=1)
        r.source.fault(WRITE, errno.EIO)
        write = r.write(0, 1)
        r.guest.wait(write)
        assert write.status == Status.IOERR
        r.write_now(0, 1)
        r.driver.call(lib.VS_CMD_PEER_DIFFERS, value=0)
        r.source.fault(WRITE, errno.EIO)
        write = r.write(0, 2)
        await_failure(r)
        fail_over(r)
        r.guest.wait(write)
        assert write.ok


def test_the_new_source_fails_too() -> None:
    with rig() as r:
        r.source.fault(WRITE, errno.EIO)
        r.destination.fault(WRITE, errno.EIO)
        write = r.write(0, 1)
        await_failure(r)
        fail_over(r)
        r.guest.wait(write)
        assert write.status == Status.IOERR
        assert r.driver.settle().doubt == ((0, BLOCK),)


def test_stopping_a_ring_waits_for_it_no_longer_than_the_stop_timeout() -> None:
    with rig(stop_timeout_us=50_000) as r:
        r.source.fault(WRITE, errno.EIO)
        write = r.write(0, 1)
        await_failure(r)
        stop = r.driver.submit(lib.VS_CMD_VRING_STOP, attachment=0, queue=0)
        r.await_degraded()
        r.driver.wait(stop)
        r.guest.poll()
        assert write.status == Status.IOERR
        r.record_written()


def test_another_disk_can_become_the_mirror_of_the_new_source() -> None:
    with rig() as r:
        r.source.fault(WRITE, errno.EIO)
        write = r.write(0, 1)
        await_failure(r)
        fail_over(r)
        r.guest.wait(write)
        third = r.other_disk()
        r.driver.mirror(third)
        r.write_now(1, 2)
        r.flush_now()
        assert r.durable(third, 0, 2) == pattern(1) + pattern(2)


@pytest.mark.parametrize("seed", range(10))
def test_under_load_the_guest_sees_no_error_and_loses_nothing(seed: int) -> None:
    choose = random.Random(seed)
    with rig(queues=2) as r:
        last: dict[int, int] = {}
        requests: list[Request] = []
        op = choose.choice([WRITE, READ, FLUSH])
        r.source.fault(op, errno.EIO, skip=choose.randrange({WRITE: 20, READ: 8, FLUSH: 1}[op]), count=-1)
        for number in range(60):
            block = choose.randrange(40)
            last[block] = number
            requests.append(r.write(block, number, queue=block % 2))
            if number % 5 == 0:
                requests.append(r.guest.flush(queue=number % 2))
            if number % 3 == 0:
                requests.append(r.guest.read(choose.randrange(40) * BLOCK, BLOCK))
        assert await_failure(r) == op
        fail_over(r)
        r.guest.wait(*requests)
        assert all(request.ok for request in requests)
        r.flush_now()
        for block, number in last.items():
            assert r.durable(r.source, block) == pattern(number), f"block {block}"
