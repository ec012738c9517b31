# SPDX-License-Identifier: Apache-2.0
"""The vhost-user backends that a guest's disk can come from: vhostsync, and qemu-storage-daemon as a second
opinion.

A test talks to `Backend` and does not know which it has; VHOSTSYNC_TEST_BACKEND=qsd runs the guest tests
against qemu-storage-daemon, so that a failure can be told apart: is it the backend or the test?
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tests.guest.processes import Process, ProcessError, wait_listening
from tests.guest.qmp_client import Qmp


class Backend(Protocol):
    """A running backend with one disk."""

    socket: Path
    control: Path
    process: Process

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def start_mirror(self, destination: Path, *, speed: int = 0) -> None:
        """Attach a destination (an existing image of the right size). `speed` in bytes per second, 0: no
        limit."""

    def wait_steady(self, timeout_s: float = 120.0) -> None:
        """Return when the destination holds all that the source does."""

    def switch(self, *, keep_mirror: bool = False) -> float | None:
        """Move the guest to the destination; the pause in milliseconds, where the backend reports one."""

    def stop(self) -> None:
        """End it as a service manager would, and check that it ended well."""


def vhostsync_command() -> list[str]:
    """The program under test, from the same environment as the tests."""
    beside = Path(sys.executable).parent / "vhostsync"
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "vhostsync"]


class _Daemon:
    """What both have in common: a process, a socket for the guest and one for control."""

    def __init__(
        self, name: str, command: Sequence[str | Path], socket: Path, control: Path, log: Path
    ) -> None:
        self.socket = socket
        self.control = control
        self.process = Process(name, command, log)
        self._qmp: Qmp | None = None
        try:
            wait_listening(self.process, socket)
            wait_listening(self.process, control)
        except BaseException:
            self.process.kill()
            raise

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            self._qmp = Qmp(self.control)
        return self._qmp

    def _close_control(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def stop(self) -> None:
        self._close_control()
        code = self.process.terminate()
        if code != 0:
            raise ProcessError(f"{self.process.name} ended with {code}:\n{self.process.last_output()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_control()
        self.process.kill()
        if kind is not None and issubclass(kind, Exception):
            print(f"--- the last output of {self.process.name}:\n{self.process.last_output(60)}")


class Vhostsync(_Daemon):
    """`vhostsync serve`."""

    def __init__(
        self, folder: Path, disk: Path, *, queues: int = 1, options: Sequence[str] = (), name: str = "disk",
        prefix: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`prefix`: words before the command that make it run elsewhere, as `ip netns exec`."""
        socket = folder / f"{name}.sock"
        control = folder / f"{name}.control"
        command = [
            *prefix,
            *vhostsync_command(),
            "serve",
            "--socket-path",
            socket,
            "--blk-file",
            disk,
            "--control",
            control,
            "--num-queues",
            str(queues),
            "--state-file",
            folder / f"{name}.state",
            *options,
        ]
        super().__init__(
            "vhostsync serve", [str(word) for word in command], socket, control, folder / f"{name}.log"
        )

    def start_mirror(self, destination: Path, *, speed: int = 0) -> None:
        arguments: dict[str, Any] = {"destination": str(destination)}
        if speed:
            arguments["speed"] = speed
        self.qmp.execute("mirror-start", **arguments)

    def wait_steady(self, timeout_s: float = 120.0) -> None:
        if self.status()["state"] != "steady":
            self.qmp.wait_event("MIRROR_STATE_CHANGE", timeout_s, state="steady")

    def switch(self, *, keep_mirror: bool = False) -> float | None:
        result = self.qmp.execute("switch", keep_mirror=keep_mirror)
        return float(result["pause-us"]) / 1000

    def status(self) -> dict[str, Any]:
        """The answer to query-mirror."""
        status: dict[str, Any] = self.qmp.execute("query-mirror")
        return status


class StorageDaemon(_Daemon):
    """qemu-storage-daemon with blockdev-mirror in write-blocking mode: the nearest thing that exists
    already."""

    def __init__(
        self, folder: Path, disk: Path, *, queues: int = 1, options: Sequence[str] = (), name: str = "disk"
    ) -> None:
        socket = folder / f"{name}.sock"
        control = folder / f"{name}.control"
        disk_options = f"driver=file,node-name=source,filename={disk},cache.direct=on,discard=unmap"
        export = f"type=vhost-user-blk,id=export,node-name=source,writable=on,num-queues={queues}"
        command = [
            "qemu-storage-daemon",
            "--chardev", f"socket,id=qmp,path={control},server=on,wait=off", "--monitor", "chardev=qmp",
            "--blockdev", disk_options,
            "--export", f"{export},addr.type=unix,addr.path={socket}",
            *options,
        ]  # fmt: skip
        super().__init__("qemu-storage-daemon", command, socket, control, folder / f"{name}.log")

    def start_mirror(self, destination: Path, *, speed: int = 0) -> None:
        self.qmp.execute(
            "blockdev-add",
            driver="file",
            node_name="destination",
            filename=str(destination),
            cache={"direct": True},
            discard="unmap",
        )
        self.qmp.execute(
            "blockdev-mirror",
            job_id="mirror",
            device="source",
            target="destination",
            sync="full",
            copy_mode="write-blocking",
            speed=speed,
        )

    def wait_steady(self, timeout_s: float = 120.0) -> None:
        self.qmp.wait_event("BLOCK_JOB_READY", timeout_s)

    def switch(self, *, keep_mirror: bool = False) -> float | None:
        assert not keep_mirror, "qemu-storage-daemon has no such thing"
        self.qmp.execute("block-job-complete", device="mirror")
        self.qmp.wait_event("BLOCK_JOB_COMPLETED")
        return None


def storage_daemon_wanted() -> bool:
    """Whether the tests run against qemu-storage-daemon instead of vhostsync."""
    return os.environ.get("VHOSTSYNC_TEST_BACKEND") == "qsd"


def start_backend(
    folder: Path, disk: Path, *, queues: int = 1, options: Sequence[str] = (), name: str = "disk"
) -> Backend:
    """Start the backend that the tests run against, with one disk; options are for vhostsync alone."""
    if storage_daemon_wanted():
        if shutil.which("qemu-storage-daemon") is None:
            raise ProcessError("qemu-storage-daemon is not installed")
        return StorageDaemon(folder, disk, queues=queues, name=name)
    return Vhostsync(folder, disk, queues=queues, options=options, name=name)
