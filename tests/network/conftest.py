# SPDX-License-Identifier: Apache-2.0
"""Disks over the network. A test whose package is not there is skipped, with the package's name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.rig import image
from tests.network import ceph_cluster
from tests.network.ceph_cluster import CephCluster
from tests.network.servers import MIBS

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vhostsync._nbd") is not None:
        return
    lacking = pytest.mark.skip(reason="vhostsync was built without libnbd (package libnbd-dev)")
    for item in items:
        if item.path.parent == HERE and "nbd" in item.path.name:
            item.add_marker(lacking)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The guest's."""
    return image(tmp_path / "a.img", MIBS)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """For a server to have: an image of the same size, with nothing in it."""
    return image(tmp_path / "b.img", MIBS, filled_mib=0)


@pytest.fixture(scope="session")
def cluster() -> Iterator[CephCluster]:
    """Of one monitor and one OSD. Tests that use it are of the group `ceph`, so that there is but one; each
    leaves it as healthy as it was."""
    if (why := ceph_cluster.lacking()) is not None:
        pytest.skip(why)
    with CephCluster() as cluster:
        yield cluster
