# SPDX-License-Identifier: Apache-2.0
"""What an engine is told in a test: members of struct vs_engine_config, times as the options have them."""

from __future__ import annotations

_TO_MICROSECONDS = {"_s": 1_000_000, "_ms": 1000}


def engine_options(**options: float) -> dict[str, int]:
    """`stop_timeout_s=0.2` becomes `stop_timeout_us`, `max_lag_ms` `max_lag_us`; all else keeps its name."""
    told = {
        "log_bytes": 8 << 20, "destination_timeout_s": 10.0, "stop_timeout_s": 1.0, "max_lag_ms": 500,
        "checkpoint_s": 3.0, "ahead_backoff_s": 1.0, "dirty_region_bytes": 65536, "copy_depth": 4,
        "writeback": 1, "threads": 1,
    } | options  # fmt: skip
    members = {}
    for name, value in told.items():
        for end, factor in _TO_MICROSECONDS.items():
            if name.endswith(end):
                name, value = name.removesuffix(end) + "_us", value * factor
        members[name] = int(value)
    return members
