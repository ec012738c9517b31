# SPDX-License-Identifier: Apache-2.0
"""What `serve` is told reaches the engine: every option that names a member of struct vs_engine_config."""

from pathlib import Path
from typing import Any

import pytest

from vhostsync.config import POLL_AUTO, ServeConfig
from vhostsync.engine.engine import EngineConfig
from vhostsync.option import options_of

GIVEN: dict[str, tuple[Any, int]] = {
    "read_only": (True, 1),
    "num_queues": (7, 7),
    "write_cache": (False, 0),
    "poll_us": (50, 50),
    "threads": (3, 3),
    "log_bytes": (16 << 20, 16 << 20),
    "max_lag_ms": (250, 250_000),
    "on_congestion": ("pull-ahead", 1),
    "congestion_fill_bytes": (2 << 20, 2 << 20),
    "destination_timeout_s": (2.5, 2_500_000),
    "stop_timeout_s": (0.5, 500_000),
    "on_destination_error": ("pause", 1),
    "copy_depth": (4, 4),
    "read_fallback": (True, 1),
    "on_source_error": ("switch", 1),
}


def told(**given: Any) -> Any:
    config = ServeConfig(blk_file="/a.img", socket_path=Path("/run/s"), **given)
    return EngineConfig(1 << 30, 512, config.num_queues, config.for_engine()).to_c()


def test_every_option_of_the_engine_is_in_this_table() -> None:
    assert {each.name for each, declared in options_of(ServeConfig) if declared.engine} == GIVEN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_it_reaches_the_engine_in_the_engine_s_unit(name: str) -> None:
    member = next(declared.engine for each, declared in options_of(ServeConfig) if each.name == name)
    value, expected = GIVEN[name]
    more = {"on_congestion": "pull-ahead"} if name == "congestion_fill_bytes" else {}
    assert getattr(told(**{name: value, **more}), member or "") == expected


def test_what_is_not_given_has_its_default_there_too() -> None:
    made = told()
    assert (made.poll_us, made.congestion_fill_bytes, made.writeback) == (POLL_AUTO, 56 << 20, 1)


def test_an_option_that_the_engine_does_not_know_is_an_error() -> None:
    with pytest.raises(AttributeError):
        EngineConfig(1 << 30, 512, 1, {"no_such_member": 1}).to_c()
