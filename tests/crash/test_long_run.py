# SPDX-License-Identifier: Apache-2.0
"""Some seconds of the long run (tests/crash/long_run.py), which is for hours."""

from __future__ import annotations

import json

import pytest

from tests.crash.long_run import play

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]


def test_a_short_long_run() -> None:
    figures = play(minutes=0.03, seed=4)
    print(figures.table())
    assert figures.good and json.dumps(figures.as_json()), figures.failure
    assert figures.cycles > 0 and figures.faults.total() > 0 and figures.engine_requests > 0
    assert figures.bytes_verified_on_host > 0 and figures.bytes_verified_in_guest > 0
