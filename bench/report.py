# SPDX-License-Identifier: Apache-2.0
"""The table, as Markdown for people and as JSON with every sample."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.plan import COLUMNS, GIB, Plan
from bench.rival_program import rival_version
from bench.rows import Outcome
from bench.sample import amount
from bench.targets import Target

Json = dict[str, Any]


def spread_of(values: Sequence[float]) -> Json:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def as_json(plan: Plan, outcomes: Sequence[Outcome], machine: dict[str, str]) -> Json:
    """All that was measured, and what is said of it: table, pictures and docs are made of it."""

    def judge(target: Target, values: Sequence[float]) -> Json:
        value = target.over_rounds(values)
        return {"target": str(target), "values": values, "value": value, "met": target.met(value)}

    def row(outcome: Outcome) -> Json:
        measured = ((target, target.values(outcome.rounds)) for target in outcome.row.targets)
        shown = ((name, outcome.figures(name)) for name in COLUMNS)
        return {
            "number": outcome.row.number,
            "title": outcome.row.title,
            "place": outcome.row.place,
            "figure": outcome.row.shown,
            "unit": outcome.row.unit,
            "work": asdict(outcome.row.work) if outcome.row.work else None,
            "failure": outcome.failure,
            "shown": {name: spread_of(figures) for name, figures in shown if figures},
            "targets": [
                judge(target, values) if values else {"target": str(target)} for target, values in measured
            ],
            "rounds": [
                {name: asdict(sample) for name, sample in samples.items()} for samples in outcome.rounds
            ],
        }

    method = {
        "rounds": plan.pairs, "seconds": plan.seconds, "ramp_s": plan.ramp_s,
        "mirrored_ramp_s": plan.mirrored_ramp_s, "bytes_of": plan.bytes_of,
    }
    return {"machine": machine, "method": method, "rows": [row(outcome) for outcome in outcomes]}


def describe(machine: Mapping[str, str]) -> str:
    return "\n".join(f"* {name}: {value}" for name, value in machine.items()) + "\n"


def table(section: Json) -> str:
    """The comparison, from its JSON, as Markdown."""
    method = section["method"]
    sizes = ", ".join(f"{size / GIB:g} GiB ({place})" for place, size in method["bytes_of"].items())
    head = (
        f"* {method['rounds']} rounds, in turn; each measurement {method['seconds']:g} s, after "
        f"{method['ramp_s']:g} s ({method['mirrored_ramp_s']:g} s where mirrored) that do not count; "
        f"files of {sizes}\n"
        "* medians, and in brackets the least and the greatest\n"
    )
    lines = [
        "| # | work | " + " | ".join(COLUMNS) + " | ratios, and targets |",
        "| --- | --- | " + "--- | " * len(COLUMNS) + "--- |",
    ]
    for row in section["rows"]:
        said = [verdict(target) for target in row["targets"]]
        if row["failure"]:
            said.append(f"**failed**: {' '.join(row['failure'].split())}")
        cells = [spread(row["shown"].get(name)) for name in COLUMNS]
        columns = [row["number"], f"{row['title']} ({row['unit']})", *cells, "<br>".join(said)]
        lines.append(f"| {' | '.join(columns)} |")
    return describe(section["machine"]) + head + "\n" + "\n".join(lines) + "\n"


def spread(shown: Json | None) -> str:
    if shown is None:
        return "-"
    return f"{amount(shown['median'])} ({amount(shown['least'])} to {amount(shown['greatest'])})"


def verdict(target: Json) -> str:
    if "values" not in target:
        return f"{target['target']}: not measured"
    word = {True: "met", False: "**missed**", None: "no target"}[target["met"]]
    least, greatest = min(target["values"]), max(target["values"])
    return f"{target['value']:.3g} ({least:.3g} to {greatest:.3g}); {target['target']}: {word}"


def describe_machine() -> dict[str, str]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break

    def first_line(*command: str) -> str:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.partition("\n")[0]

    top = Path(__file__).resolve().parent
    real_time = os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": f"{model}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "rival": rival_version(),
        "fio": first_line("fio", "--version"),
        "vhostsync": first_line("git", "-C", str(top), "describe", "--always", "--dirty") or "unknown",
        "scheduling": "real time" if real_time else f"nice {os.nice(0)}",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }
