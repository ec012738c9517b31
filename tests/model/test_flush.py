# SPDX-License-Identifier: Apache-2.0
"""When a guest's flush is confirmed (docs/durability.md, section 2)."""

from __future__ import annotations

import pytest

from tests.engine_driver import DiskOp, EngineTransport, Reason
from tests.frontend import DEFAULT_FEATURES, Feature
from tests.model.rig import Rig, flushes, pattern, rig
from vhostsync._shim import lib

WRITE, FLUSH = DiskOp.WRITE, DiskOp.FLUSH


def test_passthrough_flush_waits_for_the_source() -> None:
    with rig() as r:
        r.write_now(0, 1)
        r.source.hold(FLUSH)
        flush = r.guest.flush()
        r.driver.await_held(r.source, FLUSH)
        assert r.unconfirmed(flush)
        assert r.durable(r.source, 0) == bytes(4096)
        r.source.release(FLUSH)
        r.guest.wait(flush)
        assert flush.ok
        assert r.durable(r.source, 0) == pattern(1)


@pytest.mark.parametrize("slow", ["source", "destination"])
def test_flush_is_held_back_with_either_disk(slow: str) -> None:
    # No checkpoint flushes the disks meanwhile, nor is the mirror given up, which has the source flushed.
    with rig(mirrored=True, checkpoint_us=600_000_000, destination_timeout_us=600_000_000) as r:
        held = r.source if slow == "source" else r.destination
        held.hold(FLUSH)
        r.write_now(3, 7)
        flush = r.guest.flush()
        r.driver.await_held(held, FLUSH)
        assert r.unconfirmed(flush)
        held.release(FLUSH)
        r.guest.wait(flush)
        assert flush.ok
        assert r.durable(r.source, 3) == r.durable(r.destination, 3) == pattern(7)
        counts = r.snapshot().counts
        assert counts.flushed == counts.source_flushed == counts.request == counts.generation == 1


def test_both_disks_are_flushed_side_by_side() -> None:
    with rig(mirrored=True) as r:
        for disk in (r.source, r.destination):
            disk.hold(FLUSH)
        r.write_now(0, 1)
        flush = r.guest.flush()
        r.driver.await_held(r.source, FLUSH)
        r.driver.await_held(r.destination, FLUSH)
        r.source.release(FLUSH)
        assert r.unconfirmed(flush)
        r.destination.release(FLUSH)
        r.guest.wait(flush)
        assert flush.ok


def test_what_the_disks_hold_already_is_confirmed_without_a_flush() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1)
        r.flush_now()
        before = flushes(r.source), flushes(r.destination)
        r.source.hold(FLUSH)
        r.destination.hold(FLUSH)
        r.flush_now()  # R <= F and R <= source_flushed: neither disk is asked
        assert (flushes(r.source), flushes(r.destination)) == before
        assert (r.source.held(FLUSH), r.destination.held(FLUSH)) == (0, 0)


def test_flush_of_an_idle_guest_at_generation_0() -> None:
    with rig(mirrored=True) as r:
        assert r.snapshot().counts.generation == 0
        before = flushes(r.destination)
        r.flush_now()
        assert flushes(r.destination) == before
        # A former process may have left unflushed writes: the source was flushed at least once.
        assert flushes(r.source) >= 1


def test_passthrough_flush_at_generation_0_reaches_the_source() -> None:
    with rig() as r:
        before = flushes(r.source)
        r.flush_now()
        assert flushes(r.source) == before + 1


def test_flush_waits_for_replication() -> None:
    """M < R: no flush of the destination can help before the write is there."""
    with rig(mirrored=True) as r:
        r.destination.hold(WRITE)
        before = flushes(r.destination)
        r.write_now(5, 9)
        flush = r.guest.flush()
        r.driver.await_held(r.destination, WRITE)
        assert r.unconfirmed(flush)
        assert flushes(r.destination) == before
        r.destination.release(WRITE)
        r.guest.wait(flush)
        assert flush.ok
        assert r.durable(r.destination, 5) == pattern(9)


def test_m_is_a_contiguous_prefix() -> None:
    """A later write that is mirrored first does not count before the earlier one is there."""
    with rig(mirrored=True) as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        r.write_now(8, 2)
        flush = r.guest.flush()
        r.driver.await_held(r.destination, WRITE, 2)
        r.destination.release(WRITE, 1)  # the newest first
        assert r.unconfirmed(flush)
        assert r.seen(r.destination, 8) == pattern(2)
        assert r.snapshot().counts.mirrored == 0
        r.destination.release(WRITE)
        r.guest.wait(flush)
        assert r.snapshot().counts.mirrored == 2
        assert r.durable(r.destination, 0) == pattern(1)


def test_a_waiting_flush_is_decided_anew_when_the_mirror_is_stopped() -> None:
    with rig(mirrored=True) as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        flush = r.guest.flush()
        r.driver.await_held(r.destination, WRITE)
        assert r.unconfirmed(flush)
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
        r.guest.wait(flush)
        assert flush.ok and r.durable(r.source, 0) == pattern(1)


