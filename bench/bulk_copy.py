# SPDX-License-Identifier: Apache-2.0
"""Row 10: copying a whole disk: ours against dd, qemu-img convert and the rival's mirror; and what a guest
feels of ours meanwhile."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.contenders import Ours, Rival
from bench.files import make_file
from bench.generator import load_beside, run_loadgen
from bench.plan import Plan
from bench.sample import BenchError, Round, Sample, Work

GUEST = Work("randwrite", 1)
DEADLINE_S = 300


@contextlib.contextmanager
def _folder(plan: Plan) -> Iterator[Path]:
    folder = plan.directory_of["disk"] / f"vhostsync-bench-copy-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _timed(*command: str) -> float:
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{command[0]}: {done.stderr.strip()[-300:]}")
    return time.monotonic() - begin


def _dd(source: Path, to: Path) -> float:
    options = ("bs=1M", "iflag=direct", "oflag=direct", "conv=notrunc,fdatasync", "status=none")
    return _timed("dd", f"if={source}", f"of={to}", *options)


def _qemu_img(source: Path, to: Path) -> float:
    # -S 0: as the others, it writes all of a file that was written; -n: into the file that is there.
    return _timed("qemu-img", "convert", "-n", "-S", "0", "-t", "none", "-T", "none", "-m", "8", "-W",
                  "-f", "raw", "-O", "raw", str(source), str(to))


def _rival(folder: Path, source: Path, to: Path) -> float:
    """From blockdev-mirror to ready: nobody writes, so all is there then; and a flush as the others do it."""
    rival = Rival("rival", folder, source, direct=True)
    try:
        begin = time.monotonic()
        rival.start_mirror(to)
        _timed("sync", "-d", str(to))
        return time.monotonic() - begin
    finally:
        rival.close()


def _ours(ours: Ours, to: Path) -> float:
    """From mirror-start to steady: all of it is durable then."""
    begin = time.monotonic()
    ours.start_mirror(to)
    return time.monotonic() - begin


def _guest_beside(ours: Ours, to: Path, seconds: float) -> float:
    """The guest's p99 while the copy runs over that without it. The copy begins anew until the guest ends."""
    alone = run_loadgen(ours.socket, GUEST, seconds, 0.1)["operations"]["write"]["latency_ns"]["p99"]
    end = time.monotonic() + seconds
    with load_beside(ours.socket, GUEST, seconds) as found:
        while time.monotonic() < end:
            ours.begin_mirror(to)
            ours.wait_mirror(lambda mirror: mirror["state"] == "steady" or time.monotonic() > end, DEADLINE_S)
            ours.leave_mirror()
    return float(found["operations"]["write"]["latency_ns"]["p99"] / alone)


def measure_copy(plan: Plan) -> list[Round]:
    """Every one copies the same source, over a destination that was just written."""
    size = plan.bytes_of["disk"]
    rounds = []
    with _folder(plan) as folder:
        source = make_file(folder / "source.img", size, direct=True)
        own = make_file(folder / "own.img", size, direct=True)
        to = make_file(folder / "to.img", size, direct=True)
        ours = Ours("ours", folder, own, direct=True)
        try:
            for _ in range(plan.pairs):
                taken: dict[str, Callable[[], float]] = {
                    "dd": lambda: _dd(source, to),
                    "qemu-img": lambda: _qemu_img(source, to),
                    "rival": lambda: _rival(folder, source, to),
                    "ours": lambda: _ours(ours, to),
                }
                seconds = {name: take() for name, take in taken.items()}
                ours.leave_mirror()
                speed = {name: size / each / 1e6 for name, each in seconds.items()}
                times = _guest_beside(ours, to, plan.seconds)
                rounds.append({
                    "raw": Sample({"mb_per_s": max(speed["dd"], speed["qemu-img"])}, {"seconds": seconds}),
                    "rival": Sample({"mb_per_s": speed["rival"]}),
                    "ours": Sample({"mb_per_s": speed["ours"], "p99_ratio": times}),
                })
        finally:
            ours.close()
    return rounds


def measure_holes(plan: Plan) -> list[Round]:
    """Half of the disk was never written, half is zeroes that were preallocated; dd copies the full way."""
    size = plan.bytes_of["disk"]
    rounds = []
    with _folder(plan) as folder:
        full = make_file(folder / "full.img", size, direct=True)
        to = make_file(folder / "to.img", size, direct=True)
        empty = folder / "empty.img"
        with empty.open("wb") as file:
            file.truncate(size)
            os.posix_fallocate(file.fileno(), 0, size // 2)
        ours = Ours("ours", folder, empty, direct=True)
        try:
            for number in range(plan.pairs):
                other = size / _dd(full, to) / 1e6
                fresh = folder / f"fresh-{number}.img"
                with fresh.open("wb") as file:
                    file.truncate(size)
                speed = size / _ours(ours, fresh) / 1e6
                ours.leave_mirror()
                fresh.unlink()
                rounds.append({
                    "raw": Sample({"mb_per_s": other}),
                    "ours": Sample({"mb_per_s": speed, "of_full": speed / other}),
                })
        finally:
            ours.close()
    return rounds
