# SPDX-License-Identifier: Apache-2.0
"""A Ceph cluster of a test's own: a monitor and some OSDs as child processes, with cephx, on ports and in a
folder of their own, started within seconds and gone with their folder.

No manager: RBD needs none. `ceph` as a program of this module starts one by hand:

    python -m tests.network.ceph_cluster          prints how to reach it, and ends with its standard input
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.guest.processes import Process
from tests.sizes import GIB
from vhostsync.storage.ceph_client import Access, Client

PACKAGES = ("ceph-mon", "ceph-osd", "ceph-common")
PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "rbd", "rados", "ceph-authtool", "monmaptool")
POOL = "rbd"
PORTS = 60  # of one cluster
START_S = 60.0

CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}/0]
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind msgr1 = false
ms bind port min = {first_port}
ms bind port max = {last_port}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
run dir = {folder}
pid file =
log file = {folder}/log/$name.log
admin socket = {folder}/$name.asok
crash dir = {folder}/crash
keyring = {folder}/keyring
osd pool default size = {size}
osd pool default min size = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
osd heartbeat grace = 6
osd heartbeat interval = 2
mon osd down out interval = 600
mon osd adjust heartbeat grace = false
mon osd min down reporters = 1
mon data avail warn = 1
mon data avail crit = 1

[mon]
mon data = {folder}/mon
mon initial members = a
[osd]
osd data = {folder}/osd$id
osd objectstore = bluestore
bluestore block size = {bytes}
bluestore fsck on mount = false
osd memory target = 939524096
osd pool default read lease ratio = 100
osd max backfills = 8
osd class update on start = false

[client]
log file =
admin socket =
pid file =
"""


def lacking() -> str | None:
    """Why there can be no cluster here, in words."""
    if importlib.util.find_spec("vhostsync._rbd") is None:
        return "vhostsync was built without librbd (package librbd-dev)"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"needs the packages {' '.join(PACKAGES)} (no {missing[0]})" if missing else None


def _free_ports(count: int) -> int:
    """The first of so many that nobody has, below those that the kernel gives away by itself."""
    for _ in range(100):
        first = random.randrange(10000, 32000 - count)
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
        return first
    raise AssertionError("no free ports")


@dataclass
class Osd:
    number: int
    process: Process | None = None


def _roomy() -> Path:
    """In memory, where there is enough and files there can be opened for direct I/O (Linux 6.6): that is
    several times as fast on a busy machine."""
    memory = Path("/dev/shm")
    try:
        if shutil.disk_usage(memory).free < 4 * GIB:
            return Path("/var/tmp")
        with tempfile.NamedTemporaryFile(dir=memory) as file:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return Path("/var/tmp")
    return memory


def _is_stopped(osd: Osd) -> bool:
    assert osd.process is not None
    stats = [path.read_text() for path in Path(f"/proc/{osd.process.pid}/task").glob("*/stat")]
    return all(text.rpartition(")")[2].split()[0] == "T" for text in stats)


