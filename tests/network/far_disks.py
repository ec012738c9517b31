# SPDX-License-Identifier: Apache-2.0
"""A disk of each kind that there is over a network, behind one face: what a test of all of them may do to it.
Its server is a real one, a process of this host: qemu-nbd, the OSD of a Ceph cluster, `vhostsync receive`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tests.daemon.rig import image
from tests.network.ceph_cluster import CephCluster
from tests.network.receivers import Authority, Receiving
from tests.network.unit import QemuNbdUnit


class FarDisk(Protocol):
    """It is as large as it was made, and empty."""

    name: str
    """As vhostsync is told."""
    options: tuple[str | Path, ...]
    """Of `serve`: so that it comes back by itself when it was lost."""

    def content(self) -> Path:
        """A file with what it holds now."""
        ...

    def used_bytes(self) -> int:
        """So much is not a hole."""
        ...

    def spoil(self, offset: int, data: bytes) -> None:
        """Written to it behind everybody's back."""
        ...

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        """It answers nothing meanwhile, unless whoever wants it back has its server ended."""
        ...


@contextlib.contextmanager
def _process_stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)
        os.fsync(file.fileno())


class NbdDisk:
    """Of a qemu-nbd that the fence command starts anew."""

    def __init__(self, server: QemuNbdUnit, raw: Path, pid_file: Path) -> None:
        self._raw, self._pid_file = raw, pid_file
        self.name = server.uri
        self.options: tuple[str | Path, ...] = ("--fence-command", server.restart_command)

    def content(self) -> Path:
        return self._raw

    def used_bytes(self) -> int:
        return self._raw.stat().st_blocks * 512

    def spoil(self, offset: int, data: bytes) -> None:
        _write_at(self._raw, offset, data)

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        return _process_stopped(int(self._pid_file.read_text()))


class ReceivedDisk:
    def __init__(self, receiving: Receiving) -> None:
        self._receiving = receiving
        self.name = f"receive://{receiving.host}:{receiving.port}?tls-certificates={receiving.certificates}"
        self.options: tuple[str | Path, ...] = ()

    def content(self) -> Path:
        return self._receiving.image

    def used_bytes(self) -> int:
        return self._receiving.image.stat().st_blocks * 512

    def spoil(self, offset: int, data: bytes) -> None:
        _write_at(self._receiving.image, offset, data)

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        return _process_stopped(self._receiving.status()["server"])


class RbdDisk:
    _numbers = itertools.count()

    def __init__(self, cluster: CephCluster, folder: Path, mibs: int) -> None:
        self._cluster, self._folder = cluster, folder
        self.image = f"rbd/far{next(self._numbers)}"
        self.name = f"rbd:{self.image}"
        self.options: tuple[str | Path, ...] = ("--ceph-conf", cluster.conf)
        cluster.rbd("create", self.image, "--size", f"{mibs}M")

    def content(self) -> Path:
        path = self._folder / "exported"
        path.unlink(missing_ok=True)
        self._cluster.rbd("export", "--no-progress", self.image, str(path))
        return path

    def used_bytes(self) -> int:
        found: dict[str, Any] = json.loads(self._cluster.rbd("du", self.image, "--format", "json"))
        return int(found["images"][0]["used_size"])

    def spoil(self, offset: int, data: bytes) -> None:
        """In its object: the image itself is locked."""
        shown: dict[str, Any] = json.loads(self._cluster.rbd("info", self.image, "--format", "json"))
        number, at = divmod(offset, shown["object_size"])
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            self._cluster.rados(
                "put", f"{shown['block_name_prefix']}.{number:016x}", file.name, "--offset", str(at)
            )

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        return self._cluster.osds_stopped()


@contextlib.contextmanager
def nbd_disk(folder: Path, mibs: int) -> Iterator[FarDisk]:
    raw = image(folder / "there.img", mibs, filled_mib=0)
    with QemuNbdUnit(folder, raw) as server:
        yield NbdDisk(server, raw, folder / "server.pid")


@contextlib.contextmanager
def received_disk(folder: Path, mibs: int, certificates: Path) -> Iterator[FarDisk]:
    raw = image(folder / "there.img", mibs, filled_mib=0)
    with Receiving(folder, raw, certificates) as receiving:
        yield ReceivedDisk(receiving)


def certificates_of_both(folder: Path) -> Path:
    return Authority(folder / "ca").issue(folder / "both", "server", "client")
