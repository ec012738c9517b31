# SPDX-License-Identifier: Apache-2.0
"""`./run bench`: each work, its contenders in turn (A B C A B C …) within one run, medians and ratios, and
whether each target is met. Markdown on stdout, and with every sample in OUTPUT.md and OUTPUT.json.

The results have sections: table, timeline, growth, calibration. What is not measured in this run comes from
the results named with --from.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.calibrate import calibrate
from bench.documents import PICTURES, text_of, update_document
from bench.files import require
from bench.growth import KINDS, measure_growth
from bench.pictures import draw
from bench.plan import COLUMNS, GIB, Plan
from bench.report import as_json, describe_machine
from bench.results import save
from bench.rows import ROWS, Outcome, Row, Tell, chosen
from bench.sample import BenchError
from bench.side_by_side import measure_place
from bench.timeline import measure_timeline


@dataclass(frozen=True)
class Task:
    """What to measure, and what to make of it."""

    plan: Plan
    rows: tuple[Row, ...]  # none: no table
    timeline: bool
    growth: tuple[str, ...]
    calibrate: bool
    earlier: Path | None
    pictures: Path | None
    update_docs: bool
    output: Path
    machine: str | None  # to keep the table's results for


def parse(arguments: list[str] | None) -> Task:
    parser = argparse.ArgumentParser(prog="./run bench", description=(__doc__ or "").partition("\n\n")[0])
    all_rows = [row.number for row in ROWS]
    what = parser.add_argument_group("what to measure (by default the table)")
    what.add_argument("--rows", help=f"only these of the table, as in 4,5 (of {', '.join(all_rows)})")
    what.add_argument("--growth", nargs="?", const=",".join(KINDS), help=f"how cost grows: {','.join(KINDS)}")
    what.add_argument("--calibrate", action="store_true", help="the load generator's limit, and another's")
    what.add_argument("--timeline", action="store_true", help="a guest through copy, steady and switch")
    what.add_argument("--all", action="store_true", help="the table and all of these")
    what.add_argument("--from", dest="earlier", type=Path, help="a .json for what is not measured now")
    how = parser.add_argument_group("how")
    how.add_argument("--quick", action="store_true", help="under 4 minutes: short, small")
    how.add_argument("--pairs", type=int, help="rounds (5; 3 with --quick)")
    how.add_argument("--seconds", type=float, help="of each measurement (4; 0.5 with --quick)")
    how.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on the disk (/var/tmp)")
    how.add_argument("--memory-directory", type=Path, default=Path("/dev/shm"), help="a tmpfs (/dev/shm)")
    how.add_argument("--disk-gib", type=float, help="size of a file on the disk (4; 0.5 with --quick)")
    how.add_argument("--memory-gib", type=float, help="size of a file in memory (1; 0.25 with --quick)")
    how.add_argument("--without", action="append", default=[], choices=COLUMNS, help="leave this one out")
    then = parser.add_argument_group("what to make of it")
    then.add_argument("--output", type=Path, default=Path("bench-result"), help="for .json and .md")
    then.add_argument(
        "--plot", nargs="?", type=Path, const=PICTURES, metavar="FOLDER",
        help="draw the results, with a timeline unless --from has one (needs matplotlib; docs/pictures)",
    )
    then.add_argument(
        "--save", metavar="MACHINE",
        help="keep the table's figures in bench/results/MACHINE.json; README's table is made of all there",
    )  # fmt: skip
    then.add_argument("--update-docs", action="store_true", help="write docs/performance.md and its pictures")
    given = parser.parse_args(arguments)
    if given.all:
        given.growth, given.calibrate, given.timeline = given.growth or ",".join(KINDS), True, True
    other = given.earlier or given.growth or given.calibrate or given.timeline
    table = bool(given.rows or given.all or not other)
    numbers = given.rows.split(",") if given.rows else all_rows
    growth = tuple(given.growth.split(",")) if given.growth else ()
    if unknown := set(growth) - set(KINDS):
        parser.error(f"no such growth: {', '.join(sorted(unknown))}")
    try:
        rows = chosen(numbers) if table else ()
    except KeyError as error:
        parser.error(f"no such row: {error.args[0]}")
    pictures: Path | None = given.plot or (PICTURES if given.update_docs else None)
    return Task(
        plan=_plan(given), rows=rows, timeline=given.timeline or (bool(pictures) and table), growth=growth,
        calibrate=given.calibrate, earlier=given.earlier, pictures=pictures, update_docs=given.update_docs,
        output=given.output, machine=given.save,
    )


def _plan(given: argparse.Namespace) -> Plan:
    quick = given.quick
    sizes = {
        "disk": given.disk_gib or (0.5 if quick else 4),
        "memory": given.memory_gib or (0.25 if quick else 1),
    }
    return Plan(
        pairs=given.pairs or (3 if quick else 5),
        seconds=given.seconds or (0.5 if quick else 4),
        ramp_s=0.2 if quick else 1,
        # The log swallows a burst: what counts begins when it no longer can.
        mirrored_ramp_s=0.6 if quick else 2,
        bytes_of={place: int(gib * GIB) for place, gib in sizes.items()},
        directory_of={"disk": given.directory, "memory": given.memory_directory},
        without=frozenset(given.without) | (frozenset({"rival background"}) if quick else frozenset()),
        quick=quick,
    )


def _measure_alone(plan: Plan, rows: tuple[Row, ...], tell: Tell) -> list[Outcome]:
    outcomes = []
    for row in rows:
        if row.alone is None:
            continue
        tell(f"{row.number}: {row.title}")
        outcome = Outcome(row)
        try:
            outcome.rounds = row.alone(plan)
        except BenchError as error:
            outcome.failure = str(error)
            tell(f"  {row.number}: {error}")
        outcomes.append(outcome)
    return outcomes


def measure_table(plan: Plan, rows: tuple[Row, ...], tell: Tell) -> list[Outcome]:
    """In the table's order."""
    outcomes = [each for place in ("disk", "memory") for each in measure_place(plan, rows, place, tell)]
    outcomes += _measure_alone(plan, rows, tell)
    by_number = {outcome.row.number: outcome for outcome in outcomes}
    for row in rows:
        if row.derived_from:
            origin = by_number[row.derived_from]
            outcomes.append(Outcome(row, origin.rounds, origin.failure))
    return sorted(outcomes, key=lambda outcome: ROWS.index(outcome.row))


