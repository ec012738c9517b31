# SPDX-License-Identifier: Apache-2.0
"""How cost grows as the work grows: `./run bench --growth`. Ours alone, in one pass (no rival, no
rounds, but for the threads, where one is compared with another): these tables show a shape, the comparison
is the other table's business.
"""

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.contenders import Contender, Ours
from bench.disk_sizes import SIZES, measure_size, own_mib
from bench.files import make_file
from bench.generator import load_beside
from bench.idle import on_cpu_ns
from bench.node_growth import ForkedOurs, Host, asking_s, median_start_ms, node_at, pss_mib, user_of
from bench.plan import GIB, Plan
from bench.report import describe, describe_machine
from bench.rows import Tell
from bench.sample import BenchError, Work, amount

KIB, MIB = 1 << 10, 1 << 20
QUEUES = (1, 2, 4, 8)
BLOCKS = (512, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)
THREADS = (1, 2, 3)
THREADS_ROUNDS = 3
THREADS_DISK_BYTES = 256 << 20
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BACKENDS = (1, 4, 16, 64)
FORKED = (1, 8, 64, 250, 500)
FORKED_BYTES = 4 * MIB  # twice 500 of them are to fit in memory
RAMP_S = 0.3
IDLE_S = 4.0
Json = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """columns: each with the unit in its title; rows: text and numbers, None where nothing was measured."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str | float | None, ...]]


@contextlib.contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    folder = parent / f"vhostsync-bench-growth-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _both(plan: Plan, place: str, queues: int = 4) -> Iterator[tuple[Ours, Ours]]:
    """One in pass-through, one mirrored and steady."""
    direct, size = plan.direct(place), plan.bytes_of[place]
    plan.check_room(place, ("ours", "ours mirrored"))
    with _folder(plan.directory_of[place]) as folder, contextlib.ExitStack() as stack:
        images = [make_file(folder / f"{name}.img", size, direct=direct) for name in ("alone", "from", "to")]
        alone = Ours("ours", folder, images[0], direct=direct, queues=queues)
        stack.callback(alone.close)
        mirrored = Ours(
            "ours mirrored", folder, images[1], direct=direct, destination=images[2], queues=queues
        )
        stack.callback(mirrored.close)
        yield alone, mirrored


# Of one kind of load: what is said of it, in columns.
_LOAD_COLUMNS = ("per second", "MB/s", "mean µs", "p99 µs", "CPU µs/request")


def _load(contender: Contender, work: Work, plan: Plan) -> tuple[float, ...]:
    figures = contender.measure(work, min(plan.seconds, 1.5), RAMP_S).figures
    per_s = figures["per_s"]
    return per_s, per_s * work.block_bytes / 1e6, figures["mean_us"], figures["p99_us"], figures["cpu_us"]


def _loads(plan: Plan, place: str, title: str, what: str, works: dict[str, Work]) -> Table:
    queues = max(work.queues for work in works.values())
    rows: list[tuple[str | float | None, ...]] = []
    with _both(plan, place, queues) as (alone, mirrored):
        for label, work in works.items():
            for name, contender in (("pass-through", alone), ("mirrored", mirrored)):
                try:
                    rows.append((label, name, *_load(contender, work, plan)))
                except BenchError as error:  # the others are worth having
                    rows.append((label, f"{name}: {error}", *(None,) * len(_LOAD_COLUMNS)))
    return Table(title, (what, "mode", *_LOAD_COLUMNS), rows)


def _size_name(size: int) -> str:
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


_WRITE = Work("randwrite", 32)


def _queues(plan: Plan) -> list[Table]:
    works = {str(count): replace(_WRITE, queues=count) for count in QUEUES}
    title = "Queues: 4 KiB random writes, 32 in flight in each, memory"
    return [_loads(plan, "memory", title, "queues", works)]


_THREADED = {
    "4 KiB writes, 1 queue": _WRITE,
    "4 KiB writes, 4 queues": replace(_WRITE, queues=4),
    "4 KiB reads, 4 queues": Work("randread", 32, queues=4),
    "64 KiB writes, 4 queues": Work("randwrite", 8, block_bytes=64 * KIB, queues=4),
    "64 KiB reads, 4 queues": Work("randread", 8, block_bytes=64 * KIB, queues=4),
}


def _threads_of(plan: Plan, place: str) -> Table:
    """Backends that differ in --threads, each work with all of them in turn."""
    columns = ("work", "mode", *(f"{count}: per second" for count in THREADS))
    columns += (*(f"{count}: of 1" for count in THREADS[1:]), *(f"{count}: CPU µs" for count in THREADS))
    direct, size = plan.direct(place), min(THREADS_DISK_BYTES, plan.bytes_of[place])
    rows: list[tuple[str | float | None, ...]] = []
    with _folder(plan.directory_of[place]) as folder, contextlib.ExitStack() as stack:
        for mode in ("pass-through", "mirrored"):
            backends: list[Ours] = []
            for count in THREADS:
                name = f"{mode} {count}"
                images = [make_file(folder / f"{name} {n}.img", size, direct=direct) for n in ("from", "to")]
                destination = images[1] if mode == "mirrored" else None
                options = ("--threads", str(count))
                backends.append(
                    Ours(name, folder, images[0], direct=direct, destination=destination, options=options)
                )
                stack.callback(backends[-1].close)
            for label, work in _THREADED.items():
                rounds = [[_load(ours, work, plan) for ours in backends] for _ in range(THREADS_ROUNDS)]
                per_s = [statistics.median(each[i][0] for each in rounds) for i in range(len(THREADS))]
                cpu_us = [statistics.median(each[i][-1] for each in rounds) for i in range(len(THREADS))]
                # Of each round, where both had the same machine.
                of_one = [
                    statistics.median(each[i][0] / each[0][0] for each in rounds)
                    for i in range(1, len(THREADS))
                ]
                rows.append((label, mode, *per_s, *of_one, *cpu_us))
    return Table(f"Threads (--threads), {place}; 32 in flight in each queue, 8 of 64 KiB", columns, rows)


def _threads(plan: Plan) -> list[Table]:
    return [_threads_of(plan, place) for place in ("memory", "disk")]


def _blocks(plan: Plan) -> list[Table]:
    works = {_size_name(size): replace(_WRITE, depth=8, block_bytes=size) for size in BLOCKS}
    title = "Block size: random writes, 8 in flight, one queue"
    return [_loads(plan, place, f"{title}, {place}", "block", works) for place in ("disk", "memory")]


def _depths(plan: Plan) -> list[Table]:
    works = {str(depth): replace(_WRITE, depth=depth) for depth in DEPTHS}
    title = "Depth: 4 KiB random writes, one queue"
    return [_loads(plan, place, f"{title}, {place}", "in flight", works) for place in ("disk", "memory")]


def _disks(plan: Plan) -> list[Table]:
    columns = (
        "disk", "start s", "attach (copy of the empty disk) s", "query-mirror ms", "resync of 2,000 writes s",
        "of that CPU s", "regions copied, MiB", "memory MiB",
    )
    rows: list[tuple[str | float | None, ...]] = []
    with _folder(plan.directory_of["memory"]) as folder:
        for size in SIZES:
            figures = measure_size(folder / str(size), size).figures
            names = (
                "start_s", "attach_s", "status_ms", "resync_s", "resync_cpu_s", "resync_mib", "rss_mib"
            )
            rows.append((_size_name(size), *(figures[name] for name in names)))
    return [Table("Disk size: sparse files in memory, a log of 8 MiB", columns, rows)]


def _idle_backends(plan: Plan) -> list[Table]:
    """Each with a guest connected that has written a little and its mirror steady, within the limit on locked
    memory that is in force: their rings count there, of all of a user's together."""
    columns = ("backends", "memory of each, MiB", "of all, MiB", "CPU of all, % of a core", "wake-ups/s")
    rows: list[tuple[str | float | None, ...]] = []
    size = 16 * MIB
    with _folder(plan.directory_of["memory"]) as folder, contextlib.ExitStack() as stack:
        running: list[Ours] = []

        def start(number: int) -> None:
            names = [folder / f"{number}-{name}.img" for name in ("from", "to")]
            source, to = (make_file(name, size, direct=False) for name in names)
            options = ("--log-size", "8M")
            ours = Ours(
                f"ours {number}", folder, source, direct=False, destination=to, queues=1, options=options
            )
            stack.callback(ours.close)
            load = ("--operations", "100", "--stay")
            stack.enter_context(load_beside(ours.socket, Work("randwrite", 4), 600, *load))
            running.append(ours)

        for count in BACKENDS:
            try:
                while len(running) < count:
                    start(len(running))
            except BenchError as error:
                why = str(error).rpartition("vhostsync: ")[2]  # as the backend said it
                rows.append((f"{count}: after {len(running)}, {why}", None, None, None, None))
                break
            rows.append(_idle(running))
    title = "Idle backends: guest connected, mirror steady, 16 MiB of disk, a log of 8 MiB"
    return [Table(title, columns, rows)]


