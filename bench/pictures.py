# SPDX-License-Identifier: Apache-2.0
"""The pictures, as SVG, from the JSON of a run: the same results give the same files, byte for byte.

Who is who is told by colour and by hatch, marker or dash. matplotlib is needed only here.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.sample import BenchError, amount

Json = dict[str, Any]

# Contender -> colour (of a palette made for colour-blind readers), hatch, dashes.
LOOK: dict[str, tuple[str, str, Any]] = {
    "raw": ("#999999", "", (0, (1, 1))),
    "rival": ("#E69F00", "///", (0, (4, 2))),
    "rival blocking": ("#E69F00", "///", (0, (4, 2))),
    "rival background": ("#F0D58A", "...", (0, (4, 1, 1, 1))),
    "ours": ("#0072B2", "", "solid"),
    "ours mirrored": ("#0072B2", "", "solid"),
}
# Of one look, one name.
NAMES = {
    "raw": "bare file (fio, one disk)",
    "rival": "qemu-storage-daemon (its mirror: write-blocking)",
    "rival blocking": "qemu-storage-daemon (its mirror: write-blocking)",
    "rival background": "its background mirror",
    "ours": "vhostsync",
    "ours mirrored": "vhostsync",
}
# Of its row, what another one shows already.
LEFT_OUT = {("6", "ours")}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("pictures need matplotlib; ./run bench --plot installs it") from error
    matplotlib.use("svg")
    matplotlib.rcParams.update({
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "vhostsync",  # the same names inside at each redraw
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.linewidth": 0.6,
    })
    from matplotlib import pyplot

    return pyplot


def _said(section: Json) -> str:
    machine = section["machine"]
    return (
        f"{machine['date']}; {machine['processor']}; Linux {machine['kernel']}; "
        f"load of the machine before: {machine['load before']}"
    )


def _contenders(row: Json, within: Any) -> list[str]:
    return [name for name in LOOK if name in within and (row["number"], name) not in LEFT_OUT]


def _legend(figure: Any, drawn: dict[str, Any]) -> None:
    """Below the title, which takes 0.25 inches."""
    handles = {NAMES[name]: drawn[name] for name in LOOK if name in drawn}
    below_title = (0, 1 - 0.25 / figure.get_figheight())
    figure.legend(
        list(handles.values()), list(handles), loc="upper left", bbox_to_anchor=below_title, ncols=4,
        frameon=False, fontsize=8,
    )


def _finish_figure(figure: Any, title: str, section: Json, path: Path, *, how: str = "") -> None:
    """The title above, when and where it was measured below, the rest between them."""
    height = figure.get_figheight()
    foot, head = (0.38 if how else 0.22) / height, 0.5 / height
    figure.get_layout_engine().set(rect=(0, foot, 1, 1 - foot - head))
    figure.text(0.01, 1 - 0.05 / height, title, va="top", fontweight="bold", fontsize=10)
    said = f"{how}\nMeasured {_said(section)}".strip()
    figure.text(0.01, 0.05 / height, said, fontsize=7, color="#555555", va="bottom")
    figure.savefig(path, metadata={"Date": None, "Creator": None})


# ---- side by side --------------------------------------------------------------------------------

_PANELS = (
    ("Requests per second, 32 in flight (longer is better)", ("1r", "1w", "4", "7", "8", "2r", "2w", "5")),
    ("Mean latency, 1 in flight, µs (shorter is better)", ("3", "6", "3m")),
)
_LABELS = {
    "1r": "disk: reads", "1w": "disk: writes",
    "4": "disk: mirrored writes",
    "7": "disk: mirrored, 1 in flight,\na flush after each write",
    "8": "disk: mirrored,\na flush after 32 writes",
    "2r": "memory: reads", "2w": "memory: writes", "5": "memory: mirrored writes",
    "3": "disk: writes", "6": "disk: mirrored writes", "3m": "memory: writes",
}
# Where an axis ends, in longest bars: a round that went wild must not make the others small.
_WHISKER_END, _END = 1.4, 1.55


def side_by_side(pyplot: Any, section: Json, path: Path) -> None:
    rows = {row["number"]: row for row in section["rows"] if row["shown"]}
    panels = [(title, [number for number in numbers if number in rows]) for title, numbers in _PANELS]
    panels = [(title, numbers) for title, numbers in panels if numbers]
    if not panels:
        return
    heights = [sum(len(rows[number]["shown"]) + 0.8 for number in numbers) for _, numbers in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 0.17 * sum(heights) + 0.3 * len(panels) + 0.9), layout="constrained",
        gridspec_kw={"height_ratios": heights}, squeeze=False,
    )
    drawn: dict[str, Any] = {}
    for (title, numbers), one in zip(panels, axes[:, 0], strict=True):
        _bars(one, [rows[number] for number in numbers], drawn)
        one.set_title(title, loc="left", fontsize=9)
    _legend(figure, drawn)
    title = "vhostsync beside its rival and the bare file: 4 KiB random, one queue"
    how = "Bars: medians, each group on its own scale; lines: from the least to the greatest round."
    _finish_figure(figure, title, section, path, how=how)


def _bars(one: Any, rows: Sequence[Json], drawn: dict[str, Any]) -> None:
    at, ticks = 0.0, []
    for row in rows:
        first = at
        names = _contenders(row, row["shown"])
        most = max(row["shown"][name]["median"] for name in names)
        for name in names:
            shown, (colour, hatch, _) = row["shown"][name], LOOK[name]
            least, median, greatest = (shown[key] / most for key in ("least", "median", "greatest"))
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            drawn[name] = one.barh(at, median, height=0.9, **style)
            error = [[median - least], [min(greatest, _WHISKER_END) - median]]
            one.errorbar(median, at, xerr=error, color="black", linewidth=0.8, capsize=2)
            one.text(_END, at, amount(shown["median"]), ha="right", va="center", fontsize=8)
            at += 1
        ticks.append(((first + at - 1) / 2, _LABELS[row["number"]]))
        at += 0.8
    one.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    one.tick_params(axis="y", length=0)
    one.invert_yaxis()
    one.set_xlim(0, _END)
    one.set_xticks([])
    one.spines["bottom"].set_visible(False)


# ---- latencies -----------------------------------------------------------------------------------

_LATENCIES = (
    ("3", "one disk, 1 in flight"), ("6", "mirrored, 1 in flight"),
    ("1w", "one disk, 32 in flight"), ("4", "mirrored, 32 in flight"),
)
_PARTS = (0, 50, 90, 99, 99.9, 99.99)


def _nines(percent: float) -> float:
    """Each further nine takes the same room."""
    return -math.log10(1 - percent / 100)


def percentile_curve(row: Json, name: str) -> list[tuple[float, float]]:
    """(µs, percent): of all rounds together where there are histograms, else the rounds' median (fio)."""
    details = [samples[name]["detail"] for samples in row["rounds"] if name in samples]
    if not details:
        return []
    if "percentiles_us" in details[0]:
        by_part: dict[float, list[float]] = {}
        for detail in details:
            for part, us in detail["percentiles_us"]:
                by_part.setdefault(part, []).append(us)
        return [(statistics.median(values), part) for part, values in sorted(by_part.items())]
    counts: dict[int, int] = {}
    for detail in details:
        for floor_ns, count in detail["operations"]["write"]["histogram"]:
            counts[floor_ns] = counts.get(floor_ns, 0) + count
    total, seen, curve = sum(counts.values()), 0, []
    for floor_ns, count in sorted(counts.items()):
        curve.append((floor_ns / 1000, 100 * seen / total))
        seen += count
    return curve


