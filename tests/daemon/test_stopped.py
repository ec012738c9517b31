# SPDX-License-Identifier: Apache-2.0
"""A backend that is stopped for longer than its timeout (SIGSTOP, a freezer, a debugger), and goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon.rig import WAIT_S, Load, Served, flush, image, lacking, need_root, write_block
from tests.frontend import Frontend
from tests.guest.images import new_image
from tests.hanging_disk import HangingDisk, Op, hanging_disk
from tests.sizes import MIB

STOPPED_S = 2.0  # there is nothing to wait for: what is tested is that this time passes
TIMEOUT_S = 4.0  # of a request that is under way all the time: what is left of it is the machine's to lose


@contextmanager
def stopped(served: Served) -> Iterator[None]:
    os.kill(served.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(served.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_healthy_mirror_is_kept(work: Path, threads: str) -> None:
    source, other = image(work / "a.img", 16), new_image(work / "b.img", 16)
    options = ("--destination-timeout", "1s", "--on-destination-error", "pause", "--threads", threads)
    with Served(work, source, *options) as served, Load(served, depth=32) as load:
        served.start_mirror(other)
        for _ in range(2):
            load.go_on(3)
            with stopped(served):
                time.sleep(STOPPED_S)
        load.go_on(10)
        found = served.mirror()
        assert found["state"] == "steady", found
        expected = load.stop()
        served.qmp.execute("switch")
        served.stop()
    assert not lacking(other, expected)


@contextmanager
def a_write_that_hangs(work: Path, timeout_s: float) -> Iterator[tuple[Served, Frontend, HangingDisk]]:
    """At the destination of a mirror, which is given up after so long."""
    need_root()
    if not Path("/dev/fuse").exists():
        pytest.skip("this machine has no FUSE")
    source = image(work / "a.img", 16)
    with (
        hanging_disk(work / "hanging", 16 * MIB) as destination,
        Served(work, source, "--destination-timeout", f"{timeout_s:g}s") as served,
        served.guest(queues=2) as guest,
        destination.goes_on_at_the_end(),
    ):
        served.start_mirror(destination.path)
        destination.hang(Op.WRITE)
        write_block(guest, 0, 1)
        destination.await_hanging(Op.WRITE, WAIT_S)
        yield served, guest, destination


def test_a_request_that_is_under_way_meanwhile_grows_no_older(work: Path) -> None:
    """Whatever is reaped first when the backend goes on: this request has not been answered."""
    with a_write_that_hangs(work, TIMEOUT_S) as (served, guest, destination):
        with stopped(served):
            time.sleep(TIMEOUT_S + 1)
        guest.read_now(0, 512)  # so the engine has made a pass
        assert served.mirror()["state"] == "steady"
        destination.go_on()
        flush(guest)
        assert served.mirror()["state"] == "steady"


def test_a_backend_that_is_stopped_again_and_again_gives_up_a_destination_all_the_same(work: Path) -> None:
    """Of such gaps only some are forgiven (clock.h): who is slow at every pass is not stopped."""
    with a_write_that_hangs(work, 6) as (served, guest, _):
        for _ in range(16):  # of each it lives through 0.25 s, at most
            with stopped(served):
                time.sleep(0.8)
            guest.read_now(0, 512)  # so the engine has made a pass
            if served.state == "degraded":
                break
        assert served.state == "degraded"
