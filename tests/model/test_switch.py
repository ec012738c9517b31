# SPDX-License-Identifier: Apache-2.0
"""Attaching, cancelling and switching (docs/durability.md, "States" and "Switch")."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tests.engine_driver import DiskOp, EventKind, Reason, State
from tests.frontend import Status
from tests.model.rig import BLOCK, Rig, flushes, pattern, rig
from tests.sizes import MIB
from vhostsync._shim import ffi, lib

READ, WRITE, FLUSH = DiskOp.READ, DiskOp.WRITE, DiskOp.FLUSH


def drained(r: Rig) -> None:
    r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")


# -- attaching and cancelling ----------------------------------------------------------


def test_a_destination_that_does_not_fit_is_refused() -> None:
    with rig() as r:
        assert r.driver.start_mirror(r.other_disk(r.source.bytes - BLOCK)) == errno.ENOSPC
        assert r.driver.start_mirror(r.other_disk(block_bytes=4096)) == errno.EINVAL
        assert r.snapshot().state == State.PASSTHROUGH
        r.mirror()
        assert r.driver.start_mirror(r.other_disk()) == errno.EBUSY
        r.write_now(0, 1)
        r.flush_now()
        assert r.durable(r.destination, 0) == pattern(1)


def test_a_larger_destination_with_smaller_blocks() -> None:
    with rig(block_bytes=4096) as r:
        r.destination = r.other_disk(r.source.bytes + MIB)
        r.mirror()
        r.write_now(3, 1)
        r.flush_now()
        r.assert_same_content()


def test_attaching_with_counts_already_high() -> None:
    with rig() as r:
        for number in range(50):
            r.write_now(number, number)
        r.mirror()
        counts = r.snapshot().counts
        assert (counts.generation, counts.mirrored, counts.flushed) == (50, 50, 50)
        r.flush_now()
        r.write_now(0, 100)
        r.flush_now()
        counts = r.snapshot().counts
        assert counts.generation == counts.mirrored == counts.flushed == counts.source_flushed == 51


def test_attaching_to_an_idle_guest() -> None:
    with rig() as r:
        r.mirror()
        counts = r.snapshot().counts
        assert (counts.generation, counts.mirrored, counts.flushed) == (0, 0, 0)
        r.flush_now()
        r.write_now(0, 1)
        r.flush_now()
        assert r.durable(r.destination, 0) == pattern(1)


def test_cancel_leaves_a_named_point_in_time() -> None:
    with rig(mirrored=True) as r:
        for number in range(20):
            r.write_now(number, number + 1)
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        counts = r.snapshot().counts
        assert counts.generation == counts.mirrored == counts.flushed == 20
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
        assert r.durable(r.destination, 0, 32) == r.seen(r.source, 0, 32)
        r.write_now(0, 99)
        r.flush_now()
        assert r.seen(r.destination, 0) == pattern(1), "a write reached a destination that was cancelled"


def test_cancel_and_attach_again_and_another_one() -> None:
    with rig() as r:
        for round_, disk in enumerate([r.destination, r.destination, r.other_disk()]):
            r.driver.mirror(disk)
            r.write_now(round_, round_ + 1)
            r.flush_now()
            assert r.durable(disk, 0, 8) == r.seen(r.source, 0, 8)
            r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
            r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
            r.driver.take_event(EventKind.FENCE_CLEAR)
            r.write_now(5, round_)


def test_cancel_during_the_copy() -> None:
    with rig() as r:
        r.source.load(0, pattern(1, 1024))
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, WRITE)
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN, expect=errno.ENOTCONN)
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
        assert r.snapshot().state == State.PASSTHROUGH
        r.write_now(0, 2)
        r.flush_now()
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        r.mirror()
        r.assert_same_content()


def test_a_drain_without_a_steady_mirror_is_refused() -> None:
    with rig() as r:
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN, expect=errno.ENOTCONN)


def test_a_drain_that_loses_its_mirror_is_no_success() -> None:
    with rig(mirrored=True) as r:
        r.destination.hold(FLUSH)
        r.write_now(0, 1)
        token = r.driver.submit(lib.VS_CMD_MIRROR_DRAIN)
        r.driver.await_held(r.destination, FLUSH)
        r.destination.fault(FLUSH, errno.EIO)
        r.destination.release(FLUSH)
        r.await_degraded()
        r.record_written()
        assert r.driver.wait(token).result < 0


# -- the switch --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_a_switch(keep: bool) -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.write_now(1, 2)
        r.flush_now()
        old, new = r.source, r.destination
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        r.gate()
        assert r.snapshot().gated
        assert r.exchange(keep=keep) > 0
        r.source, r.destination = new, old
        assert r.guest.read_now(0, BLOCK) == pattern(1)
        r.write_now(0, 3)
        r.flush_now()
        assert r.durable(new, 0) == pattern(3)
        if keep:
            assert r.snapshot().state == State.STEADY
            assert r.durable(old, 0) == pattern(3)
            r.assert_same_content()
        else:
            assert r.snapshot().state == State.PASSTHROUGH
            assert r.seen(old, 0) == pattern(1), "a write reached the disk that was left"


def test_requests_that_arrive_at_the_gate_go_to_the_new_disk() -> None:
    with rig(mirrored=True) as r:
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        r.gate()
        write, read = r.write(0, 1), r.guest.read(BLOCK, BLOCK, queue=1)
        assert r.unconfirmed(write, read)
        reads = r.destination.count(READ)
        r.exchange(keep=False)
        r.guest.wait(write, read)
        assert write.ok and read.ok
        assert r.destination.count(READ) == reads + 1
        assert r.seen(r.destination, 0) == pattern(1)
        assert r.seen(r.source, 0) == bytes(BLOCK)


def test_the_gate_lets_those_in_flight_finish() -> None:
    with rig(mirrored=True) as r:
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        r.source.hold(WRITE)
        r.destination.hold(WRITE)
        write = r.write(0, 1)
        r.driver.await_held(r.source, WRITE)
        token = r.driver.submit(lib.VS_CMD_GATE, value=5_000_000)
        late = r.write(1, 2)
        r.driver.settle()
        assert r.driver.done(token) is None
        r.source.release(WRITE)
        r.guest.wait(write)
        r.driver.await_held(r.destination, WRITE)
        r.driver.settle()
        assert r.driver.done(token) is None, "the gate was answered before M = G"
        r.destination.release(WRITE)
        assert r.driver.wait(token).result == 0
        assert r.unconfirmed(late)
        counts = r.snapshot().counts
        assert counts.mirrored == counts.generation == 1
        r.assert_same_content()


@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_gate_that_takes_too_long_is_opened_again(role: str) -> None:
    with rig(mirrored=True) as r:
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        slow = r.source if role == "source" else r.destination
        slow.hold(WRITE)
        write = r.write(0, 1)
        r.driver.await_held(slow, WRITE)
        r.gate(20_000, expect=errno.ETIMEDOUT)
        assert not r.snapshot().gated
        assert r.guest.read_now(BLOCK, BLOCK, queue=1) == bytes(BLOCK)
        slow.hold(WRITE, False)
        slow.release(WRITE)
        r.guest.wait(write)
        assert r.snapshot().state == State.STEADY
        drained(r)
        r.assert_same_content()
        r.switch(keep=True)


def test_a_gate_may_be_opened_without_an_exchange() -> None:
    with rig(mirrored=True) as r:
        r.gate()
        write = r.write(0, 1)
        assert r.unconfirmed(write)
        r.driver.call(lib.VS_CMD_UNGATE)
        r.guest.wait(write)
        drained(r)
        r.assert_same_content()


def test_a_gate_may_be_called_off_while_it_closes() -> None:
    with rig(mirrored=True) as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        r.driver.await_held(r.destination, WRITE)
        token = r.driver.submit(lib.VS_CMD_GATE, value=60_000_000)
        r.driver.call(lib.VS_CMD_UNGATE)
        r.destination.release(WRITE)
        assert r.driver.wait(token).result < 0
        r.destination.hold(WRITE, False)
        assert not r.snapshot().gated
        r.write_now(1, 2)


def test_an_exchange_without_a_closed_gate_is_refused() -> None:
    with rig() as r:
        r.exchange(keep=False, expect=errno.ENOTCONN)
        r.gate(expect=errno.ENOTCONN)
        r.mirror()
        r.exchange(keep=False, expect=errno.EBUSY)
        r.write_now(0, 1)
        drained(r)
        r.assert_same_content()


def mark(flags: int = 0) -> tuple[Any, tuple[Any, ...]]:
    """Where the engine is to leave its mark (to be kept as long), and the exchange that does so."""
    memory = ffi.new("uint64_t *")
    return memory, (flags, memory, 77)


def test_an_exchange_waits_for_the_gate_and_leaves_its_mark() -> None:
    memory, what = mark(lib.VS_EXCHANGE_KEEP)
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN, value=1)
        r.destination.hold(WRITE)
        r.write_now(1, 2)
        r.driver.await_held(r.destination, WRITE)
        gate = r.driver.submit(lib.VS_CMD_GATE, value=5_000_000)
        exchange = r.driver.submit(lib.VS_CMD_EXCHANGE, exchange=what)
        waiting = r.write(2, 3)
        r.driver.settle_quickly()
        assert r.driver.done(exchange) is None
        assert memory[0] == 0
        r.destination.hold(WRITE, False)  # first: the next write to it may be the one that waits
        r.destination.release(WRITE)
        assert r.driver.wait(gate).result == 0
        assert r.driver.wait(exchange).result == 0
        assert memory[0] == 77
        r.guest.wait(waiting)
        assert r.destination.read(2 * BLOCK, BLOCK) == pattern(3), "it goes to the new disk"


@pytest.mark.parametrize("how", ["too late", "opened"])
def test_an_exchange_ends_with_a_gate_that_does_not_close(how: str) -> None:
    memory, what = mark()
    with rig(mirrored=True) as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        r.driver.await_held(r.destination, WRITE)
        gate = r.driver.submit(lib.VS_CMD_GATE, value=10_000 if how == "too late" else 60_000_000)
        exchange = r.driver.submit(lib.VS_CMD_EXCHANGE, exchange=what)
        if how == "opened":
            r.driver.call(lib.VS_CMD_UNGATE)
        expected = errno.ETIMEDOUT if how == "too late" else errno.ECANCELED
        assert r.driver.wait(gate).result == -expected
        assert r.driver.wait(exchange).result == -errno.ECANCELED
        assert memory[0] == 0
        r.destination.hold(WRITE, False)
        r.destination.release(WRITE)
        r.write_now(1, 2)
        r.switch(keep=False)
        assert memory[0] == 0


def test_an_exchange_that_is_refused_leaves_no_mark_and_the_gate_closed() -> None:
    memory, what = mark()
    with rig(mirrored=True) as r:
        r.source.fault(WRITE, errno.EIO)
        r.guest.wait(r.write(0, 1))
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        r.driver.submit(lib.VS_CMD_GATE, value=5_000_000)
        r.driver.call(lib.VS_CMD_EXCHANGE, expect=errno.EBUSY, exchange=what)
        held = r.write(1, 2)
        r.driver.settle_quickly()
        assert memory[0] == 0
        assert r.unconfirmed(held)
        r.driver.call(lib.VS_CMD_UNGATE)
        r.guest.wait(held)
        assert r.source.read(BLOCK, BLOCK) == pattern(2), "the guest is still on the source"


def test_a_range_in_doubt_stands_in_the_way() -> None:
    with rig(mirrored=True) as r:
        r.source.fault(WRITE, errno.EIO)
        r.guest.wait(r.write(0, 1))
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        r.gate()
        r.exchange(keep=False, expect=errno.EBUSY)
        assert r.snapshot().gated  # the record may have to be put back before the guest goes on
        r.driver.call(lib.VS_CMD_UNGATE)
        r.write_now(0, 2)
        r.switch(keep=False)
        assert r.guest.read_now(0, BLOCK) == pattern(2)


def test_a_destination_that_fails_at_the_gate_leaves_the_guest_on_the_source() -> None:
    with rig(mirrored=True) as r:
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        r.driver.await_held(r.destination, WRITE)
        token = r.driver.submit(lib.VS_CMD_GATE, value=5_000_000)
        r.destination.fault(WRITE, errno.EIO)
        r.destination.release(WRITE)
        assert r.driver.wait(token).result < 0
        r.await_degraded()
        r.exchange(keep=False, expect=errno.ENOTCONN)
        r.record_written()
        assert r.guest.read_now(0, BLOCK) == pattern(1)
        r.write_now(1, 2)
        r.flush_now()


def test_a_drain_at_the_gate_does_not_end_the_process() -> None:
    with rig(mirrored=True) as r:
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN)
        r.write_now(0, 1)
        drained(r)
        r.gate()
        r.source.hold(FLUSH)
        token = r.driver.submit(lib.VS_CMD_MIRROR_DRAIN)
        r.driver.settle()
        r.driver.wait(r.driver.submit(lib.VS_CMD_EXCHANGE))
        r.source.hold(FLUSH, False)
        r.source.release(FLUSH)
        r.driver.wait(token)
        r.write_now(1, 1)


def test_there_and_back_again() -> None:
    with rig() as r:
        r.mirror()
        for round_ in range(5):
            r.write_now(round_, round_ + 1)
            r.write_now(0, 100 + round_)
            if round_ % 2:
                r.flush_now()
            r.switch(keep=True)
            assert r.guest.read_now(0, BLOCK) == pattern(100 + round_)
            r.assert_same_content()
        r.write_now(9, 9)
        r.flush_now()
        assert r.durable(r.source, 9) == r.durable(r.destination, 9) == pattern(9)


def test_the_flushed_counts_change_places_with_the_disks() -> None:
    """After a switch each count must speak of its own disk."""
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.flush_now()
        r.write_now(1, 2)
        # The source is flushed without the destination: the guest's flush fails on the way.
        r.destination.hold(FLUSH)
        flush = r.guest.flush()
        r.driver.await_held(r.destination, FLUSH)
        r.driver.until(lambda: r.snapshot().counts.source_flushed == 2, "the source is flushed")
        assert r.snapshot().counts.flushed == 1
        assert r.unconfirmed(flush)
        r.destination.hold(FLUSH, False)
        r.destination.release(FLUSH)
        r.guest.wait(flush)
        r.write_now(2, 3)
        r.source.fault(FLUSH, errno.EIO)
        assert r.guest.flush_now().status == Status.IOERR
        r.driver.until(lambda: r.driver.settle().counts.flushed == 3, "the destination was flushed beside it")
        before = r.snapshot().counts
        assert (before.source_flushed, before.flushed) == (2, 3)
        r.gate()
        r.exchange(keep=True)
        after = r.snapshot().counts
        assert (after.source_flushed, after.flushed) == (3, 2)
        r.source, r.destination = r.destination, r.source
        old = flushes(r.destination)
        r.flush_now()  # R = 3: the new source holds it, the old one has to be flushed
        assert flushes(r.destination) == old + 1
        assert r.durable(r.destination, 2) == pattern(3)


def test_what_the_new_source_does_not_hold_durably_is_flushed() -> None:
    """A gate needs M = G, not F = G: the count must not claim what only the cache holds."""
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.flush_now()
        r.write_now(1, 2)
        drained(r)
        r.gate()
        r.exchange(keep=False)
        assert r.snapshot().counts.source_flushed == 1
        assert r.durable(r.destination, 1) == bytes(BLOCK)
        r.flush_now()
        assert r.durable(r.destination, 1) == pattern(2)


def test_the_gate_waits_for_write_through_writes() -> None:
    """Taken up, on both disks, and not yet answered: it waits for a flush."""
    with rig(mirrored=True) as r:
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN, value=1)
        r.transport.set_write_cache(False)
        r.source.hold(FLUSH)
        write = r.write(0, 1)
        r.driver.await_held(r.source, FLUSH)
        r.driver.settle()
        token = r.driver.submit(lib.VS_CMD_GATE, value=5_000_000)
        r.driver.settle()
        assert r.driver.done(token) is None
        r.source.hold(FLUSH, False)
        r.source.release(FLUSH)
        assert r.driver.wait(token).result == 0
        r.guest.wait(write)
        assert write.ok and r.durable(r.source, 0) == pattern(1)


def test_a_destination_kept_after_a_switch_can_fail_like_any_other() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.switch(keep=True)
        r.destination.fault(WRITE, errno.EIO)
        r.write_now(0, 2)
        assert r.await_degraded() == Reason.DESTINATION_WRITE
        flush = r.guest.flush()
        assert r.unconfirmed(flush)
        r.record_written()
        r.guest.wait(flush)
        assert flush.ok and r.durable(r.source, 0) == pattern(2)


def test_a_source_that_cannot_be_flushed_can_be_left() -> None:
    """That is what a switch is for: draining asks the destination alone."""
    with rig(mirrored=True) as r:
        r.source.fault(FLUSH, errno.EIO, count=-1)
        r.write_now(0, 1)
        assert r.guest.flush_now().status == Status.IOERR
        r.switch(keep=False)
        r.flush_now()
        assert r.durable(r.source, 0) == pattern(1)


def test_a_write_through_guest_is_switched() -> None:
    with rig(mirrored=True) as r:
        r.transport.set_write_cache(False)
        r.write_now(0, 1)
        r.switch(keep=True)
        r.write_now(1, 2)
        assert r.durable(r.source, 1) == r.durable(r.destination, 1) == pattern(2)
