# SPDX-License-Identifier: Apache-2.0
"""Deadlines move by the time for which the process did not run."""

from __future__ import annotations

import time

import anyio
import pytest

from vhostsync.host import patience

pytestmark = pytest.mark.anyio


async def test_time_that_was_not_lived_through_does_not_count() -> None:
    with patience.fail_after(2.0) as scope:
        await anyio.sleep(0)
        time.sleep(2.5)
        await anyio.sleep(0.01)
        assert scope.deadline > anyio.current_time() + 1.0
    assert not scope.cancel_called


async def test_time_that_passes_does() -> None:
    with pytest.raises(TimeoutError), patience.fail_after(0.3):
        await anyio.sleep_forever()
