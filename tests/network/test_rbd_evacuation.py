# SPDX-License-Identifier: Apache-2.0
"""`vhostsync evacuate` into a real Ceph pool, and out of it: every disk under its name, with what its guest
wrote meanwhile."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.daemon.evacuated_host import Evacuated, lines_of
from tests.daemon.rig import flush, image, write_block
from tests.network.ceph_cluster import CephCluster
from tests.network.test_rbd import assert_holds

pytestmark = [pytest.mark.xdist_group("ceph"), pytest.mark.timeout(300)]

_numbers = itertools.count()


@pytest.fixture
def host(work: Path, cluster: CephCluster) -> Evacuated:
    host = Evacuated(work)
    host.environment["CEPH_CONF"] = str(cluster.conf)
    return host


@pytest.fixture
def pool(cluster: CephCluster) -> str:
    """A namespace of its own."""
    name = f"rbd/evacuated{next(_numbers)}"
    cluster.rbd("namespace", "create", name)
    return f"rbd:{name}"


def test_disks_are_moved_into_a_pool_and_back(host: Evacuated, pool: str, work: Path) -> None:
    disks = [image(host.old / f"{at}.img", 8, filled_mib=4) for at in range(3)]
    beside = image(work / "beside.img", 4)
    with host.serve_all(*disks, beside), host.guest("vm0") as guest:
        write_block(guest, 1, 7)
        flush(guest)
        plan = json.loads(host.evacuate("--dry-run", "--json", to=pool)[0])["plan"]
        assert [each["destination"] for each in plan] == [f"{pool}/{at}" for at in range(3)]
        out, err = host.evacuate("--switch", "--parallel", "2", "--json", to=pool)
        assert (lines_of(out)[-1], err) == ({"done": 3, "failed": []}, "")
        assert [host.status(f"vm{at}")["disk"] for at in range(3)] == [f"{pool}/{at}" for at in range(3)]
        write_block(guest, 2, 8)
        flush(guest)

        again, _ = host.evacuate("--switch", "--json", to=pool)
        assert lines_of(again)[-1] == {"done": 0, "failed": []}

        out, err = host.evacuate("--switch", "--json", where=pool, to=host.new)
        assert (lines_of(out)[-1], err) == ({"done": 3, "failed": []}, "")
        write_block(guest, 3, 9)
        flush(guest)
        assert host.status("vm3")["disk"] == str(beside)
    moved = [host.new / f"{at}.img" for at in range(3)]
    assert_holds(moved[0], {1: 7, 2: 8, 3: 9})
    for disk, copy in zip(disks[1:], moved[1:], strict=True):
        assert disk.read_bytes() == copy.read_bytes()


def test_an_image_of_others_in_the_pool_is_not_overwritten(
    host: Evacuated, pool: str, cluster: CephCluster, work: Path
) -> None:
    disk = image(host.old / "taken.img", 8, filled_mib=4)
    theirs = image(work / "theirs", 8, filled_mib=1)
    cluster.rbd("import", "--no-progress", str(theirs), f"{pool.removeprefix('rbd:')}/taken")
    with host.serve_all(disk):
        _, err = host.evacuate("--switch", to=pool, code=1)
        assert "taken" in err, err
        assert host.status("vm0")["disk"] == str(disk)
    found = work / "found"
    cluster.rbd("export", "--no-progress", f"{pool.removeprefix('rbd:')}/taken", str(found))
    assert found.read_bytes() == theirs.read_bytes()
