# SPDX-License-Identifier: Apache-2.0
"""The contenders of a row, measured in turn.

Machines drift by tens of percent from minute to minute, so a ratio is taken within each round, between
measurements that lie seconds apart, and the median of those is what counts; figures alone are shown to give
an idea of the size.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bench.contenders import Contender, Ours, Raw, Rival
from bench.files import make_file
from bench.plan import COLUMNS, WITH_DESTINATION, Plan
from bench.rows import Outcome, Row, Tell
from bench.sample import BenchError, Round


@contextlib.contextmanager
def contenders(plan: Plan, place: str, names: set[str]) -> Iterator[dict[str, Contender]]:
    """Those of one place, started: who mirrors on one pair of files, all others on one file. A disk remembers
    what was written where, so files made in the same way are not equally fast; the same file is. Whoever is
    not measured does not touch it."""
    direct = plan.direct(place)
    working = plan.directory_of[place] / f"vhostsync-bench-{os.getpid()}"
    working.mkdir()

    @functools.cache
    def file(name: str) -> Path:
        return make_file(working / f"{name}.img", plan.bytes_of[place], direct=direct)

    def start(name: str) -> Contender:
        mirrored = name in WITH_DESTINATION
        source, to = file("source" if mirrored else "alone"), file("destination") if mirrored else None
        if name == "raw":
            return Raw(source, direct=direct)
        if name.startswith("ours"):
            return Ours(name, working, source, direct=direct, destination=to)
        mode = "background" if name.endswith("background") else "write-blocking"
        return Rival(name, working, source, direct=direct, destination=to, copy_mode=mode)

    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, working, ignore_errors=True)
        running: dict[str, Contender] = {}
        for name in (each for each in COLUMNS if each in names):
            running[name] = start(name)
            stack.callback(running[name].close)
        yield running


def measure_place(plan: Plan, rows: tuple[Row, ...], place: str, tell: Tell) -> list[Outcome]:
    rows = tuple(row for row in rows if row.place == place and row.contenders and not row.derived_from)
    names = {name for row in rows for name in row.contenders} - plan.without
    if not names:
        return []
    plan.check_room(place, names)
    tell(f"{place}: starting {', '.join(sorted(names))}")
    outcomes = []
    with contenders(plan, place, names) as running:
        for row in rows:
            outcome = Outcome(row)
            outcomes.append(outcome)
            try:
                _measure_row(plan, row, running, outcome, tell)
            except BenchError as error:
                outcome.failure = str(error)
                tell(f"  {row.number}: {error}")
    return outcomes


def _measure_row(plan: Plan, row: Row, running: dict[str, Contender], outcome: Outcome, tell: Tell) -> None:
    ramp = plan.mirrored_ramp_s if row.mirrored else plan.ramp_s
    in_turn = [name for name in row.contenders if name in running]
    for number in range(plan.pairs):
        samples: Round = {}
        # The order turns, so that nobody is always the one after the heaviest.
        turn = number % len(in_turn)
        for name in in_turn[turn:] + in_turn[:turn]:
            if row.measure:
                samples[name] = row.measure(running[name], plan)
            else:
                assert row.work is not None
                samples[name] = running[name].measure(row.work, plan.seconds, ramp)
        outcome.rounds.append(samples)
        figures = "  ".join(f"{name} {samples[name].figures[row.shown]:.4g}" for name in in_turn)
        tell(f"  {row.number}.{number + 1}  {figures}")
