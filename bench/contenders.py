# SPDX-License-Identifier: Apache-2.0
"""The things that are measured: the bare file (fio), qemu-storage-daemon, vhostsync. Each is started once, on
files of its own that were made in the same way, and then measured in turn with the others; one that is not
being measured is idle.

A measurement is a `Sample`. Both backends are driven by the same load generator (loadgen.c).
"""

import contextlib
import functools
import importlib.util
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 15
COPY_S = 300
REST_S = 30


class BenchError(Exception):
    """One sentence: what is missing or went wrong."""


@dataclass(frozen=True)
class Work:
    """What is asked of a contender."""

    rw: str
    depth: int
    block_bytes: int = 4096
    flush_every: int = 0
    queues: int = 1
    poll: bool = False


@dataclass(frozen=True)
class Sample:
    """Of one measurement: requests (without flushes) per second, latencies in µs, CPU of the backend."""

    per_s: float
    mean_us: float
    p99_us: float
    cpu_us_per_request: float | None
    detail: dict[str, Any]


class Qmp:
    """The wire that qemu-storage-daemon's monitor and vhostsync's control socket share."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BenchError(f"nobody listens at {path}") from error
                time.sleep(0.02)
        self._file = self._socket.makefile("rw", encoding="utf-8")
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while line := self._file.readline():
            reply = json.loads(line)
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise BenchError(f"{command}: {reply['error']['desc']}")
        raise BenchError(f"{command}: the backend hung up")

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@functools.cache
def find_loadgen() -> Path:
    """The load generator: $VHOSTSYNC_LOADGEN, or where the build of this tree put it."""
    places = [Path(os.environ["VHOSTSYNC_LOADGEN"])] if "VHOSTSYNC_LOADGEN" in os.environ else []
    with contextlib.suppress(ImportError):
        # An editable install uses the extension from its build's directory; the load generator is beside it.
        extension = importlib.util.find_spec("vhostsync._shim")
        if extension is not None and extension.origin is not None:
            places.append(Path(extension.origin).parent.parent / "bench" / "loadgen")
    top = Path(__file__).resolve().parent.parent
    places += sorted(top.glob("build*/bench/loadgen")) + sorted(top.glob("build/*/bench/loadgen"))
    for place in places:
        if place.exists():
            return place
    raise BenchError("loadgen is not built; use ./run bench, or meson compile and VHOSTSYNC_LOADGEN=…")


def run_loadgen(sock: Path, work: Work, seconds: float, ramp: float, *options: str) -> dict[str, Any]:
    command = [
        str(find_loadgen()), "--socket", str(sock), "--rw", work.rw, "--bs", str(work.block_bytes),
        "--depth", str(work.depth), "--queues", str(work.queues), "--seconds", str(seconds),
        "--ramp", str(ramp), *options,
    ]
    if work.flush_every:
        command += ["--flush-every", str(work.flush_every)]
    if work.poll:
        command.append("--poll")
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + ramp + 60)
    if result.returncode:
        said = result.stderr.strip() or result.stdout.strip()[:500]
        raise BenchError(f"loadgen: {said} ({result.returncode})")
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads, the kernel's workers for its io_uring included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Contender:
    name = "?"

    def measure(self, work: Work, seconds: float, ramp: float) -> Sample:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Raw(Contender):
    """fio with io_uring on the bare file: the limit."""

    def __init__(self, file: Path, *, direct: bool) -> None:
        self.name = "raw"
        self._file, self._direct = file, direct

    def measure(self, work: Work, seconds: float, ramp: float) -> Sample:
        command = [
            "fio", "--name=raw", f"--filename={self._file}", "--ioengine=io_uring", f"--rw={work.rw}",
            f"--bs={work.block_bytes}", f"--iodepth={work.depth}", f"--direct={int(self._direct)}",
            f"--runtime={int(seconds * 1000)}ms", f"--ramp_time={int(ramp * 1000)}ms", "--time_based",
            f"--size={self._file.stat().st_size}", "--norandommap", "--randrepeat=0", "--allow_file_create=0",
            "--invalidate=0", f"--fdatasync={work.flush_every}", "--output-format=json",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        job = json.loads(result.stdout[result.stdout.index("{"):])["jobs"][0]
        side = job["read" if "read" in work.rw else "write"]
        # fio rounds a run up to its own clock's steps: take what it says it did.
        per_s = side["total_ios"] / (side["runtime"] / 1000)
        latency = side["clat_ns"]
        return Sample(
            per_s, side["lat_ns"]["mean"] / 1000, latency.get("percentile", {}).get("99.000000", 0) / 1000,
            None, {"usr_cpu": job["usr_cpu"], "sys_cpu": job["sys_cpu"]},
        )


class Backend(Contender):
    """A vhost-user-blk backend in a process of its own."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory / name.replace(" ", "-")
        self._directory.mkdir(exist_ok=True)
        self._socket = self._directory / "vhost.sock"
        self._monitor_path = self._directory / "monitor.sock"
        self._log = self._directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.qmp: Qmp | None = None

    def _start(self, command: list[str]) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self.qmp = Qmp(self._monitor_path)
            deadline = time.monotonic() + START_S
            while not self._socket.exists():
                if time.monotonic() > deadline:
                    raise BenchError("no socket")
                time.sleep(0.02)
        except (BenchError, OSError) as error:
            said = self._log.read_text()[-500:]
            self.close()
            raise BenchError(f"{self.name} does not start ({error}): {said}") from error

    def measure(self, work: Work, seconds: float, ramp: float) -> Sample:
        assert self._process is not None
        before = cpu_seconds(self._process.pid)
        result = run_loadgen(self._socket, work, seconds, ramp)
        rest_from = time.monotonic()
        self._rest()
        result["rest_s"] = time.monotonic() - rest_from
        used = cpu_seconds(self._process.pid) - before
        side = result["operations"]["read" if "read" in work.rw else "write"]
        latency = side["latency_ns"]
        for each in result["operations"].values():
            each.pop("histogram", None)
        return Sample(
            side["per_s"], latency["mean"] / 1000, latency["p99"] / 1000, used / result["submitted"] * 1e6,
            result )

    def _rest(self) -> None:
        """Waits until the backend has nothing left to do, so that it does not disturb who is measured
        next."""

    def close(self) -> None:
        if self.qmp is not None:
            self.qmp.close()
            self.qmp = None
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class Rival(Backend):
    """qemu-storage-daemon; with a destination and a copy mode: its blockdev-mirror, ready."""

    def __init__(
        self, name: str, directory: Path, source: Path, *, direct: bool, destination: Path | None = None,
        copy_mode: str = "write-blocking", queues: int = 4,
    ) -> None:
        super().__init__(name, directory)
        self._destination = destination

        def node(node_name: str, file: Path) -> dict[str, Any]:
            cache = {"direct": direct, "no-flush": False}
            return {"driver": "file", "node-name": node_name, "filename": str(file), "aio": "io_uring",
            "cache": cache}

        export = (
            f"type=vhost-user-blk,id=export,node-name=source,writable=on,num-queues={queues},"
            f"addr.type=unix,addr.path={self._socket}"
        )
        self._start([
            "qemu-storage-daemon",
            "--chardev", f"socket,id=monitor,path={self._monitor_path},server=on,wait=off",
            "--monitor", "chardev=monitor",
            "--blockdev", json.dumps(node("source", source)),
            "--export", export,
        ])
        assert self.qmp is not None
        if destination is not None:
            self.qmp.execute("blockdev-add", **node("destination", destination))
            mirror = {"job-id": "mirror", "device": "source", "target": "destination", "sync": "full"}
            self.qmp.execute("blockdev-mirror", **mirror, **{"copy-mode": copy_mode})
            self._wait_job(lambda job: bool(job["ready"]), COPY_S)

    def _job(self) -> dict[str, Any]:
        assert self.qmp is not None
        jobs = self.qmp.execute("query-block-jobs")
        if not jobs:
            raise BenchError(f"{self.name}: the mirror ended")
        job: dict[str, Any] = jobs[0]
        return job

    def _wait_job(self, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self._job()):
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name}: the mirror does not converge")
            time.sleep(0.05)

    def _rest(self) -> None:
        if self._destination is not None:
            self._wait_job(lambda job: job["offset"] == job["len"], REST_S)


