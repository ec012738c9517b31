# SPDX-License-Identifier: Apache-2.0
"""An engine on a real file (c_shim/disk/disk_file.c)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine_driver import DiskOp, EngineDriver, EngineOptions, EngineTransport, MemoryDisk
from tests.frontend import Frontend, Status
from tests.guest_ring import GuestMemory
from tests.model.rig import BLOCK, pattern
from tests.sizes import MIB
from vhostsync._shim import ffi, lib


class FileDisk(MemoryDisk):
    """A file, for one engine. What a test disk can do besides it cannot."""

    def __init__(self, path: Path, *, direct: bool) -> None:
        self.fd = os.open(path, os.O_RDWR)
        probe = ffi.new("struct vs_disk_probe *")
        assert lib.vs_disk_probe_fd(self.fd, int(direct), probe) == 0
        self.bytes = int(probe.bytes)
        self.handle: Any = lib.vs_disk_file(self.fd, probe, int(direct))

    def hand_over(self) -> Any:
        return self.handle

    def release_all(self) -> None:
        pass

    def count(self, op: DiskOp) -> int:
        return 0

    @contextmanager
    def without_flushes(self) -> Iterator[None]:
        """A pipe stands in its place meanwhile, which cannot be flushed."""
        file, (reader, writer) = os.dup(self.fd), os.pipe()
        os.dup2(writer, self.fd)
        yield
        os.dup2(file, self.fd)
        for fd in (file, reader, writer):
            os.close(fd)


@pytest.mark.parametrize("direct", [False, True])
def test_a_failed_flush_of_a_file_stays_an_error(tmp_path: Path, direct: bool) -> None:
    """With direct I/O too: file systems let it through the page cache where they have to, and there a second
    fdatasync would succeed without the data."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4 * MIB))
    disk = FileDisk(path, direct=direct)
    with EngineDriver(EngineOptions(disk.bytes), disk) as driver:
        guest = Frontend(EngineTransport(driver), queues=1, queue_size=16, memory=GuestMemory((MIB,)))
        guest.start()
        guest.wait(guest.write(0, pattern(1)))
        assert guest.flush_now().ok
        guest.wait(guest.write(BLOCK, pattern(2)))
        with disk.without_flushes():
            assert guest.flush_now().status == Status.IOERR
        assert guest.flush_now().status == Status.IOERR
        guest.close()
