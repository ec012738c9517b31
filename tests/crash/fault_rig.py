# SPDX-License-Identifier: Apache-2.0
"""A real guest under a verified load, its backend, and what is looked at on both: the parts of a long run.

The guest runs from the beginning to the end. Its load notes what it has synced; `Rig.verify` looks for that
on an image, `Rig.verify_in_guest` through the guest's own disk, from where a new load goes on.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from tests.crash.fault_disks import Disk
from tests.crash.fault_figures import Figures, Life
from tests.daemon.rig import Mounted, await_true
from tests.guest.assets import GuestAssets
from tests.guest.backends import Vhostsync
from tests.guest.harness import Guest, GuestDisk, GuestError, Load, Report, machine_command, verify_blocks
from tests.guest.processes import ProcessError
from tests.guest.qmp_client import Qmp, QmpError
from tests.holding import holding
from tests.vhost_client import ConnectionLostError, Message, VhostUserClient
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord, Worth

LOG_MIB = 16
LOAD_BLOCKS = 6144
BLOCK_BYTES = 4096
QUEUES = 2
DESTINATION_TIMEOUT_S = 2
OPTIONS = (
    f"--log-size={LOG_MIB}M",
    f"--destination-timeout={DESTINATION_TIMEOUT_S}s",
    "--on-congestion=pull-ahead",
    "--on-source-error=switch",
    "--read-fallback",
)
WAIT_S = 90.0
"""For anything that the guest or the backend has to do by itself, on a machine that does much else."""


class LossError(Exception):
    """Something that was synced is not there."""


class Nuisance:
    """Clients that hang up midway and a second frontend that talks nonsense, all the time."""

    def __init__(self, work: Path, rng: random.Random, figures: Figures) -> None:
        self._control, self._socket = work / "disk.control", work / "disk.sock"
        self._rng, self._figures = rng, figures
        self._end = threading.Event()
        self.pause = threading.Lock()  # held: nobody is connected but the guest and the operator
        self._thread = threading.Thread(target=self._run, name="nuisance")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._end.wait(self._rng.uniform(0.2, 3)):
            act = self._rng.choice((self._hang_up, self._talk_nonsense))
            with self.pause, contextlib.suppress(OSError, ConnectionLostError):  # the backend may be dead
                act()

    def _hang_up(self) -> None:
        words = [
            b'{"execute": "qmp_capabilities"}{"execute": "query-stats"}{"execute": "query-mir',
            b'{"execute": "qmp_capabilities"}{"execute": "verify"}',
            b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-stats"}' * 200,
            b'{"execute": "qmp_capabilities"}{"execute": "resize"}',
            b"\xff\xfe" * 3000,
            b"[" * 60000,
        ]
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(self._control))
            self._figures.faults["control client hangs up midway"] += 1
            client.sendall(self._rng.choice(words))

    def _talk_nonsense(self) -> None:
        frontend = VhostUserClient(self._socket, timeout_s=5)
        try:
            self._figures.faults["second frontend talks nonsense"] += 1
            frontend.ask_u64(Message.GET_FEATURES)
            if self._rng.random() < 0.3:
                frontend.send_raw(self._rng.randbytes(self._rng.randrange(1, 400)))
            else:
                fd = os.memfd_create("nonsense")
                try:
                    for _ in range(self._rng.randrange(1, 6)):
                        message = self._rng.choice(list(Message))
                        payload = self._rng.randbytes(self._rng.choice((0, 8, 16, 40, 64)))
                        frontend.send(message, payload, fds=[fd] * self._rng.randrange(3))
                finally:
                    os.close(fd)
        finally:
            frontend.close()


class Rig:
    def __init__(self, assets: GuestAssets, work: Path, disks: tuple[Disk, ...], figures: Figures) -> None:
        self.assets, self.work, self.disks, self.figures = assets, work, disks, figures
        self.source = disks[0]
        self.backend = self._new_backend()
        self.rng = random.Random(figures.seed)
        self.nuisance = Nuisance(work, random.Random(figures.seed + 1), figures)
        self._load_seed = 0
        try:
            self.guest = Guest(
                assets,
                work,
                machine_command([GuestDisk(self.backend.socket, queues=QUEUES, chardev="reconnect=1")]),
            )
        except BaseException:
            self.backend.__exit__(None, None, None)
            raise
        self.load = self._new_load()
        self.nuisance.start()

    def close(self) -> None:
        Mounted.thaw_all()
        self.nuisance.close()
        self.guest.kill()
        self.backend.__exit__(None, None, None)

    # -- the backend ----------------------------------------------------------

    def _new_backend(self, *, resume: bool = True) -> Vhostsync:
        resumes = f"--resume-mirror={'on' if resume else 'off'}"
        options = (*OPTIONS, f"--bitmap={self.work / 'bits'}", resumes)
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                backend = Vhostsync(self.work, self.source.path, queues=QUEUES, options=options)
                break
            except ProcessError as error:
                # Rings of other programs of this user count, and that of a killed one for a moment.
                if "locked memory is too small" not in str(error) or time.monotonic() > deadline:
                    raise
                self.figures.done["start tried again: locked memory"] += 1
                time.sleep(0.5)
        self.figures.lives.append(Life(backend.process.pid))
        return backend

    @property
    def qmp(self) -> Qmp:
        return self.backend.qmp

    def record(self) -> StateRecord | None:
        return StateFile(self.work / "disk.state").load()

    def serve_again(self, *, resume: bool) -> None:
        """On the disk that the record names, as an operator would; returns when the guest goes on, and with
        `resume` when the mirror does, if there was one."""
        record = self.record()
        if record is not None:
            self.source = self.disk_at(record.current.path)
        self.backend = self._new_backend(resume=resume)
        if resume and record is not None and record.wanted is not None:
            self.await_state("syncing", "steady", "ahead", "degraded")
            self.figures.done["mirror resumed by a restart"] += 1
        self.report()

    def disk_at(self, path: str) -> Disk:
        return next(disk for disk in self.disks if str(disk.path) == path)

    def peer(self) -> Disk:
        record = self.record()
        assert record is not None and record.peer is not None
        return self.disk_at(record.peer.path)

    def kill(self) -> None:
        """SIGKILL. What a hanging disk has under way keeps the process from ending until it goes on."""
        self.backend.process.signal(signal.SIGKILL)
        time.sleep(self.rng.uniform(0, 0.3))  # a destination that hangs does so for a while after it
        Mounted.thaw_all()
        self.backend.process.kill()
        self.backend.__exit__(None, None, None)

    def stop(self) -> None:
        self.count_requests()
        self.backend.stop()
        self.backend.__exit__(None, None, None)

    def count_requests(self) -> None:
        queues = self.qmp.execute("query-stats")["queues"]
        self.figures.engine_requests += sum(
            kind["operations"] for queue in queues for kind in queue["operations"].values()
        )

    def mirror(self) -> dict[str, Any]:
        return self.backend.status()

    @property
    def state(self) -> str:
        return str(self.mirror()["state"])

    def await_state(self, *states: str) -> str:
        await_true(lambda: self.state in states, f"the mirror is {' or '.join(states)}", WAIT_S)
        return self.state

    def start_mirror(self, destination: Disk, **arguments: Any) -> None:
        deadline = time.monotonic() + WAIT_S
        full = {"full": True} if destination.spoiled else {}
        while True:
            try:
                self.qmp.execute("mirror-start", destination=str(destination.path), **full, **arguments)
                break
            except QmpError as error:  # what was given up is not over yet
                if "not over yet" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        destination.spoiled = False

    def was_steady_all_the_time(self) -> bool:
        """Since `qmp.events` was cleared in steady."""
        self.qmp.execute("query-status")
        return not any(
            event["event"] == "MIRROR_STATE_CHANGE" and event["data"]["former"] == "steady"
            and event["data"]["state"] in ("ahead", "degraded")
            for event in self.qmp.events
        )  # fmt: skip

    # -- what must hold -------------------------------------------------------

    def report(self) -> Report:
        """Of a sync that began after this call."""
        return self.load.fresh_report(WAIT_S)

    def _new_load(self) -> Load:
        self._load_seed += 1
        load = self.guest.start_load(
            "/dev/vda", blocks=LOAD_BLOCKS, threads=8, seed=self.figures.seed * 10000 + self._load_seed
        )
        load.next_report(WAIT_S)
        return load

    def verify(self, disk: Disk, *, synced: int, issued: int = 0) -> None:
        try:
            said = verify_blocks(self.assets, disk.path, self.load, synced=synced, issued=issued)
        except GuestError as error:
            self.figures.losses += 1
            raise LossError(str(error)) from error
        self.figures.verifications += 1
        self.figures.bytes_verified_on_host += BLOCK_BYTES * _holding(said)

    def verify_in_guest(self) -> None:
        """The load ends, all that it synced is read back through the guest's disk, and a new one begins."""
        last = self.guest.stop_load(self.load)
        self.figures.guest_writes += last.synced
        self.figures.guest_syncs += self.load.reports()
        self.figures.slowest_write_ms = max(self.figures.slowest_write_ms, self.load.slowest_ms())
        self.guest.run("echo 3 >/proc/sys/vm/drop_caches")
        command = f"vhs-load verify /dev/vda {self.load.options} --synced {last.synced}"
        try:
            said = self.guest.run(command, timeout_s=WAIT_S)
        except GuestError as error:
            self.figures.losses += 1
            raise LossError(str(error)) from error
        self.figures.verifications += 1
        self.figures.bytes_verified_in_guest += BLOCK_BYTES * _holding(said)
        self.figures.guest_io_errors = self.guest.io_trouble()
        if self.figures.guest_io_errors:
            raise LossError(f"the guest's kernel saw {self.figures.guest_io_errors}")
        self.load = self._new_load()

    def verify_after_kill(self) -> None:
        """All that the guest was told is synced is on the disk that the record names, and on its peer if the
        record trusts it. The guest waits, so the last that it was told came from the dead backend."""
        told = self.load.latest_report()
        record = self.record()
        if record is None:
            self.verify(self.source, synced=told.synced)
            return
        self.source = self.disk_at(record.current.path)
        self.verify(self.source, synced=told.synced)
        if record.peer_worth is Worth.UP_TO_DATE:
            self.verify(self.peer(), synced=told.synced)
            self.figures.done["both disks verified after a kill in steady"] += 1

    def sample(self) -> None:
        """What the backend holds, in passthrough, with the guest and one operator connected."""
        life = self.figures.lives[-1]
        with self.nuisance.pause:
            await_true(lambda: self.qmp.execute("query-status")["frontends"] == 1, "only the guest is there")
            now = holding(life.pid)
            deadline = time.monotonic() + 3  # sockets of clients that hung up are closed a moment later
            while life.samples and now.descriptors > life.samples[0].descriptors:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
                now = holding(life.pid)
        life.samples.append(now)


def _holding(said: str) -> int:
    """Of vhs-load's summary: blocks that were found to be right."""
    return int(dict(word.split("=") for word in said.split() if "=" in word)["holding"])