def latencies(pyplot: Any, section: Json, path: Path) -> None:
    rows = {row["number"]: row for row in section["rows"] if row["rounds"]}
    panels = [(number, title) for number, title in _LATENCIES if number in rows]
    if not panels:
        return
    figure, axes = pyplot.subplots(
        (len(panels) + 1) // 2, 2, figsize=(8, 2.7 * ((len(panels) + 1) // 2) + 0.5), layout="constrained",
        sharey=True, squeeze=False,
    )
    drawn: dict[str, Any] = {}
    for one in axes.flat[len(panels):]:
        one.set_visible(False)
    for (number, title), one in zip(panels, axes.flat, strict=False):
        row = rows[number]
        for name in _contenders(row, row["rounds"][0]):
            curve = percentile_curve(row, name)
            colour, _, dashes = LOOK[name]
            inside = [(us, part) for us, part in curve if us > 0 and part <= _PARTS[-1]]
            xs, ys = [us for us, _ in inside], [_nines(part) for _, part in inside]
            (drawn[name],) = one.plot(xs, ys, color=colour, linestyle=dashes, linewidth=1.6)
        one.set_xscale("log")
        one.set_title(title, loc="left", fontsize=9)
        one.set_yticks([_nines(part) for part in _PARTS], [f"{part:g} %" for part in _PARTS])
        one.xaxis.set_major_formatter(_time)
        one.grid(color="#dddddd", linewidth=0.6)
    for one in axes[-1]:
        one.set_xlabel("latency")
    for one in axes[:, 0]:
        one.set_ylabel("part of the writes that took less")
    _legend(figure, drawn)
    _finish_figure(figure, "Latency of 4 KiB random writes, disk (further left is better)", section, path)


