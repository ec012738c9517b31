# SPDX-License-Identifier: Apache-2.0
"""A database on two disks, in a guest, while snapshots of both are taken again and again. Each set is opened
in another guest: the file systems replay their journals, SQLite recovers, and what is there must be whole,
alike on both disks, and all that the guest had been told was committed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.daemon.named_host import Host
from tests.daemon.rig import await_true
from tests.groups import ledger_guest
from tests.groups.pairs import DISKS, Pair
from tests.guest.assets import GuestAssets
from tests.guest.processes import Process
from tests.guest.uml import start_uml, virtio_module, words_of
from tests.sizes import MIB

SETS_AT_ONCE = 8  # the guest that checks has 16 disks
DISK_MIB = 24
CONFIRMED = re.compile(r"^confirmed (\d+)", re.MULTILINE)
CHECKED = re.compile(r"^set (\d+) last (\d+) journals (\d+) wrong (.*)$", re.MULTILINE)


class BrokenSetError(AssertionError):
    """What no power cut could have left."""


@dataclass(frozen=True)
class Copy:
    """A set, and what the guest had been told before and after it was taken."""

    disks: tuple[Path, Path]
    before: int
    after: int


@dataclass
class Verdict:
    sets: int = 0
    with_journal: int = 0
    commits: int = 0

    def __str__(self) -> str:
        return (
            f"{self.sets} sets of both disks, all whole; in {self.with_journal} a journal was hot; "
            f"{self.commits:,} transactions were confirmed meanwhile"
        )


class LedgerGuest:
    """It commits until it is told to stop."""

    def __init__(self, assets: GuestAssets, folder: Path, sockets: list[Path]) -> None:
        self._log = folder / "guest.log"
        self._stop = folder / "stop"
        devices = words_of(sockets)
        self._process = start_guest(assets, folder, devices, f"write {self._stop}", self._log)

    def confirmed(self) -> int:
        found = CONFIRMED.findall(self._log.read_text(errors="replace").replace("\r\n", "\n"))
        return int(found[-1]) if found else 0

    def go_on(self, count: int) -> None:
        wanted = self.confirmed() + count
        await_true(lambda: self.confirmed() >= wanted or not self._process.running, "the guest commits", 120)
        assert self._process.running, self._process.last_output()

    def stop(self) -> int:
        self._stop.touch()
        self._process.wait(60)
        assert "@@STATUS 0" in self._log.read_text(errors="replace"), self._process.last_output()
        return self.confirmed()

    def kill(self) -> None:
        self._process.kill()


def start_guest(
    assets: GuestAssets, folder: Path, devices: list[str], arguments: str, log: Path
) -> Process:
    """With the host's files to read, so with its Python."""
    init = folder / f"{log.stem}.init"
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    init.write_text(
        f"""#!{assets.busybox} sh
        export PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/mnt PYTHONDONTWRITEBYTECODE=1
        b={assets.busybox}
        $b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
        $b mount -t tmpfs tmp /mnt
        $b insmod {virtio_module()}
        {python} -S {Path(ledger_guest.__file__).resolve()} {arguments}
        echo "@@STATUS $?"
        $b sync
        $b poweroff -f
        """.replace("\n        ", "\n")
    )
    init.chmod(0o755)
    return start_uml(assets, folder, Path("/"), init, devices, log)


@contextmanager
def ledgers(assets: GuestAssets, work: Path) -> Iterator[tuple[Pair, LedgerGuest]]:
    def file_system(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(DISK_MIB * MIB)
        subprocess.run(
            ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-J", "size=2", path], check=True
        )

    with Pair(Host(work), file_system, "--packed-rings", "off") as pair:
        guest = LedgerGuest(assets, work, [pair.host.run / name / "vm.sock" for name in DISKS])
        try:
            guest.go_on(1)
            yield pair, guest
        finally:
            guest.kill()


def prove(assets: GuestAssets, work: Path, times: int, *, commits_between: int = 3) -> Verdict:
    """BrokenSetError."""
    verdict, waiting = Verdict(), []
    with ledgers(assets, work) as (pair, guest):
        for count in range(times):
            guest.go_on(commits_between)
            waiting.append(taken(pair, guest, work / f"set{count}"))
            pair.mirror_again()
            if len(waiting) == SETS_AT_ONCE:
                check_sets(assets, work, waiting, verdict)
                waiting.clear()
        check_sets(assets, work, waiting, verdict)
        verdict.commits = guest.stop()
    return verdict


def taken(pair: Pair, guest: LedgerGuest, name: Path) -> Copy:
    before = guest.confirmed()
    pair.snapshot()
    return keep(pair, name, before, guest.confirmed() + 1)  # one may be done, and not told yet


def keep(pair: Pair, name: Path, before: int, after: int) -> Copy:
    disks = (Path(f"{name}.a"), Path(f"{name}.b"))
    for copy, disk in zip(disks, pair.others, strict=True):
        shutil.copyfile(disk, copy)
    return Copy(disks, before, after)


def check_sets(assets: GuestAssets, work: Path, copies: list[Copy], verdict: Verdict) -> None:
    """BrokenSetError. The copies are removed."""
    if not copies:
        return
    folder = work / "check"
    folder.mkdir(exist_ok=True)
    disks = [disk for copy in copies for disk in copy.disks]
    devices = [f"ubd{at}={disk}" for at, disk in enumerate(disks)]
    log = folder / "check.log"
    log.unlink(missing_ok=True)
    with start_guest(assets, folder, devices, f"check {len(copies)}", log) as process:
        process.wait(120)
    said = log.read_text(errors="replace").replace("\r\n", "\n")
    found = CHECKED.findall(said)
    assert len(found) == len(copies), said[-3000:]
    for copy, (_, last, journals, wrong) in zip(copies, found, strict=True):
        if wrong != "-":
            raise BrokenSetError(f"{copy}: {wrong}")
        if not copy.before <= int(last) <= copy.after:
            raise BrokenSetError(f"{copy}: it ends with {last}")
        verdict.sets += 1
        verdict.with_journal += int(journals) > 0
        for disk in copy.disks:
            disk.unlink()
