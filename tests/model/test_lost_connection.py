# SPDX-License-Identifier: Apache-2.0
"""A destination of another machine whose connection is lost: its server may have forgotten what it had
answered and not flushed, whatever the mirror was doing, and what differs is known all the same (rule 4)."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from tests.engine_driver import DiskOp, Event, EventKind, Reason, State
from tests.frontend import Request
from tests.model.rig import BLOCK, Rig, rig
from tests.model.test_resync import differing, settled
from tests.sizes import MIB
from vhostsync._shim import lib

WRITE, FLUSH, ZERO = DiskOp.WRITE, DiskOp.FLUSH, DiskOp.ZERO
FORGETS = (0, 1, 2, 3)
"""Seeds of what the server has left; 0: all."""


def await_degraded(r: Rig) -> None:
    r.driver.until(lambda: r.snapshot().state == State.DEGRADED, "the loss is noticed")
    if r.snapshot().record_pending:
        r.record_written()


def closed(r: Rig) -> Event:
    return r.driver.take_event(EventKind.FENCE_CLEAR)


def resynced(r: Rig) -> None:
    """The fence is the tests': what is late was carried out before."""
    r.destination.land()
    r.destination.connect()
    r.driver.mirror(r.destination, resync=True)
    r.flush_now()
    r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")
    r.assert_same_content()


def writes(r: Rig, choose: random.Random, count: int = 20) -> list[Request]:
    return [
        r.write(choose.randrange(900), choose.randrange(99), blocks=choose.randint(1, 8))
        for _ in range(count)
    ]


@pytest.mark.parametrize("forget", FORGETS)
def test_in_steady(forget: int) -> None:
    choose = random.Random(forget)
    with rig(size_bytes=4 * MIB, mirrored=True, checkpoint_us=20_000) as r:
        for flushed in (False, True, False):
            r.guest.wait(*writes(r, choose))
            if flushed:
                r.flush_now()
        r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")
        r.destination.cut(forget)
        r.write_now(1, 7)
        await_degraded(r)
        assert closed(r).value == 0, "nothing was under way"
        r.guest.wait(*writes(r, choose))
        resynced(r)


@pytest.mark.parametrize("forget", FORGETS)
def test_in_the_copy_and_in_the_resync_after_it(forget: int) -> None:
    """Nothing of what the copy has written was ever flushed."""
    choose = random.Random(forget)
    with rig(size_bytes=4 * MIB) as r:
        r.source.load(0, choose.randbytes(4 * MIB))
        r.driver.call(lib.VS_CMD_MIRROR_SPEED, value=MIB)
        assert r.driver.start_mirror(r.destination) == 0
        for _ in range(2):
            before = r.snapshot().copy_bytes_done
            r.driver.until(lambda before=before: r.snapshot().copy_bytes_done > before, "a part is copied")  # type: ignore[misc]
            r.destination.cut(forget)
            await_degraded(r)
            closed(r)
            r.guest.wait(*writes(r, choose, 4))
            r.destination.land()
            r.destination.connect()
            assert r.driver.start_mirror(r.destination, resync=True) == 0
        r.driver.call(lib.VS_CMD_MIRROR_SPEED, value=0)
        r.driver.until(lambda: r.snapshot().state == State.STEADY, "the copy ends")
        r.assert_same_content()


def _repair(r: Rig) -> None:
    r.driver.call(lib.VS_CMD_VERIFY, verify=(1, 0))


def _grow(r: Rig) -> None:
    r.driver.submit(lib.VS_CMD_GROW, grow=(3 * MIB, 4 * MIB, 4 * MIB))


