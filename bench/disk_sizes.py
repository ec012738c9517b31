# SPDX-License-Identifier: Apache-2.0
"""Row 13, and how cost grows with the disk: sparse files in memory, up to 16 TiB."""

import os
import shutil
import time
from pathlib import Path

from bench.contenders import Ours, cpu_seconds
from bench.generator import run_loadgen
from bench.plan import GIB, Plan
from bench.sample import Round, Sample, Work

TIB = 1 << 40
RESTS = 20
SETTLE_S = 30
RESYNC_WRITES = 2000
SIZES = (GIB, 64 * GIB, TIB, 4 * TIB, 16 * TIB)


def own_mib(pid: int) -> float:
    """Without the guest's memory and the disks', which are mapped or cached, not owned."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return (int(fields["VmRSS"].split()[0]) - int(fields["RssShmem"].split()[0])) / 1024


def measure_size(folder: Path, size: int) -> Sample:
    """`folder` is made for this size alone: a record that is left there would know another source."""
    folder.mkdir()
    source, destination = folder / "source.img", folder / "destination.img"
    for path in (source, destination):
        with path.open("wb") as file:
            file.truncate(size)
    begin = time.monotonic()
    ours = Ours("ours mirrored", folder, source, direct=False, options=("--log-size", "8M"))
    try:
        start_s = time.monotonic() - begin
        begin = time.monotonic()
        ours.start_mirror(destination)
        attach_s = time.monotonic() - begin
        run_loadgen(ours.socket, Work("randwrite", 32), 0.5, 0)
        begin = time.monotonic()
        for _ in range(RESTS):
            ours.status()
        status_ms = (time.monotonic() - begin) / RESTS * 1000
        figures = {"start_s": start_s, "attach_s": attach_s, "status_ms": status_ms}
        figures |= _resync(ours, destination)
        figures["rss_mib"] = own_mib(ours.pid)
        return Sample(figures, {"disk_bytes": size})
    finally:
        ours.close()
        source.unlink()
        destination.unlink()


def _resync(ours: Ours, destination: Path) -> dict[str, float]:
    """The same destination again, after some writes all over the disk without it. Nothing may differ before:
    what was written shortly before the mirror's end would be copied too."""
    ours.wait_mirror(lambda mirror: mirror["differing-bytes"] == 0, SETTLE_S)
    ours.leave_mirror()
    run_loadgen(ours.socket, Work("randwrite", 32), 0.5, 0, "--operations", str(RESYNC_WRITES))
    differing = ours.status()["differing-bytes"]
    cpu, begin = cpu_seconds(ours.pid), time.monotonic()
    ours.start_mirror(destination, full=False)
    resync_s = time.monotonic() - begin
    return {
        "resync_s": resync_s,
        "resync_cpu_s": cpu_seconds(ours.pid) - cpu,
        "resync_mib": differing / (1 << 20),
    }


def measure_sizes(plan: Plan) -> list[Round]:
    sizes = (GIB, 16 * TIB) if plan.quick else SIZES
    folder = plan.directory_of["memory"] / f"vhostsync-bench-sizes-{os.getpid()}"
    folder.mkdir()
    try:
        return [{"ours mirrored": measure_size(folder / str(size), size)} for size in sizes]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
