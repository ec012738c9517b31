# SPDX-License-Identifier: Apache-2.0
"""The table: each row is a work, who does it, how it is measured, and what is to be reached."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from statistics import fmean

from bench.bulk_copy import measure_copy, measure_holes
from bench.ceph import measure_copy_to_rbd, measure_from_rbd, measure_mirrored_to_rbd
from bench.contenders import Contender
from bench.disk_sizes import measure_sizes
from bench.idle import measure_idle
from bench.limits import measure_limit
from bench.network import (
    FAR_MS,
    measure_copy_to_nbd,
    measure_data_thread,
    measure_far,
    measure_far_flushed,
    measure_mirrored,
    measure_mirrored_tls,
)
from bench.plan import Plan
from bench.sample import Round, Sample, Work
from bench.switching import measure_idle_switch, measure_no_switch, measure_switch
from bench.targets import Target, every, of_limit, percentile_99, ratio, value

Measure = Callable[[Contender, Plan], Sample]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    number: str
    title: str
    place: str  # "disk" or "memory"
    contenders: tuple[str, ...]
    targets: tuple[Target, ...]
    shown: str = "per_s"  # the figure in the table
    unit: str = "per second"
    work: Work | None = None
    measure: Measure | None = None  # of one contender, in place of the work
    alone: Callable[[Plan], list[Round]] | None = None  # all rounds, with contenders of its own
    derived_from: str | None = None  # another row's rounds, another figure of them
    mirrored: bool = False
    shown_events: str | None = None  # in place of "shown": each event, a list in the detail


@dataclass
class Outcome:
    row: Row
    rounds: list[Round] = field(default_factory=list)
    failure: str | None = None

    def figures(self, contender: str) -> list[float]:
        samples = [samples[contender] for samples in self.rounds if contender in samples]
        if events := self.row.shown_events:
            return [event for each in samples for event in each.detail[events]]
        return [each.figures[self.row.shown] for each in samples if self.row.shown in each.figures]


ALONE = ("raw", "rival", "ours")
RIVALS = ("rival blocking", "rival background")
MIRRORS = (*RIVALS, "ours mirrored")
READ_32, WRITE_32, WRITE_1 = Work("randread", 32), Work("randwrite", 32), Work("randwrite", 1)


def _pass_through(number: str, kind: str, place: str, of_raw: float, of_rival: float) -> Row:
    work = READ_32 if kind == "read" else WRITE_32
    targets = (
        Target("of raw", ratio("ours", "raw"), of_raw),
        Target("of rival", ratio("ours", "rival"), of_rival),
    )
    return Row(number, f"pass-through, {place}, depth 32, {kind}", place, ALONE, targets, work=work)


def _cpu(row: Row, contender: str, bound_us: float) -> Row:
    target = Target("CPU µs/request", value(contender, "cpu_us"), bound_us, at_most=True)
    title = f"CPU of the backend a request: {row.title}"
    return replace(
        row, number=f"11/{row.number}", title=title, targets=(target,), shown="cpu_us", unit="µs",
        derived_from=row.number,
    )


def _latency(number: str, place: str, bound: float) -> Row:
    target = Target("of raw", ratio("ours", "raw", name="mean_us"), bound, at_most=True)
    title = f"pass-through, {place}, depth 1, write: mean latency"
    return Row(number, title, place, ALONE, (target,), "mean_us", "µs", WRITE_1)


def _packed(number: str, kind: str) -> Row:
    """What packed rings cost or spare, with the same backend on the same file in turn."""
    work = READ_32 if kind == "read" else WRITE_32

    def measure(contender: Contender, plan: Plan) -> Sample:
        split = contender.measure(work, plan.seconds, plan.ramp_s)
        packed = contender.measure(replace(work, packed=True), plan.seconds, plan.ramp_s)
        ratio_of_both = packed.figures["per_s"] / split.figures["per_s"]
        return Sample({**packed.figures, "of_split": ratio_of_both}, {"split": split.figures})

    title = f"packed rings: pass-through, memory, depth 32, {kind}"
    targets = (Target("of split rings", value("ours", "of_split"), None),)
    return Row(number, title, "memory", ("ours",), targets, measure=measure)


_R4 = Row(
    "4", "mirrored writes, disk, depth 32", "disk", ("raw", *MIRRORS),
    (Target("of L", of_limit, 0.95), Target("of rival's best", ratio("ours mirrored", *RIVALS), 1.25)),
    work=WRITE_32, mirrored=True,
)
_R5 = Row(
    "5", "mirrored writes, memory, depth 32", "memory", MIRRORS,
    (Target("of rival's best", ratio("ours mirrored", *RIVALS), 6),), work=WRITE_32, mirrored=True,
)
_SIDE_BY_SIDE = (
    _pass_through("1r", "read", "disk", 0.9, 1),
    _pass_through("1w", "write", "disk", 0.9, 1),
    _pass_through("2r", "read", "memory", 0.95, 4),
    _pass_through("2w", "write", "memory", 0.95, 4),
    _packed("2rp", "read"),
    _packed("2wp", "write"),
    _latency("3", "disk", 1.4),
    _latency("3m", "memory", 0.3),
    replace(
        _latency("3p", "memory", 0.3), work=replace(WRITE_1, poll=True),
        title="the same, where the guest does not sleep, either: without its wake-up",
    ),
    _R4,
    _R5,
    Row(
        "6", "mirrored writes, disk, depth 1: mean latency", "disk",
        ("ours", "rival blocking", "ours mirrored"),
        (Target("of pass-through", ratio("ours mirrored", "ours", name="mean_us"), 1.15, at_most=True),),
        "mean_us", "µs", WRITE_1, mirrored=True,
    ),
    Row(
        "7", "mirrored, disk, depth 1, a flush after every write", "disk", ("raw", *MIRRORS),
        (Target("of rival's best", ratio("ours mirrored", *RIVALS), 1.4), Target("of L", of_limit, None)),
        work=Work("randwrite", 1, flush_every=1), mirrored=True,
    ),
    Row(
        "8", "mirrored, disk, depth 32, a flush after every 32", "disk", ("raw", *MIRRORS),
        (Target("of rival's best", ratio("ours mirrored", *RIVALS), 1.6), Target("of L", of_limit, None)),
        work=Work("randwrite", 32, flush_every=32), mirrored=True,
    ),
)
_SWITCHES = (
    Row(
        "9", "longest wait of a guest around a switch, depth-32 writes, disk", "disk", MIRRORS,
        (
            Target("median ms", every("ours mirrored", "pauses_ms"), 1.5, at_most=True),
            Target("p99 ms", every("ours mirrored", "pauses_ms"), 4, at_most=True, over_rounds=percentile_99),
        ),
        "pause_ms", unit="ms", shown_events="pauses_ms", measure=measure_switch, mirrored=True,
    ),
    Row(
        "9n", "the same without a switch", "disk", MIRRORS, (), "pause_ms", unit="ms",
        shown_events="pauses_ms", measure=measure_no_switch, mirrored=True,
    ),
    Row(
        "9i", "pause of a switch, guest idle", "disk", ("ours mirrored",),
        (Target("median ms", every("ours mirrored", "pauses_ms"), 0.2, at_most=True),),
        "pause_ms", unit="ms", shown_events="pauses_ms", measure=measure_idle_switch, mirrored=True,
    ),
)
_COPIES = (
    Row(
        "10", "bulk copy, disk (raw: the best of dd and qemu-img convert)", "disk", (),
        (Target("of the best other", ratio("ours", "raw", "rival", name="mb_per_s"), 1.2),),
        "mb_per_s", "MB/s", alone=measure_copy,
    ),
    Row(
        "10h", "the same, a disk of holes and zeroes", "disk", (),
        (Target("of the best other's full copy", value("ours", "of_full"), 10),),
        "mb_per_s", "MB/s", alone=measure_holes,
    ),
    Row(
        "10p", "guest's write p99, depth 1, while the copy runs: times that without", "disk", (),
        (Target("times", value("ours", "p99_ratio"), 3, at_most=True),),
        "p99_ratio", "times", derived_from="10",
    ),
)
_FOOTPRINT = (
    Row(
        "12", "idle, guest connected, mirror steady: wake-ups of the data plane", "memory",
        ("ours mirrored",),
        (
            # Over all the time that was looked at: a median would pass over a round that woke.
            Target("wake-ups/s", value("ours mirrored", "wakeups_per_s"), 0.5, True, fmean),
            Target("% of a core", value("ours mirrored", "core_percent"), 0.1, True, fmean),
        ),
        "wakeups_per_s", "per second", measure=measure_idle, mirrored=True,
    ),
    Row(
        "13", "memory at a disk of up to 16 TiB (sparse), with a log of 8 MiB", "memory", (),
        (Target("MiB", value("ours mirrored", "rss_mib"), 60, at_most=True, over_rounds=max),),
        "rss_mib", "MiB", alone=measure_sizes,
    ),
)


def _from_rbd(number: str, kind: str) -> Row:
    targets = (Target("of raw", ratio("ours", "raw"), 0.9), Target("of rival", ratio("ours", "rival"), 1))
    title = f"pass-through, source in Ceph RBD, depth 32, {kind} (raw: fio's RBD engine)"
    return Row(number, title, "memory", (), targets, alone=partial(measure_from_rbd, rw=f"rand{kind}"))


_OURS_OF_RAW = ratio("ours mirrored", "raw")
_NETWORK = (
    Row(
        "N1", "mirrored writes, memory, depth 32, to NBD by a Unix socket (raw: libnbd alone)", "memory", (),
        (Target("of raw", _OURS_OF_RAW, 0.9), Target("of rival", ratio("ours mirrored", "rival"), 1.5)),
        alone=measure_mirrored,
    ),
    Row(
        "N2", "the same over TCP with TLS-PSK", "memory", (),
        (Target("of raw", _OURS_OF_RAW, 0.9), Target("of rival", ratio("ours mirrored", "rival"), 1.5)),
        alone=measure_mirrored_tls,
    ),
    Row(
        "N3", f"mirrored, disk, depth 1, to NBD {FAR_MS} ms away: mean latency", "disk", (),
        (Target("of pass-through", ratio("ours mirrored", "ours", name="mean_us"), 1.1, at_most=True),),
        "mean_us", "µs", alone=measure_far,
    ),
    Row(
        "N4", "the same, memory, a flush after every write (raw: one round trip and the flush)", "memory", (),
        (Target("of raw", _OURS_OF_RAW, 1 / 1.3), Target("of rival", ratio("ours mirrored", "rival"), None)),
        alone=measure_far_flushed,
    ),
    Row(
        "N5", "mirrored writes, memory, depth 32, to Ceph RBD (raw: fio's RBD engine)", "memory", (),
        (Target("of raw", _OURS_OF_RAW, 0.9), Target("of rival", ratio("ours mirrored", "rival"), 1)),
        alone=measure_mirrored_to_rbd,
    ),
    Row(
        "N5c", "bulk copy, memory, to Ceph RBD (raw: rbd import)", "memory", (),
        (Target("of raw", ratio("ours", "raw", name="mb_per_s"), 0.9),),
        "mb_per_s", "MB/s", alone=measure_copy_to_rbd,
    ),
    _from_rbd("N6r", "read"),
    _from_rbd("N6w", "write"),
    Row(
        "N7", "bulk copy, memory, to NBD (raw: nbdcopy)", "memory", (),
        (Target("of raw", ratio("ours", "raw", name="mb_per_s"), 0.9),),
        "mb_per_s", "MB/s", alone=measure_copy_to_nbd,
    ),
    Row(
        "N8", "CPU of the data thread a mirrored write, memory, to NBD over TLS", "memory", (),
        (Target("of a local destination's", value("ours mirrored", "of_near"), 1.5, at_most=True),),
        "data_us", "µs", alone=measure_data_thread,
    ),
)


def _limit(number: str, work: Work, kind: str) -> Row:
    """A limit is to be kept to within two percent, whatever the guest's depth."""
    size = "4 KiB" if work.block_bytes == 4096 else "1 MiB"
    what = "requests" if kind == "iops" else "bytes"
    title = f"a limit of {what}, memory, depth {work.depth}, writes of {size}: off by"
    targets = (
        Target("%", value("ours", "off_percent"), 2, at_most=True),
        Target("rival's %", value("rival", "off_percent"), None),
    )
    measure = partial(measure_limit, work=work, kind=kind)
    return Row(number, title, "memory", (), targets, "off_percent", "%", alone=measure)