@pytest.mark.parametrize("forget", FORGETS)
@pytest.mark.parametrize("work", [_repair, _grow], ids=["repair", "grow"])
def test_in_a_repair_and_while_the_disk_grows(forget: int, work: Callable[[Rig], None]) -> None:
    """What is written there is in no count."""
    choose = random.Random(forget)
    with rig(size_bytes=2 * MIB, disk_bytes=4 * MIB, mirrored=True, checkpoint_us=20_000) as r:
        r.guest.wait(*writes(r, choose, 4))
        r.driver.until(lambda: r.snapshot().lag_writes == 0, "all is mirrored")
        settled(r)
        r.source.load(2 * MIB, choose.randbytes(2 * MIB))
        if work is _repair:
            r.destination.load(64 * BLOCK, choose.randbytes(8 * BLOCK))
        r.destination.hold(FLUSH)
        work(r)
        r.driver.until(lambda: r.destination.held(FLUSH) > 0, "it is there, and not flushed")
        r.destination.cut(forget)
        await_degraded(r)
        closed(r)
        r.destination.hold(FLUSH, False)
        assert differing(r) > 0
        resynced(r)


def test_what_was_under_way_is_told_of_when_it_is_closed() -> None:
    with rig(mirrored=True) as r:
        r.destination.hold(WRITE)
        request = r.write(1, 1)
        r.driver.until(lambda: r.destination.held(WRITE) == 1, "it is under way")
        r.destination.cut()
        r.destination.hold(WRITE, False)
        await_degraded(r)
        r.guest.wait(request)
        assert closed(r).value == 1
        before = r.seen(r.destination, 1)
        assert r.destination.land() == 1 and r.seen(r.destination, 1) != before, "it lands late"
        resynced(r)


def test_one_that_hangs_is_cut_off_and_its_requests_come_back() -> None:
    with rig(destination_timeout_us=100_000) as r:
        r.destination.make_remote()
        r.mirror()
        r.destination.hold(WRITE)
        r.write_now(1, 1)
        await_degraded(r)
        assert closed(r).value == 1, "without anybody letting go of them"
        r.destination.hold(WRITE, False)
        resynced(r)


@pytest.mark.parametrize("keep", [True, False])
def test_the_guest_is_not_moved_to_a_disk_whose_connection_is_lost(keep: bool) -> None:
    """No request has met with the loss, and the guest's would be the first."""
    with rig(mirrored=True) as r:
        r.write_now(1, 1)
        r.flush_now()
        r.driver.call(lib.VS_CMD_MIRROR_DRAIN, value=int(keep))
        r.gate()
        r.destination.cut()
        r.exchange(keep=keep, expect=errno.ENOTCONN)
        r.driver.call(lib.VS_CMD_UNGATE)
        assert r.await_degraded() == Reason.DESTINATION_LOST
        r.record_written()
        closed(r)
        resynced(r)
        r.switch(keep=keep)


def test_the_loss_is_noticed_though_nothing_is_asked_of_it() -> None:
    """As soon as the engine's thread does anything, whatever that is."""
    with rig(mirrored=True) as r:
        r.flush_now()
        r.destination.cut()
        assert r.guest.read_now(0, BLOCK) == bytes(BLOCK)
        assert r.await_degraded() == Reason.DESTINATION_LOST
        r.record_written()
        assert closed(r).value == 0, "nothing was under way"
        resynced(r)


def test_one_that_falls_silent_while_nothing_is_asked_of_it_is_given_up() -> None:
    """It is asked for a block now and then; that it does not answer is what loses it."""
    with rig(destination_timeout_us=100_000) as r:
        r.destination.make_remote()
        r.mirror()
        settled(r)
        r.destination.hold(DiskOp.READ)
        assert r.await_degraded() == Reason.DESTINATION_TIMEOUT
        r.record_written()
        assert closed(r).value == 0, "what it has not answered is no change"
        r.destination.hold(DiskOp.READ, False)
        resynced(r)


def test_a_cancel_that_flushes_nothing_leaves_what_a_server_may_forget_marked() -> None:
    with rig(mirrored=True) as r:
        settled(r)
        r.write_now(1, 1)
        r.driver.until(lambda: r.snapshot().lag_writes == 0, "it is mirrored")
        r.driver.call(lib.VS_CMD_MIRROR_STOP, value=Reason.COMMAND)
        closed(r)
        r.destination.cut(forget_seed=1)
        resynced(r)
