# SPDX-License-Identifier: Apache-2.0
"""Until when changes of the disks are the engine's own, as the bitmap's file says it to the next start."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.model.rig import Rig
from tests.model.test_bitmap_lost import BLOCKS_A_REGION, Bits, rig
from vhostsync._shim import lib
from vhostsync.record.heartbeat import AHEAD_NS, LANDING_NS, Heartbeat, why_changed

ENGINES = Path(__file__).resolve().parents[2] / "c_shim/bitmap/heartbeat.c"
HOUR_NS = 3_600_000_000_000


def promised(bits: Bits) -> Heartbeat:
    with bits.path.open("rb") as file:
        return Heartbeat.read(file.fileno())


def pass_by(r: Rig, moment_ns: int) -> None:
    r.driver.until(lambda: time.time_ns() > moment_ns, "the moment is past", timeout_s=20)


def test_what_is_written_is_promised(tmp_path: Path) -> None:
    bits = Bits(tmp_path / "bits")
    with rig(bits) as r:
        pass_by(r, max(promised(bits).current_ns, promised(bits).peer_ns))
        r.write_now(0, 1)
        now_ns = time.time_ns()
        r.driver.until(lambda: promised(bits).current_ns >= now_ns, "the source's", timeout_s=20)
        r.driver.until(lambda: promised(bits).peer_ns >= now_ns, "the destination's", timeout_s=20)


def test_of_a_peer_that_is_not_attached_nothing_is_promised(tmp_path: Path) -> None:
    """Somebody else may be changing it."""
    bits = Bits(tmp_path / "bits")
    with rig(bits) as r:
        stopping_ns = time.time_ns()
        r.driver.call(lib.VS_CMD_MIRROR_STOP)
        r.driver.snapshot()  # in a later pass: the one that stopped has made its last promise by then
        stopped_ns = time.time_ns()
        r.driver.until(lambda: promised(bits).peer_ns >= stopping_ns, "ours up to its end", timeout_s=20)
        # One promise may have been on its way to the file. What is promised for later was begun afterwards.
        while promised(bits).current_ns <= stopped_ns + AHEAD_NS:
            r.write_now(BLOCKS_A_REGION, 2)
        left_ns = promised(bits).peer_ns
        assert left_ns <= stopped_ns + AHEAD_NS
        r.driver.until(lambda: time.time_ns() > promised(bits).current_ns, "the moment is past", timeout_s=20)
        r.write_now(BLOCKS_A_REGION, 2)
        past_ns = time.time_ns()
        r.driver.until(lambda: promised(bits).current_ns > past_ns, "the source's", timeout_s=20)
        r.write_now(2 * BLOCKS_A_REGION, 3)
        assert promised(bits).peer_ns == left_ns


def test_the_engine_says_it_no_further_ahead() -> None:
    said = re.search(r"^#define AHEAD_NS (\d+)u$", ENGINES.read_text(), re.MULTILINE)
    assert said is not None and int(said[1]) == AHEAD_NS


def test_a_clock_that_was_set_back_tells_nothing() -> None:
    now_ns = time.time_ns()
    assert why_changed("/vm.img", now_ns, now_ns) is None
    assert why_changed("/vm.img", now_ns, now_ns - LANDING_NS - 1) is not None
    why = why_changed("/vm.img", now_ns, now_ns + HOUR_NS)
    assert why is not None and "the clock has been set back" in why
    assert why_changed("/dev/vm", None, now_ns + HOUR_NS) is None, "changes of a block device do not show"
