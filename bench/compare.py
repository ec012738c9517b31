# SPDX-License-Identifier: Apache-2.0
"""The comparison: each work, its contenders in turn (A B C A B C …) within one run, medians and ratios, and
whether each target is met. Markdown on stdout, JSON beside it.

Machines drift by tens of percent from minute to minute, so a ratio is taken within each round, between
measurements that lie seconds apart, and the median of those is what counts; figures alone are shown to give
an idea of the size.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.contenders import BenchError, Contender, Ours, Raw, Rival, Sample, Work, make_file, require

GIB = 1 << 30
ORDER = ("raw", "rival", "rival blocking", "rival background", "ours", "ours mirrored")

# One round: contender -> sample.
Round = dict[str, Sample]


@dataclass(frozen=True)
class Target:
    """A ratio of one round and the bound that its median must keep."""

    label: str
    ratio: Callable[[Round], float | None]
    bound: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{self.label} {'≤' if self.at_most else '≥'} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    number: str
    title: str
    place: str  # "disk" or "memory"
    work: Work
    contenders: tuple[str, ...]
    targets: tuple[Target, ...]
    latency: bool = False  # the figure is the mean latency in µs, not requests per second
    mirrored: bool = False


def throughput(ours: str, *others: str) -> Callable[[Round], float | None]:
    """Ours over the best of the others that were measured."""

    def ratio(samples: Round) -> float | None:
        known = [samples[other].per_s for other in others if other in samples]
        return samples[ours].per_s / max(known) if known and ours in samples else None

    return ratio


def latency(ours: str, other: str) -> Callable[[Round], float | None]:
    def ratio(samples: Round) -> float | None:
        known = ours in samples and other in samples
        return samples[ours].mean_us / samples[other].mean_us if known else None

    return ratio


def of_limit(samples: Round) -> float | None:
    """Every byte goes to the one disk twice: L = 1 / (1 / raw + 1 / raw)."""
    known = "raw" in samples and "ours mirrored" in samples
    return samples["ours mirrored"].per_s / (samples["raw"].per_s / 2) if known else None


def cpu(ours: str) -> Callable[[Round], float | None]:
    return lambda samples: samples[ours].cpu_us_per_request if ours in samples else None


ALONE = ("raw", "rival", "ours")
MIRRORS = ("rival blocking", "rival background", "ours mirrored")
RIVALS = ("rival blocking", "rival background")

READ_32, WRITE_32 = Work("randread", 32), Work("randwrite", 32)
FLUSHED_1, FLUSHED_32 = Work("randwrite", 1, flush_every=1), Work("randwrite", 32, flush_every=32)
ROWS = (
    Row("1r", "pass-through, disk, depth 32, read", "disk", READ_32, ALONE, (
        Target("of raw", throughput("ours", "raw"), 0.9), Target("of rival", throughput("ours", "rival"),
        1.0), Target("CPU µs/request", cpu("ours"), 5, at_most=True),
    )),
    Row("1w", "pass-through, disk, depth 32, write", "disk", WRITE_32, ALONE, (
        Target("of raw", throughput("ours", "raw"), 0.9), Target("of rival", throughput("ours", "rival"),
        1.0), Target("CPU µs/request", cpu("ours"), 5, at_most=True),
    )),
    Row("2r", "pass-through, memory, depth 32, read", "memory", READ_32, ALONE, (
        Target("of raw", throughput("ours", "raw"), 0.95), Target("of rival", throughput("ours", "rival"), 4),
        Target("CPU µs/request", cpu("ours"), 2.5, at_most=True),
    )),
    Row("2w", "pass-through, memory, depth 32, write", "memory", WRITE_32, ALONE, (
        Target("of raw", throughput("ours", "raw"), 0.95), Target("of rival", throughput("ours", "rival"), 4),
        Target("CPU µs/request", cpu("ours"), 2.5, at_most=True),
    )),
    Row("3", "pass-through, disk, depth 1, write: mean latency", "disk", Work("randwrite", 1), ALONE, (
        Target("of raw", latency("ours", "raw"), 1.4, at_most=True),
    ), latency=True),
    Row("4", "mirrored writes, disk, depth 32", "disk", WRITE_32, ("raw", *MIRRORS), (
        Target("of L", of_limit, 0.95), Target("of rival's best", throughput("ours mirrored", *RIVALS), 1.25),
        Target("CPU µs/request", cpu("ours mirrored"), 8, at_most=True),
    ), mirrored=True),
    Row("5", "mirrored writes, memory, depth 32", "memory", WRITE_32, MIRRORS, (
        Target("of rival's best", throughput("ours mirrored", *RIVALS), 6),
        Target("CPU µs/request", cpu("ours mirrored"), 6, at_most=True),
    ), mirrored=True),
    Row("6", "mirrored writes, disk, depth 1: mean latency", "disk", Work("randwrite", 1),
        ("ours", "rival blocking", "ours mirrored"), (
        Target("of our own pass-through", latency("ours mirrored", "ours"), 1.15, at_most=True),
    ), latency=True, mirrored=True),
    Row("7", "mirrored, disk, depth 1, a flush after every write", "disk", FLUSHED_1, ("raw", *MIRRORS), (
        Target("of rival's best", throughput("ours mirrored", *RIVALS), 1.4),
    ), mirrored=True),
    Row("8", "mirrored, disk, depth 32, a flush after every 32", "disk", FLUSHED_32, ("raw", *MIRRORS), (
        Target("of rival's best", throughput("ours mirrored", *RIVALS), 1.6),
    ), mirrored=True),
)


@dataclass
class Outcome:
    row: Row
    rounds: list[Round] = field(default_factory=list)
    failure: str | None = None

    def figures(self, contender: str) -> list[float]:
        samples = [samples[contender] for samples in self.rounds if contender in samples]
        return [each.mean_us if self.row.latency else each.per_s for each in samples]

    def ratios(self, target: Target) -> list[float]:
        found = (target.ratio(samples) for samples in self.rounds)
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    pairs: int
    seconds: float
    ramp_s: float
    mirrored_ramp_s: float
    bytes_of: dict[str, int]
    directory_of: dict[str, Path]
    without: frozenset[str]


@contextlib.contextmanager
def contenders(plan: Plan, place: str, names: set[str]) -> Iterator[dict[str, Contender]]:
    """Those of one place, started: each on files that were made the same way."""
    directory = plan.directory_of[place]
    direct = place == "disk"
    working = directory / f"vhostsync-bench-{os.getpid()}"
    working.mkdir()

    def file(name: str) -> Path:
        return make_file(working / f"{name.replace(' ', '-')}.img", plan.bytes_of[place], direct=direct)

    makers: dict[str, Callable[[str, Path, Path | None], Contender]] = {
        "raw": lambda name, source, _: Raw(source, direct=direct),
        "rival": lambda name, source, _: Rival(name, working, source, direct=direct),
        "rival blocking": lambda name, source, to: Rival(
            name, working, source, direct=direct, destination=to, copy_mode="write-blocking"
        ),
        "rival background": lambda name, source, to: Rival(
            name, working, source, direct=direct, destination=to, copy_mode="background"
        ),
        "ours": lambda name, source, _: Ours(name, working, source, direct=direct),
        "ours mirrored": lambda name, source, to: Ours(name, working, source, direct=direct, destination=to),
    }
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, working, ignore_errors=True)
        running: dict[str, Contender] = {}
        for name in (each for each in ORDER if each in names):
            source = file(name)
            mirrored = name in MIRRORS
            destination = file(f"{name} destination") if mirrored else None
            running[name] = makers[name](name, source, destination)
            stack.callback(running[name].close)
        yield running


def measure_place(plan: Plan, place: str, tell: Callable[[str], None]) -> list[Outcome]:
    rows = [row for row in plan.rows if row.place == place]
    if not rows:
        return []
    names = {name for row in rows for name in row.contenders} - plan.without
    tell(f"{place}: starting {', '.join(sorted(names))}")
    outcomes = []
    with contenders(plan, place, names) as running:
        for row in rows:
            outcome = Outcome(row)
            outcomes.append(outcome)
            try:
                measure_row(plan, row, running, outcome, tell)
            except BenchError as error:
                outcome.failure = str(error)
                tell(f"  {row.number}: {error}")
    return outcomes


def measure_row(
    plan: Plan, row: Row, running: dict[str, Contender], outcome: Outcome, tell: Callable[[str], None]
) -> None:
    ramp = plan.mirrored_ramp_s if row.mirrored else plan.ramp_s
    in_turn = [name for name in row.contenders if name in running]
    for number in range(plan.pairs):
        samples: Round = {}
        # The order turns, so that nobody is always the one after the heaviest.
        turn = number % len(in_turn)
        for name in in_turn[turn:] + in_turn[:turn]:
            samples[name] = running[name].measure(row.work, plan.seconds, ramp)
        outcome.rounds.append(samples)
        figures = "  ".join(f"{name} {figure(row, samples[name])}" for name in in_turn)
        tell(f"  {row.number}.{number + 1}  {figures}")


def figure(row: Row, sample: Sample) -> str:
    return f"{sample.mean_us:.1f}" if row.latency else thousands(sample.per_s)


def thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number < 100_000 else f"{number / 1000:.0f}k"


# ---- the report --------------------------------------------------------------------


def markdown(plan: Plan, outcomes: list[Outcome], machine: dict[str, str]) -> str:
    lines = ["# Side by side", ""]
    lines += [f"* {name}: {value}" for name, value in machine.items()]
    method = (
        f"* {plan.pairs} rounds, in turn; each measurement {plan.seconds:g} s, after {plan.ramp_s:g} s "
        f"({plan.mirrored_ramp_s:g} s where mirrored) that do not count"
    )
    lines += [
        method,
        "* medians, and in brackets the least and the greatest",
        "",
        "| # | work | " + " | ".join(ORDER) + " | ratios, and targets |",
        "| --- | --- | " + "--- | " * len(ORDER) + "--- |",
    ]
    for outcome in outcomes:
        row = outcome.row
        cells = [spread(row, outcome.figures(name)) for name in ORDER]
        said = [verdict(target, outcome.ratios(target)) for target in row.targets]
        if outcome.failure:
            said.append(f"**failed**: {outcome.failure}")
        unit = "µs" if row.latency else "per second"
        columns = [row.number, f"{row.title} ({unit})", *cells, "<br>".join(said)]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def spread(row: Row, figures: list[float]) -> str:
    if not figures:
        return "-"
    show = (lambda number: f"{number:.1f}") if row.latency else thousands
    return f"{show(statistics.median(figures))} ({show(min(figures))} to {show(max(figures))})"


def verdict(target: Target, ratios: list[float]) -> str:
    if not ratios:
        return f"{target}: not measured"
    value = statistics.median(ratios)
    word = "met" if target.met(value) else "**missed**"
    return f"{value:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {target}: {word}"


def as_json(plan: Plan, outcomes: list[Outcome], machine: dict[str, str]) -> dict[str, Any]:
    return {
        "machine": machine,
        "rounds": plan.pairs,
        "seconds": plan.seconds,
        "rows": [
            {
                "number": outcome.row.number,
                "title": outcome.row.title,
                "work": asdict(outcome.row.work),
                "failure": outcome.failure,
                "targets": [
                    {
                        "target": str(target),
                        "ratios": ratios,
                        "median": statistics.median(ratios),
                        "met": target.met(statistics.median(ratios)),
                    }
                    for target in outcome.row.targets
                    if (ratios := outcome.ratios(target))
                ],
                "rounds": [
                    {name: asdict(sample) for name, sample in samples.items()} for samples in outcome.rounds
                ],
            }
            for outcome in outcomes
        ],
    }


def describe_machine() -> dict[str, str]:
    model = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        model)

    def first_line(*command: str) -> str:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.partition("\n")[0]

    top = Path(__file__).resolve().parent
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": f"{model}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "rival": first_line("qemu-storage-daemon", "--version"),
        "fio": first_line("fio", "--version"),
        "vhostsync": first_line("git", "-C", str(top), "describe", "--always", "--dirty") or "unknown",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


# ---- the command line ------------------------------------------------------------------


def parse(arguments: list[str] | None) -> tuple[Plan, Path]:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under 4 minutes: short, small")
    parser.add_argument("--rows", help=f"only these, as in 4,5 (of {', '.join(row.number for row in ROWS)})")
    parser.add_argument("--pairs", type=int, default=5, help="rounds (5)")
    parser.add_argument("--seconds", type=float, help="of each measurement (8; 1 with --quick)")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on the disk (/var/tmp)")
    parser.add_argument("--memory-directory", type=Path, default=Path("/dev/shm"), help="a tmpfs (/dev/shm)")
    parser.add_argument("--disk-gib", type=float, help="size of a file on the disk (4; 0.5 with --quick)")
    parser.add_argument("--memory-gib", type=float, help="size of a file in memory (1; 0.25 with --quick)")
    parser.add_argument("--without", action="append", default=[], choices=ORDER, help="leave this one out")
    parser.add_argument("--output", type=Path, default=Path("bench-result"), help="for .json and .md")
    given = parser.parse_args(arguments)
    wanted = given.rows.split(",") if given.rows else [row.number for row in ROWS]
    unknown = set(wanted) - {row.number for row in ROWS} - {row.number.rstrip("rw") for row in ROWS}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    rows = tuple(row for row in ROWS if {row.number, row.number.rstrip("rw")} & set(wanted))
    without = frozenset(given.without) | (frozenset({"rival background"}) if given.quick else frozenset())
    sizes = {
        "disk": given.disk_gib or (0.5 if given.quick else 4),
        "memory": given.memory_gib or (0.25 if given.quick else 1),
    }
    plan = Plan(
        rows=rows,
        pairs=given.pairs,
        seconds=given.seconds or (1 if given.quick else 8),
        ramp_s=0.2 if given.quick else 1,
        # The log swallows a burst: what counts begins when it no longer can.
        mirrored_ramp_s=0.6 if given.quick else 2,
        bytes_of={place: int(gib * GIB) for place, gib in sizes.items()},
        directory_of={"disk": given.directory, "memory": given.memory_directory},
        without=without,
    )
    return plan, given.output


def check_room(plan: Plan) -> None:
    for place, directory in plan.directory_of.items():
        names = {name for row in plan.rows if row.place == place for name in row.contenders} - plan.without
        files = sum(2 if name in MIRRORS else 1 for name in names)
        need, free = files * plan.bytes_of[place], shutil.disk_usage(directory).free
        if need > free * 0.9:
            raise BenchError(
                f"{directory} has {free / GIB:.1f} GiB free and {files} files of "
                f"{plan.bytes_of[place] / GIB:g} GiB are needed; name another directory, or smaller files"
            )


def main(arguments: list[str] | None = None) -> int:
    plan, output = parse(arguments)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        require("fio", "qemu-storage-daemon", "fallocate")
        check_room(plan)
        machine = describe_machine()
        outcomes = [outcome for place in ("disk", "memory") for outcome in measure_place(plan, place, tell)]
    except BenchError as error:
        tell(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    outcomes.sort(key=lambda outcome: ROWS.index(outcome.row))
    text = markdown(plan, outcomes, machine)
    output.with_suffix(".md").write_text(text)
    output.with_suffix(".json").write_text(json.dumps(as_json(plan, outcomes, machine), indent=1))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