def _round_amount(number: float, _: object = None) -> str:
    return f"{number / 1000:g}k" if number >= 1000 else f"{number:g}"


def _time(us: float, _: object = None) -> str:
    return f"{us / 1e6:g} s" if us >= 1e6 else f"{us / 1000:g} ms" if us >= 1000 else f"{us:g} µs"


# ---- timeline ------------------------------------------------------------------------------------


def timeline(pyplot: Any, section: Json, path: Path) -> None:
    step = section["interval_ms"] / 1000
    per_s = [count / step for count in section["completions"]]
    end = len(per_s) * step
    figure, (load, lag) = pyplot.subplots(2, 1, figsize=(8, 4.4), sharex=True, layout="constrained")
    edges = [number * step for number in range(len(per_s) + 1)]
    load.stairs(per_s, edges, color=LOOK["ours"][0], baseline=None)
    load.set_ylabel("writes per second")
    load.set_ylim(0, max(per_s) * 1.15)
    load.yaxis.set_major_formatter(_round_amount)
    mirror = [look for look in section["mirror"] if 0 <= look["t_s"] <= end]
    most = max(look["lag_bytes"] for look in mirror)
    unit, name_of_unit = (2**20, "MiB") if most > 2**21 else (2**10, "KiB")
    lag.plot(
        [look["t_s"] for look in mirror], [look["lag_bytes"] / unit for look in mirror],
        color=LOOK["ours"][0], marker=".", markersize=3, linewidth=1,
    )
    lag.set_ylabel(f"lag of the destination, {name_of_unit}")
    lag.set_ylim(bottom=0)
    lag.set_xlabel("seconds since the guest began to write")
    borders = [*section["events"], {"t_s": end}]
    names = ["one disk", "copy", "steady: both disks", "after the switch: both disks, the other way round"]
    begin = 0.0
    for number, (edge, name) in enumerate(zip(borders, names, strict=True)):
        for one in (load, lag):
            one.axvspan(begin, edge["t_s"], color="#f1f1f1" if number % 2 else "white", linewidth=0, zorder=0)
            if number:
                one.axvline(begin, color="#777777", linewidth=0.8, linestyle="dotted")
        middle = (begin + edge["t_s"]) / 2
        load.text(middle, max(per_s) * 1.13, _fold(name), ha="center", va="top", fontsize=8)
        begin = edge["t_s"]
    load.set_xlim(0, end)
    title = (
        "A guest that writes through copy, steady and switch\n"
        f"(a disk of {section['disk_bytes'] / 2**30:g} GiB, 4 KiB random, 32 in flight; "
        f"pause at the switch {section['switch_pause_ms']:.1f} ms)"
    )
    _finish_figure(figure, title, section, path)


def _fold(text: str) -> str:
    return text.replace(": ", ":\n").replace(", ", ",\n")


# ---- all -----------------------------------------------------------------------------------------

PICTURES: dict[str, tuple[str, Callable[[Any, Json, Path], None]]] = {
    "side-by-side.svg": ("table", side_by_side),
    "latency.svg": ("table", latencies),
    "timeline.svg": ("timeline", timeline),
}


def draw(results: Json, folder: Path) -> list[Path]:
    """Those for which the results have something; where they are now."""
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (section, picture) in PICTURES.items():
        if section in results:
            picture(pyplot, results[section], folder / name)
            pyplot.close("all")
            drawn.append(folder / name)
    return drawn
