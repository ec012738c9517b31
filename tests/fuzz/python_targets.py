# SPDX-License-Identifier: Apache-2.0
"""Runs what of the fuzzers is Python: python -m tests.fuzz.python_targets sessions|control SECONDS [SEED]

Prints how many conversations there were. A finding ends it with the number that makes the same one again:
python -m tests.fuzz.python_targets sessions 0 SEED.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import anyio
import structlog

from tests.fuzz import control, sessions

TARGETS: dict[str, Any] = {"sessions": sessions, "control": control}


async def run(name: str, seconds: float, first: int, on_seed: Callable[[int], None]) -> int:
    """Conversations until the time is up, one at least; returns how many."""
    target = TARGETS[name]
    until, count = time.monotonic() + seconds, 0
    async with target.bench() as bench:
        while count == 0 or time.monotonic() < until:
            on_seed(first + count)
            await target.play(bench, first + count)
            count += 1
    return count


def main() -> None:
    name, seconds = sys.argv[1], float(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else time.time_ns() % (1 << 40)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    at = [first]
    try:
        count = anyio.run(run, name, seconds, first, lambda seed: at.__setitem__(0, seed))
    except BaseException:
        print(f"finding: python -m tests.fuzz.python_targets {name} 0 {at[0]}", flush=True)
        raise
    print(f"{name}: {count} conversations from {first} on, no finding")


if __name__ == "__main__":
    main()
