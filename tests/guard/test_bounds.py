# SPDX-License-Identifier: Apache-2.0
"""A request costs no more than bounds.toml allows. No wall-clock: counts, the same on a busy machine."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.guard.measure import (
    can_trace,
    instructions_per_request,
    kernel_syscalls_per_request,
    least,
    per_request,
)

BOUNDS: dict[str, dict[str, float]] = tomllib.loads(Path(__file__).with_name("bounds.toml").read_text())
WORKS = sorted(BOUNDS["syscalls"])
OF_ONE_THREAD = [work for work in WORKS if not work.endswith("-lent")]


@pytest.mark.alone
@pytest.mark.parametrize("work", WORKS)
def test_a_request_takes_no_more_than_it_may(work: str) -> None:
    bounds = {name: each[work] for name, each in BOUNDS.items() if work in each}
    measured = least(lambda: per_request(work), bounds)
    counted = [name for name in BOUNDS if name in measured]
    assert {"syscalls", "wakeups", "notifications", "allocations"} <= set(counted)
    over = {name: measured[name] for name in counted if measured[name] > BOUNDS[name][work]}
    assert not over, f"{work}: more a request than tests/guard/bounds.toml allows: {over}"


@pytest.mark.alone
@pytest.mark.parametrize("work", WORKS)
def test_the_kernel_counts_no_more_system_calls(work: str, tmp_path: Path) -> None:
    if not can_trace():
        pytest.skip("strace cannot trace here")
    bound = BOUNDS["kernel-syscalls"][work]
    measured = least(lambda: kernel_syscalls_per_request(work, tmp_path), {"kernel-syscalls": bound})
    assert 0 < measured["kernel-syscalls"] <= bound


@pytest.mark.parametrize("work", OF_ONE_THREAD)
def test_a_request_takes_no_more_instructions(work: str, tmp_path: Path) -> None:
    measured = instructions_per_request(work, tmp_path)
    if measured is None:
        pytest.skip("valgrind is not installed")
    assert 100 < measured <= BOUNDS["instructions"][work]


def test_every_bound_names_every_work() -> None:
    for name, each in BOUNDS.items():
        assert sorted(each) == (OF_ONE_THREAD if name == "instructions" else WORKS), name