def _forked_backends(plan: Plan) -> list[Table]:
    """As the idle ones, forked from a node, with users of their own where the bench is root; until a limit is
    reached."""
    columns = (
        "backends", "PSS of each, MiB", "of all and the node, MiB", "CPU of all, % of a core", "wake-ups/s",
        "start ms", "list s", "evacuate --dry-run s", "one scrape s",
    )  # fmt: skip
    rows: list[tuple[str | float | None, ...]] = []
    with _folder(plan.directory_of["memory"]) as folder, contextlib.ExitStack() as stack:
        running: list[ForkedOurs] = []
        host = Host(folder)
        host.disks.mkdir()
        host.away.mkdir()
        node = stack.enter_context(node_at(host.node))
        for count in FORKED[:2] if plan.quick else FORKED:
            try:
                while len(running) < count:
                    _start_forked(host, stack, running)
            except (BenchError, OSError) as error:
                why = f"{count}: after {len(running)}, {error}"
                rows.append((why, *(None,) * (len(columns) - 1)))
                break
            _, _, _, core_percent, sleeps = _idle(running)
            pss = pss_mib([node, *(each.pid for each in running)])
            asking = asking_s(host, count)
            rows.append((count, pss / count, pss, core_percent, sleeps, median_start_ms(running), *asking))
    title = "Idle backends of a node: guest connected, mirror steady, 4 MiB of disk, a log of 8 MiB"
    return [Table(title, columns, rows)]


