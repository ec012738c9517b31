# SPDX-License-Identifier: Apache-2.0
"""A guest that moves while its disk is an image of a Ceph cluster. Two QEMUs share one backend, which keeps
the lock; two backends never share the image: the second one has it when the first has let go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.rig import Served, block_of, flush, refused_start, write_block
from tests.guest.assets import GuestAssets
from tests.guest.backends import Vhostsync, storage_daemon_wanted
from tests.guest.harness import Guest, GuestDisk, GuestOptions, machine_command, verify_blocks
from tests.guest.images import new_image
from tests.guest.migration import Migration
from tests.network.ceph_cluster import CephCluster
from tests.network.test_rbd import SIZE_MIB, assert_holds, exported, folder, name
from tests.vhost_client import VhostUserTransport

__all__ = ["folder", "name"]  # fixtures

pytestmark = [pytest.mark.xdist_group("ceph")]


def locks(cluster: CephCluster, name: str) -> list[str]:
    """The clients that have the lock."""
    found: list[dict[str, Any]] = json.loads(
        cluster.rbd("lock", "ls", name.removeprefix("rbd:"), "--format", "json")
    )
    return [each["locker"] for each in found]


@pytest.mark.timeout(180)
def test_the_next_backend_has_the_lock_when_the_first_has_let_go(
    folder: Path, cluster: CephCluster, name: str
) -> None:
    """As two hosts do it that share nothing but the image: the guest stops here, and goes on there."""
    cluster.rbd("create", name.removeprefix("rbd:"), "--size", f"{SIZE_MIB}M")
    hosts = [folder / "one", folder / "other"]
    for host in hosts:
        host.mkdir()
    with Served(hosts[0], name) as here, here.guest(timeout_s=60) as guest:
        write_block(guest, 1, 1)
        flush(guest)
        [owner] = locks(cluster, name)
        code, said = refused_start(
            "serve", "--blk-file", name, "--socket-path", hosts[1] / "vm.sock",
            env={"STATE_DIRECTORY": str(hosts[1] / "state")},
        )  # fmt: skip
        assert code == 1 and f"{name} is in use" in said
        write_block(guest, 2, 2)  # which has disturbed nobody
        guest.stop()
        here.stop()
        assert locks(cluster, name) == []
        with Served(hosts[1], name) as there:
            left, guest.transport = guest.transport, VhostUserTransport(there.socket, timeout_s=60)
            left.close()
            guest.start()
            assert guest.read_now(2 * 4096, 4096) == block_of(2, 2)
            write_block(guest, 3, 3)
            flush(guest)
            [successor] = locks(cluster, name)
            assert successor != owner
            guest.close()
            there.stop()
    assert_holds(exported(cluster, name, folder), {1: 1, 2: 2, 3: 3})


@pytest.mark.guest
@pytest.mark.timeout(600)
@pytest.mark.skipif(storage_daemon_wanted(), reason="it has no RBD here")
def test_two_qemus_on_the_backend_of_an_image_under_load(
    assets: GuestAssets, folder: Path, cluster: CephCluster, name: str
) -> None:
    """The guest is on the image, which is mirrored to a file, and writes all the way."""
    cluster.rbd("create", name.removeprefix("rbd:"), "--size", "64M")
    back = new_image(folder / "back.img", 64)
    with Vhostsync(folder, Path(name), queues=2) as backend:
        machine = machine_command([GuestDisk(backend.socket, queues=2)], GuestOptions(memory_mib=256))
        with Guest(assets, folder, machine, name="home") as guest:
            load = guest.start_load("/dev/vda", blocks=4096, threads=4)
            load.next_report()
            backend.start_mirror(back)
            backend.wait_steady()
            [owner] = locks(cluster, name)
            with Migration(guest, machine, "away") as migration:
                assert backend.qmp.execute("query-status")["frontends"] == 2
                migration.begin()
                before = load.fresh_report()
                figures = migration.complete()
            print(f"to the other QEMU: {figures}")
            while load.fresh_report().synced <= before.issued:
                pass  # each is a newer one; that the load stands still is an error
            assert locks(cluster, name) == [owner], "the backend is the same, and so is its lock"
            assert backend.qmp.execute("query-mirror")["state"] == "steady"
            last = guest.stop_load(load)
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()
    for image in (back, exported(cluster, name, folder)):
        verify_blocks(assets, image, load, synced=last.synced, issued=last.issued)
