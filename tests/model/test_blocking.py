# SPDX-License-Identifier: Apache-2.0
"""A disk that hangs where it is asked for its holes, or in its close, holds up nobody but who asked."""

from __future__ import annotations

import errno

import pytest

from tests.engine_driver import Errand, EventKind, MemoryDisk, State
from tests.model.rig import BLOCK, Rig, pattern, rig
from vhostsync._shim import lib


def assert_guest_goes_on(r: Rig, number: int) -> None:
    r.write_now(number, number)
    read = r.guest.read(number * BLOCK, BLOCK, queue=1)
    r.guest.wait(read)
    assert read.ok and read.data == pattern(number)
    r.flush_now()


def begin_copy(r: Rig) -> None:
    r.driver.call(lib.VS_CMD_MIRROR_START, disk=r.destination)


def cancel(r: Rig) -> None:
    r.driver.call(lib.VS_CMD_MIRROR_STOP, value=lib.VS_REASON_COMMAND)


def let_go(r: Rig, disk: MemoryDisk, what: Errand) -> None:
    disk.hold(what, False)
    disk.release(what)


@pytest.mark.parametrize("disk", ["source", "destination"])
def test_the_copy_alone_waits_for_an_answer_about_holes(disk: str) -> None:
    with rig() as r:
        asked: MemoryDisk = getattr(r, disk)
        asked.hold(Errand.EXTENTS)
        begin_copy(r)
        r.driver.await_held(asked, Errand.EXTENTS)
        assert_guest_goes_on(r, 1)
        assert r.snapshot().state is State.SYNCING
        let_go(r, asked, Errand.EXTENTS)
        r.driver.await_state(State.STEADY)
        assert_guest_goes_on(r, 2)
        r.assert_same_content()


def test_a_destination_that_hangs_in_it_is_given_up_by_its_timeout() -> None:
    with rig(destination_timeout_us=200_000) as r:
        r.destination.hold(Errand.EXTENTS)
        begin_copy(r)
        r.driver.await_held(r.destination, Errand.EXTENTS)
        r.driver.await_state(State.DEGRADED)
        assert r.snapshot().fenced == 1
        assert_guest_goes_on(r, 1)


def test_a_hole_that_is_filled_while_it_is_looked_at_is_copied() -> None:
    with rig() as r:
        r.source.hold(Errand.EXTENTS)
        begin_copy(r)
        r.driver.await_held(r.source, Errand.EXTENTS)
        r.source.release(Errand.EXTENTS)  # a hole; it gets its place, and is looked at again
        r.driver.await_held(r.source, Errand.EXTENTS)
        r.write_now(3, 3)
        let_go(r, r.source, Errand.EXTENTS)
        r.driver.await_state(State.STEADY)
        r.flush_now()
        r.assert_same_content()


def test_a_verification_alone_waits_for_an_answer_about_holes() -> None:
    with rig(mirrored=True) as r:
        r.destination.hold(Errand.EXTENTS)
        r.driver.call(lib.VS_CMD_VERIFY)
        r.driver.await_held(r.destination, Errand.EXTENTS)
        assert_guest_goes_on(r, 1)
        let_go(r, r.destination, Errand.EXTENTS)
        assert r.driver.take_event(EventKind.VERIFIED).result == 0


@pytest.mark.parametrize("role", [0, 1])
def test_who_asks_for_a_size_alone_waits_for_it(role: int) -> None:
    with rig(mirrored=True) as r:
        disk = (r.source, r.destination)[role]
        disk.hold(Errand.SIZE)
        asked = r.driver.submit(lib.VS_CMD_DISK_SIZE, value=role)
        r.driver.await_held(disk, Errand.SIZE)
        assert_guest_goes_on(r, 1)
        assert r.driver.done(asked) is None
        r.driver.call(lib.VS_CMD_DISK_SIZE, value=role, expect=errno.EBUSY)
        assert r.driver.call(lib.VS_CMD_DISK_SIZE, value=1 - role).value == disk.bytes
        let_go(r, disk, Errand.SIZE)
        assert r.driver.wait(asked).value == disk.bytes
        assert r.driver.call(lib.VS_CMD_DISK_SIZE, value=role).value == disk.bytes


def test_a_destination_that_is_not_there_has_no_size() -> None:
    with rig() as r:
        r.driver.call(lib.VS_CMD_DISK_SIZE, value=1, expect=errno.ENOTCONN)


def test_the_fence_alone_waits_for_the_end_of_a_close() -> None:
    with rig(mirrored=True) as r:
        r.destination.hold(Errand.CLOSE)
        cancel(r)
        r.driver.await_held(r.destination, Errand.CLOSE)
        assert_guest_goes_on(r, 1)
        assert r.snapshot().fenced == 1
        let_go(r, r.destination, Errand.CLOSE)
        r.driver.take_event(EventKind.FENCE_CLEAR)


def test_a_switch_does_not_wait_until_the_old_disk_is_closed() -> None:
    with rig(mirrored=True) as r:
        r.source.hold(Errand.CLOSE)
        old = r.source
        r.switch(keep=False)
        assert_guest_goes_on(r, 1)
        assert old.held(Errand.CLOSE) == 1
        third = r.other_disk()
        r.driver.mirror(third)  # nor does the next mirror
        assert_guest_goes_on(r, 2)
