# SPDX-License-Identifier: Apache-2.0
"""The things that are measured: the bare file (fio), qemu-storage-daemon, vhostsync. Each is started once
and then measured in turn with the others, on the same files; one that is not being measured is idle. Both
backends are driven by the same load generator.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.generator import run_loadgen
from bench.qmp import Qmp
from bench.rival_program import rival_program
from bench.sample import BenchError, Sample, Work

START_S = 15
COPY_S = 300
REST_S = 30
# What fio is asked for (it takes twenty).
PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.99)


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

    def target(self) -> list[str]:
        """What fio works on, and by which engine."""
        return [
            f"--filename={self._file}", "--ioengine=io_uring", f"--direct={int(self._direct)}",
            f"--size={self._file.stat().st_size}", "--allow_file_create=0", "--invalidate=0",
        ]

    def measure(self, work: Work, seconds: float, ramp: float) -> Sample:
        command = [
            "fio", "--name=raw", *self.target(), f"--rw={work.rw}", f"--bs={work.block_bytes}",
            f"--iodepth={work.depth}", f"--runtime={int(seconds * 1000)}ms",
            f"--ramp_time={int(ramp * 1000)}ms", "--time_based", "--norandommap", "--randrepeat=0",
            f"--fdatasync={work.flush_every}", "--output-format=json",
            # Of whole requests, as the load generator counts them: from before the submission.
            "--lat_percentiles=1", "--clat_percentiles=0",
            f"--percentile_list={':'.join(map(str, PERCENTILES))}",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        job = json.loads(result.stdout[result.stdout.index("{"):])["jobs"][0]
        side = job["read" if "read" in work.rw else "write"]
        # fio rounds a run up to its own clock's steps: take what it says it did.
        per_s = side["total_ios"] / (side["runtime"] / 1000)
        latency = side["lat_ns"]
        reached = {float(part): ns / 1000 for part, ns in latency.get("percentile", {}).items()}
        figures = {"per_s": per_s, "mean_us": latency["mean"] / 1000, "p99_us": reached.get(99.0, 0)}
        percentiles = [[part, us] for part, us in sorted(reached.items())]
        detail = {"usr_cpu": job["usr_cpu"], "sys_cpu": job["sys_cpu"], "percentiles_us": percentiles}
        return Sample(figures, detail)


class Backend(Contender):
    """A vhost-user-blk backend in a process of its own."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory / name.replace(" ", "-")
        self._directory.mkdir(exist_ok=True)
        self.socket = self._directory / "vhost.sock"
        self._monitor_path = self._directory / "monitor.sock"
        self._log = self._directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.qmp: Qmp | None = None

    def _start(self, command: list[str]) -> None:
        self._process = self._spawn(command)
        try:
            self.qmp = Qmp(self._monitor_path)
            deadline = time.monotonic() + START_S
            while not self.socket.exists():
                if time.monotonic() > deadline:
                    raise BenchError("no socket")
                time.sleep(0.02)
        except (BenchError, OSError) as error:
            said = self._log.read_text()[-500:]
            self.close()
            raise BenchError(f"{self.name} does not start ({error}): {said}") from error

    def _spawn(self, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        with self._log.open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def _mirror_or_end(self, destination: Any) -> None:
        """Nobody would end a backend that was not made to the end."""
        try:
            self.start_mirror(destination)
        except BaseException:
            self.close()
            raise

    def start_mirror(self, destination: Any) -> None:
        raise NotImplementedError

    def measure(self, work: Work, seconds: float, ramp: float) -> Sample:
        assert self._process is not None
        before = cpu_seconds(self._process.pid)
        result = run_loadgen(self.socket, work, seconds, ramp)
        rest_from = time.monotonic()
        self.rest()
        result["rest_s"] = time.monotonic() - rest_from
        used = cpu_seconds(self._process.pid) - before
        side = result["operations"].get("read" if "read" in work.rw else "write")
        if side is None:
            raise BenchError(f"{self.name}: no request was completed within {seconds:g} s (--seconds)")
        latency = side["latency_ns"]
        figures = {
            "per_s": side["per_s"],
            "mean_us": latency["mean"] / 1000,
            "p99_us": latency["p99"] / 1000,
            "cpu_us": used / result["submitted"] * 1e6,
        }
        return Sample(figures, result)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def switch(self) -> None:
        """Moves the guest to the destination and keeps the mirror, the other way round. Only with one."""
        raise NotImplementedError

    def rest(self) -> None:
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
    """qemu-storage-daemon; with a destination and a copy mode: its blockdev-mirror, ready. A disk that is no
    file is the options of its node; `objects` are what that needs before."""

    def __init__(
        self, name: str, directory: Path, source: Path | Mapping[str, Any], *, direct: bool,
        destination: Path | Mapping[str, Any] | None = None, copy_mode: str = "write-blocking",
        queues: int = 4, objects: Sequence[str] = (),
    ) -> None:
        super().__init__(name, directory)
        self._destination = destination
        self._copy_mode = copy_mode

        self._direct = direct
        export = (
            f"type=vhost-user-blk,id=export,node-name=source,writable=on,num-queues={queues},"
            f"addr.type=unix,addr.path={self.socket}"
        )
        self._start([
            *rival_program(),
            *(word for each in objects for word in ("--object", each)),
            "--chardev", f"socket,id=monitor,path={self._monitor_path},server=on,wait=off",
            "--monitor", "chardev=monitor",
            "--blockdev", json.dumps(self._node("source", source)),
            "--export", export,
        ])
        if destination is not None:
            self._mirror_or_end(destination)

    def start_mirror(self, destination: Path | Mapping[str, Any]) -> None:
        """Returns when it is ready."""
        assert self.qmp is not None
        self.qmp.execute("blockdev-add", **self._node("destination", destination))
        self._mirror("source", "destination", "full")

    def _node(self, name: str, file: Path | Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(file, Path):
            return {"node-name": name, **file}
        cache = {"direct": self._direct, "no-flush": False}
        return {
            "driver": "file", "node-name": name, "filename": str(file), "aio": "io_uring", "cache": cache,
            "locking": "off",  # the files are vhostsync's as well
        }

    def _mirror(self, source: str, destination: str, sync: str) -> None:
        assert self.qmp is not None
        self._nodes = (source, destination)
        mirror = {"job-id": "mirror", "device": source, "target": destination, "sync": sync}
        self.qmp.execute("blockdev-mirror", **mirror, **{"copy-mode": self._copy_mode})
        self._wait_job(lambda job: bool(job["ready"]), COPY_S)

    def switch(self) -> None:
        """Both disks are the same then: only what is written from now on has to be mirrored."""
        assert self.qmp is not None
        self.qmp.execute("job-complete", id="mirror")
        deadline = time.monotonic() + COPY_S
        while self.qmp.execute("query-block-jobs"):
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name}: the switch does not end")
            time.sleep(0.01)
        source, destination = self._nodes
        self._mirror(destination, source, "none")

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

    def rest(self) -> None:
        if self._destination is not None:
            self._wait_job(lambda job: job["offset"] == job["len"], REST_S)


class Ours(Backend):
    """vhostsync; with a destination: its mirror, steady."""

    def __init__(
        self, name: str, directory: Path, source: Path | str, *, direct: bool,
        destination: Path | str | None = None, queues: int = 4, options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, directory)
        self._destination = destination
        self.last_pause_ms = 0.0  # of the last switch, as the backend has measured it
        self._cache = "none" if direct else "writeback"
        self._start([
            sys.executable, "-m", "vhostsync", "serve", "--socket-path", str(self.socket), "--blk-file",
            str(source), "--cache", self._cache, "--num-queues", str(queues),
            "--control", str(self._monitor_path), *self._state_options(), *options,
        ])
        if destination is not None:
            self._mirror_or_end(destination)

    def _state_options(self) -> tuple[str, ...]:
        return ("--state-file", str(self._directory / "state"))

    def begin_mirror(self, destination: Path | str, *, full: bool = True) -> None:
        assert self.qmp is not None
        self.qmp.execute("mirror-start", destination=str(destination), cache=self._cache, full=full)

    def start_mirror(self, destination: Path | str, *, full: bool = True) -> None:
        """Copies everything, or what differs; returns when it is steady."""
        self.begin_mirror(destination, full=full)
        self.wait_mirror(lambda mirror: bool(mirror["state"] == "steady"), COPY_S)

    def leave_mirror(self) -> None:
        assert self.qmp is not None
        self.qmp.execute("mirror-cancel", force=True)
        self.wait_mirror(lambda mirror: bool(mirror["state"] == "passthrough"), COPY_S)

    def status(self) -> dict[str, Any]:
        assert self.qmp is not None
        mirror: dict[str, Any] = self.qmp.execute("query-mirror")
        return mirror

    def switch(self) -> None:
        assert self.qmp is not None
        self.last_pause_ms = self.qmp.execute("switch", **{"keep-mirror": True})["pause-us"] / 1000

    def wait_mirror(self, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(mirror := self.status()):
            if mirror["state"] == "degraded" or time.monotonic() > deadline:
                raise BenchError(f"{self.name}: the mirror is {mirror}")
            time.sleep(0.05)

    def rest(self) -> None:
        if self._destination is not None:
            self.wait_mirror(lambda mirror: not lag_of(mirror), REST_S)
            if (state := self.status()["state"]) != "steady":
                raise BenchError(f"{self.name}: measured while not steady, but {state}")


def lag_of(mirror: dict[str, Any]) -> int:
    for name in ("lag-bytes", "lag_bytes"):
        if name in mirror:
            return int(mirror[name] or 0)
    raise BenchError(f"query-mirror tells no lag: {mirror}")