def test_waiting_flushes_share_and_one_is_in_flight() -> None:
    with rig(mirrored=True) as r:
        r.destination.hold(FLUSH)
        before = flushes(r.destination)
        r.write_now(0, 1)
        first = r.guest.flush()
        r.driver.await_held(r.destination, FLUSH)
        r.write_now(1, 2)
        later = [r.guest.flush(queue=number % 2) for number in range(10)]
        assert r.unconfirmed(first, *later)
        assert r.destination.held(FLUSH) == 1
        r.destination.release(FLUSH)
        r.guest.wait(first)
        r.driver.await_held(r.destination, FLUSH)
        assert r.unconfirmed(*later)
        r.destination.release(FLUSH)
        r.guest.wait(*later)
        assert all(flush.ok for flush in later)
        assert flushes(r.destination) == before + 2


def test_waiting_flushes_share_a_source_flush() -> None:
    with rig() as r:
        r.source.hold(FLUSH)
        r.write_now(0, 1)
        first = r.guest.flush()
        r.driver.await_held(r.source, FLUSH)
        r.write_now(1, 2)
        later = [r.guest.flush(queue=number % 2) for number in range(10)]
        assert r.unconfirmed(first, *later)
        r.source.hold(FLUSH, False)
        r.source.release(FLUSH)
        r.guest.wait(first, *later)
        assert flushes(r.source) == 2
        assert r.durable(r.source, 1) == pattern(2)


def test_f_is_m_as_it_was_when_the_flush_began() -> None:
    """Writes mirrored while the destination is being flushed are not in that flush."""
    with rig(mirrored=True) as r:
        r.destination.hold(FLUSH)
        r.write_now(0, 1)
        first = r.guest.flush()
        r.driver.await_held(r.destination, FLUSH)
        r.write_now(1, 2)
        r.driver.until(lambda: r.snapshot().counts.mirrored == 2, "the second write is mirrored")
        r.destination.release(FLUSH)
        r.guest.wait(first)
        counts = r.snapshot().counts
        assert (counts.mirrored, counts.flushed) == (2, 1)
        assert r.durable(r.destination, 1) == bytes(4096)
        second = r.guest.flush()
        r.driver.await_held(r.destination, FLUSH)
        assert r.unconfirmed(second)
        r.destination.release(FLUSH)
        r.guest.wait(second)
        assert r.durable(r.destination, 1) == pattern(2)
        assert r.snapshot().counts.flushed == 2


def test_source_flushed_is_g_as_it_was_when_the_flush_began() -> None:
    with rig() as r:
        r.source.hold(FLUSH)
        r.write_now(0, 1)
        first = r.guest.flush()
        r.driver.await_held(r.source, FLUSH)
        r.write_now(1, 2)
        r.source.release(FLUSH)
        r.guest.wait(first)
        assert r.snapshot().counts.source_flushed == 1
        second = r.guest.flush()
        r.driver.await_held(r.source, FLUSH)
        assert r.unconfirmed(second)
        r.source.release(FLUSH)
        r.guest.wait(second)
        assert r.durable(r.source, 1) == pattern(2)


def test_steady_begins_with_a_flush_that_began_late_enough() -> None:
    """Not steady before the destination's flush has succeeded; then all that was there is durable."""
    with rig() as r:
        r.write_now(0, 1, blocks=8)
        r.destination.hold(FLUSH)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, FLUSH)
        assert not r.driver.settle().counts.mirrored_known
        r.write_now(2, 5)  # mirrored while the flush is in flight: not in F
        r.destination.release(FLUSH)
        r.driver.until(lambda: r.snapshot().counts.mirrored_known, "steady")
        counts = r.driver.settle().counts
        assert (counts.generation, counts.mirrored, counts.flushed) == (2, 2, 1)
        assert r.durable(r.destination, 0) == pattern(1)
        assert r.durable(r.destination, 2) == pattern(1, 8)[2 * 4096 : 3 * 4096]


def test_flush_in_syncing_needs_the_source_alone() -> None:
    with rig() as r:
        r.write_now(0, 1)
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, WRITE)
        r.flush_now()


# -- write-through -------------------------------------------------------------


def write_is_durable_when_confirmed(r: Rig, block: int) -> None:
    r.destination.hold(FLUSH)
    write = r.write(block, 42)
    r.driver.await_held(r.destination, FLUSH)
    assert r.unconfirmed(write)
    assert r.seen(r.source, block) == pattern(42)
    r.destination.hold(FLUSH, False)
    r.destination.release(FLUSH)
    r.guest.wait(write)
    assert write.ok
    assert r.durable(r.source, block) == r.durable(r.destination, block) == pattern(42)


def test_write_through_by_the_write_cache_switch() -> None:
    with rig(mirrored=True) as r:
        r.transport.set_write_cache(False)
        write_is_durable_when_confirmed(r, 1)
        r.transport.set_write_cache(True)
        r.destination.hold(FLUSH)
        r.write_now(2, 1)


