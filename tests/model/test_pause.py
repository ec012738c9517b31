# SPDX-License-Identifier: Apache-2.0
"""on_destination_error=pause: a steady destination is lost, and flushes wait until a mirror is steady."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.engine_driver import DiskOp, EventKind, Reason, State
from tests.frontend import Request, Status
from tests.guest_ring import Region
from tests.model import rig as rigs
from tests.model.rig import BLOCK, Rig, pattern
from tests.sizes import MIB
from vhostsync._shim import lib

WRITE, FLUSH = DiskOp.WRITE, DiskOp.FLUSH
HANG: dict[str, Any] = {"destination_timeout_us": 60_000}
STOP: dict[str, Any] = {"stop_timeout_us": 50_000}


@contextmanager
def rig(**options: Any) -> Iterator[Rig]:
    with rigs.rig(mirrored=True, pause_on_destination_error=True, **options) as r:
        yield r


def lose_destination(r: Rig, block: int = 0, seed: int = 1) -> None:
    """A write to it fails; the record says so at once."""
    r.destination.fault(WRITE, errno.EIO)
    r.write_now(block, seed)
    r.await_degraded()
    assert r.driver.take_event(EventKind.PAUSED).value == 1
    r.record_written()
    r.driver.take_event(EventKind.FENCE_CLEAR)


def held(r: Rig, *requests: Request) -> bool:
    """They are held by the pause, and by nothing else."""
    waiting = r.unconfirmed(*requests)
    now = r.snapshot()
    return waiting and now.paused and not now.record_pending and now.pause_held == len(requests)


def released(r: Rig, *requests: Request) -> None:
    r.guest.wait(*requests)
    assert all(request.ok for request in requests)


def test_flushes_wait_for_a_mirror_and_all_else_goes_on() -> None:
    with rig() as r:
        lose_destination(r)
        flush = r.guest.flush()
        r.write_now(5, 5)
        assert r.guest.read_now(5 * BLOCK, BLOCK) == pattern(5)
        other = r.guest.flush(queue=1)
        r.transport.set_write_cache(False)
        through = r.write(7, 7, queue=1)
        r.driver.settle()  # it is taken up in this mode
        r.transport.set_write_cache(True)
        assert held(r, flush, other, through)
        r.driver.call(lib.VS_CMD_GATE, value=1000, expect=errno.ENOTCONN)  # no switch
        second = r.other_disk()
        r.driver.mirror(second)
        released(r, flush, other, through)
        assert [r.durable(second, block) for block in (0, 5, 7)] == [pattern(1), pattern(5), pattern(7)]
        now = r.snapshot()
        assert (now.state, now.paused, now.pause_held, now.pause_released) == (State.STEADY, False, 0, 0)
        assert r.driver.take_event(EventKind.PAUSED).value == 0
        r.write_now(6, 6)
        r.flush_now()
        assert r.durable(second, 6) == pattern(6)


@pytest.mark.parametrize("write_through", [False, True])
def test_however_many_are_held_all_else_goes_on(write_through: bool) -> None:
    """More requests than may be at work at once, and (since they are not aligned) more bytes than the
    backend's own buffers take."""
    with rig(queues=4, queue_size=1024, memory_bytes=64 * MIB) as r:
        lose_destination(r)
        r.transport.set_write_cache(not write_through)
        requests = []
        for queue in (1, 2, 3):
            for number in range(160 if write_through else 330):
                if write_through:
                    data = pattern(number, 10)
                    request = r.guest.write(number * BLOCK, data, queue=queue, align=16, kick=False)
                else:
                    request = r.guest.flush(queue=queue, kick=False)
                requests.append(request)
            r.guest.kick(queue)
        r.driver.settle()
        r.transport.set_write_cache(True)
        assert held(r, *requests)
        more = [r.guest.flush(queue=0) for _ in range(100)]
        assert held(r, *requests, *more)
        for queue in (0, 1):  # also behind those that are held
            read = r.guest.read(0, 16 * BLOCK, queue=queue, align=16)
            r.guest.wait(read)
            assert read.ok
            r.write_now(500 + queue, queue, queue=queue)
        r.driver.mirror(r.other_disk())
        released(r, *requests, *more)


def test_a_flush_of_the_copy_is_not_confirmed_by_the_source_before_steady() -> None:
    """Not even one whose generation the steady flush is bound to cover: that flush may still fail."""
    with rig() as r:
        lose_destination(r)
        flush = r.guest.flush()
        second = r.other_disk()
        second.hold(FLUSH)
        assert r.driver.start_mirror(second) == 0
        r.driver.await_held(second, FLUSH)
        later = r.guest.flush(queue=1)
        assert r.driver.settle().state == State.SYNCING and held(r, flush, later)
        second.fault(FLUSH, errno.EIO)
        second.hold(FLUSH, False)
        second.release(FLUSH)
        r.driver.await_state(State.DEGRADED)
        assert held(r, flush, later)
        r.driver.mirror(r.other_disk())
        released(r, flush, later)


@pytest.mark.parametrize("write_through", [False, True])
def test_a_cancel_gives_up_the_promise(write_through: bool) -> None:
    with rig() as r:
        r.transport.set_write_cache(not write_through)
        r.destination.fault(WRITE, errno.EIO)
        request = r.write(0, 1)
        r.await_degraded()
        if not write_through:
            released(r, request)
            request = r.guest.flush()
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
        assert r.unconfirmed(request), "confirmed before the state record said that it may be"
        assert not r.snapshot().paused
        r.record_written()
        released(r, request)
        assert r.durable(r.source, 0) == pattern(1)