class Ours(Backend):
    """vhostsync; with a destination: its mirror, steady."""

    def __init__(
        self, name: str, directory: Path, source: Path, *, direct: bool, destination: Path | None = None,
        queues: int = 4, options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, directory)
        self._destination = destination
        cache = "none" if direct else "writeback"
        self._start([
            sys.executable, "-m", "vhostsync", "serve", "--socket-path", str(self._socket), "--blk-file",
            str(source), "--cache", cache, "--num-queues", str(queues), "--control", str(self._monitor_path),
            "--state-file", str(self._directory / "state"), *options,
        ])
        assert self.qmp is not None
        if destination is not None:
            self.qmp.execute("mirror-start", destination=str(destination), cache=cache)
            self._wait_mirror(lambda mirror: bool(mirror["state"] == "steady"), COPY_S)

    def status(self) -> dict[str, Any]:
        assert self.qmp is not None
        mirror: dict[str, Any] = self.qmp.execute("query-mirror")
        return mirror

    def _wait_mirror(self, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(mirror := self.status()):
            if mirror["state"] == "degraded" or time.monotonic() > deadline:
                raise BenchError(f"{self.name}: the mirror is {mirror}")
            time.sleep(0.05)

    def _rest(self) -> None:
        if self._destination is not None:
            self._wait_mirror(lambda mirror: not lag_of(mirror), REST_S)
            if (state := self.status()["state"]) != "steady":
                raise BenchError(f"{self.name}: measured while not steady, but {state}")


def lag_of(mirror: dict[str, Any]) -> int:
    for name in ("lag-bytes", "lag_bytes"):
        if name in mirror:
            return int(mirror[name] or 0)
    raise BenchError(f"query-mirror tells no lag: {mirror}")


# ---- files ------------------------------------------------------------------------


def make_file(path: Path, size_bytes: int, *, direct: bool) -> Path:
    """Allocated and written once from beginning to end, so that no measurement pays for that."""
    if not path.exists() or path.stat().st_size != size_bytes:
        path.unlink(missing_ok=True)
        subprocess.run(["fallocate", "-l", str(size_bytes), str(path)], check=True)
    flags = os.O_WRONLY | (os.O_DIRECT if direct else 0)
    buffer = mmap.mmap(-1, 4 << 20)  # aligned, for direct I/O
    buffer.write(os.urandom(4 << 20))
    with contextlib.closing(buffer):
        fd = os.open(path, flags)
        try:
            done = 0
            while done < size_bytes:
                done += os.pwrite(fd, memoryview(buffer)[: min(len(buffer), size_bytes - done)], done)
            os.fsync(fd)
        finally:
            os.close(fd)
    return path


def require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise BenchError(f"{program} is not installed (Debian: fio, qemu-system-common, qemu-utils)")
