# SPDX-License-Identifier: Apache-2.0
"""What becomes of a guest when the Ceph cluster of one of its disks fails: each failure with the outcome that
is required. The guest waits no longer than was promised, nothing that it has flushed is lost."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, await_true, flush, image, refused_start, same_content, write_block
from tests.network.ceph_cluster import CephCluster
from tests.network.test_rbd import BLOCKS, SIZE_MIB, assert_holds, exported, folder, name
from vhostsync.storage.ceph_client import CALL_S

__all__ = ["folder", "name"]  # fixtures

pytestmark = [pytest.mark.xdist_group("ceph"), pytest.mark.timeout(180)]

TIMEOUT_S = 1.0
SLACK_S = 5.0  # of a loaded machine
Failure = Callable[[CephCluster], AbstractContextManager[None]]


@pytest.mark.parametrize(
    "failure",
    [CephCluster.osds_stopped, CephCluster.osds_killed, CephCluster.full],
    ids=["stop", "kill", "full"],
)
def test_a_destination_whose_cluster_does_not_answer_is_given_up_and_comes_back(
    folder: Path, cluster: CephCluster, name: str, failure: Failure
) -> None:
    file = image(folder / "a.img", SIZE_MIB)
    with Served(folder, file, "--destination-timeout", f"{TIMEOUT_S:g}s") as served:
        served.start_mirror(name, create=True)
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            with failure(cluster):
                served.await_state("degraded")
                load.go_on()
                assert load.longest_round_s < TIMEOUT_S + SLACK_S
                record = served.record()
                assert record is not None and record.current.path == str(file)
            served.await_resumed()  # by itself: what librbd still had under way is over
            load.go_on()
            expected = load.stop()
        served.stop()
    assert_holds(file, expected)
    assert same_content(file, exported(cluster, name, folder))


def test_a_backend_ends_although_its_destination_does_not_answer(
    folder: Path, cluster: CephCluster, name: str
) -> None:
    file = image(folder / "a.img", SIZE_MIB)
    with Served(folder, file, "--destination-timeout", f"{TIMEOUT_S:g}s") as served:
        served.start_mirror(name, create=True)
        with served.guest() as guest, cluster.osds_stopped():
            write_block(guest, 1, 1)
            flush(guest)
            served.await_state("degraded")
            assert served.stop(60) < 30


@pytest.mark.parametrize("failure", [CephCluster.osds_stopped, CephCluster.osds_killed], ids=["stop", "kill"])
def test_a_guest_on_the_cluster_waits_for_it_and_sees_no_error(
    folder: Path, cluster: CephCluster, name: str, failure: Failure
) -> None:
    cluster.rbd("create", name.removeprefix("rbd:"), "--size", f"{SIZE_MIB}M")
    with Served(folder, name) as served:
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            with failure(cluster):
                await_true(lambda: served.in_flight() > 0, "a request waits")
            load.go_on()
            expected = load.stop()
        served.stop()
    assert_holds(exported(cluster, name, folder), expected)


def test_a_guest_waits_for_its_cluster_longer_than_any_call_of_the_control_plane(
    folder: Path, cluster: CephCluster, name: str
) -> None:
    """Those are bounded. The guest's are not: one that was given up might still be carried out."""
    cluster.rbd("create", name.removeprefix("rbd:"), "--size", f"{SIZE_MIB}M")
    with Served(folder, name) as served:
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            with cluster.osds_stopped():
                await_true(lambda: served.in_flight() > 0, "a request waits")
                time.sleep(CALL_S + 2)  # the fault itself
                assert served.in_flight() > 0
            load.go_on()
            expected = load.stop()
        served.stop()
    assert_holds(exported(cluster, name, folder), expected)


def test_without_its_monitor_a_cluster_goes_on_and_is_not_found_anew(
    folder: Path, cluster: CephCluster, name: str
) -> None:
    file = image(folder / "a.img", SIZE_MIB)
    with Served(folder, file) as served:
        served.start_mirror(name, create=True)
        with Load(served, blocks=BLOCKS) as load, cluster.monitor_killed():
            load.go_on(20)
            assert served.state == "steady"
            words = ("--blk-file", "rbd:rbd/other", "--socket-path", folder / "x.sock", "--no-state-file")
            code, said = refused_start("serve", *words)
            assert code == 1 and "no monitor of the cluster has answered within 10 s" in said
            load.go_on()
            expected = load.stop()
        served.stop()
    assert_holds(file, expected)
    assert same_content(file, exported(cluster, name, folder))


