# SPDX-License-Identifier: Apache-2.0
"""Rows N5 and N6: mirrored to, and served from, Ceph RBD. The cluster is the tests': a monitor and an OSD, in
memory. An image has one owner, so each contender has its own; the limit is fio's RBD engine.

Nobody has librbd's cache, which is on unless it is turned off: it answers a write that no OSD has, and hands
many to the OSD at once. Ours never uses it. fio with it is 1.2 to 1.4 times as fast as without.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.contenders import Contender, Ours, Raw, Rival
from bench.files import make_file, require
from bench.network import bench_folder, in_turn
from bench.plan import Plan
from bench.sample import BenchError, Round, Sample, Work
from tests.network import ceph_cluster
from tests.network.ceph_cluster import POOL, CephCluster


@contextlib.contextmanager
def _cluster() -> Iterator[CephCluster]:
    if why := ceph_cluster.lacking():
        raise BenchError(f"a Ceph cluster {why}")
    require("fio")
    before = os.environ.get("CEPH_CONF")
    with CephCluster() as cluster:
        os.environ |= cluster.environment  # of the contenders
        try:
            yield cluster
        finally:
            if before is None:
                del os.environ["CEPH_CONF"]
            else:
                os.environ["CEPH_CONF"] = before


def _turn_off_cache(cluster: CephCluster) -> None:
    """For clients that begin from here on; fio's engine has no option for it."""
    with cluster.conf.open("a") as conf:
        conf.write("[client]\nrbd cache = false\n")


class RawRbd(Raw):
    """fio with its RBD engine."""

    def __init__(self, image: str) -> None:
        super().__init__(Path(image), direct=False)
        self._image = image

    def target(self) -> list[str]:
        return ["--ioengine=rbd", f"--pool={POOL}", f"--rbdname={self._image}", "--clientname=admin"]


def _image(cluster: CephCluster, name: str, file: Path) -> str:
    """As large as that file, and full of it: nobody pays for objects that are not there yet."""
    cluster.rbd("import", "--no-progress", str(file), f"{POOL}/{name}")
    return name


def _name(image: str) -> str:
    return f"rbd:{POOL}/{image}"


def _node(cluster: CephCluster, image: str) -> dict[str, object]:
    # QEMU turns librbd's cache on or off by its own setting, whatever the configuration says.
    cache = {"direct": True, "no-flush": False}
    return {"driver": "rbd", "pool": POOL, "image": image, "conf": str(cluster.conf), "cache": cache}


def measure_mirrored_to_rbd(plan: Plan) -> list[Round]:
    with _bench_images(plan) as (folder, cluster, source, images):
        return _measure(
            plan, Work("randwrite", 32), images,
            lambda: Rival("rival", folder, source, direct=False, destination=_node(cluster, images["rival"])),
            lambda: Ours("ours mirrored", folder, source, direct=False, destination=_name(images["ours"])),
        )  # fmt: skip


def measure_from_rbd(plan: Plan, rw: str) -> list[Round]:
    with _bench_images(plan) as (folder, cluster, _, images):
        return _measure(
            plan, Work(rw, 32), images,
            lambda: Rival("rival", folder, _node(cluster, images["rival"]), direct=False),
            lambda: Ours("ours", folder, _name(images["ours"]), direct=False),
        )  # fmt: skip


@contextlib.contextmanager
def _bench_images(plan: Plan) -> Iterator[tuple[Path, CephCluster, Path, dict[str, str]]]:
    """A folder, a cluster, a file, and images that are full of it: one for each contender."""
    with bench_folder(plan, "memory") as folder, _cluster() as cluster:
        file = make_file(folder / "source.img", plan.bytes_of["memory"], direct=False)
        images = {name: _image(cluster, name, file) for name in ("raw", "rival", "ours")}
        _turn_off_cache(cluster)
        yield folder, cluster, file, images


def _measure(
    plan: Plan, work: Work, images: dict[str, str], *start: Callable[[], Contender]
) -> list[Round]:
    running: dict[str, Contender] = {"raw": RawRbd(images["raw"])}
    with contextlib.ExitStack() as stack:
        for each in start:
            started = each()
            stack.callback(started.close)
            running[started.name] = started
        return in_turn(plan, running, work)


def measure_copy_to_rbd(plan: Plan) -> list[Round]:
    """All of a disk in memory to an image: `rbd import`, and ours from mirror-start to steady."""
    size = plan.bytes_of["memory"]
    rounds = []
    with bench_folder(plan, "memory") as folder, _cluster() as cluster:
        source = make_file(folder / "source.img", size, direct=False)
        with contextlib.closing(Ours("ours", folder, source, direct=False)) as ours:
            for number in range(plan.pairs):
                begin = time.monotonic()
                try:
                    _image(cluster, f"imported-{number}", source)
                except subprocess.CalledProcessError as error:
                    raise BenchError(f"rbd import: {error.stderr}") from error
                imported_s = time.monotonic() - begin
                name = f"mirrored-{number}"
                cluster.rbd("create", "--size", f"{size}B", f"{POOL}/{name}")
                begin = time.monotonic()
                ours.start_mirror(_name(name))
                copied_s = time.monotonic() - begin
                ours.leave_mirror()
                rounds.append({
                    "raw": Sample({"mb_per_s": size / imported_s / 1e6}),
                    "ours": Sample({"mb_per_s": size / copied_s / 1e6}),
                })
    return rounds
