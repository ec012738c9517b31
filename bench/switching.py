# SPDX-License-Identifier: Apache-2.0
"""Rows 9: what a guest feels of a switch. The mirror is kept, so it can be switched back and forth."""

import statistics
import time

from bench.contenders import Backend, Contender, Ours
from bench.generator import load_beside
from bench.plan import Plan
from bench.sample import Sample, Work

RUN_S = 0.8
BEFORE_S = 0.3


def measure_switch(contender: Contender, plan: Plan) -> Sample:
    """The longest time without a completion, with 32 writes in flight and a switch in the midst: what the
    guest sees, whatever the backend says of itself. The machine's own hiccups count too, for all alike."""
    return _longest_gaps(contender, plan, switch=True)


def measure_no_switch(contender: Contender, plan: Plan) -> Sample:
    """The same without the switch: these hiccups."""
    return _longest_gaps(contender, plan, switch=False)


def _longest_gaps(contender: Contender, plan: Plan, *, switch: bool) -> Sample:
    assert isinstance(contender, Backend)
    pauses, said = [], []
    # Ours often enough for a 99th percentile over five rounds that is not just the longest.
    often = 24 if isinstance(contender, Ours) else 8
    for _ in range(1 if plan.quick else often):
        with load_beside(contender.socket, Work("randwrite", 32), RUN_S) as found:
            time.sleep(BEFORE_S)  # into the midst of the load
            if switch:
                contender.switch()
        pauses.append(found["longest_gap_ns"] / 1e6)
        if switch and isinstance(contender, Ours):
            said.append(contender.last_pause_ms)
        contender.rest()
    figures = {"pause_ms": statistics.median(pauses), "pause_max_ms": max(pauses)}
    return Sample(figures, {"pauses_ms": pauses, "backend_says_ms": said})


def measure_idle_switch(contender: Contender, plan: Plan) -> Sample:
    """As the backend says: an idle guest sees nothing."""
    assert isinstance(contender, Ours)
    pauses = []
    for _ in range(2 if plan.quick else 10):
        contender.switch()
        pauses.append(contender.last_pause_ms)
    return Sample({"pause_ms": statistics.median(pauses), "pause_max_ms": max(pauses)}, {"pauses_ms": pauses})