def test_the_lock_of_a_backend_that_was_killed_is_broken_at_once(
    folder: Path, cluster: CephCluster, name: str
) -> None:
    cluster.rbd("create", name.removeprefix("rbd:"), "--size", f"{SIZE_MIB}M")
    for seed in (1, 2, 3):  # also one after the other, while the cluster still waits for each
        with Served(folder, name) as served:
            with served.guest() as guest:
                write_block(guest, seed, seed)
                flush(guest)
            if seed > 1:
                await_said(served, "the lock of a process that is gone is broken")
            served.kill()
    with Served(folder, name) as served:
        served.stop()
    assert_holds(exported(cluster, name, folder), {1: 1, 2: 2, 3: 3})


def await_said(served: Served, words: str) -> None:
    await_true(lambda: words in served.process.last_output(100), f"the log says {words!r}")


def as_of_another_host(cluster: CephCluster, name: str) -> None:
    """Nobody here can tell whether the owner of the lock is alive."""
    image_name, key = name.removeprefix("rbd:"), "vhostsync.owner"
    note = json.loads(cluster.rbd("image-meta", "get", image_name, key))
    cluster.rbd("image-meta", "set", image_name, key, json.dumps({**note, "machine": "another"}))


def test_a_lock_of_another_host_is_broken_on_demand_and_its_owner_stays_out(
    folder: Path, cluster: CephCluster, name: str
) -> None:
    cluster.rbd("create", name.removeprefix("rbd:"), "--size", f"{SIZE_MIB}M")
    with Served(folder, name, "--no-state-file", name="old") as old, old.guest() as stale:
        write_block(stale, 1, 1)
        flush(stale)
        as_of_another_host(cluster, name)
        old.process.signal(signal.SIGSTOP)
        words = ("--blk-file", name, "--socket-path", folder / "x.sock", "--no-state-file")
        code, said = refused_start("serve", *words)
        assert code == 1 and f"{name} is in use" in said and "of another host" in said
        with Served(folder, name, "--no-state-file", "--break-lock", name="new") as new:
            with new.guest() as guest:
                write_block(guest, 2, 2)
                flush(guest)
                old.process.signal(signal.SIGCONT)
                assert not stale.write_now(0, bytes(4096)).ok
                assert not stale.write_now(2 * 4096, bytes(4096)).ok
                write_block(guest, 3, 3)
                flush(guest)
            await_said(old, "was shut out of the Ceph cluster")
            new.stop()
    entries = cluster.ceph("osd", "blocklist", "ls")
    years = {int(line.split()[1][:4]) for line in entries.splitlines() if line.startswith("127.")}
    assert max(years) > 2030
    assert_holds(exported(cluster, name, folder), {1: 1, 2: 2, 3: 3})


def watcher_of(cluster: CephCluster, name: str) -> str:
    """The client that has the image open."""
    status = json.loads(cluster.rbd("status", name.removeprefix("rbd:"), "--format", "json"))
    [watcher] = status["watchers"]
    return str(watcher["address"])


def test_that_a_destination_is_shut_out_is_noticed_while_the_guest_is_idle(
    folder: Path, cluster: CephCluster, name: str
) -> None:
    file = image(folder / "a.img", SIZE_MIB)
    with Served(folder, file) as served:
        served.start_mirror(name, create=True)
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        cluster.ceph("osd", "blocklist", "add", watcher_of(cluster, name), "3600")
        assert served.await_state("degraded")["reason"] == "the connection to the destination is lost"
        await_said(served, "was shut out of the Ceph cluster")
        served.await_resumed()
        served.stop()
    assert same_content(file, exported(cluster, name, folder))


def test_a_destination_that_is_shut_out_is_given_up(folder: Path, cluster: CephCluster, name: str) -> None:
    file = image(folder / "a.img", SIZE_MIB)
    with Served(folder, file) as served:
        served.start_mirror(name, create=True)
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            cluster.ceph("osd", "blocklist", "add", watcher_of(cluster, name), "3600")
            served.await_state("degraded")
            load.go_on()
            served.await_resumed()  # with a client of its own, which nobody has shut out
            load.go_on()
            expected = load.stop()
        await_said(served, "was shut out of the Ceph cluster")
        served.stop()
    assert_holds(file, expected)
    assert same_content(file, exported(cluster, name, folder))