class CephCluster:
    """A context manager. Its pool is called `rbd`."""

    def __init__(self, osds: int = 1, *, store_bytes: int = 8 * GIB, parent: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ceph-", dir=parent or _roomy()))
        self.fsid = str(uuid.uuid4())
        self.osds = [Osd(number) for number in range(osds)]
        self._store_bytes = store_bytes
        self._port = _free_ports(PORTS)
        self._monitor: Process | None = None

    # ---- its life -------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._make()
            self.start_monitor()
            for osd in self.osds:
                self._make_osd(osd)
            self._await_osds()
            self.command("osd pool create", pool=POOL, pg_num=8, pgp_num=8, pool_type="replicated")
            # Else a user of a namespace alone might have to make its first image, and may not.
            self.rbd("pool", "init", POOL)
            return self
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in (self._monitor, *(osd.process for osd in self.osds)):
            if process is not None:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self) -> None:
        for name in ("log", "crash", "mon"):
            (self.folder / name).mkdir()
        self.conf.write_text(
            CONFIGURATION.format(
                fsid=self.fsid, port=self._port, folder=self.folder, size=len(self.osds),
                first_port=self._port + 1, last_port=self._port + PORTS - 1, bytes=self._store_bytes,
            )
        )  # fmt: skip
        keyring = self.keyring
        self._run(
            "ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"
        )
        self._run(
            "ceph-authtool", keyring, "--gen-key", "-n", "client.admin",
            "--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *",
        )  # fmt: skip
        map_file = self.folder / "monmap"
        address = f"[v2:127.0.0.1:{self._port}/0]"
        self._run("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", address, map_file)
        monitor = ("ceph-mon", "--mkfs", "-i", "a", "-c", self.conf)
        self._run(*monitor, "--monmap", map_file, "--keyring", keyring)

    def _make_osd(self, osd: Osd) -> None:
        data = self.folder / f"osd{osd.number}"
        data.mkdir()
        known, name = str(uuid.uuid4()), f"osd.{osd.number}"
        self.command("osd new", uuid=known, id=osd.number)
        caps = ["osd", "allow *", "mon", "allow profile osd"]
        (data / "keyring").write_text(self.command("auth get-or-create", entity=name, caps=caps))
        words = ("ceph-osd", "-i", str(osd.number), "-c", self.conf)
        self._run(*words, "--mkfs", "--osd-uuid", known, "--no-mon-config")
        self.start_osd(osd)

    # ---- its daemons -------------------------------------------------------------------

    def start_monitor(self) -> None:
        self._monitor = Process(
            "ceph-mon", ["ceph-mon", "-f", "-i", "a", "-c", self.conf], self.folder / "log" / "mon.out"
        )

    def kill_monitor(self) -> None:
        assert self._monitor is not None
        self._monitor.kill()

    def start_osd(self, osd: Osd) -> None:
        osd.process = Process(
            f"osd.{osd.number}",
            ["ceph-osd", "-f", "-i", str(osd.number), "-c", self.conf,
             "--keyring", self.folder / f"osd{osd.number}" / "keyring"],
            self.folder / "log" / f"osd{osd.number}.out",
        )  # fmt: skip

    @contextlib.contextmanager
    def osds_stopped(self) -> Iterator[None]:
        """None of them does anything meanwhile (SIGSTOP)."""
        self._signal_osds(signal.SIGSTOP)
        # On a busy machine its threads may go on for a while.
        self._await(lambda: all(map(_is_stopped, self.osds)), "the stop")
        try:
            yield
        finally:
            self._signal_osds(signal.SIGCONT)

    @contextlib.contextmanager
    def osds_killed(self) -> Iterator[None]:
        for osd in self.osds:
            assert osd.process is not None
            osd.process.kill()
        try:
            yield
        finally:
            for osd in self.osds:
                self.start_osd(osd)
            self._await_osds()

    @contextlib.contextmanager
    def osd_killed(self, osd: Osd) -> Iterator[None]:
        """One of several; all are up again on return."""
        assert osd.process is not None
        osd.process.kill()
        osd.process = None
        try:
            yield
        finally:
            self.start_osd(osd)
            self._await_osds()

    @contextlib.contextmanager
    def monitor_killed(self) -> Iterator[None]:
        self.kill_monitor()
        try:
            yield
        finally:
            self.start_monitor()
            self.status()

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Nothing more may be written, as soon as the OSDs have noticed: so little counts as full."""
        self._set_full(1e-9, 1e-9, 1e-9)
        try:
            yield
        finally:
            self._set_full(0.85, 0.9, 0.95)

    def _set_full(self, *ratios: float) -> None:
        for word, ratio in zip(("nearfull", "backfillfull", "full"), ratios, strict=True):
            self.command(f"osd set-{word}-ratio", ratio=ratio)

    def _signal_osds(self, number: signal.Signals) -> None:
        for osd in self.osds:
            assert osd.process is not None
            osd.process.signal(number)

    def _await_osds(self) -> None:
        self._await(lambda: self.status()["num_up_osds"] == len(self.osds), "the OSDs")

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            for process in (self._monitor, *(osd.process for osd in self.osds)):
                if process is not None and not process.running:
                    raise AssertionError(f"{process.name} has ended:\n{process.last_output()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} of the cluster did not come up within {START_S:g} s")
            time.sleep(0.05)

    # ---- asking it ----------------------------------------------------------------------

    @property
    def conf(self) -> Path:
        return self.folder / "ceph.conf"

    @property
    def keyring(self) -> Path:
        return self.folder / "keyring"

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever is to be its administrator."""
        return {"CEPH_CONF": str(self.conf)}

    def ceph(self, *words: str) -> str:
        return self._run("ceph", "-c", self.conf, "--connect-timeout", "15", *words)

    def rbd(self, *words: str) -> str:
        return self._run("rbd", "-c", self.conf, *words)

    def rados(self, *words: str) -> str:
        return self._run("rados", "-c", self.conf, "--pool", POOL, *words)

    def command(self, prefix: str, **arguments: Any) -> str:
        """What the monitor answers; waits for one that begins. CephError."""
        client = Client(Access(conf=str(self.conf)))
        try:
            client.connect()
            return client.command(prefix, **arguments)
        finally:
            client.close()

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.command("osd stat", format="json"))
        return found

    def add_user(self, name: str, *caps: str) -> Path:
        """A user with these capabilities; its keyring."""
        keyring = self.folder / f"{name}.keyring"
        keyring.write_text(self.ceph("auth", "get-or-create", f"client.{name}", *caps))
        return keyring

    def _run(self, *words: str | Path) -> str:
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, check=False, timeout=START_S,
            env={**os.environ, "CEPH_ARGS": ""},
        )  # fmt: skip
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, words[0], done.stdout, done.stderr)
        return done.stdout


if __name__ == "__main__":
    began = time.monotonic()
    with CephCluster(int(sys.argv[1]) if len(sys.argv) > 1 else 1) as cluster:
        print(f"CEPH_CONF={cluster.conf} ({time.monotonic() - began:.1f} s)", flush=True)
        sys.stdin.read()
