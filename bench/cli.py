# SPDX-License-Identifier: Apache-2.0
"""`./run bench`: each work, its contenders in turn (A B C A B C …) within one run, medians and ratios, and
whether each target is met. Markdown on stdout, and with every sample in OUTPUT.md and OUTPUT.json.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.files import require
from bench.plan import COLUMNS, GIB, Plan
from bench.report import as_json, describe_machine, markdown
from bench.rows import ROWS, Outcome, Row, Tell, chosen
from bench.sample import BenchError
from bench.side_by_side import measure_place


def parse(arguments: list[str] | None) -> tuple[Plan, tuple[Row, ...], Path]:
    parser = argparse.ArgumentParser(prog="./run bench", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under 4 minutes: short, small")
    parser.add_argument("--rows", help=f"only these, as in 4,5 (of {', '.join(row.number for row in ROWS)})")
    parser.add_argument("--pairs", type=int, help="rounds (5; 3 with --quick)")
    parser.add_argument("--seconds", type=float, help="of each measurement (4; 0.5 with --quick)")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on the disk (/var/tmp)")
    parser.add_argument("--memory-directory", type=Path, default=Path("/dev/shm"), help="a tmpfs (/dev/shm)")
    parser.add_argument("--disk-gib", type=float, help="size of a file on the disk (4; 0.5 with --quick)")
    parser.add_argument("--memory-gib", type=float, help="size of a file in memory (1; 0.25 with --quick)")
    parser.add_argument("--without", action="append", default=[], choices=COLUMNS, help="leave this one out")
    parser.add_argument("--output", type=Path, default=Path("bench-result"), help="for .json and .md")
    given = parser.parse_args(arguments)
    try:
        rows = chosen(given.rows.split(",") if given.rows else [row.number for row in ROWS])
    except KeyError as error:
        parser.error(f"no such row: {error.args[0]}")
    quick = given.quick
    sizes = {
        "disk": given.disk_gib or (0.5 if quick else 4),
        "memory": given.memory_gib or (0.25 if quick else 1),
    }
    plan = Plan(
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
    return plan, rows, given.output


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


def measure(plan: Plan, rows: tuple[Row, ...], tell: Tell) -> list[Outcome]:
    """In the table's order."""
    outcomes = [each for place in ("disk", "memory") for each in measure_place(plan, rows, place, tell)]
    outcomes += _measure_alone(plan, rows, tell)
    by_number = {outcome.row.number: outcome for outcome in outcomes}
    for row in rows:
        if row.derived_from:
            origin = by_number[row.derived_from]
            outcomes.append(Outcome(row, origin.rounds, origin.failure))
    return sorted(outcomes, key=lambda outcome: ROWS.index(outcome.row))


def main(arguments: list[str] | None = None) -> int:
    plan, rows, output = parse(arguments)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        require("fio", "qemu-storage-daemon", "qemu-img", "fallocate")
        machine = describe_machine()
        outcomes = measure(plan, rows, tell)
    except BenchError as error:
        tell(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    text = markdown(plan, outcomes, machine)
    output.with_suffix(".md").write_text(text)
    output.with_suffix(".json").write_text(json.dumps(as_json(plan, outcomes, machine), indent=1))
    print(text)
    return 0
