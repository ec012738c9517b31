# SPDX-License-Identifier: Apache-2.0
"""Is the load generator a bottleneck, and does it agree with another frontend?

* qemu-storage-daemon's null device answers at once: what our generator reaches there is the most that it
  could ever show, and the CPU that a request costs it says how near its own limit it is.
* libblkio's example bench (of the Debian 13 tree that the tests make) drives the same backend in turn with
  ours, both polling, neither with indirect descriptors. Where each request takes 1 ms both must show
  depth / 1 ms, less what the timer is late.
"""

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.contenders import START_S
from bench.files import make_file
from bench.generator import run_loadgen
from bench.plan import GIB, Plan
from bench.report import describe, describe_machine, spread_of
from bench.rows import Tell
from bench.sample import BenchError, Work, amount
from tests.guest import debian13
from tests.guest.assets import AssetError

EXAMPLE = "usr/share/doc/libblkio-dev/examples/blkio-bench.c"
DEPTH = 32
Json = dict[str, Any]


@contextlib.contextmanager
def _export(folder: Path, blockdev: Json) -> Iterator[Path]:
    socket = folder / "export.sock"
    socket.unlink(missing_ok=True)
    export = f"type=vhost-user-blk,id=export,node-name=source,writable=on,addr.type=unix,addr.path={socket}"
    described = json.dumps({"node-name": "source", **blockdev})
    command = ["qemu-storage-daemon", "--blockdev", described, "--export", export]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + START_S
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchError("qemu-storage-daemon makes no export")
                time.sleep(0.05)
            time.sleep(0.2)  # from bind to listen
            yield socket
        finally:
            process.terminate()


def blkio_bench(folder: Path) -> Callable[[Path, str, float], float]:
    """libblkio's example, built in the Debian 13 tree: socket, kind of work, seconds -> requests/s."""
    tree = debian13.tree()
    if not (tree / EXAMPLE).exists() or not (tree / "usr/bin/gcc").exists():
        packages = ("libblkio-dev", "gcc", "libc6-dev")
        debian13.run_inside(
            tree, "apt-get", "-q", "-y", "--no-install-recommends", "install", *packages, timeout_s=600
        )
    program = folder / "blkio-bench"
    build = ("gcc", "-O2", "-w", "-D_GNU_SOURCE", f"/{EXAMPLE}", "-o", str(program), "-pthread", "-lblkio")
    debian13.run_inside(tree, *build)

    def run(socket: Path, rw: str, seconds: float) -> float:
        said = debian13.run_inside(
            tree, str(program), f"--readwrite={rw}", f"--iodepth={DEPTH}", f"--runtime={int(seconds)}",
            "--poll", "virtio-blk-vhost-user", f"path={socket}", timeout_s=seconds + 30,
        )
        return float(json.loads(said)["aggregate"]["kiops"]) * 1000

    return run


def _compare(
    socket: Path, backend: str, plan: Plan, other: Callable[[Path, str, float], float] | None, tell: Tell
) -> Iterator[Json]:
    seconds = max(1.0, plan.seconds)
    for rw in ("randread", "randwrite"):
        ours: list[float] = []
        others: list[float] = []
        cpu_us: list[float] = []
        work = Work(rw, DEPTH, poll=other is not None)
        for _ in range(plan.pairs):
            found = run_loadgen(socket, work, seconds, 0, *(("--no-indirect",) if other else ()))
            ours.append(found["operations"][rw.removeprefix("rand")]["per_s"])
            cpu_us.append(1e6 * (found["cpu_user_s"] + found["cpu_system_s"]) / found["submitted"])
            if other is not None:
                others.append(other(socket, rw, seconds))
        entry: Json = {"backend": backend, "rw": rw, "poll": work.poll, "ours": spread_of(ours)}
        entry["cpu_us"] = statistics.median(cpu_us)
        if others:
            entry["blkio_bench"] = spread_of(others)
            ratios = [100 * (one / two - 1) for one, two in zip(ours, others, strict=True)]
            entry["more_percent"] = spread_of(ratios)
        tell(f"  {backend}, {rw}: {ours} {others}")
        yield entry


def calibrate(plan: Plan, tell: Tell) -> Json:
    tell("calibrate: the load generator")
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="vhostsync-calibrate-") as name:
        folder = Path(name)
        missing, other = None, None
        try:
            other = blkio_bench(folder)
        except (AssetError, BenchError, OSError) as error:
            missing = " ".join(str(error).split())[:300]
            tell(f"  without libblkio's bench: {missing}")
        null = {"driver": "null-co", "size": GIB, "read-zeroes": False}
        memory = plan.directory_of["memory"] / f"vhostsync-calibrate-{os.getpid()}.img"
        entries: list[Json] = []
        try:
            make_file(memory, plan.bytes_of["memory"], direct=False)
            with _export(folder, null) as socket:
                entries += _compare(socket, "null device", plan, None, tell)
                if other is not None:
                    entries += _compare(socket, "null device", plan, other, tell)
            if other is not None:
                # Nearly no CPU: the two agree here also on a machine that others keep busy.
                with _export(folder, {**null, "latency-ns": 1_000_000}) as socket:
                    entries += _compare(socket, "null device, 1 ms a request", plan, other, tell)
                file = {"driver": "file", "filename": str(memory), "aio": "io_uring"}
                with _export(folder, file) as socket:
                    entries += _compare(socket, "file in memory", plan, other, tell)
        finally:
            memory.unlink(missing_ok=True)
    method = {"rounds": plan.pairs, "seconds": max(1.0, plan.seconds), "depth": DEPTH}
    return {"machine": describe_machine(), "method": method, "entries": entries, "missing": missing}


def calibration_table(section: Json) -> str:
    method = section["method"]
    lines = [
        describe(section["machine"])
        + f"* qemu-storage-daemon's export, 4 KiB, {method['depth']} in flight; {method['rounds']} rounds of "
        f"{method['seconds']:g} s in turn, medians; in brackets the extremes of a round\n",
        "| backend | work | loadgen, per second | its CPU, µs a request | libblkio's bench | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entry in section["entries"]:
        way = "polling" if entry["poll"] else "sleeping, as in the table"
        cells = [entry["backend"], f"{entry['rw']}, {way}", amount(entry["ours"]["median"])]
        cells.append(f"{entry['cpu_us']:.2g}")
        if "blkio_bench" in entry:
            more = entry["more_percent"]
            cells.append(amount(entry["blkio_bench"]["median"]))
            cells.append(f"{more['median']:+.1f} % ({more['least']:+.1f} to {more['greatest']:+.1f})")
        else:
            cells += ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    if section["missing"]:
        lines.append(f"\nlibblkio's bench could not be had: {section['missing']}")
    return "\n".join(lines) + "\n"
