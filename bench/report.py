# SPDX-License-Identifier: Apache-2.0
"""The table, as Markdown for people and as JSON with every sample."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.plan import COLUMNS, Plan
from bench.rows import Outcome
from bench.targets import Target


def markdown(plan: Plan, outcomes: Sequence[Outcome], machine: dict[str, str]) -> str:
    lines = ["# Side by side", ""]
    lines += [f"* {name}: {value}" for name, value in machine.items()]
    method = (
        f"* {plan.pairs} rounds, in turn; each measurement {plan.seconds:g} s, after {plan.ramp_s:g} s "
        f"({plan.mirrored_ramp_s:g} s where mirrored) that do not count"
    )
    lines += [method, "* medians, and in brackets the least and the greatest", ""]
    return "\n".join(lines) + "\n" + table(outcomes)


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| # | work | " + " | ".join(COLUMNS) + " | ratios, and targets |",
        "| --- | --- | " + "--- | " * len(COLUMNS) + "--- |",
    ]
    for outcome in outcomes:
        row = outcome.row
        said = [verdict(target, target.values(outcome.rounds)) for target in row.targets]
        if outcome.failure:
            said.append(f"**failed**: {' '.join(outcome.failure.split())}")
        cells = [spread(outcome.figures(name)) for name in COLUMNS]
        columns = [row.number, f"{row.title} ({row.unit})", *cells, "<br>".join(said)]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def amount(number: float) -> str:
    if number >= 100_000:
        return f"{number / 1000:.0f}k"
    if number >= 10_000:
        return f"{number / 1000:.1f}k"
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def spread(figures: Sequence[float]) -> str:
    if not figures:
        return "-"
    return f"{amount(statistics.median(figures))} ({amount(min(figures))} to {amount(max(figures))})"


def verdict(target: Target, values: Sequence[float]) -> str:
    if not values:
        return f"{target}: not measured"
    value = target.over_rounds(values)
    word = "met" if target.met(value) else "**missed**"
    return f"{value:.3g} ({min(values):.3g} to {max(values):.3g}); {target}: {word}"


def as_json(plan: Plan, outcomes: Sequence[Outcome], machine: dict[str, str]) -> dict[str, Any]:
    def target(target: Target, values: Sequence[float]) -> dict[str, Any]:
        value = target.over_rounds(values)
        return {"target": str(target), "ratios": values, "value": value, "met": target.met(value)}

    def row(outcome: Outcome) -> dict[str, Any]:
        measured = ((each, each.values(outcome.rounds)) for each in outcome.row.targets)
        return {
            "number": outcome.row.number,
            "title": outcome.row.title,
            "figure": outcome.row.shown,
            "unit": outcome.row.unit,
            "work": asdict(outcome.row.work) if outcome.row.work else None,
            "failure": outcome.failure,
            "targets": [target(each, values) for each, values in measured if values],
            "rounds": [
                {name: asdict(sample) for name, sample in samples.items()} for samples in outcome.rounds
            ],
        }

    head = {"machine": machine, "rounds": plan.pairs, "seconds": plan.seconds}
    return {**head, "rows": [row(outcome) for outcome in outcomes]}


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
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": f"{model}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "rival": first_line("qemu-storage-daemon", "--version"),
        "fio": first_line("fio", "--version"),
        "vhostsync": first_line("git", "-C", str(top), "describe", "--always", "--dirty") or "unknown",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }
