# SPDX-License-Identifier: Apache-2.0
"""`./run demo --upgrade`: a running guest's backend is replaced by another process, three times, while the
guest writes. Its connection stays, its mirror stays in step, and nothing is copied again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.guest.assets import GuestAssets, guest_assets
from tests.guest.backends import Vhostsync
from tests.guest.harness import Guest, GuestDisk, Load, Report, machine_command, verify_blocks
from tests.guest.images import check_clean, file_of_crashed_ext4, file_of_ext4, new_image
from tests.guest.processes import ProcessError
from tests.guest.qmp_client import Qmp
from tests.guest.story import (
    DISK_MIB,
    LOAD_BLOCKS,
    Screen,
    check_log,
    make_source,
    tell,
    vhostsync,
)

STEPS = 7
UPGRADES = 3


@dataclass(frozen=True)
class Upgraded:
    load: Load
    last: Report
    slowest_ms: float  # the longest single write that the guest saw around the upgrades
    before_ms: float  # without one


def process_of(control: Path) -> int:
    """Who serves."""
    with contextlib.closing(Qmp(control)) as client:
        return client.process


@contextlib.contextmanager
def last_of(backend: Vhostsync) -> Iterator[None]:
    """Ends whoever serves in the end, also where something has failed."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.kill(process_of(backend.control), signal.SIGTERM)


def upgrade(screen: Screen, backend: Vhostsync, load: Load) -> float:
    """The longest write meanwhile, in milliseconds."""
    former = process_of(backend.control)
    load.drain()
    vhostsync(screen, backend.control, "upgrade")
    slowest = max(load.next_report().slowest_ms, load.fresh_report().slowest_ms)
    if process_of(backend.control) == former:
        raise ProcessError("the same process serves as before")
    with contextlib.closing(Qmp(backend.control)) as client:
        mirror, status = client.execute("query-mirror"), client.execute("query-status")
    if (mirror["state"], mirror["full-copy-reason"], status["frontends"]) != ("steady", None, 1):
        raise ProcessError(f"the mirror is {mirror}, the device {status}")
    screen.good(f"steady, nothing was copied; the slowest of the guest's writes took {slowest:.0f} ms")
    return slowest


def run_guest(screen: Screen, assets: GuestAssets, work: Path, source: Path, standby: Path) -> Upgraded:
    screen.step("Start the backend")
    screen.command("vhostsync serve --socket-path disk.sock --blk-file source.img --num-queues 2")
    with Vhostsync(work, source, queues=2) as backend, last_of(backend):
        screen.good(f"process {backend.process.pid} listens")
        screen.step("Boot a Linux guest whose disk this is, and let it write and sync all the time")
        with Guest(assets, work, machine_command([GuestDisk(backend.socket, queues=2)])) as guest:
            guest.run("mount -t ext4 /dev/vda /mnt")
            load = guest.start_load("/mnt/load.bin", blocks=LOAD_BLOCKS)
            screen.good(f"Linux {guest.run('uname -r')} is up; {load.next_report().synced:,} writes synced")

            screen.step("Mirror the disk", "Once steady, a sync of the guest is durable on both disks.")
            vhostsync(screen, backend.control, "mirror", "start", str(standby), "--wait")
            before = load.fresh_report().slowest_ms

            screen.step(
                "Replace the backend's process, three times, while the guest writes",
                "The new one loads all that it needs, then takes over the disks, the mirror and the guest's "
                "connection. The guest's requests wait in their rings meanwhile.",
            )
            slowest = max(upgrade(screen, backend, load) for _ in range(UPGRADES))
            lines = [json.loads(line)["message"] for line in backend.process.log.read_text().splitlines()]
            if lines.count("frontend handed over") != UPGRADES:
                raise ProcessError("the guest's machine has connected again")

            screen.step("The guest goes on, then powers off")
            load.fresh_report()
            last = guest.stop_load(load)
            check_log(guest)
            guest.power_off()
            screen.good(f"{last.synced:,} writes synced in all; no I/O error in the guest's kernel log")
        vhostsync(screen, backend.control, "quit")
    return Upgraded(load, last, slowest, before)


def story(screen: Screen, work: Path) -> None:
    screen.step("Make two disks")
    assets = guest_assets()
    source, standby = make_source(screen, work), new_image(work / "standby.img", DISK_MIB)
    screen.say(f"{standby.name}      1 GiB, empty")
    told = run_guest(screen, assets, work, source, standby)

    screen.step("Verify both disks on the host")
    check_clean(source)
    verify_blocks(
        assets, file_of_ext4(source, "load.bin", work), told.load, synced=told.last.synced,
        issued=told.last.issued,
    )  # fmt: skip
    found = file_of_crashed_ext4(standby, "load.bin", work)
    verify_blocks(assets, found, told.load, synced=told.last.synced, issued=told.last.issued)
    screen.good(f"both hold all {told.last.synced:,} synced writes")

    screen.title("What you have seen")
    screen.paragraph(
        "The program below a running machine's disk was replaced three times. The machine kept its "
        "connection, its mirror stayed in step and nothing was copied again. The slowest of its writes "
        f"meanwhile took {told.slowest_ms:.0f} ms ({told.before_ms:.0f} ms before)."
    )
    print(f"\nIt took {screen.seconds:.0f} s. Next: docs/operations.md, \"Stopping and restarting\".")


if __name__ == "__main__":
    raise SystemExit(tell(STEPS, story))
