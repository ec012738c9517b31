# SPDX-License-Identifier: Apache-2.0
"""A pool that keeps three copies, on three OSDs: one of them may die at any time, and the guest goes on with
the other two. Nobody hears of it but `ceph health`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, image, same_content
from tests.network import ceph_cluster
from tests.network.ceph_cluster import CephCluster
from tests.network.test_rbd import BLOCKS, SIZE_MIB, assert_holds, exported
from tests.sizes import GIB

pytestmark = [pytest.mark.xdist_group("ceph"), pytest.mark.timeout(300)]

PATIENCE = ("--destination-timeout", "60s", "--max-lag-ms", "60000")


@pytest.fixture(scope="module")
def three() -> Iterator[CephCluster]:
    if (why := ceph_cluster.lacking()) is not None:
        pytest.skip(why)
    with CephCluster(3, store_bytes=2 * GIB) as cluster:
        yield cluster


@pytest.mark.parametrize("role", ["destination", "source"])
def test_one_of_three_dies_and_comes_back(work: Path, three: CephCluster, role: str) -> None:
    """Its requests are held up until the cluster has noticed, for some seconds."""
    name = f"rbd:rbd/{role}"
    three.rbd("create", name.removeprefix("rbd:"), "--size", f"{SIZE_MIB}M")
    file = image(work / "a.img", SIZE_MIB, filled_mib=0)
    disk, other = (file, name) if role == "destination" else (name, file)
    with Served(work, disk, "--ceph-conf", three.conf, *PATIENCE) as served:
        served.start_mirror(other)
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.qmp.events.clear()
            with three.osd_killed(three.osds[1]):
                load.go_on(timeout_s=120)
                assert three.status()["num_up_osds"] == 2
                load.go_on(timeout_s=60)
            load.go_on(timeout_s=60)
            expected = load.stop()
        assert served.state == "steady"
        assert not [each for each in served.qmp.events if each["event"] == "MIRROR_STATE_CHANGE"]
        served.stop()
    assert_holds(file, expected)
    assert same_content(file, exported(three, name, work))
