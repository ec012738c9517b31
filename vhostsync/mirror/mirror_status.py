# SPDX-License-Identifier: Apache-2.0
"""What the mirror tells about itself and its copy's progress."""

from collections import deque
from dataclasses import dataclass
from typing import Final

from vhostsync.engine.snapshot import MirrorFigures
from vhostsync.mirror.bad_ranges import BadRanges
from vhostsync.statistic import Metric, statistic

RATE_WINDOW_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class MirrorStatus(MirrorFigures):
    """What `query-mirror` shows; bytes, milliseconds, bytes per second, seconds. `worth` is what the
    destination is worth if the source were lost now."""

    state: str = statistic(
        "`passthrough` (no destination), `syncing` (copying), `steady`, `ahead`, `degraded`"
    )
    worth: str | None = statistic(
        "of the destination, or of the last one: `up-to-date`, `outdated`, `inconsistent`; null if there was "
        "none"
    )
    source: str = statistic("its path")
    destination: str | None = statistic(
        "its path; the last one's where there is none now, null if there was none"
    )
    counts: dict[str, int | None] = statistic(
        "`source-generation`, `source-flushed`, `writes-mirrored`, `flush-request`, `writes-flushed` "
        "(durability.md); null where undefined"
    )
    bitmap: str | None = statistic(
        "the file of `--bitmap`; null: what differs is known as long as this process lives"
    )
    bitmap_failed: bool = statistic(
        "true: the file of `--bitmap` could not be written, so a restart copies everything",
        Metric("bitmap_failed", "gauge",
               "1 if the file of --bitmap could not be written: a restart copies everything."),
    )  # fmt: skip
    full_copy_reason: str | None = statistic(
        "why the last copy was of everything; null: it was of what differed"
    )
    copy_rate_bytes_per_s: float = statistic("the copy's recent rate")
    copy_remaining_s: float | None = statistic("an estimate; null: not known")
    speed_bytes_per_s: int = statistic("the copy's limit; 0: none")
    wanted: bool = statistic(
        "`mirror-start` has asked for the mirror, and neither `mirror-cancel` nor a switch without "
        "`keep-mirror` has ended it: a restart resumes it"
    )
    last_error: str | None = statistic("of the last failure; or null")
    reason: str | None = statistic("of the last change of state; or null")
    doubt: list[dict[str, int]] = statistic(
        "ranges of the source (`offset`, `length`, bytes) whose content is in doubt after failed writes; "
        "they stand in the way of a switch",
        Metric("doubt_ranges", "gauge", "Ranges of the source in doubt.", len),
    )
    unreadable: list[dict[str, int]] = statistic(
        "the same, of the ranges that the copy could not read: the destination lacks them until the guest "
        "writes there",
        Metric("unreadable_ranges", "gauge", "Ranges of the source that the copy could not read.", len),
    )
    outdated_since: str | None = statistic("ISO time (or in words, after a restart), or null")
    different_since: str | None = statistic(
        "since when a verification is known to have found the destination different (ISO time); a switch is "
        "refused. Null: none has, or it was repaired, verified equal, or copied anew",
        Metric("different", "gauge", "1 if a verification has found that the destination differs.", bool, 0),
    )
    record_error: str | None = statistic(
        "why the state record could not be written when that was last tried; null: it was written",
        Metric("record_unwritable", "gauge",
               "1 while the state record cannot be written, when that was last tried.", bool, 0),
    )  # fmt: skip
    fence: str | None = statistic(
        "what has to make it certain that requests of a lost connection are over before the destination is "
        "attached again: `hand` (`mirror-start` with `fenced`), `limit` or `command`; null: nothing",
        Metric("fence_awaited", "gauge",
               "1 while the destination waits for what fences it after a lost connection.", bool, 0),
    )  # fmt: skip
    flushes_fail: bool = statistic(
        "true: the guest's flushes fail until the record can be written (a `steady` destination was lost)",
        Metric("flushes_fail", "gauge", "1 while flushes fail because of that."),
    )


@dataclass(frozen=True)
class SwitchResult:
    """`pause_us`: for how long no request of the guest was taken up; `attempts` counts gates closed;
    `accepted`: the ranges in doubt or unreadable that did not stop it."""

    pause_us: int
    attempts: int
    source_path: str
    destination_path: str | None
    accepted: dict[str, list[dict[str, int]]]


@dataclass(frozen=True)
class Opened:
    """What became of one disk of a group. `pause_us`: for how long no request of the guest was taken up;
    `opened_ns` (CLOCK_MONOTONIC): until when, so that a coordinator on this host knows it of all.
    `destination_path`: of a snapshot, what was let go."""

    pause_us: int
    opened_ns: int
    source_path: str
    destination_path: str | None


@dataclass(frozen=True)
class SwitchPlan:
    """How a switch is to be tried."""

    max_pause_ms: float
    keep_mirror: bool = False
    accept_unreadable: bool = False
    accept_different: bool = False


@dataclass(frozen=True)
class Switched:
    """A try that has succeeded."""

    pause_ns: int
    accepted: BadRanges


class CopyRate:
    """Bytes per second over the last RATE_WINDOW_S of a copy."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def clear(self) -> None:
        self._samples.clear()

    def add(self, now_s: float, bytes_done: int) -> None:
        self._samples.append((now_s, bytes_done))
        while now_s - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()

    def bytes_per_s(self) -> float:
        """0.0 while unknown."""
        if len(self._samples) < 2:
            return 0.0
        (begin_s, begin), (end_s, end) = self._samples[0], self._samples[-1]
        return (end - begin) / (end_s - begin_s) if end_s > begin_s else 0.0
