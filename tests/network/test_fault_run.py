# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to the second disk of a guest at work, and whenever, nothing is lost: servers killed
(which makes them forget what was not flushed), stopped and restarted, connections cut by resets and by
silence, certificates expired, `receive` and the backend killed, a Ceph cluster that stops, dies, is full or
shuts its client out; during copy, steady, switch, verification and growth.

VHOSTSYNC_NETWORK_FAULTS_S=3600 runs for an hour in all; what happened is printed (-s)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.rig import Served, image
from tests.guest.assets import GuestAssets
from tests.network.ceph_cluster import CephCluster
from tests.network.fault_guests import Client, FaultGuest, Linux
from tests.network.fault_places import CephPlace, NbdPlace, Place, ReceivePlace
from tests.network.fault_run import FaultRun
from tests.network.servers import needs

RUNS = 3
RUN_S = float(os.environ.get("VHOSTSYNC_NETWORK_FAULTS_S", "60")) / RUNS
SEED = int(os.environ.get("VHOSTSYNC_NETWORK_FAULTS_SEED", "1"))
MIBS = 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(RUN_S + 400)]


def nothing_is_lost(folder: Path, place: Place, make_guest: Callable[[Served], FaultGuest]) -> None:
    disk = image(folder / "a.img", MIBS)
    with place:
        report = FaultRun(folder, disk, place, make_guest, SEED).run(RUN_S)
    print(f"\n{type(place).__name__}, seed {SEED}: {report}")
    assert not (report.losses or report.errors or report.leaks), report
    assert report.faults  # how many is the machine's affair


def test_of_an_nbd_server_behind_its_fence(work: Path) -> None:
    needs("certtool")
    nothing_is_lost(work, NbdPlace(work, MIBS), Client)


def test_of_a_receiver_with_a_real_guest_whose_backend_is_killed_too(work: Path, assets: GuestAssets) -> None:
    needs("certtool", "qemu-nbd")
    nothing_is_lost(work, ReceivePlace(work, MIBS), lambda served: Linux(served, assets, work))


@pytest.mark.xdist_group("ceph")
def test_of_a_ceph_cluster(work: Path, cluster: CephCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CEPH_CONF", str(cluster.conf))
    nothing_is_lost(work, CephPlace(work, cluster), Client)
