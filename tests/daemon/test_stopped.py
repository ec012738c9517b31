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

from tests.daemon.rig import Load, Served, image, lacking
from tests.guest.images import new_image

STOPPED_S = 2.0  # there is nothing to wait for: what is tested is that this time passes


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

