# SPDX-License-Identifier: Apache-2.0
"""What the engine shows of itself: its structs of c_shim/shim_api.h as frozen dataclasses.

Made from C structs that engine.py hands over; the binding is not imported here.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final


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


@dataclass(frozen=True)
class QueueStats:
    """struct vs_queue_stats."""

    operations: dict[str, OpStats]
    malformed: int
    kicks: int
    notifications: int
    in_flight: int
    running: bool
    broken: str | None


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


@dataclass(frozen=True)
class Snapshot:
    """struct vs_snapshot and the queues' statistics, of one moment."""

    state: State
    gated: bool
    record_pending: bool
    fenced: int
    write_cache: bool
    active_attachment: int | None
    counts: Counts
    lag_bytes: int
    lag_writes: int
    lag_ns: int
    log_bytes_used: int
    copy_bytes_total: int
    copy_bytes_done: int
    copy_bytes_sparse: int
    differing_bytes: int | None
    bitmap_in_use: bool
    bitmap_syncs: int
    throttled_ns: int
    polled_ns: int
    polls: int
    poll_hits: int
    verify: VerifyProgress
    wakeups: int
    lent_operations: int
    syscalls: int
    requests_waiting: int
    events_lost: int
    doubt: tuple[tuple[int, int], ...]
    spared: tuple[tuple[int, int], ...]  # of these: what the destination holds better
    disks: dict[str, dict[str, OpStats]]
    disks_in_flight: dict[str, int]
    unreadable: tuple[tuple[int, int], ...]
    ahead_drained: bool
    reads_from_destination: int
    source_failovers: int
    failover_pending: bool
    paused: bool
    pause_held: int
    pause_ns: int
    pause_released: int


def ranges_of(c_ranges: Any, count: int) -> tuple[tuple[int, int], ...]:
    """Offset and length of the first `count` of an array of struct vs_range."""
    return tuple((each.offset, each.length) for each in c_ranges[0:count])


def _op_stats(s: Any) -> OpStats:
    return OpStats(s.operations, s.bytes, s.errors, s.latency_ns_total, tuple(s.latency_ns_log2))


def queue_stats_of(s: Any) -> QueueStats:
    """From a struct vs_queue_stats."""
    return QueueStats(
        operations={name: _op_stats(s.op[i]) for i, name in enumerate(REQUEST_OPS)},
        malformed=s.malformed,
        kicks=s.kicks,
        notifications=s.notifications,
        in_flight=s.in_flight,
        running=bool(s.running),
        broken=BREACHES[s.broken] if s.broken else None,
    )


def snapshot_of(s: Any, no_attachment: int) -> Snapshot:
    """From a struct vs_snapshot."""
    c = s.counts
    return Snapshot(
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
        lag_bytes=s.lag_bytes,
        lag_writes=s.lag_writes,
        lag_ns=s.lag_ns,
        log_bytes_used=s.log_bytes_used,
        copy_bytes_total=s.copy_bytes_total,
        copy_bytes_done=s.copy_bytes_done,
        copy_bytes_sparse=s.copy_bytes_sparse,
        bitmap_in_use=bool(s.bitmap_in_use),
        bitmap_syncs=s.bitmap_syncs,
        differing_bytes=s.differing_bytes if s.tracked else None,
        throttled_ns=s.throttled_ns,
        polled_ns=s.polled_ns,
        polls=s.polls,
        poll_hits=s.poll_hits,
        verify=VerifyProgress(
            running=bool(s.verify_running),
            bytes_done=s.verify_bytes_done,
            bytes_skipped=s.verify_bytes_skipped,
            bytes_differing=s.verify_bytes_differing,
            bytes_repaired=s.verify_bytes_repaired,
            differing=ranges_of(s.verify_ranges, s.verify_range_count),
        ),
        wakeups=s.wakeups,
        lent_operations=s.lent,
        syscalls=s.syscalls,
        requests_waiting=s.requests_waiting,
        events_lost=s.events_lost,
        doubt=ranges_of(s.doubt, s.doubt_count),
        spared=ranges_of(s.spared, s.spared_count),
        disks={
            role: {name: _op_stats(s.disk[r].op[i]) for i, name in enumerate(DISK_OPS)}
            for r, role in enumerate(ROLES)
        },
        disks_in_flight={role: s.disk[r].in_flight for r, role in enumerate(ROLES)},
        unreadable=ranges_of(s.unreadable, s.unreadable_count),
        ahead_drained=bool(s.ahead_drained),
        reads_from_destination=s.reads_from_destination,
        source_failovers=s.source_failovers,
        failover_pending=bool(s.failover_pending),
        paused=bool(s.paused),
        pause_held=s.pause_held,
        pause_ns=s.pause_ns,
        pause_released=s.pause_released,
    )