def _start_forked(host: Host, stack: contextlib.ExitStack, running: list[ForkedOurs]) -> None:
    number, folder = len(running), host.disks
    user = user_of(number)
    source, to = (
        make_file(folder / f"{number}-{name}.img", FORKED_BYTES, direct=False) for name in ("from", "to")
    )
    if user is not None:
        user.give(source, to)
    ours = ForkedOurs(
        host, user, f"ours {number}", folder, source, direct=False, destination=to, queues=1,
        options=("--log-size", "8M"),
    )  # fmt: skip
    stack.callback(ours.close)
    load = ("--operations", "100", "--stay")
    stack.enter_context(load_beside(ours.socket, Work("randwrite", 4), 1800, *load))
    running.append(ours)


def _idle(running: Sequence[Ours]) -> tuple[float, ...]:
    time.sleep(1.5)  # for the writes, and what a start leaves to do
    # A query would wake them: threads' own counts of voluntary sleeps do not.
    cpu, sleeps = [sum(on_cpu_ns(each.pid) for each in running)], [sum(map(_sleeps, running))]
    time.sleep(IDLE_S)
    cpu.append(sum(on_cpu_ns(each.pid) for each in running))
    sleeps.append(sum(map(_sleeps, running)))
    memory = sum(own_mib(each.pid) for each in running)
    core_percent = (cpu[1] - cpu[0]) / IDLE_S / 1e7
    return len(running), memory / len(running), memory, core_percent, (sleeps[1] - sleeps[0]) / IDLE_S


def _sleeps(ours: Ours) -> int:
    """How often its threads, Python's too, have gone to sleep; each was woken before."""
    total = 0
    for task in Path(f"/proc/{ours.pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


KINDS: dict[str, Callable[[Plan], list[Table]]] = {
    "queues": _queues,
    "threads": _threads,
    "blocks": _blocks,
    "depths": _depths,
    "disks": _disks,
    "idle": _idle_backends,
    "node": _forked_backends,
}


def measure_growth(plan: Plan, kinds: Sequence[str], earlier: Json | None, tell: Tell) -> Json:
    """With the tables of the earlier results that are of other kinds."""
    before: list[Json] = earlier["tables"] if earlier else []
    described = [table for table in before if table["kind"] not in kinds]
    for kind in kinds:
        tell(f"growth: {kind}")
        machine = describe_machine()
        try:
            tables = KINDS[kind](plan)
        except BenchError as error:
            tell(f"  {error}")
            tables = [Table(kind, ("failed",), [(str(error),)])]
        measured = {"kind": kind, "date": machine["date"], "load": machine["load before"]}
        described += [{**measured, **asdict(table)} for table in tables]
    order = list(KINDS)
    described.sort(key=lambda table: order.index(table["kind"]))
    method = {"seconds": min(plan.seconds, 1.5), "bytes_of": plan.bytes_of}
    return {"machine": describe_machine(), "method": method, "tables": described}


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return " ".join(value.split())
    return "0" if value == 0 else amount(value)


def growth_tables(section: Json) -> str:
    """From its JSON, as Markdown."""
    method = section["method"]
    sizes = ", ".join(f"{size / GIB:g} GiB ({place})" for place, size in method["bytes_of"].items())
    parts = [
        describe(section["machine"]) + f"* one pass of {method['seconds']:g} s each; files of {sizes}\n"
    ]
    for table in section["tables"]:
        when = f"({table['date']}; load of the machine before: {table['load']})"
        lines = [f"**{table['title']}** {when}", "", f"| {' | '.join(table['columns'])} |"]
        lines.append(f"|{' --- |' * len(table['columns'])}")
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in table["rows"]]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
