# SPDX-License-Identifier: Apache-2.0
"""Unruly clients of the control socket (tests/fuzz/control.py)."""

import pytest

from tests.fuzz.python_targets import run

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


async def test_conversations_made_from_numbers() -> None:
    """Always the same ones; `./run fuzz` makes others."""
    assert await run("control", 6, 0, lambda seed: None) > 20
