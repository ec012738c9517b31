# SPDX-License-Identifier: Apache-2.0
"""What the mirror tells about itself and its copy's progress."""

from collections import deque
from dataclasses import dataclass
from typing import Final

from vhostsync.bad_ranges import BadRanges

RATE_WINDOW_S: Final = 10.0


@dataclass(frozen=True)
class MirrorStatus:
    """What `query-mirror` shows; bytes, milliseconds, bytes per second, seconds. `worth` is what the
    destination is worth if the source were lost now."""

    state: str
    worth: str | None
    source: str
    destination: str | None
    counts: dict[str, int | None]
    lag_bytes: int
    lag_writes: int
    lag_ms: float
    copy_bytes_total: int
    copy_bytes_done: int
    copy_bytes_sparse: int
    differing_bytes: int | None  # what a mirror-start to the same destination would copy; None: everything
    bitmap: str | None  # where that is kept; None: in memory alone
    full_copy_reason: str | None  # why the last copy was of everything
    copy_rate_bytes_per_s: float
    copy_remaining_s: float | None
    speed_bytes_per_s: int
    wanted: bool  # somebody has asked for the mirror and nobody has taken it back: a restart resumes it
    last_error: str | None
    reason: str | None
    doubt: list[dict[str, int]]
    outdated_since: str | None
    different_since: str | None  # a verification has found that the destination differs
    unreadable: list[dict[str, int]]
    reads_from_destination: int
    source_failovers: int
    paused: bool
    paused_requests: int
    paused_s: float
    paused_released: int
    record_error: str | None  # why the state record could not be written when that was last tried
    flushes_fail: bool  # the guest's, until it can


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
