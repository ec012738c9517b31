# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the protocol's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.protocol.desk import Desk
from vhostsync.host.owned_fd import close_all


def open_fds() -> set[str]:
    """The numbers of this process's open descriptors."""
    listed = [entry.name for entry in Path("/proc/self/fd").iterdir()]
    return {name for name in listed if Path("/proc/self/fd", name).is_symlink()}  # not that of the listing


@pytest.fixture
def no_leak() -> Iterator[None]:
    """Fails if the test leaves more descriptors open than it found."""
    before = open_fds()
    yield
    assert open_fds() - before == set()


@pytest.fixture
def desk() -> Iterator[Desk]:
    one = Desk()
    yield one
    one.session.close()
    close_all(one.shared)