def test_write_through_of_a_driver_that_cannot_flush() -> None:
    features = DEFAULT_FEATURES & ~(Feature.FLUSH | Feature.CONFIG_WCE)
    with rig(mirrored=True, features=features) as r:
        write_is_durable_when_confirmed(r, 1)


@pytest.mark.parametrize("lacking", [Feature.FLUSH, Feature.CONFIG_WCE])
def test_a_driver_that_has_either_is_not_write_through(lacking: Feature) -> None:
    with rig(mirrored=True, features=DEFAULT_FEATURES & ~lacking) as r:
        r.source.hold(FLUSH)
        r.destination.hold(FLUSH)
        r.write_now(1, 1)


def test_zeroes_are_written_through_too() -> None:
    with rig(mirrored=True) as r:
        r.write_now(0, 1, blocks=4)
        r.transport.set_write_cache(False)
        r.destination.hold(FLUSH)
        zero = r.guest.write_zeroes(0, 8192)
        discard = r.guest.discard(8192, 8192)
        r.driver.await_held(r.destination, FLUSH)
        assert r.unconfirmed(zero, discard)
        r.destination.hold(FLUSH, False)
        r.destination.release(FLUSH)
        r.guest.wait(zero, discard)
        assert r.durable(r.destination, 0, 4) == r.durable(r.source, 0, 4) == bytes(4 * 4096)


def test_the_mode_is_latched_when_the_write_is_taken_up() -> None:
    with rig(mirrored=True) as r:
        r.source.hold(WRITE)
        r.source.hold(FLUSH)
        back = r.write(0, 1)
        r.driver.await_held(r.source, WRITE)
        r.transport.set_write_cache(False)
        through = r.write(1, 2)
        r.driver.await_held(r.source, WRITE, 2)
        r.transport.set_write_cache(True)
        r.source.hold(WRITE, False)
        r.source.release(WRITE)
        r.guest.wait(back)
        assert r.unconfirmed(through)
        r.source.hold(FLUSH, False)
        r.source.release(FLUSH)
        r.guest.wait(through)
        assert through.ok


def test_a_device_reset_restores_the_default_mode() -> None:
    with rig(mirrored=True) as r:
        r.transport.set_write_cache(False)
        r.guest.stop()
        r.transport.reset()
        r.guest.start()
        assert r.snapshot().write_cache
        r.source.hold(FLUSH)
        r.write_now(0, 1)


def test_another_attachment_that_comes_and_goes_leaves_the_mode_alone() -> None:
    """libblkio connects twice; the first connection only probes."""
    with rig(mirrored=True) as r:
        r.transport.set_write_cache(False)
        probe = EngineTransport(r.driver, attachment=1)
        probe.set_features(DEFAULT_FEATURES)
        probe.set_write_cache(True)
        probe.close()
        write_is_durable_when_confirmed(r, 1)


def test_the_mode_goes_with_the_guest_of_a_live_migration() -> None:
    """The receiving QEMU 10 resets its new device while the guest still runs on the other side."""
    with rig(mirrored=True) as r:
        r.transport.set_write_cache(False)
        incoming = EngineTransport(r.driver, attachment=1)
        incoming.reset()
        assert not r.driver.snapshot().write_cache
        r.guest.stop()
        r.transport.close()
        r.guest.transport = incoming
        r.guest.start()
        write_is_durable_when_confirmed(r, 1)
        incoming.reset()  # a reset of the guest, which is alone now
        assert r.driver.snapshot().write_cache


@pytest.mark.parametrize("then", ["starts", "is reset first", "brings an empty record first"])
def test_the_mode_that_the_guest_sets_while_it_is_migrated_goes_with_it(then: str) -> None:
    """The receiving side has connected before: it must not go on in the mode of that moment."""
    with rig(mirrored=True) as r:
        incoming = EngineTransport(r.driver, attachment=1)
        incoming.set_features(DEFAULT_FEATURES)
        r.transport.set_write_cache(False)
        if then == "is reset first":
            incoming.reset()
        elif then == "brings an empty record first":
            incoming.set_inflight()
        r.guest.stop()
        r.transport.close()
        r.guest.transport = incoming
        r.guest.start()
        write_is_durable_when_confirmed(r, 1)


def test_who_has_chosen_a_mode_keeps_it() -> None:
    with rig(mirrored=True) as r:
        other = EngineTransport(r.driver, attachment=1)
        other.set_write_cache(False)
        r.transport.set_write_cache(False)
        r.transport.set_write_cache(True)
        assert r.snapshot().write_cache
        r.guest.stop()
        r.transport.close()
        r.guest.transport = other
        r.guest.start()
        write_is_durable_when_confirmed(r, 1)


def test_write_through_in_passthrough() -> None:
    with rig() as r:
        r.transport.set_write_cache(False)
        r.write_now(4, 4)
        assert r.durable(r.source, 4) == pattern(4)
