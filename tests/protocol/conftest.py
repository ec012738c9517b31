# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the protocol's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.rig import await_true
from tests.protocol.desk import Desk
from vhostsync.host.owned_fd import close_all


def open_fds() -> set[str]:
    """The numbers of this process's open descriptors."""
    listed = [entry.name for entry in Path("/proc/self/fd").iterdir()]
    return {name for name in listed if Path("/proc/self/fd", name).is_symlink()}  # not that of the listing


@pytest.fixture
def no_leak() -> Iterator[None]:
    """Fails if the test leaves more descriptors open than it found. What a frontend has sent is closed in a
    thread that nobody waits for (foreign_fd.py), so a little time is given."""
    before = open_fds()
    yield
    await_true(lambda: open_fds() <= before, "all descriptors are closed")


@pytest.fixture
def desk() -> Iterator[Desk]:
    one = Desk()
    yield one
    one.session.close()
    close_all(one.shared)