_LIMITS = tuple(
    _limit(f"L{number}", Work("randwrite", depth, block_bytes), kind)
    for number, (block_bytes, depth, kind) in enumerate(
        product((4096, 1 << 20), (1, 256), ("iops", "bps")), start=1
    )
)
_BY_NUMBER = {row.number: row for row in _SIDE_BY_SIDE}
_CPU = tuple(
    _cpu(_BY_NUMBER[number], contender, bound)
    for number, contender, bound in (
        ("1r", "ours", 5), ("1w", "ours", 5), ("2r", "ours", 2.5), ("2w", "ours", 2.5),
        ("4", "ours mirrored", 8), ("5", "ours mirrored", 6),
    )
)
ROWS = (*_SIDE_BY_SIDE, *_SWITCHES, *_COPIES, *_CPU, *_FOOTPRINT, *_NETWORK, *_LIMITS)


def chosen(names: list[str]) -> tuple[Row, ...]:
    """By number, or by its digits alone; with what they are derived from. KeyError: no such row."""
    found = set()
    for name in names:
        matching = {row.number for row in ROWS if name == row.number or name == _digits(row.number)}
        if not matching:
            raise KeyError(name)
        found |= matching
    found |= {row.derived_from for row in ROWS if row.number in found and row.derived_from}
    return tuple(row for row in ROWS if row.number in found)


def _digits(number: str) -> str:
    return number.partition("/")[0].rstrip("rwmihpnc")
