# SPDX-License-Identifier: Apache-2.0
"""Results by machine, in bench/results/: `./run bench --save MACHINE` keeps what it has measured there, and
README's table is made of all of them (docs/generate.py). So README says what holds on each machine, and
another machine's figures are only dropped in."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.sample import BenchError, amount

Json = dict[str, Any]

FOLDER: Final = Path(__file__).parent / "results"
MACHINE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]*")
KEPT: Final = ("number", "title", "place", "figure", "unit", "failure", "shown", "targets")
LESS_IS_BETTER: Final = ("ms", "µs")
RIVALS: Final = ("rival", "rival blocking", "rival background")


def save(section: Json, machine: str, folder: Path = FOLDER) -> Path:
    """Keep the rows of a table (report.as_json), without their samples. Rows of an earlier run on this
    machine stay, unless they were measured anew, and say when and of what version they are."""
    if MACHINE_NAME.fullmatch(machine) is None:
        raise BenchError(f"{machine!r} is no name for a machine: small letters, digits, dots and dashes")
    path = folder / f"{machine}.json"
    former = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = {"measured": section["machine"], "method": section["method"]}
    rows = [{**{key: row[key] for key in KEPT}, **measured} for row in section["rows"]]
    anew = {row["number"] for row in rows}
    rows += [row for row in former if row["number"] not in anew]
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    return path


@dataclass(frozen=True)
class Measured:
    """A row on one machine."""

    machine: str
    row: Json

    @property
    def rival(self) -> str:
        """As in `qemu-storage-daemon version 10.0.13 (…)`: 10.0.13."""
        found = re.search(r"version (\d+(?:\.\d+)*)", self.row["measured"]["rival"])
        return found[1] if found is not None else "unknown"

    def median(self, name: str) -> float | None:
        shown = self.row["shown"].get(name)
        return float(shown["median"]) if shown is not None else None

    def rivals_best(self) -> float | None:
        medians = [median for name in RIVALS if (median := self.median(name)) is not None]
        best = min if self.row["unit"] in LESS_IS_BETTER else max
        return best(medians, default=None)

    def ratio(self, target: str) -> float | None:
        """The median of the rounds' ratios, by the target's first words."""
        for each in self.row["targets"]:
            if each["target"].startswith(target) and "value" in each:
                return float(each["value"])
        return None


def results(folder: Path = FOLDER) -> list[Measured]:
    """Of all machines, by name. Where some were measured against a newer rival, the others are left out."""
    found = [
        Measured(kept["machine"], row)
        for path in sorted(folder.glob("*.json"))
        for kept in [json.loads(path.read_text())]
        for row in kept["rows"]
        if not row["failure"]
    ]
    newest = max((_major(each) for each in found), default=0)
    return [each for each in found if _major(each) == newest]


def _major(measured: Measured) -> int:
    head = measured.rival.partition(".")[0]
    return int(head) if head.isdigit() else 0


# ---- README's table -----------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Of README's table: a row of the bench, in words of its own."""

    number: str
    work: str
    ours: str
    unit: str
    of_rival: str | None = None  # the target that is claimed: only where the device is not the limit
    of_limit: str | None = None


LINES: Final = (
    Line("2r", "4 KiB reads, 32 in flight, one disk in memory", "ours", "/s", "of rival", "of raw"),
    Line("5", "4 KiB writes, 32 in flight, mirrored, both disks in memory", "ours mirrored", "/s",
         "of rival's best"),
    Line("1r", "4 KiB reads, 32 in flight, one file on a disk", "ours", "/s", None, "of raw"),
    Line("1w", "4 KiB writes, the same", "ours", "/s", None, "of raw"),
    Line("4", "4 KiB writes, 32 in flight, mirrored, both files on one disk", "ours mirrored", "/s", None,
         "of L"),
    Line("7", "4 KiB writes, a flush after each, one in flight, mirrored, the same", "ours mirrored", "/s",
         None, "of L"),
    Line("N1", "mirrored writes, 32 in flight, memory, to an NBD server", "ours mirrored", "/s", "of rival",
         "of raw"),
    Line("9", "a guest's longest wait around a switch under load", "ours mirrored", " ms"),
    Line("9i", "pause of a switch, guest idle", "ours mirrored", " ms"),
    Line("10", "bulk copy of a disk", "ours", " MB/s"),
)  # fmt: skip


def readme_table(found: Sequence[Measured] | None = None) -> str:
    """Each figure is the range of the machines' medians; a machine's own spread is in its file."""
    found = results() if found is None else found
    lines = [
        "| work | vhostsync | qemu-storage-daemon | of the other | of what the disk alone gives |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in LINES:
        of = [each for each in found if each.row["number"] == line.number]
        if of:
            lines.append(_row(line, of))
    return "\n".join(lines) + "\n\n" + "\n".join(_machines(found)) + "\n"


def _row(line: Line, of: Sequence[Measured]) -> str:
    def over(value: Callable[[Measured], float | None], text: Callable[[float], str]) -> str:
        values = [shown for each in of if (shown := value(each)) is not None]
        if not values:
            return ""
        least, greatest = text(min(values)), text(max(values))
        return least if least == greatest else f"{least} to {greatest}"

    def ratio(target: str | None) -> str:
        return over(lambda each: each.ratio(target), lambda value: f"{value:.2f}") if target else ""

    def figure(value: Callable[[Measured], float | None]) -> str:
        shown = over(value, amount)
        return shown + line.unit if shown else ""

    cells = (
        line.work, figure(lambda each: each.median(line.ours)), figure(Measured.rivals_best),
        ratio(line.of_rival), ratio(line.of_limit),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _machines(found: Sequence[Measured]) -> list[str]:
    """Which they are, and when and with what each was measured."""
    lines = []
    for machine in sorted({each.machine for each in found}):
        of = [each for each in found if each.machine == machine]
        told = [each.row["measured"] for each in of]
        days = sorted({each["date"].partition(" ")[0] for each in told})
        rivals = sorted({each.rival for each in of})
        versions = sorted({each["vhostsync"] for each in told})
        lines.append(
            f"* {machine}: {told[0]['processor']}, Linux {told[0]['kernel']}, QEMU {', '.join(rivals)}; "
            f"vhostsync {', '.join(versions)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"
        )
    return lines
