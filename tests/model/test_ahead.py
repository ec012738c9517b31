# SPDX-License-Identifier: Apache-2.0
"""A destination that is too slow: the guest runs ahead of it, and it catches up
(c_shim/mirror/pull_ahead.c)."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine_driver import CommandError, Cut, DiskOp, EventKind, Reason, State
from tests.frontend import Request
from tests.model import rig as rigs
from tests.model.rig import BLOCK, Rig, pattern
from tests.sizes import MIB
from vhostsync._shim import lib

WRITE, FLUSH, READ = DiskOp.WRITE, DiskOp.FLUSH, DiskOp.READ
REGION = 65536
BLOCKS_A_REGION = REGION // BLOCK
FILL = 64 * BLOCK
BACKOFF_US = 20_000


@contextmanager
def rig(*, mirrored: bool = True, **options: Any) -> Iterator[Rig]:
    defaults: dict[str, Any] = {
        "checkpoint_us": 20_000,
        "congestion_fill_bytes": FILL,
        "ahead_backoff_us": BACKOFF_US,
    }
    with rigs.rig(mirrored=mirrored, pull_ahead=True, **defaults | options) as r:
        yield r


def settled(r: Rig) -> None:
    r.driver.until(lambda: differing(r) == 0, "both disks are known to be equal", timeout_s=20)


def differing(r: Rig) -> int:
    found = r.snapshot().differing_bytes
    assert found is not None
    return found


def fill_log(r: Rig, *, first: int = 0, blocks: int = 1000) -> int:
    """Writes block after block until the state is ahead; how many. The destination takes none of them."""
    r.destination.hold(WRITE)
    for number in range(blocks):
        r.write_now((first + number) % 1000, number)
        if r.snapshot().state == State.AHEAD:
            return number + 1
    raise AssertionError("the log is full and the guest was not let go on")


def await_ahead(r: Rig) -> None:
    """Ahead of a destination that was steady: the event for which flushes are held."""
    event = r.driver.take_event(EventKind.DEGRADED)
    assert (event.value, event.reason) == (State.AHEAD, Reason.CONGESTION)


def let_go(r: Rig) -> None:
    """The destination takes what it is given from here on."""
    for op in (WRITE, FLUSH):
        r.destination.hold(op, False)
        r.destination.release(op)


def drained(r: Rig) -> int:
    """Until the destination holds durably what was in the log; for how long (ns) it may not catch up yet."""
    return r.driver.take_event(EventKind.AHEAD_DRAINED, timeout_s=20).value


def catch_up(r: Rig, *, expect: int = 0) -> None:
    r.driver.call(lib.VS_CMD_CATCH_UP, expect=expect)


def test_a_full_log_lets_the_guest_go_on() -> None:
    with rig() as r:
        written = fill_log(r)
        assert written <= FILL // BLOCK + 1
        await_ahead(r)
        r.record_written()
        for number in range(200):
            r.write_now(number, number)
        r.flush_now()
        now = r.snapshot()
        assert now.lag_writes >= 200 and now.lag_bytes >= 200 * BLOCK
        assert not now.counts.mirrored_known


def test_the_guest_is_not_slowed_before_the_log_is_full() -> None:
    """A throttle that settled below the threshold would never let it be reached."""
    with rig() as r:
        began = r.driver.engine_throttled_ns()
        fill_log(r)
        assert r.driver.engine_throttled_ns() - began < 10_000_000


def test_a_lag_in_time_lets_the_guest_go_on() -> None:
    with rig(max_lag_us=50_000) as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1)
        flush = r.guest.flush()
        await_ahead(r)
        assert r.unconfirmed(flush)
        r.record_written()
        r.guest.wait(flush)
        assert flush.ok


def test_flushes_are_held_until_the_record_says_outdated() -> None:
    with rig() as r:
        r.destination.hold(WRITE)
        early = r.write(900, 1)
        r.guest.wait(early)
        waiting = r.guest.flush()
        fill_log(r)
        await_ahead(r)
        late = r.guest.flush()
        assert r.unconfirmed(waiting, late)
        assert r.snapshot().record_pending
        r.record_written()
        r.guest.wait(waiting, late)
        assert waiting.ok and late.ok


def test_flushes_fail_while_the_record_cannot_be_written() -> None:
    with rig() as r:
        fill_log(r)
        await_ahead(r)
        flush = r.guest.flush()
        r.record_written(errno.ENOSPC)
        r.guest.wait(flush)
        assert not flush.ok
        let_go(r)
        drained(r)
        catch_up(r, expect=errno.EBUSY)


def test_the_destination_becomes_a_moment_of_the_source() -> None:
    """What was in the log goes on to it, in order, and nothing that was written later."""
    choose = random.Random(3)
    with rig() as r:
        r.destination.hold(WRITE)
        shadow = bytearray(1000 * BLOCK)
        moments = {r.snapshot().counts.generation: bytes(shadow)}
        for number in range(200):
            block = choose.randrange(40)
            r.write_now(block, number)
            shadow[block * BLOCK : (block + 1) * BLOCK] = pattern(number)
            moments[r.snapshot().counts.generation] = bytes(shadow)
        assert r.snapshot().state == State.AHEAD
        await_ahead(r)
        let_go(r)
        drained(r)
        now = r.snapshot()
        moment = now.counts.generation - now.lag_writes
        assert 0 < now.lag_writes < 200
        assert r.destination.read(0, 1000 * BLOCK, Cut.EVERYTHING) == moments[moment]


def test_a_write_at_the_source_is_not_in_that_moment() -> None:
    """It was captured, but a later one that is not in the log was completed before it."""
    with rig() as r:
        r.source.hold(WRITE)
        held = r.write(900, 7, queue=1)
        r.driver.await_held(r.source, WRITE)
        r.source.hold(WRITE, False)
        fill_log(r)
        await_ahead(r)
        r.write_now(960, 8)  # in another region: the first one is known to differ by itself
        r.source.release(WRITE)
        r.guest.wait(held)
        assert held.ok
        let_go(r)
        drained(r)
        assert r.durable(r.destination, 900) == r.durable(r.destination, 960) == bytes(BLOCK)
        assert r.durable(r.destination, 0) == pattern(0)
        r.record_written()
        catch_up(r)
        r.driver.await_state(State.STEADY)
        r.flush_now()
        assert r.durable(r.destination, 900) == pattern(7)
        assert r.durable(r.destination, 960) == pattern(8)


def test_catching_up_copies_what_was_written_since() -> None:
    with rig() as r:
        settled(r)
        fill_log(r)
        await_ahead(r)
        catch_up(r, expect=errno.EBUSY)
        r.record_written()
        let_go(r)
        assert drained(r) == 0
        assert differing(r) <= REGION  # the write that came to the full log, perhaps
        r.write_now(40 * BLOCKS_A_REGION, 1)
        r.write_now(41 * BLOCKS_A_REGION, 2)
        left = differing(r)
        assert 2 * REGION <= left <= 3 * REGION
        catch_up(r)
        r.driver.await_state(State.STEADY)
        now = r.snapshot()
        assert now.copy_bytes_total == now.copy_bytes_done == left
        settled(r)
        r.assert_same_content()
        catch_up(r, expect=errno.ENOTCONN)


def test_writes_in_flight_when_it_catches_up_are_copied() -> None:
    with rig() as r:
        fill_log(r)
        await_ahead(r)
        r.record_written()
        let_go(r)
        drained(r)
        r.source.hold(WRITE)
        held = r.write(30 * BLOCKS_A_REGION, 5)
        r.driver.await_held(r.source, WRITE)
        r.source.hold(WRITE, False)
        catch_up(r)
        r.driver.settle()
        assert r.snapshot().state == State.SYNCING
        assert r.snapshot().copy_bytes_done == 0
        r.source.release(WRITE)
        r.guest.wait(held)
        r.driver.await_state(State.STEADY)
        settled(r)
        r.assert_same_content()


class SlowDestination:
    """The destination takes so many writes, of any size, at each step of the test."""

    def __init__(self, r: Rig, a_step: int) -> None:
        self.r, self.a_step = r, a_step
        r.destination.hold(WRITE)
        self.waits_ns: list[int] = []
        self.copied = 0
        self._not_before = 0.0
        self._pending = False

    def step(self) -> State:
        """Takes its writes, and does what the control plane would."""
        r = self.r
        r.driver.settle_quickly()
        taken = 0
        while taken < self.a_step and r.destination.release(WRITE, 1):
            taken += 1
            r.driver.settle_quickly()
        for event in [each for each in r.driver.events if each.kind == EventKind.DEGRADED]:
            assert event.value == State.AHEAD
            r.driver.events.remove(event)
            r.record_written()
        for event in [each for each in r.driver.events if each.kind == EventKind.AHEAD_DRAINED]:
            r.driver.events.remove(event)
            self.waits_ns.append(event.value)
            self._not_before, self._pending = time.monotonic() + event.value / 1e9, True
        if self._pending and time.monotonic() >= self._not_before:
            self._pending = False
            catch_up(r)
            self.copied += r.snapshot().copy_bytes_total
        return r.snapshot().state


def test_it_converges_under_small_random_writes() -> None:
    """Each marks a region sixteen times its size, all over the disk; the destination takes twice as many
    writes as the guest makes. Every region is copied once, under the load."""
    choose = random.Random(1)
    with rig(size_bytes=16 * MIB) as r:
        settled(r)
        slow = SlowDestination(r, a_step=8)
        number, state = 0, r.snapshot().state
        while state != State.AHEAD:  # a burst
            r.guest.wait(*[r.write(choose.randrange(4096), number + i) for i in range(16)])
            number, state = number + 16, slow.step()
        seen = set()
        for _ in range(2000):
            r.guest.wait(*[r.write(choose.randrange(4096), number + i) for i in range(4)])
            number, state = number + 4, slow.step()
            seen.add(state)
            if state == State.STEADY:
                break
        assert state == State.STEADY and seen == {State.AHEAD, State.SYNCING, State.STEADY}
        assert slow.waits_ns == [0]  # it caught up once
        assert slow.copied <= 16 * MIB
        for _ in range(20):  # and it lasts
            r.guest.wait(*[r.write(choose.randrange(4096), number + i) for i in range(4)])
            number, state = number + 4, slow.step()
            assert state == State.STEADY
        let_go(r)
        settled(r)
        r.flush_now()
        r.assert_same_content()


def test_more_than_the_destination_takes_never_loops_and_keeps_its_progress() -> None:
    """The guest overwrites four regions faster than the destination takes it, for ever: the mirror is ahead
    again and again, but ever more rarely, and what was copied stays copied."""
    with rig(size_bytes=8 * MIB, memory_bytes=128 * MIB) as r:
        settled(r)
        fill_log(r)
        r.guest.wait(*[r.write(number, 5, kick=True) for number in range(0, 2048, BLOCKS_A_REGION)])
        slow = SlowDestination(r, a_step=4)
        number, left, began = 0, [], time.monotonic()
        while len(slow.waits_ns) < 5:
            writes = [r.write(choose % 64, number) for choose in range(24)]
            r.guest.wait(*writes)
            number += 24
            known = len(slow.waits_ns)
            slow.step()
            if len(slow.waits_ns) > known:
                left.append(differing(r))
            assert time.monotonic() < began + 60, (slow.waits_ns, left)
        assert slow.waits_ns[0] == 0
        for wait_ns, units in zip(slow.waits_ns[1:], (1, 2, 4, 8), strict=True):
            assert 0 <= wait_ns <= units * BACKOFF_US * 1000
        assert time.monotonic() - began >= (1 + 2 + 4) * BACKOFF_US / 1e6
        # How many of the four regions differ at one moment is chance. All others only ever become alike.
        others = [max(0, each - 4 * REGION) for each in left]
        assert others == sorted(others, reverse=True) and left[-1] < left[0], left
        let_go(r)
        while slow.step() != State.STEADY:
            assert time.monotonic() < began + 60
            let_go(r)
        let_go(r)
        settled(r)
        r.assert_same_content()


def test_catching_up_too_early_is_refused() -> None:
    """The second time it has to wait, as long as steady was short."""
    with rig(ahead_backoff_us=2_000_000) as r:
        for again in (False, True):
            fill_log(r)
            await_ahead(r)
            r.record_written()
            let_go(r)
            wait_ns = drained(r)
            assert (wait_ns > 0) == again
            if again:
                catch_up(r, expect=errno.EAGAIN)
            r.driver.until(lambda: tries(r), "it may catch up")
            r.driver.await_state(State.STEADY)


def tries(r: Rig) -> bool:
    try:
        catch_up(r)
    except CommandError as error:
        assert error.errno in (errno.EAGAIN, errno.EBUSY)
        return False
    return True


def test_a_copy_in_flight_is_waited_for_and_kept() -> None:
    """Ahead in the middle of a copy: the checkpoint that keeps the progress covers what was being copied."""
    with rig(mirrored=False, size_bytes=8 * MIB, copy_depth=2, checkpoint_us=60_000_000) as r:
        r.source.load(0, pattern(1, 2048))
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, WRITE, 1)
        r.destination.release(WRITE, 1)
        r.driver.await_held(r.destination, WRITE, 1)
        for number in range(200):  # where the copy is already: these have to be replicated
            r.write_now(number % 16, number)
            if r.snapshot().state == State.AHEAD:
                break
        assert r.snapshot().state == State.AHEAD
        # It was worth nothing yet, so nobody has to record anything.
        assert not any(each.kind == EventKind.DEGRADED for each in r.driver.events)
        let_go(r)
        drained(r)
        assert 4 * MIB <= differing(r) <= 7 * MIB + REGION
        catch_up(r)
        r.driver.await_state(State.STEADY)
        assert r.snapshot().copy_bytes_total <= 7 * MIB + REGION
        r.flush_now()
        r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")
        r.assert_same_content()


def test_the_copy_gives_way_to_replication() -> None:
    """With a quarter of the threshold in the log, no region copy begins."""
    with rig(mirrored=False, size_bytes=8 * MIB, copy_depth=1) as r:
        r.source.load(0, pattern(1, 2048))
        r.destination.hold(WRITE)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, WRITE, 1)
        for number in range(FILL // BLOCK // 4 + 1):  # behind the region copy that is on its way
            r.write_now(number, 2)
        reads = r.source.count(READ)
        r.destination.release(WRITE, 1)
        r.driver.settle()
        assert r.snapshot().copy_bytes_done == MIB and r.source.count(READ) == reads
        let_go(r)
        r.driver.await_state(State.STEADY)


def test_the_flush_that_would_make_it_steady_comes_too_late() -> None:
    """The guest got ahead while the destination was being flushed: what it holds is not steady any more."""
    with rig(mirrored=False) as r:
        r.destination.hold(FLUSH)
        assert r.driver.start_mirror(r.destination) == 0
        r.driver.await_held(r.destination, FLUSH)
        r.destination.hold(WRITE)
        fill_log(r)
        r.destination.release(FLUSH)
        r.driver.settle()
        assert r.snapshot().state == State.AHEAD
        let_go(r)
        r.driver.until(lambda: tries(r), "it may catch up")
        r.driver.await_state(State.STEADY)
        settled(r)
        r.assert_same_content()


def test_a_flush_of_the_destination_that_ends_while_ahead_counts_for_nothing() -> None:
    with rig() as r:
        r.write_now(900, 1)
        r.destination.hold(FLUSH)
        flush = r.guest.flush()
        r.driver.await_held(r.destination, FLUSH)
        fill_log(r)
        await_ahead(r)
        r.destination.hold(FLUSH, False)
        r.destination.release(FLUSH)
        r.record_written()
        r.guest.wait(flush)
        assert flush.ok and not r.snapshot().counts.mirrored_known


def test_a_destination_that_hangs_while_ahead_is_given_up() -> None:
    with rig(destination_timeout_us=300_000) as r:
        r.destination.hold(WRITE)
        r.write_now(0, 1, blocks=FILL // BLOCK + 8)  # at once: from here on it hangs
        await_ahead(r)
        r.record_written()
        r.driver.await_state(State.DEGRADED)
        r.write_now(0, 1)
        r.flush_now()
        assert r.snapshot().fenced
        catch_up(r, expect=errno.ENOTCONN)
        let_go(r)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        r.driver.mirror(r.destination, resync=True)
        r.assert_same_content()


def test_a_destination_that_fails_while_the_record_is_pending() -> None:
    with rig() as r:
        flush = [r.guest.flush()]
        fill_log(r)
        await_ahead(r)
        flush.append(r.guest.flush())
        r.destination.fault(WRITE, errno.EIO, count=1)
        let_go(r)
        r.driver.await_state(State.DEGRADED)
        assert r.unconfirmed(flush[1])
        r.record_written()
        r.guest.wait(*flush)
        assert all(each.ok for each in flush)


def test_a_ring_stops_at_once() -> None:
    with rig(stop_timeout_us=60_000_000) as r:
        fill_log(r)
        await_ahead(r)
        r.record_written()
        r.transport.stop_ring(0)
        assert r.snapshot().state == State.AHEAD


def test_letting_go_leaves_the_moment() -> None:
    with rig() as r:
        fill_log(r)
        await_ahead(r)
        r.record_written()
        let_go(r)
        drained(r)
        r.write_now(900, 1)
        before = r.destination.read(0, 4 * MIB, Cut.EVERYTHING)
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
        r.driver.take_event(EventKind.FENCE_CLEAR)
        assert r.destination.read(0, 4 * MIB, Cut.EVERYTHING) == before
        r.driver.mirror(r.destination, resync=True)
        assert r.snapshot().copy_bytes_total <= 2 * REGION
        r.assert_same_content()


def test_no_switch_and_no_drain_while_ahead() -> None:
    with rig() as r:
        r.destination.hold(WRITE)
        r.write_now(900, 1)
        waiting = r.driver.submit(lib.VS_CMD_MIRROR_DRAIN, value=0)
        fill_log(r)
        await_ahead(r)
        r.record_written()
        assert -r.driver.wait(waiting).result == errno.ENOTCONN
        r.gate(expect=errno.ENOTCONN)
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN, value=0, expect=errno.ENOTCONN)
        r.exchange(keep=True, expect=errno.ENOTCONN)


@pytest.mark.parametrize("seed", range(6))
def test_any_load_and_any_pace_leave_equal_disks(seed: int) -> None:
    """Random writes, discards and flushes; a destination that stops and goes. At the end both are equal."""
    choose = random.Random(seed)
    with rig(size_bytes=4 * MIB, dirty_region_bytes=choose.choice([4096, 65536, 1 << 21])) as r:
        slow = SlowDestination(r, a_step=choose.choice([1, 4, 16]))
        states = set()
        for number in range(60):
            requests: list[Request] = []
            for _ in range(choose.randrange(24)):
                kind = choose.randrange(10)
                if kind == 0:
                    requests.append(r.guest.discard(choose.randrange(512) * BLOCK, 8 * BLOCK))
                elif kind == 1 and State.AHEAD in states:
                    requests.append(r.guest.flush())
                else:
                    requests.append(r.write(choose.randrange(1000), number, blocks=choose.randint(1, 8)))
            for _ in range(choose.choice([1, 1, 1, 30])):
                states.add(slow.step())
            await_answers(r, slow, requests)
        assert State.AHEAD in states
        until = time.monotonic() + 60
        let_go(r)
        while slow.step() != State.STEADY:
            assert time.monotonic() < until
            let_go(r)
        let_go(r)
        r.flush_now()
        settled(r)
        r.assert_same_content()


def await_answers(r: Rig, slow: SlowDestination, requests: list[Request]) -> None:
    until = time.monotonic() + 20
    while not all(each.done for each in requests):
        assert time.monotonic() < until, "the guest's requests are not answered"
        slow.step()
        r.guest.poll()


def test_a_grow_that_is_cut_off_leaves_the_moment_whole() -> None:
    """Steady while the disk grew: what the log still brings to the region across the old end is part of the
    moment, and nothing that the copy reads there later is."""
    old = 4 * MIB - 3 * 512
    with rig(mirrored=False, size_bytes=old, disk_bytes=8 * MIB, congestion_fill_bytes=2 * FILL) as r:
        r.source.load(old - 5 * 512, b"last" * 640)  # what is copied last
        r.driver.call(lib.VS_CMD_MIRROR_SPEED, value=16)  # and after it nothing for minutes
        r.mirror()
        token = r.driver.submit(lib.VS_CMD_GROW, grow=(5 * MIB, 8 * MIB, 8 * MIB))
        r.destination.hold(WRITE)
        for number in range(64):  # all that may be on its way at once: what comes now stays in the log
            r.write_now(2 * number, number)
        before, after = b"before" * 256, b"later!" * 256
        request = r.guest.write(old - len(before), before)
        r.guest.wait(request)
        fill_log(r)
        await_ahead(r)
        r.record_written()
        assert r.driver.wait(token).result == 0
        r.guest.wait(r.guest.write(old - len(after), after))
        let_go(r)
        drained(r)
        assert r.destination.read(old - len(before), len(before), Cut.EVERYTHING) == before
        r.driver.call(lib.VS_CMD_MIRROR_SPEED, value=0)
        catch_up(r)
        r.driver.await_state(State.STEADY)
        r.assert_same_content()
        assert r.destination.read(old - len(after), len(after)) == after
