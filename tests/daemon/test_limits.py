# SPDX-License-Identifier: Apache-2.0
"""`serve` limits its guest: from the start, changed while it runs, and without a word about the mirror."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.daemon.rig import Served, flush, image, same_content, write_block
from tests.frontend import DEFAULT_FEATURES, Feature, Frontend
from tests.guest.backends import vhostsync_command
from tests.guest.images import new_image
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB
from tests.vhost_client import VhostUserTransport

PACKED = DEFAULT_FEATURES | Feature.RING_PACKED


def command(served: Served, *words: str) -> subprocess.CompletedProcess[str]:
    full = [*vhostsync_command(), *words, "--control", str(served.control)]
    return subprocess.run(full, capture_output=True, text=True, check=False, timeout=60)


def throttle(served: Served, **given: int) -> None:
    served.qmp.execute_as_given("block_set_io_throttle", given)


def limits(served: Served) -> dict[str, int]:
    """Those that there are."""
    shown: dict[str, int] = served.qmp.execute("query-status")["limits"]
    return {name: n for name, n in shown.items() if n and not name.endswith("-length")}


def written_in(guest: Frontend, mib: int) -> float:
    """How long the guest takes for so many writes of 1 MiB, 8 at a time."""
    began = time.monotonic()
    under_way = []
    for number in range(mib):
        under_way.append(guest.write(number % 16 * MIB, bytes([number % 251 + 1]) * MIB))
        if len(under_way) == 8:
            request = under_way.pop(0)
            guest.wait(request)
            assert request.ok
            guest.recycle(request)
    guest.wait(*under_way)
    assert all(request.ok for request in under_way)
    for request in under_way:
        guest.recycle(request)
    return time.monotonic() - began


def test_a_limited_mirror_stays_steady_under_heavy_writes(work: Path) -> None:
    """Each write waits for longer than a destination may take."""
    source, other = image(work / "a.img", 16), new_image(work / "b.img", 16)
    with (
        Served(work, source, "--destination-timeout", "2s", "--limit-bps-wr", "1M") as served,
        served.guest() as guest,
    ):
        served.start_mirror(other)
        took_s = written_in(guest, 10)
        assert took_s > 8.5
        found = served.mirror()
        assert (found["state"], found["last-error"]) == ("steady", None), found
        engine = served.qmp.execute("query-stats")["engine"]
        assert engine["throttled-ms"] == 0 and engine["limited-ms"] > 8000
        assert engine["limited-bytes"] >= 8 * MIB
        flush(guest)
        served.qmp.execute("switch")
        served.stop()
    assert same_content(source, other)


def test_limits_are_shown_and_changed_by_the_command_line(work: Path) -> None:
    with Served(work, image(work / "a.img"), "--limit-iops", "500:2000:10s") as served:
        shown = command(served, "limit")
        assert shown.returncode == 0 and "500 requests/s (2,000 for 10 s)" in shown.stdout, shown
        done = command(served, "limit", "--bps", "100M", "--iops-wr", "none", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["limits"]["bps"] == 100 * MIB
        assert limits(served) == {"bps": 100 * MIB, "iops": 500, "iops-max": 2000}
        assert command(served, "limit", "--none").returncode == 0
        assert limits(served) == {}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--bps", "100M:50M"), "slower"),
        (("--iops", "1.5"), "number of requests"),
        (("--bps", "1M:2M:1500ms"), "whole seconds"),
        (("--none", "--iops", "3"), "--none"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(
    work: Path, words: Sequence[str], complaint: str
) -> None:
    with Served(work, image(work / "a.img")) as served:
        refused = command(served, "limit", *words)
        assert refused.returncode == 2 and complaint in refused.stderr
        assert limits(served) == {}


def test_qemus_command_has_qemus_meaning(work: Path) -> None:
    """All six rates are given there, and what is left out of a burst is none."""
    rates = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    with Served(work, image(work / "a.img"), "--limit-bps-rd", "5M") as served:
        burst = {"iops": 100, "iops_max": 200, "iops_max_length": 5, "iops_size": 4096}
        throttle(served, **{**rates, **burst})
        assert limits(served) == {"iops": 100, "iops-max": 200, "iops-size": 4096}
        throttle(served, **{**rates, "iops": 100})
        assert limits(served) == {"iops": 100}
        for wrong in ({"bps_max": 5}, {"bps": 10, "bps_max": 5}, {"iops": 1, "iops_max_length": 2}):
            with pytest.raises(QmpError):
                throttle(served, **wrong)
        assert limits(served) == {"iops": 100}


def test_a_changed_limit_holds_until_the_end(work: Path) -> None:
    """The options say what a start begins with."""
    source = image(work / "a.img")
    for _ in range(2):
        with Served(work, source, "--limit-iops", "1000") as served:
            assert limits(served) == {"iops": 1000}
            throttle(served, iops=5)
            assert limits(served) == {"iops": 5}
            served.stop()


def test_what_was_stopped_earns_no_burst(work: Path) -> None:
    with (
        Served(work, image(work / "a.img"), "--limit-bps-wr", "4M") as served,
        served.guest() as guest,
    ):
        written_in(guest, 2)
        os.kill(served.process.pid, signal.SIGSTOP)
        time.sleep(2.0)  # there is nothing to wait for: what is tested is that this time passes
        os.kill(served.process.pid, signal.SIGCONT)
        assert written_in(guest, 8) > (8 - 2 - 0.4) / 4  # what the bucket holds, and one beyond it


@pytest.mark.parametrize("features", [DEFAULT_FEATURES, PACKED], ids=["split", "packed"])
def test_a_migration_does_not_wait_for_a_limit(work: Path, features: int) -> None:
    """The rings stop at once, and another connection goes on with what waited."""
    with (
        Served(work, image(work / "a.img"), "--limit-bps-wr", "1") as served,
        served.guest(features=features) as guest,
    ):
        write_block(guest, 0, 1)
        waiting = [guest.write(number * 4096, bytes([number]) * 4096) for number in range(1, 4)]
        began = time.monotonic()
        guest.stop()
        assert time.monotonic() - began < 10
        guest.poll()
        assert not any(request.done for request in waiting)
        guest.transport.close()
        throttle(served, bps_wr=0)
        guest.transport = VhostUserTransport(served.socket)
        guest.start()
        guest.wait(*waiting)
        assert all(request.ok for request in waiting)


def test_after_a_kill_the_next_backend_takes_up_what_waited(work: Path) -> None:
    source = image(work / "a.img")
    with Served(work, source, "--limit-bps-wr", "1") as served, served.guest() as guest:
        write_block(guest, 0, 1)
        waiting = [guest.write(number * 4096, bytes([number]) * 4096) for number in range(1, 4)]
        served.kill()
        guest.poll()
        queue = guest.queues[0]
        queue.base = queue.ring.base_after_crash()
        with Served(work, source) as again:
            guest.transport.close()
            guest.transport = VhostUserTransport(again.socket)
            guest.start()
            guest.wait(*waiting)
            assert all(request.ok for request in waiting)
