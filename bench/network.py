# SPDX-License-Identifier: Apache-2.0
"""Rows N1 to N4, N7, N8: mirrored over NBD. The server is nbdkit's memory, which all contenders use in turn;
the limit is a bare loop of libnbd on the same export, and nbdcopy where all of a disk is copied.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contenders import Contender, Ours, Rival
from bench.files import make_file, require
from bench.generator import find_nbd_loop
from bench.plan import Plan
from bench.sample import BenchError, Round, Sample, Work

START_S = 10.0
FAR_MS = 5
FAR_THREADS = 64  # with fewer, requests that wait for the delay would wait for a thread as well
USER = "bench"
WRITES_32 = Work("randwrite", 32)


@dataclass(frozen=True)
class NbdServer:
    """One export. `options`: of the rival's node in QEMU's terms; `objects`: what that needs before."""

    uri: str
    options: dict[str, Any]
    objects: tuple[str, ...] = ()


@contextlib.contextmanager
def memory_server(
    folder: Path, size_bytes: int, *, tls: bool = False, far: bool = False
) -> Iterator[NbdServer]:
    """nbdkit's memory: on a Unix socket, or with a key on a port of the loopback; `far`: each write is
    answered 5 ms later."""
    require("nbdkit")
    command = ["nbdkit", "--foreground", "--exit-with-parent", "--threads", str(FAR_THREADS)]
    if tls:
        port = _free_port()
        keys = folder / "keys.psk"
        keys.write_text(f"{USER}:{secrets.token_hex(32)}\n")
        keys.chmod(0o600)
        command += ["--tls=require", f"--tls-psk={keys}", "--ipaddr", "127.0.0.1", "--port", str(port)]
        server = NbdServer(
            f"nbds://{USER}@127.0.0.1:{port}/?tls-psk-file={keys}",
            {"driver": "nbd", "server": _inet(port), "tls-creds": "psk"},
            (f"tls-creds-psk,id=psk,endpoint=client,username={USER},dir={folder}",),
        )
        address: tuple[Any, Any] = (socket.AF_INET, ("127.0.0.1", port))
    else:
        path = folder / "nbd.sock"
        command += ["--unix", str(path)]
        unix = {"type": "unix", "path": str(path)}
        server = NbdServer(f"nbd+unix:///?socket={path}", {"driver": "nbd", "server": unix})
        address = (socket.AF_UNIX, str(path))
    if far:
        command += ["--filter=delay"]
    command += ["memory", f"size={size_bytes}", *([f"wdelay={FAR_MS}ms"] if far else [])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_until_it_listens(process, *address)
            yield server
        finally:
            process.terminate()


def _inet(port: int) -> dict[str, str]:
    return {"type": "inet", "host": "127.0.0.1", "port": str(port)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_listens(process: subprocess.Popen[bytes], family: int, address: Any) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.connect(address)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError("nbdkit does not start")
        time.sleep(0.02)


@contextlib.contextmanager
def bench_folder(plan: Plan, place: str) -> Iterator[Path]:
    folder = plan.directory_of[place] / f"vhostsync-bench-network-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(plan: Plan, place: str, work: Work, names: tuple[str, ...], **how: bool) -> list[Round]:
    """All who mirror on one source, to one export; who does not, on a file of its own. Who is not measured is
    idle."""
    size = plan.bytes_of[place]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(bench_folder(plan, place))
        server = stack.enter_context(memory_server(folder, size, **how))

        @functools.cache
        def file(name: str) -> Path:
            return make_file(folder / f"{name}.img", size, direct=plan.direct(place))

        def start(name: str) -> Contender:
            if name == "raw":
                return RawNbd(server.uri)
            source = file("alone" if name == "ours" else "source")
            if name == "rival":
                return Rival(
                    name, folder, source, direct=plan.direct(place), destination=server.options,
                    objects=server.objects,
                )  # fmt: skip
            to = server.uri if name == "ours mirrored" else None
            return Ours(name, folder, source, direct=plan.direct(place), destination=to)

        running: dict[str, Contender] = {}
        for name in (each for each in names if each not in plan.without):
            running[name] = start(name)
            stack.callback(running[name].close)
        return in_turn(plan, running, work)


def in_turn(plan: Plan, running: dict[str, Contender], work: Work) -> list[Round]:
    return [
        {name: who.measure(work, plan.seconds, plan.mirrored_ramp_s) for name, who in running.items()}
        for _ in range(plan.pairs)
    ]


class RawNbd(Contender):
    """What a client of libnbd reaches that does nothing else (nbd_loop.c)."""

    def __init__(self, uri: str) -> None:
        self.name = "raw"
        self._uri = uri

    def measure(self, work: Work, seconds: float, ramp: float) -> Sample:
        words = (self._uri, seconds, ramp, work.depth, work.block_bytes, work.flush_every)
        command = [str(find_nbd_loop()), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(done.stderr.strip())
        return Sample(json.loads(done.stdout))


def measure_mirrored(plan: Plan) -> list[Round]:
    return _measure(plan, "memory", WRITES_32, ("raw", "rival", "ours mirrored"))


def measure_mirrored_tls(plan: Plan) -> list[Round]:
    return _measure(plan, "memory", WRITES_32, ("raw", "rival", "ours mirrored"), tls=True)


def measure_far(plan: Plan) -> list[Round]:
    """On the disk, where one write at a time stays below what 64 requests of 5 ms let through."""
    return _measure(plan, "disk", Work("randwrite", 1), ("ours", "rival", "ours mirrored"), far=True)


def measure_far_flushed(plan: Plan) -> list[Round]:
    work = Work("randwrite", 1, flush_every=1)
    return _measure(plan, "memory", work, ("raw", "rival", "ours mirrored"), far=True)


def measure_copy_to_nbd(plan: Plan) -> list[Round]:
    """All of a disk in memory to the export: nbdcopy, and ours from mirror-start to steady."""
    require("nbdcopy")
    size = plan.bytes_of["memory"]
    with bench_folder(plan, "memory") as folder, memory_server(folder, size) as server:
        source = make_file(folder / "source.img", size, direct=False)
        with contextlib.closing(Ours("ours", folder, source, direct=False)) as ours:
            return [_copy_both_ways(ours, source, server.uri, size) for _ in range(plan.pairs)]


def _copy_both_ways(ours: Ours, source: Path, uri: str, size: int) -> Round:
    begin = time.monotonic()
    command = ["nbdcopy", "--flush", str(source), uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"nbdcopy: {done.stderr.strip()[-300:]}")
    other = size / (time.monotonic() - begin) / 1e6
    begin = time.monotonic()
    ours.start_mirror(uri)
    speed = size / (time.monotonic() - begin) / 1e6
    ours.leave_mirror()
    return {"raw": Sample({"mb_per_s": other}), "ours": Sample({"mb_per_s": speed})}


def measure_data_thread(plan: Plan) -> list[Round]:
    """Its own time a request with a destination over TLS, and with a file beside the source."""
    size = plan.bytes_of["memory"]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(bench_folder(plan, "memory"))
        server = stack.enter_context(memory_server(folder, size, tls=True))
        destinations: dict[str, str | Path] = {
            "near": make_file(folder / "near.img", size, direct=False), "far": server.uri
        }
        running = {}
        for name, to in destinations.items():
            source = make_file(folder / f"source-{name}.img", size, direct=False)
            running[name] = Ours(name, folder, source, direct=False, destination=to)
            stack.callback(running[name].close)
        return [_data_thread_round(running, plan) for _ in range(plan.pairs)]


def _data_thread_round(running: dict[str, Ours], plan: Plan) -> Round:
    us = {}
    for name, ours in running.items():
        before = _data_thread_s(ours.pid)
        sample = ours.measure(WRITES_32, plan.seconds, plan.mirrored_ramp_s)
        us[name] = (_data_thread_s(ours.pid) - before) / sample.detail["submitted"] * 1e6
    return {"ours mirrored": Sample({"data_us": us["far"], "of_near": us["far"] / us["near"]}, {"us": us})}


def _data_thread_s(pid: int) -> float:
    """Processor time of the thread that decides, to the nanosecond."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().strip() == "vhostsync-data":
            return int((task / "schedstat").read_text().split()[0]) / 1e9
    raise BenchError("the backend has no data thread")
