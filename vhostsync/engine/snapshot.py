# SPDX-License-Identifier: Apache-2.0
"""What the engine shows of itself: its structs of c_shim/shim_figures.h as frozen dataclasses.

Made from C structs that engine.py hands over; the binding is not imported here.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from vhostsync.statistic import Metric, from_engine, milliseconds, of_milliseconds, seconds, statistic


class State(IntEnum):
    """enum vs_mirror_state (engine.py compares)."""

    PASSTHROUGH = 0
    SYNCING = 1
    STEADY = 2
    AHEAD = 3
    DEGRADED = 4


BREACHES: Final = (
    "",
    "its rings lie outside the guest's memory",
    "its available index jumped",
    "a head is no descriptor",
    "a descriptor chain loops or leaves its table",
    "an indirect table has a bad length or address",
    "a request has no byte for its status",
)
"""Why a queue is broken, by enum vs_breach."""
ROLES: Final = ("source", "destination")
DISK_OPS: Final = ("read", "write", "flush", "zero")
REQUEST_OPS: Final = ("read", "write", "flush", "discard", "write-zeroes", "other")


@dataclass(frozen=True)
class OpStats:
    """struct vs_op_stats: latencies in nanoseconds, the histogram by powers of two."""

    operations: int
    bytes: int
    errors: int
    latency_ns_total: int
    latency_ns_log2: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class QueueFigures:
    """Of struct vs_queue_stats, what query-stats shows of a queue; `broken` says why, for people."""

    running: bool = statistic(
        "true while the guest's driver uses the queue",
        Metric("queue_running", "gauge", "1 while the guest's driver uses the queue."),
        member="running", of=bool,
    )
    broken: str | None = statistic(
        "null, or why the queue was given up",
        Metric("queue_broken", "gauge", "1 if the queue was given up because of what the guest put there.",
               bool, 0),
        member="broken", of=lambda breach: BREACHES[breach] or None,
    )
    in_flight: int = statistic(
        "requests taken up and not answered",
        Metric("queue_in_flight", "gauge", "Requests taken up and not answered."), member="in_flight",
    )
    malformed: int = statistic(
        "requests that were malformed",
        Metric("queue_malformed_total", "counter", "Requests that were malformed."), member="malformed",
    )
    kicks: int = statistic(
        "kicks by the guest", Metric("queue_kicks_total", "counter", "Kicks by the guest."), member="kicks"
    )
    notifications: int = statistic(
        "notifications to the guest",
        Metric("queue_notifications_total", "counter", "Notifications to the guest."), member="notifications",
    )


@dataclass(frozen=True, kw_only=True)
class QueueStats(QueueFigures):
    """struct vs_queue_stats."""

    operations: dict[str, OpStats]


@dataclass(frozen=True)
class Counts:
    """struct vs_counts (docs/durability.md). M and F are None outside the steady state."""

    source_generation: int
    source_flushed: int | None
    flush_request: int
    writes_mirrored: int | None
    writes_flushed: int | None


@dataclass(frozen=True)
class VerifyProgress:
    """Of the last verification; bytes. `differing`: offset and length of each range."""

    running: bool
    bytes_done: int
    bytes_skipped: int
    bytes_differing: int
    bytes_repaired: int
    differing: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class MirrorFigures:
    """Of struct vs_snapshot, what query-mirror shows; its units are in the names."""

    lag_bytes: int = statistic(
        "how far the destination is behind",
        Metric("lag_bytes", "gauge", "Bytes that the destination is behind."), member="lag_bytes",
    )
    lag_writes: int = statistic(
        "the same in writes",
        Metric("lag_writes", "gauge", "Writes that the destination is behind."), member="lag_writes",
    )
    lag_ms: float = statistic(
        "the age of the oldest write on its way",
        Metric("lag_seconds", "gauge", "Age of the oldest write not mirrored.", of_milliseconds),
        member="lag_ns", of=milliseconds,
    )
    copy_bytes_total: int = statistic(
        "what the copy has to go through",
        Metric("copy_bytes", "gauge", "Bytes that the copy has to go through."), member="copy_bytes_total",
    )
    copy_bytes_done: int = statistic(
        "of these: what the copy has dealt with",
        Metric("copy_done_bytes", "gauge", "Bytes that the copy has dealt with."), member="copy_bytes_done",
    )
    copy_bytes_sparse: int = statistic(
        "of those done: holes and zeroes",
        Metric("copy_sparse_bytes", "gauge", "Of those, holes and zeroes."), member="copy_bytes_sparse",
    )
    differing_bytes: int | None = statistic(
        "where source and destination may differ: what a `mirror-start` to it would copy; null: no "
        "destination is known",
        Metric("differing_bytes", "gauge", "Bytes that a catch-up or a new start would copy."),
        member="differing_bytes",
    )
    reads_from_destination: int = statistic(
        "guest reads that the source failed and the destination answered (`--read-fallback`), since the "
        "start",
        Metric("reads_from_destination_total", "counter",
               "Guest reads that the source failed and the destination answered."),
        member="reads_from_destination",
    )  # fmt: skip
    source_failovers: int = statistic(
        "switches from a source that had failed (`--on-source-error switch`), since the start",
        Metric("source_failovers_total", "counter", "Failures of the source that were answered by a switch."),
        member="source_failovers",
    )
    paused: bool = statistic(
        "true: a steady destination was lost under `--on-destination-error pause`, and flushes wait for a "
        "mirror or `mirror-cancel`",
        Metric("paused", "gauge", "1 while flushes wait for a mirror."), member="paused", of=bool,
    )
    paused_requests: int = statistic(
        "how many flushes and write-through writes that holds now",
        Metric("paused_requests", "gauge", "Requests that wait for it."), member="pause_held",
    )
    paused_s: float = statistic(
        "for how long it has lasted; 0: there is none", member="pause_ns", of=seconds
    )
    paused_released: int = statistic(
        "requests of a pause that were confirmed by the source alone, because the frontend could not wait, "
        "since the start",
        Metric("paused_released_total", "counter", "Requests that could not wait, because a frontend did."),
        member="pause_released",
    )


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """Of struct vs_snapshot, what query-stats shows of the engine."""

    lent_operations: int = statistic(
        "disk operations that threads beside the data thread have done",
        Metric("engine_lent_operations_total", "counter",
               "Disk operations that threads beside the engine's have done (--threads)."),
        member="lent",
    )  # fmt: skip
    wakeups: int = statistic(
        "wake-ups of the data thread",
        Metric("engine_wakeups_total", "counter", "Wake-ups of the engine's thread."), member="wakeups",
    )
    syscalls: int = statistic(
        "system calls of the engine",
        Metric("engine_syscalls_total", "counter", "System calls of the engine."), member="syscalls",
    )
    throttled_ms: float = statistic(
        "how long guest writes waited for room in the log",
        Metric("throttled_seconds_total", "counter", "How long guest writes waited for room in the log.",
               of_milliseconds),
        member="throttled_ns", of=milliseconds,
    )  # fmt: skip
    limited_requests: int = statistic(
        "guest requests that a limit has made wait at the head of their ring",
        Metric("limited_requests_total", "counter", "Guest requests that a limit has made wait."),
        member="limited_requests",
    )
    limited_bytes: int = statistic(
        "bytes of these",
        Metric("limited_bytes_total", "counter", "Bytes of guest requests that a limit has made wait."),
        member="limited_bytes",
    )
    limited_ms: float = statistic(
        "how long a limit has made some ring wait",
        Metric("limited_seconds_total", "counter", "How long a limit has made some ring of the guest wait.",
               of_milliseconds),
        member="limited_ns", of=milliseconds,
    )  # fmt: skip
    polls: int = statistic("how often the data thread looked for work before it slept", member="polls")
    poll_hits: int = statistic("of these: something came", member="poll_hits")
    polled_ms: float = statistic(
        "time spent so",
        Metric("engine_polled_seconds_total", "counter",
               "How long the engine's thread looked for work before it slept.", of_milliseconds),
        member="polled_ns", of=milliseconds,
    )  # fmt: skip
    events_lost: int = statistic(
        "events that the engine dropped",
        Metric("engine_events_lost_total", "counter", "Events that the engine dropped."),
        member="events_lost",
    )
    log_bytes_used: int = statistic(
        "bytes in the replication log",
        Metric("log_used_bytes", "gauge", "Bytes in the replication log."), member="log_bytes_used",
    )
    requests_waiting: int = statistic(
        "flushes and write-through writes that wait for a disk", member="requests_waiting"
    )
    bitmap_flushes: int = statistic("flushes of the bitmap's file", member="bitmap_syncs")


@dataclass(frozen=True, kw_only=True)
class Snapshot(MirrorFigures, EngineFigures):
    """struct vs_snapshot, of one moment."""

    state: State
    gated: bool
    record_pending: bool
    fenced: int
    write_cache: bool
    active_attachment: int | None
    counts: Counts
    bitmap_in_use: bool
    verify: VerifyProgress
    doubt: tuple[tuple[int, int], ...]
    spared: tuple[tuple[int, int], ...]  # of these: what the destination holds better
    unreadable: tuple[tuple[int, int], ...]
    disks: dict[str, dict[str, OpStats]]
    disks_in_flight: dict[str, int]
    ahead_drained: bool
    failover_pending: bool


def ranges_of(c_ranges: Any, count: int) -> tuple[tuple[int, int], ...]:
    """Offset and length of the first `count` of an array of struct vs_range."""
    return tuple((each.offset, each.length) for each in c_ranges[0:count])


def _op_stats(s: Any) -> OpStats:
    return OpStats(s.operations, s.bytes, s.errors, s.latency_ns_total, tuple(s.latency_ns_log2))


def queue_stats_of(s: Any) -> QueueStats:
    """From a struct vs_queue_stats."""
    operations = {name: _op_stats(s.op[i]) for i, name in enumerate(REQUEST_OPS)}
    return QueueStats(operations=operations, **from_engine(QueueFigures, s))


def snapshot_of(s: Any, no_attachment: int) -> Snapshot:
    """From a struct vs_snapshot."""
    c = s.counts
    figures = from_engine(Snapshot, s)
    if not s.tracked:
        figures["differing_bytes"] = None
    return Snapshot(
        **figures,
        state=State(s.mirror_state),
        gated=bool(s.gated),
        record_pending=bool(s.record_pending),
        fenced=s.fenced,
        write_cache=bool(s.write_cache),
        active_attachment=None if s.active_attachment == no_attachment else s.active_attachment,
        counts=Counts(
            source_generation=c.source_generation,
            source_flushed=c.source_flushed if c.source_flush_known else None,
            flush_request=c.flush_request,
            writes_mirrored=c.writes_mirrored if c.mirrored_known else None,
            writes_flushed=c.writes_flushed if c.mirrored_known else None,
        ),
        bitmap_in_use=bool(s.bitmap_in_use),
        verify=VerifyProgress(
            running=bool(s.verify_running),
            bytes_done=s.verify_bytes_done,
            bytes_skipped=s.verify_bytes_skipped,
            bytes_differing=s.verify_bytes_differing,
            bytes_repaired=s.verify_bytes_repaired,
            differing=ranges_of(s.verify_ranges, s.verify_range_count),
        ),
        doubt=ranges_of(s.doubt, s.doubt_count),
        spared=ranges_of(s.spared, s.spared_count),
        unreadable=ranges_of(s.unreadable, s.unreadable_count),
        disks={
            role: {name: _op_stats(s.disk[r].op[i]) for i, name in enumerate(DISK_OPS)}
            for r, role in enumerate(ROLES)
        },
        disks_in_flight={role: s.disk[r].in_flight for r, role in enumerate(ROLES)},
        ahead_drained=bool(s.ahead_drained),
        failover_pending=bool(s.failover_pending),
    )
