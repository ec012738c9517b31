# SPDX-License-Identifier: Apache-2.0
"""Disks of a real Ceph cluster: all that a backend does with an image file, it does with an RBD image."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.rig import (
    BLOCK,
    Load,
    Served,
    block_of,
    flush,
    image,
    refused_start,
    same_content,
    write_block,
)
from tests.guest.qmp_client import QmpError
from tests.network.ceph_cluster import CephCluster

pytestmark = [pytest.mark.xdist_group("ceph"), pytest.mark.timeout(180)]

SIZE_MIB = 16
BLOCKS = 64
_numbers = itertools.count()


@pytest.fixture
def name() -> str:
    """Of an image that no other test has."""
    return f"rbd:rbd/vm{next(_numbers)}"


@pytest.fixture
def folder(work: Path, cluster: CephCluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Backends that are started in it reach the cluster as its administrator."""
    monkeypatch.setenv("CEPH_CONF", str(cluster.conf))
    return work


def exported(cluster: CephCluster, name: str, folder: Path) -> Path:
    """What the image holds."""
    path = folder / "exported"
    path.unlink(missing_ok=True)
    cluster.rbd("export", "--no-progress", name.removeprefix("rbd:"), str(path))
    return path


def assert_holds(path: Path, expected: dict[int, int]) -> None:
    with path.open("rb") as file:
        wrong = []
        for number, seed in expected.items():
            file.seek(number * BLOCK)
            if file.read(BLOCK) != block_of(number, seed):
                wrong.append(number)
    assert wrong == []


def refusal(served: Served, command: str, **arguments: Any) -> str:
    with pytest.raises(QmpError) as refused:
        served.qmp.execute(command, **arguments)
    return str(refused.value)


def test_a_guest_moves_into_the_cluster_and_back(folder: Path, cluster: CephCluster, name: str) -> None:
    file = image(folder / "a.img", SIZE_MIB)
    with Served(folder, file) as served:
        served.start_mirror(name, create=True)
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.qmp.execute("switch", keep_mirror=True)
            load.go_on()
            expected = load.stop()
        assert (served.mirror()["source"], served.mirror()["destination"]) == (name, str(file))
        served.stop()
    assert same_content(file, exported(cluster, name, folder))
    assert_holds(file, expected)
    with Served(folder, name) as served:
        served.await_resumed()
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.qmp.execute("switch")
            load.go_on()
            expected |= load.stop()
        served.stop()
    assert_holds(file, expected)
    code, said = refused_start("serve", "--blk-file", name, "--socket-path", folder / "x.sock", env={
        "STATE_DIRECTORY": str(served.state_directory)
    })  # fmt: skip
    assert code == 1 and f"{name} was superseded by a switch" in said and str(file) in said


def test_one_that_somebody_has_is_refused(folder: Path, cluster: CephCluster, name: str) -> None:
    cluster.rbd("create", name.removeprefix("rbd:"), "--size", f"{SIZE_MIB}M")
    with Served(folder, name) as served:
        with served.guest() as guest:
            write_block(guest, 1, 1)
            flush(guest)
        env = {"STATE_DIRECTORY": str(folder / "other")}
        code, said = refused_start(
            "serve", "--blk-file", name, "--socket-path", folder / "x.sock", "--no-state-file", env=env
        )
        assert code == 1
        assert f"{name} is in use: the client at 127.0.0.1" in said
        assert f"has its lock, process {served.process.pid} of this host" in said and "--break-lock" in said
        with pytest.raises(subprocess.CalledProcessError) as refused:  # it does not get the lock by asking
            cluster.rbd("bench", "--io-type", "write", "--io-total", "4K", name.removeprefix("rbd:"))
        assert "Read-only file system" in refused.value.stderr
        with served.guest() as guest:
            write_block(guest, 2, 2)
            flush(guest)
        served.stop()
    assert_holds(exported(cluster, name, folder), {1: 1, 2: 2})


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("rbd:rbd", "names no image of a Ceph cluster; write rbd:POOL/IMAGE"),
        ("rbd:rbd/a@snapshot", "names no image of a Ceph cluster"),
        ("rbd:nowhere/a", "the cluster has no pool nowhere"),
        ("rbd:rbd/no/a", "the pool rbd has no namespace no; make it: rbd namespace create rbd/no"),
        ("rbd:rbd/nothing", "there is no such image; make it with rbd create"),
    ],
)
def test_what_names_nothing_is_a_sentence(folder: Path, wrong: str, sentence: str) -> None:
    code, said = refused_start(
        "serve", "--blk-file", wrong, "--socket-path", folder / "x.sock", "--no-state-file"
    )
    assert code in (1, 2) and sentence in said and said.count("\n") == 1
