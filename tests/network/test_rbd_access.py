# SPDX-License-Identifier: Apache-2.0
"""How a Ceph cluster is reached and what of it is used: users, configuration files, namespaces, the sandbox;
holes, growth, and that nothing is left of what was attached."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.daemon.rig import (
    BLOCK,
    Load,
    Served,
    answered,
    await_true,
    flush,
    image,
    refused_start,
    same_content,
    write_block,
)
from tests.network.ceph_cluster import CephCluster
from tests.network.test_rbd import BLOCKS, SIZE_MIB, assert_holds, exported, folder, name, refusal
from tests.sizes import MIB

__all__ = ["folder", "name"]  # fixtures

pytestmark = [pytest.mark.xdist_group("ceph"), pytest.mark.timeout(180)]


@pytest.fixture
def elsewhere(cluster: CephCluster, work: Path) -> Path:
    """A folder with a configuration and a keyring of a user who may use the pool and nothing else; the
    environment says nothing of a cluster."""
    cluster.add_user("vm", "mon", "profile rbd", "osd", "profile rbd pool=rbd")
    shutil.copy(cluster.folder / "vm.keyring", work / "vm.keyring")
    text = cluster.conf.read_text().replace(str(cluster.keyring), "/nonexistent")
    (work / "other.conf").write_text(text)
    return work


def access(folder: Path) -> tuple[str | Path, ...]:
    return "--ceph-conf", folder / "other.conf", "--ceph-user", "vm", "--ceph-keyring", folder / "vm.keyring"


def test_another_user_and_another_configuration(elsewhere: Path, cluster: CephCluster, name: str) -> None:
    """With the least capabilities: also to make an image, and to break a lock."""
    file = image(elsewhere / "a.img", SIZE_MIB)
    with Served(elsewhere, file, *access(elsewhere)) as served:
        served.start_mirror(name, create=True)
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.qmp.execute("switch", keep_mirror=True)
            load.go_on()
        served.kill()
    with Served(elsewhere, name, *access(elsewhere)) as served:
        served.await_resumed()
        served.stop()
    assert same_content(file, exported(cluster, name, elsewhere))
    words = ("--blk-file", name, "--socket-path", elsewhere / "x.sock", "--no-state-file")
    code, said = refused_start("serve", *words, "--ceph-conf", elsewhere / "missing.conf")
    assert code == 1 and f"there is no configuration file {elsewhere}/missing.conf" in said
    code, said = refused_start("serve", *words, *access(elsewhere)[:2])
    assert code == 1 and "client.admin" in said and "--ceph-keyring" in said
    wrong = elsewhere / "wrong.keyring"
    wrong.write_text("[client.vm]\n\tkey = AQCKAAAAAAAAABAA1xQ5M2zZB1d0xk6yT0y9mw==\n")
    code, said = refused_start("serve", *words, *access(elsewhere)[:4], "--ceph-keyring", wrong)
    assert code == 1 and "the cluster does not accept client.vm" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_in_the_sandbox_as_a_user_who_may_read_neither_key_nor_configuration(
    elsewhere: Path, cluster: CephCluster, name: str
) -> None:
    nobody = pwd.getpwnam("nobody")
    run = elsewhere / "run"
    run.mkdir()
    file = image(run / "a.img", SIZE_MIB)
    for path in (run, file):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    for path in (elsewhere / "vm.keyring", elsewhere / "other.conf"):
        path.chmod(0o600)
    elsewhere.chmod(0o711)
    options = ("--user", "nobody", "--sandbox", "require", *access(elsewhere))
    with Served(run, file, *options) as served:
        served.start_mirror(name, create=True)
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.qmp.execute("switch", keep_mirror=True)
            load.go_on()
        served.stop()
    with Served(run, name, *options) as served:
        served.await_resumed()
        with served.guest() as guest:
            write_block(guest, 1, 9)
            flush(guest)
        served.stop()
    assert_holds(file, {1: 9})
    assert same_content(file, exported(cluster, name, elsewhere))


def test_a_sandbox_that_was_told_of_no_cluster_says_so(folder: Path, name: str) -> None:
    with Served(folder, image(folder / "a.img", SIZE_MIB), "--sandbox", "require") as served:
        assert "start it with --ceph-conf" in refusal(served, "mirror-start", destination=name)
        served.stop()


def test_a_namespace(folder: Path, cluster: CephCluster) -> None:
    cluster.rbd("namespace", "create", "rbd/tenant")
    cluster.add_user("tenant", "mon", "profile rbd", "osd", "profile rbd pool=rbd namespace=tenant")
    keyring = ("--ceph-user", "tenant", "--ceph-keyring", cluster.folder / "tenant.keyring")
    file = image(folder / "a.img", SIZE_MIB)
    with Served(folder, file, *keyring) as served:
        served.start_mirror("rbd:rbd/tenant/vm", create=True)
        with served.guest() as guest:
            write_block(guest, 1, 5)
            flush(guest)
        served.qmp.execute("switch", keep_mirror=True)
        served.stop()
    assert cluster.rbd("ls", "rbd/tenant").split() == ["vm"]
    assert_holds(exported(cluster, "rbd:rbd/tenant/vm", folder), {1: 5})
    code, said = refused_start(
        "serve", "--blk-file", "rbd:rbd/vm", "--socket-path", folder / "x.sock", "--no-state-file", *keyring
    )
    assert code == 1 and "client.tenant may not do that" in said and "profile rbd pool=rbd" in said


def used_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_holes_are_not_copied(folder: Path, cluster: CephCluster, name: str) -> None:
    """Out of the cluster and into it, also after the guest has written into one."""
    cluster.rbd("create", name.removeprefix("rbd:"), "--size", "64M")
    with Served(folder, name) as served:
        with served.guest() as guest:
            for number in (0, 5000, 9000):
                write_block(guest, number, number + 1)
            flush(guest)
            served.start_mirror(folder / "b.img", create=True)
            assert served.mirror()["copy-bytes-sparse"] > 60 * MIB
            write_block(guest, 12000, 7)
            flush(guest)
        served.qmp.execute("mirror-cancel")
        served.start_mirror(folder / "c.img", create=True)
        served.stop()
    for path in (folder / "b.img", folder / "c.img"):
        assert_holds(path, {0: 1, 5000: 5001, 9000: 9001, 12000: 7})
        assert used_bytes(path) <= 2 * MIB
        assert same_content(path, exported(cluster, name, folder))


def test_a_large_range_is_zeroed_to_its_end(folder: Path, cluster: CephCluster, name: str) -> None:
    """It is zeroed in parts of 64 MiB."""
    cluster.rbd("create", name.removeprefix("rbd:"), "--size", "160M")
    blocks = [number * MIB // BLOCK for number in (1, 63, 64, 127, 128, 149, 151)]
    with Served(folder, name) as served, served.guest() as guest:
        for number in blocks:
            write_block(guest, number, 5)
        assert answered(guest, guest.write_zeroes(2 * MIB, 148 * MIB))
        read = [guest.read(number * BLOCK, BLOCK) for number in blocks]
        guest.wait(*read)
        assert [any(each.data) for each in read] == [True, *[False] * 5, True]
        guest.close()
        served.stop()


def test_both_disks_grow(folder: Path, cluster: CephCluster, name: str) -> None:
    file = image(folder / "a.img", SIZE_MIB)
    size = SIZE_MIB * MIB
    with Served(folder, file) as served:
        served.start_mirror(name, create=True)
        os.truncate(file, 2 * size)
        assert f"the destination {name} has {size} bytes" in refusal(served, "resize")
        cluster.rbd("resize", "--no-progress", name.removeprefix("rbd:"), "--size", f"{2 * SIZE_MIB}M")
        assert served.qmp.execute("resize") == {"capacity": 2 * size}
        with served.guest() as guest:
            write_block(guest, 2 * size // 4096 - 1, 3)
            flush(guest)
        served.qmp.execute("switch", keep_mirror=True)
        cluster.rbd("resize", "--no-progress", name.removeprefix("rbd:"), "--size", f"{3 * SIZE_MIB}M")
        os.truncate(file, 3 * size)
        assert served.qmp.execute("resize") == {"capacity": 3 * size}
        served.stop()
    assert_holds(file, {2 * size // 4096 - 1: 3})
    assert same_content(file, exported(cluster, name, folder))


def test_an_image_that_breaks_a_promise_is_refused(folder: Path, cluster: CephCluster, name: str) -> None:
    image_name = name.removeprefix("rbd:")
    words = ("serve", "--blk-file", name, "--socket-path", folder / "x.sock", "--no-state-file")
    cluster.rbd("create", image_name, "--size", "16M", "--image-feature", "layering")
    code, said = refused_start(*words)
    assert code == 1 and f"give it one: rbd feature enable {image_name} exclusive-lock" in said
    cluster.rbd("feature", "enable", image_name, "exclusive-lock")
    for option, value in (("rbd_cache", "true"), ("rbd_persistent_cache_mode", "ssd")):
        cluster.rbd("image-meta", "set", image_name, f"conf_{option}", value)
        code, said = refused_start(*words)
        assert code == 1 and f"rbd config image set {image_name} {option}" in said
        cluster.rbd("image-meta", "remove", image_name, f"conf_{option}")
    with Served(folder, name) as served:
        served.stop()


def test_nothing_is_left_of_mirrors_that_were_cancelled(
    folder: Path, cluster: CephCluster, name: str
) -> None:
    def left(served: Served) -> tuple[int, int]:
        process = Path(f"/proc/{served.process.pid}")
        return len(list((process / "task").iterdir())), len(list((process / "fd").iterdir()))

    with Served(folder, image(folder / "a.img", SIZE_MIB)) as served:
        served.start_mirror(name, create=True)
        served.qmp.execute("mirror-cancel")
        await_true(lambda: left(served)[0] < 15, "librbd's threads have ended")
        before = left(served)
        memory = []
        for _ in range(3):  # what malloc keeps for librbd's threads grows at first
            for _ in range(10):
                served.start_mirror(name, force=True)
                served.qmp.execute("mirror-cancel")
            await_true(lambda: left(served) <= before, "as many threads and descriptors as before")
            memory.append(served.memory_kib())
        grown = [later - earlier for earlier, later in itertools.pairwise(memory)]
        assert min(grown) < 20 * 1024, memory
        status = cluster.rbd("status", name.removeprefix("rbd:"))
        assert "Watchers: none" in status
        served.stop()


def test_what_the_image_holds_is_looked_for(folder: Path, cluster: CephCluster, name: str) -> None:
    file = folder / "fs"
    with file.open("wb") as empty:
        empty.truncate(SIZE_MIB * MIB)
    subprocess.run(["mkfs.ext4", "-q", file], check=True)
    cluster.rbd("import", "--no-progress", str(file), name.removeprefix("rbd:"))
    with Served(folder, image(folder / "a.img", SIZE_MIB)) as served:
        said = refusal(served, "mirror-start", destination=name)
        assert "ext4 (file system)" in said and "--force" in said
        served.start_mirror(name, force=True)
        served.stop()