def test_a_destination_that_hangs() -> None:
    """The timeout gives it up, and does not end the pause; nor does it count against the next one."""
    with rig(**HANG) as r:
        r.write_now(0, 1)
        r.destination.hold(FLUSH)
        flush = r.guest.flush()
        assert r.await_degraded() == Reason.DESTINATION_TIMEOUT
        r.record_written()
        began = r.driver.take_event(EventKind.PAUSED)
        assert began.value == 1 and held(r, flush)
        r.destination.hold(FLUSH, False)
        r.destination.release(FLUSH)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        r.driver.mirror(r.destination)
        released(r, flush)
        assert r.snapshot().state == State.STEADY
        assert r.durable(r.destination, 0) == pattern(1)


def test_the_copy_that_ends_a_pause_does_not_yield_to_who_waits_for_it() -> None:
    with rig(size_bytes=8 * MIB, copy_depth=4) as r:
        r.source.load(0, bytes([7]) * 8 * MIB)
        lose_destination(r)
        flush = r.guest.flush()
        assert held(r, flush)
        time.sleep(0.11)  # GUEST_WORKS_NS: beside a guest that works the copy is slow
        second = r.other_disk()
        second.hold(WRITE)
        assert r.driver.start_mirror(second) == 0
        r.driver.await_held(second, WRITE, 4)
        second.hold(WRITE, False)
        second.release(WRITE)
        released(r, flush)


def test_a_source_that_fails_during_a_pause_is_the_guests_error() -> None:
    with rig() as r:
        lose_destination(r)
        r.source.fault(FLUSH, errno.EIO)
        flush = r.guest.flush()
        r.guest.wait(flush)
        assert flush.status == Status.IOERR


def test_losing_a_destination_that_was_not_steady_pauses_nobody() -> None:
    with rigs.rig(pause_on_destination_error=True) as r:
        r.source.load(0, pattern(1, 512))
        r.destination.fault(WRITE, errno.EIO)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_state(State.DEGRADED)
        r.flush_now()
        assert not r.snapshot().paused


def test_stopping_a_ring_ends_the_pause_for_that_ring_alone() -> None:
    with rig(**STOP) as r:
        lose_destination(r)
        flush, other = r.guest.flush(), r.guest.flush(queue=1)
        assert held(r, flush, other)
        r.driver.call(lib.VS_CMD_VRING_STOP, attachment=0, queue=0)
        r.guest.poll()
        assert flush.ok and held(r, other)
        assert r.driver.take_event(EventKind.PAUSE_RELEASED).value == 1
        assert r.snapshot().pause_released == 1


def test_stopping_a_ring_lets_nothing_go_before_the_record_is_written() -> None:
    with rig(**STOP) as r:
        r.destination.hold(FLUSH)
        r.write_now(0, 1)
        flush = r.guest.flush()
        r.driver.await_held(r.destination, FLUSH)
        stop = r.driver.submit(lib.VS_CMD_VRING_STOP, attachment=0, queue=0)
        assert r.await_degraded() == Reason.STOP_TIMEOUT
        assert r.driver.take_event(EventKind.PAUSE_RELEASED).value == 1
        assert r.unconfirmed(flush)
        r.record_written()
        r.driver.wait(stop)
        r.guest.poll()
        assert flush.ok and r.snapshot().paused


def test_a_frontend_that_leaves_is_not_held() -> None:
    with rig(**STOP) as r:
        lose_destination(r)
        requests = [r.guest.flush(), r.guest.flush(queue=1)]
        assert held(r, *requests)
        r.driver.call(lib.VS_CMD_DETACH, attachment=0)
        assert r.driver.take_event(EventKind.PAUSE_RELEASED).value == 2
        r.driver.call(lib.VS_CMD_ATTACH, attachment=0)


def test_memory_that_is_removed_is_not_waited_for_longer() -> None:
    """The frontend waits for the answer, and the VM with it."""
    with rig(**STOP) as r:
        memory = os.memfd_create("more", os.MFD_CLOEXEC)
        os.ftruncate(memory, MIB)
        more = [Region(1 << 40, MIB, 1 << 40, 0, memory)]
        r.driver.call(lib.VS_CMD_ADD_MEM_REGION, attachment=0, regions=more)
        os.close(memory)
        lose_destination(r)
        flush = r.guest.flush()
        assert held(r, flush)
        gone = [replace(more[0], fd=-1)]
        r.driver.call(lib.VS_CMD_REMOVE_MEM_REGION, attachment=0, regions=gone)
        released(r, flush)
        later = r.guest.flush()
        time.sleep(2 * STOP["stop_timeout_us"] / 1e6)  # nobody waits any more, and it is held for good
        assert held(r, later)
        assert r.snapshot().pause_released == 1


def test_the_control_planes_drain_is_not_held() -> None:
    with rig() as r:
        r.destination.hold(FLUSH)
        r.write_now(0, 1)
        drain = r.driver.submit(lib.VS_CMD_MIRROR_DRAIN)
        r.driver.await_held(r.destination, FLUSH)
        r.destination.fault(FLUSH, errno.EIO)
        r.destination.hold(FLUSH, False)
        r.destination.release(FLUSH)
        r.await_degraded()
        r.record_written()
        assert r.driver.wait(drain).result == -errno.ENOTCONN
