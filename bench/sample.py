# SPDX-License-Identifier: Apache-2.0
"""What is asked of a contender, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class BenchError(Exception):
    """One sentence: what is missing or went wrong."""


@dataclass(frozen=True)
class Work:
    """What is asked of a contender."""

    rw: str
    depth: int
    block_bytes: int = 4096
    flush_every: int = 0
    queues: int = 1
    poll: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Sample:
    """Of one measurement. Figures carry their unit in the name: per_s (requests without flushes), mean_us,
    p99_us, cpu_us (of the backend, a request), pause_ms, …"""

    figures: Mapping[str, float]
    detail: Mapping[str, Any] = field(default_factory=dict)


# One round: contender -> sample.
Round = dict[str, Sample]


def amount(number: float) -> str:
    if number >= 100_000:
        return f"{number / 1000:.0f}k"
    if number >= 10_000:
        return f"{number / 1000:.1f}k"
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"
