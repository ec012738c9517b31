# SPDX-License-Identifier: Apache-2.0
"""One guest that writes all the while, through copy, steady and switch: its throughput, and how far the
destination lags. Both clocks are CLOCK_MONOTONIC, and zero is where the load began.
"""

import os
import shutil
import time
from typing import Any

from bench.contenders import Ours, lag_of
from bench.files import make_file
from bench.generator import load_beside
from bench.plan import Plan
from bench.report import describe_machine
from bench.sample import BenchError, Work

INTERVAL_MS = 100
BEFORE_S, STEADY_S, AFTER_S = 1.5, 3.0, 2.0
MOST_S = 60.0  # of load; the copy has what the rest leaves of it
WORK = Work("randwrite", 32)


class _Watch:
    """Looks at the mirror once each interval."""

    def __init__(self, ours: Ours) -> None:
        self._ours = ours
        self.seen: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def note(self, event: str) -> None:
        self.events.append({"at_ns": time.monotonic_ns(), "event": event})

    def look(self) -> str:
        mirror = self._ours.status()
        lag_bytes = lag_of(mirror) if mirror["state"] != "passthrough" else 0
        self.seen.append({"at_ns": time.monotonic_ns(), "state": mirror["state"], "lag_bytes": lag_bytes})
        time.sleep(INTERVAL_MS / 1000)
        return str(mirror["state"])

    def look_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()

    def look_until(self, state: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (now := self.look()) != state:
            if now == "degraded" or time.monotonic() > end:
                raise BenchError(f"the mirror is {now} and not {state} after {seconds:g} s of load")


def measure_timeline(plan: Plan) -> dict[str, Any]:
    size = plan.bytes_of["disk"]
    folder = plan.directory_of["disk"] / f"vhostsync-bench-timeline-{os.getpid()}"
    plan.check_room("disk", ("ours mirrored",))
    folder.mkdir()
    try:
        source = make_file(folder / "source.img", size, direct=True)
        destination = make_file(folder / "destination.img", size, direct=True)
        ours = Ours("ours", folder, source, direct=True)
        try:
            found, watch = _run(ours, destination)
        finally:
            ours.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    start_ns = found["started_monotonic_ns"]

    def since_start(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"t_s": (entry.pop("at_ns") - start_ns) / 1e9, **entry} for entry in entries]

    last = watch.seen[-1]["at_ns"]
    whole = min(len(found["intervals"]), (last - start_ns) // (INTERVAL_MS * 1_000_000))
    return {
        "machine": describe_machine(),
        "disk_bytes": size,
        "interval_ms": INTERVAL_MS,
        "completions": found["intervals"][:whole],
        "longest_gap_ms": found["longest_gap_ns"] / 1e6,
        "switch_pause_ms": ours.last_pause_ms,
        "mirror": since_start(watch.seen),
        "events": since_start(watch.events),
    }


def _run(ours: Ours, destination: Any) -> tuple[dict[str, Any], _Watch]:
    watch = _Watch(ours)
    # --stay lets the load be ended when everything has been seen.
    with load_beside(ours.socket, WORK, MOST_S, "--interval-ms", str(INTERVAL_MS), "--stay") as found:
        watch.look_for(BEFORE_S)
        watch.note("mirror start")
        ours.begin_mirror(destination)
        watch.look_until("steady", MOST_S - BEFORE_S - STEADY_S - AFTER_S - 1)
        watch.note("steady")
        watch.look_for(STEADY_S)
        watch.note("switch")
        ours.switch()
        watch.look_for(AFTER_S)
    return found, watch
