# SPDX-License-Identifier: Apache-2.0
"""The guests of a fault run: each writes and flushes without end and knows what it wrote, so a disk can be
held against that. One is the tests' own client of vhost-user, quick and strict; the other is Linux under
QEMU, which connects again when the backend was killed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from tests.daemon.rig import BLOCK, Served, await_true, lacking
from tests.daemon.rig import Load as ClientLoad
from tests.guest.assets import GuestAssets
from tests.guest.harness import Guest, GuestDisk, GuestError, machine_command, verify_blocks
from tests.guest.harness import Load as LinuxLoad

CLIENT_BLOCKS = 512
LINUX_BLOCKS = 1024
SECTOR = 512
LONG_S = 180.0  # a guest waits as long as its disk may, and a machine may be busy


class FaultGuest(Protocol):
    survives_its_backend: bool

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def go_on(self) -> None:
        """Returns when it has written and flushed some more."""

    def grown(self, disk_bytes: int) -> None:
        """Its disk is larger by now: it uses what was added."""

    def stop(self) -> None:
        """All that it has written is flushed."""

    def losses(self, disk: Path) -> list[str]:
        """What the disk does not hold, after stop()."""

    def errors(self) -> list[str]:
        """Of its disk, after stop()."""


class Client:
    """`Served.guest()` under rig's load, which ends at the first error."""

    survives_its_backend = False

    def __init__(self, served: Served) -> None:
        self._load = ClientLoad(served, blocks=CLIENT_BLOCKS)
        self._expected: dict[int, int] = {}

    def __enter__(self) -> Self:
        self._load.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._load.__exit__(kind, error, trace)

    def go_on(self) -> None:
        self._load.go_on(timeout_s=LONG_S)

    def grown(self, disk_bytes: int) -> None:
        self._load.widen(disk_bytes // BLOCK)

    def stop(self) -> None:
        self._expected = self._load.stop()

    def losses(self, disk: Path) -> list[str]:
        return [f"block {number}" for number in lacking(disk, self._expected)]

    def errors(self) -> list[str]:
        return []  # stop() would have raised them


class Linux:
    """Under QEMU, with a writer whose every block says which write it is."""

    survives_its_backend = True

    def __init__(self, served: Served, assets: GuestAssets, folder: Path) -> None:
        disk = GuestDisk(served.socket, queues=2, chardev="reconnect=1")
        self._assets = assets
        self._guest = Guest(assets, folder, machine_command([disk]))
        self._load = self._begin()
        self._trouble: list[str] = []
        self._synced = 0

    def _begin(self) -> LinuxLoad:
        return self._guest.start_load("/dev/vda", blocks=LINUX_BLOCKS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guest.kill()

    def go_on(self) -> None:
        self._load.fresh_report(LONG_S)

    def grown(self, disk_bytes: int) -> None:
        sectors = str(disk_bytes // SECTOR)
        await_true(lambda: self._guest.run("cat /sys/block/vda/size") == sectors, "the guest sees the growth")
        last = disk_bytes // BLOCK - 1
        self._guest.run(f"dd if=/dev/urandom of=/dev/vda bs={BLOCK} seek={last} count=1 conv=fsync 2>&1")

    def stop(self) -> None:
        self._synced = self._guest.stop_load(self._load).synced
        self._trouble = self._guest.io_trouble()
        self._guest.power_off()

    def losses(self, disk: Path) -> list[str]:
        try:
            verify_blocks(self._assets, disk, self._load, synced=self._synced)
        except GuestError as error:
            return str(error).splitlines()
        return []

    def errors(self) -> list[str]:
        return self._trouble