def measure(task: Task, tell: Tell, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The sections of the results, those of --from included; kept after each, for the next one may fail."""
    plan = task.plan
    results: dict[str, Any] = json.loads(task.earlier.read_text()) if task.earlier else {}
    if task.rows:
        machine = describe_machine()
        results["table"] = as_json(plan, measure_table(plan, task.rows, tell), machine)
        keep(results)
    if task.timeline:
        tell("timeline: copy, steady, switch")
        results["timeline"] = measure_timeline(plan)
        keep(results)
    if task.growth:
        results["growth"] = measure_growth(plan, task.growth, results.get("growth"), tell)
        keep(results)
    if task.calibrate:
        results["calibration"] = calibrate(plan, tell)
    keep(results)
    return results


def main(arguments: list[str] | None = None) -> int:
    task = parse(arguments)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def keep(results: dict[str, Any]) -> None:
        task.output.with_suffix(".json").write_text(json.dumps(results, indent=1))

    try:
        require("fio", "qemu-storage-daemon", "qemu-img", "fallocate")
        results = measure(task, tell, keep)
        text = text_of(results)
        task.output.with_suffix(".md").write_text(text)
        if task.pictures:
            for path in draw(results, task.pictures):
                tell(f"drawn: {path}")
        if task.machine and "table" in results:
            tell(f"kept: {save(results['table'], task.machine)}; now python docs/generate.py")
        if task.update_docs:
            update_document(results)
    except (BenchError, OSError) as error:
        tell(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    print(text)
    return 0
