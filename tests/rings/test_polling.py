# SPDX-License-Identifier: Apache-2.0
"""Looking for work before sleeping (c_shim/guest/poller.c): a ring that is looked at needs no kick, and no
wake-up is lost where that ends."""

from __future__ import annotations

import threading
import time

import pytest

from tests.engine_driver import DiskOp
from tests.frontend import DEFAULT_FEATURES, Feature
from tests.model.rig import BLOCK, Rig, pattern, rig
from vhostsync._shim import lib

PACKED = DEFAULT_FEATURES | Feature.RING_PACKED
WINDOW_US = 10_000_000  # longer than the test


@pytest.mark.parametrize("features", [DEFAULT_FEATURES, DEFAULT_FEATURES & ~Feature.EVENT_IDX, PACKED])
def test_a_ring_that_is_looked_at_needs_no_kick(features: int) -> None:
    with rig(features=features, poll_us=WINDOW_US) as r:
        r.write_now(0, 1)
        silent = r.write(1, 2, kick=False)
        r.guest.wait(silent)
        assert silent.ok
        assert r.source.read(BLOCK, BLOCK) == pattern(2)


def test_commands_are_heard_while_it_looks() -> None:
    with rig(poll_us=WINDOW_US) as r:
        r.write_now(0, 1)
        began = time.monotonic()
        r.snapshot()
        assert time.monotonic() - began < WINDOW_US / 1e6 / 2


@pytest.mark.parametrize(
    ("poll_us", "features"),
    [
        *((poll_us, DEFAULT_FEATURES) for poll_us in (1, 20, 200, lib.VS_POLL_AUTO)),
        (20, PACKED),
    ],
)
def test_no_wake_up_is_lost_where_looking_ends(poll_us: int, features: int) -> None:
    """The guest's next request comes at every moment about the end of the window; each is kicked only if the
    ring asks for it, and each must be answered."""
    with rig(poll_us=poll_us, features=features) as r:
        for n in range(3000):
            pause_s = (n % 60) * (poll_us if poll_us < 1000 else 50) / 30 * 1e-6
            until = time.perf_counter() + pause_s
            while time.perf_counter() < until:
                pass
            r.write_now(n % 64, n)


def test_an_idle_guest_is_not_looked_for_for_ever() -> None:
    with rig(poll_us=lib.VS_POLL_AUTO) as r:
        for n in range(50):
            r.write_now(n % 8, n)
        r.driver.settle()
        first = r.snapshot().wakeups
        threading.Event().wait(0.3)  # nothing is to happen, so there is nothing to await
        assert r.snapshot().wakeups <= first + 2  # the snapshots' own


def _write_and_flush(r: Rig, seed: int, disk_takes_s: float) -> None:
    """The source takes so long for the flush."""
    r.write_now(seed % 8, seed)
    flush = r.guest.flush()
    until = time.perf_counter() + disk_takes_s
    while not r.source.held(DiskOp.FLUSH) or time.perf_counter() < until:
        pass  # a sleep would take longer
    r.source.release(DiskOp.FLUSH)
    r.guest.wait(flush)


@pytest.mark.alone
def test_around_flushes_a_quick_disk_is_waited_for_awake_and_a_slow_one_is_not() -> None:
    with rig(poll_us=lib.VS_POLL_AUTO) as r:
        r.source.hold(DiskOp.FLUSH)
        for n in range(2000):
            _write_and_flush(r, n, 30e-6)
            if r.snapshot().polls >= 20:
                break
        else:
            pytest.skip("others want the cores, so they are left to them")
        for n in range(40):  # the guest is slow, too: nothing is worth to be waited for awake any more
            if n == 30:
                before = r.snapshot().polls
            _write_and_flush(r, n, 2e-3)
            time.sleep(2e-3)
        assert r.snapshot().polls <= before + 2
