# SPDX-License-Identifier: Apache-2.0
"""Row 12: what a backend costs while its guest does nothing."""

import time
from pathlib import Path

from bench.contenders import Contender, Ours
from bench.generator import load_beside
from bench.plan import Plan
from bench.sample import Sample, Work

SETTLE_S = 15.0


def on_cpu_ns(pid: int) -> int:
    """Of the threads that live; finer than the clock ticks of /proc/PID/stat."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def _wakeups(ours: Ours) -> int:
    assert ours.qmp is not None
    return int(ours.qmp.execute("query-stats")["engine"]["wakeups"])


def measure_idle(contender: Contender, plan: Plan) -> Sample:
    """After some writes, the guest stays connected. A query wakes the data plane itself: what one costs is
    measured, and taken off."""
    assert isinstance(contender, Ours)
    seconds = 2.0 if plan.quick else 8.0
    work = Work("randwrite", 4)
    with load_beside(contender.socket, work, seconds + 2 * SETTLE_S, "--operations", "100", "--stay"):
        time.sleep(0.5)  # for the writes
        contender.wait_mirror(lambda mirror: mirror["differing-bytes"] == 0, SETTLE_S)
        first = _wakeups(contender)
        by_a_query = _wakeups(contender) - first
        before, cpu_before = _wakeups(contender), on_cpu_ns(contender.pid)
        time.sleep(seconds)
        cpu_ns = on_cpu_ns(contender.pid) - cpu_before
        wakeups = max(0, _wakeups(contender) - before - by_a_query)
    return Sample({"wakeups_per_s": wakeups / seconds, "core_percent": cpu_ns / seconds / 1e7})
