# SPDX-License-Identifier: Apache-2.0
"""NBD servers as processes: nbdkit, qemu-nbd, qemu-storage-daemon. Each is up when it is entered, and gone
when it is left; `uri` is how vhostsync names its export."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.guest.processes import Process, ProcessError

WAIT_S = 20.0
MIBS = 16  # of the disks that conftest.py makes
PACKAGES = {
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "certtool": "gnutls-bin",
    "psktool": "gnutls-bin",
}


def needs(*programs: str) -> None:
    """Skips, with the name of the package that has it."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (package {PACKAGES.get(program, program)})")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """One on a Unix socket in `folder`, or, with a port, on that of 127.0.0.1. It can be started again after
    it was killed."""

    program = ""

    def __init__(self, folder: Path, *, name: str = "nbd", port: int | None = None, tls: str = "") -> None:
        """`tls`: what the URI says of it: the user, `@` and the query's words."""
        needs(self.program)
        self.folder = folder
        self.name = name
        self.port = port
        self.socket = folder / f"{name}.sock"
        self._tls = tls
        self.process: Process | None = None

    @property
    def uri(self) -> str:
        scheme = "nbds" if self._tls else "nbd"
        user, at, query = self._tls.rpartition("@")
        if self.port is None:
            words = "&".join(filter(None, (f"socket={self.socket}", query)))
            return f"{scheme}+unix://{user}{at}/{self.export}?{words}"
        return f"{scheme}://{user}{at}{self.host}:{self.port}/{self.export}" + (f"?{query}" if query else "")

    host = "127.0.0.1"
    export = ""

    def words(self) -> Sequence[str | Path]:
        raise NotImplementedError

    def start(self) -> None:
        if self.port is None:
            self.socket.unlink(missing_ok=True)
        self.process = Process(self.program, self.words(), self.folder / f"{self.name}.log")
        deadline = time.monotonic() + WAIT_S
        while not self._listens():
            if not self.process.running or time.monotonic() > deadline:
                raise ProcessError(f"{self.program} does not listen:\n{self.process.last_output()}")
            time.sleep(0.01)

    def _listens(self) -> bool:
        """By what the kernel says: a connection would count as one for the filters."""
        assert self.process is not None
        if self.port is None:
            return f" {self.socket}\n" in Path("/proc/net/unix").read_text()
        wanted = f":{self.port:04X} 00000000:0000 0A"
        return wanted in Path("/proc/net/tcp").read_text()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.signal(number)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.signal(signal.SIGCONT)
            self.process.kill()

    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if kind is not None:
            print(f"--- the last output of {self.name}:\n{self.log()[-4000:]}")


class Nbdkit(Server):
    """`plugin`: the plugin's words; filters come before it."""

    program = "nbdkit"

    def __init__(
        self, folder: Path, *plugin: str, filters: Sequence[str] = (), options: Sequence[str | Path] = (),
        name: str = "nbd", port: int | None = None, tls: str = "",
    ) -> None:  # fmt: skip
        super().__init__(folder, name=name, port=port, tls=tls)
        self.plugin = plugin
        self.filters = tuple(filters)
        self.options = tuple(options)

    def words(self) -> Sequence[str | Path]:
        where: tuple[str | Path, ...] = ("-U", self.socket)
        if self.port is not None:
            where = ("--ipaddr", "127.0.0.1", "--port", str(self.port))
        filters = [f"--filter={each}" for each in self.filters]
        return ["nbdkit", "--foreground", "--exit-with-parent", *where, *self.options, *filters, *self.plugin]


class QemuNbd(Server):
    program = "qemu-nbd"

    def __init__(
        self, folder: Path, image: Path, *options: str, image_format: str = "raw", name: str = "nbd",
        port: int | None = None, tls: str = "",
    ) -> None:  # fmt: skip
        super().__init__(folder, name=name, port=port, tls=tls)
        self.image = image
        self.image_format = image_format
        self.options = options

    def words(self) -> Sequence[str | Path]:
        where: tuple[str | Path, ...] = ("--socket", self.socket)
        if self.port is not None:
            where = ("--bind", "127.0.0.1", "--port", str(self.port))
        return [
            "qemu-nbd", "--persistent", "--format", self.image_format, "--discard", "unmap",
            *where, *self.options, self.image,
        ]  # fmt: skip


class StorageDaemon(Server):
    """qemu-storage-daemon, which shows the image as the export `disk`."""

    program = "qemu-storage-daemon"
    export = "disk"

    def __init__(self, folder: Path, image: Path, *, image_format: str = "raw", name: str = "nbd") -> None:
        super().__init__(folder, name=name)
        self.image = image
        self.image_format = image_format

    def words(self) -> Sequence[str | Path]:
        file = {"driver": "file", "node-name": "file", "filename": str(self.image), "discard": "unmap"}
        node = {"driver": self.image_format, "node-name": "disk", "file": "file", "discard": "unmap"}
        server = f"addr.type=unix,addr.path={self.socket}"
        return [
            "qemu-storage-daemon", "--blockdev", json.dumps(file), "--blockdev", json.dumps(node),
            "--nbd-server", server, "--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on",
        ]  # fmt: skip


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
