# SPDX-License-Identifier: Apache-2.0
"""Disks of a long run that can be made to fail, with real parts and as often as wanted.

`HangingDisk` is an image in an ext4 of its own: frozen, every write to it hangs. `FailingDisk` is a loop
device over a file with holes in a tmpfs: when that is filled up, the block layer fails each write to a hole.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.daemon.rig import Mounted, ext4, loop_device, tmpfs
from tests.guest.images import new_image


@dataclass
class Disk:
    """`spoiled`: its content was changed by somebody else, so it has to be copied anew."""

    path: Path
    spoiled: bool = False


@dataclass
class HangingDisk(Disk):
    files: Mounted | None = None

    def hang(self) -> None:
        assert self.files is not None
        self.files.freeze()

    def go_on(self) -> None:
        assert self.files is not None
        self.files.thaw()


@dataclass
class FailingDisk(Disk):
    backing: Path = Path()

    def fail_holes(self) -> None:
        """From now on a write fails where there is a hole."""
        with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(64 << 10))

    def fail_everywhere(self) -> None:
        """What it holds is lost, and every write fails."""
        self.spoiled = True
        length = str(self.backing.stat().st_size)
        subprocess.run(["fallocate", "--punch-hole", "--length", length, str(self.backing)], check=True)
        self.fail_holes()

    def mend(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def hole(self, begin: int, end: int, length: int) -> int | None:
        """The first aligned range of that many bytes from `begin` on that is a hole."""
        fd = os.open(self.backing, os.O_RDONLY)
        try:
            for offset in range(begin, end, length):
                try:
                    data = os.lseek(fd, offset, os.SEEK_DATA)
                except OSError:  # no data up to the end
                    return offset
                if data >= offset + length:
                    return offset
            return None
        finally:
            os.close(fd)

    @property
    def _ballast(self) -> Path:
        return self.backing.with_name("ballast")


@contextlib.contextmanager
def hanging_disk(folder: Path, mib: int) -> Iterator[HangingDisk]:
    folder.mkdir()
    with ext4(folder, mib + 32) as files:
        yield HangingDisk(new_image(files.folder / "disk.img", mib), files=files)


@contextlib.contextmanager
def failing_disk(folder: Path, mib: int) -> Iterator[FailingDisk]:
    folder.mkdir()
    with tmpfs(folder, (mib + 16) << 10) as memory:
        backing = new_image(memory.folder / "backing.img", mib)
        with loop_device(backing, 512) as device:
            yield FailingDisk(device, backing=backing)


@contextlib.contextmanager
def full_disk(folder: Path, mib: int) -> Iterator[Disk]:
    """An image for which there is far too little room."""
    folder.mkdir()
    with tmpfs(folder, 4 << 10) as small:
        yield Disk(new_image(small.folder / "disk.img", mib), spoiled=True)


@contextlib.contextmanager
def fault_disks(work: Path, mib: int) -> Iterator[tuple[HangingDisk, HangingDisk, FailingDisk, Disk]]:
    with (
        hanging_disk(work / "a", mib) as one,
        hanging_disk(work / "b", mib) as other,
        failing_disk(work / "c", mib) as failing,
        full_disk(work / "d", mib) as full,
    ):
        yield one, other, failing, full
