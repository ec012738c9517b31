# SPDX-License-Identifier: Apache-2.0
"""`./run demo`: a running guest's disk is mirrored and moved to another disk while the guest writes.

Everything is real: a Linux guest under QEMU, an ext4 file system, two image files, the `vhostsync` that a
user would run. At the end both images are read on the host and compared with what the guest was told was
safe."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.guest import demo_ceph, demo_hosts, demo_upgrade
from tests.guest.assets import GuestAssets, guest_assets
from tests.guest.backends import Vhostsync
from tests.guest.harness import Guest, GuestDisk, Load, Report, machine_command, verify_blocks
from tests.guest.images import (
    ImageError,
    check_clean,
    digest,
    file_of_crashed_ext4,
    file_of_ext4,
    new_image,
)
from tests.guest.story import (
    DISK_MIB,
    LOAD_BLOCKS,
    Screen,
    check_log,
    make_source,
    show_counts,
    switch,
    tell,
    vhostsync,
)

COPY_SPEED = "60M"  # slow enough to be watched
STEPS = 9

@dataclass(frozen=True)
class Outcome:
    """What the guest was told around the switch, for the verification and the summary."""

    load: Load
    before: Report  # the last sync reported before `switch` was called
    after: Report  # a sync that began after it had returned
    last: Report
    pause_ms: float
    slowest_ms: float  # the longest single write that the guest saw around the switch


def make_disks(screen: Screen, work: Path) -> tuple[Path, Path]:
    """A source with a file system and data on it, and an empty destination of the same size."""
    source = make_source(screen, work)
    destination = new_image(work / "destination.img", DISK_MIB)
    screen.say(f"{destination.name}  1 GiB, empty")
    return source, destination


def run_guest(screen: Screen, assets: GuestAssets, work: Path, source: Path, destination: Path) -> Outcome:
    """Steps 2 to 8: everything that happens while the backend runs."""
    screen.step("Start the backend", "It serves the source to whoever connects to its socket.")
    screen.command("vhostsync serve --socket-path disk.sock --blk-file source.img --num-queues 2")
    with Vhostsync(work, source, queues=2) as backend:
        screen.good(f"process {backend.process.pid} listens")

        screen.step("Boot a Linux guest whose disk this is", "QEMU without KVM, so that it works everywhere.")
        started = time.monotonic()
        with Guest(assets, work, machine_command([GuestDisk(backend.socket, queues=2)])) as guest:
            guest.run("mount -t ext4 /dev/vda /mnt")
            kernel = guest.run("uname -r")
            screen.good(f"Linux {kernel} runs after {time.monotonic() - started:.1f} s, /dev/vda is mounted")

            screen.step(
                "The guest writes, syncs, and keeps writing",
                "Each 4 KiB block says which write put it there. After every 64 writes the guest syncs; "
                "what was synced by then is what must never be lost.",
            )
            guest.run("echo 'written before the mirror' >/mnt/early.txt && sync")
            load = guest.start_load("/mnt/load.bin", blocks=LOAD_BLOCKS)
            report = load.next_report()
            screen.good(f"{report.synced:,} writes synced so far, and it goes on")

            screen.step(
                "Attach the destination and copy, while the guest writes",
                f"Limited to {COPY_SPEED} a second, so that there is something to see.",
            )
            vhostsync(
                screen, backend.control, "mirror", "start", str(destination), "--speed", COPY_SPEED, "--wait"
            )
            screen.good("steady: from here on every sync of the guest is durable on both disks")

            screen.step(
                "Watch the counts move with the guest's syncs",
                "The guest's writes are confirmed by the source alone; a sync is confirmed only when the "
                "destination durably holds all that it covers.",
            )
            show_counts(screen, backend, load)

            screen.step("Switch: the guest moves to the destination while it writes")
            before = load.fresh_report()
            pause_ms = switch(screen, backend)
            first = load.next_report()
            after = load.fresh_report()
            slowest = max(first.slowest_ms, after.slowest_ms)
            screen.good(f"the guest goes on: {after.synced:,} writes synced, now on {destination.name}")

            screen.step("The guest writes some more to its new disk, then powers off")
            guest.run("echo 'written after the switch' >/mnt/late.txt && sync")
            load.fresh_report()
            last = guest.stop_load(load)
            check_log(guest)
            guest.power_off()
            screen.good(f"{last.synced:,} writes synced in all; no I/O error in the guest's kernel log")
        backend.stop()
        screen.good("the backend ended cleanly")
    return Outcome(load, before, after, last, pause_ms, slowest)


def verify(screen: Screen, assets: GuestAssets, work: Path, disks: tuple[Path, Path], told: Outcome) -> None:
    """Read both images on the host and compare them with what the guest was told. Raises on any
    difference."""
    source, destination = disks
    screen.step(
        "Verify both disks on the host",
        "The new disk was unmounted and must be clean as it is. The old disk is what a power cut at "
        "the switch would leave: its journal is replayed, on a copy.",
    )
    check_clean(destination)
    screen.good(f"{destination.name}: e2fsck finds a clean file system")
    new = file_of_ext4(destination, "load.bin", work)
    verify_blocks(assets, new, told.load, synced=told.last.synced, issued=told.last.issued)
    screen.good(f"{destination.name}: holds all {told.last.synced:,} synced writes")

    old = file_of_crashed_ext4(source, "load.bin", work)
    verify_blocks(assets, old, told.load, synced=told.before.synced, issued=told.after.issued)
    screen.good(
        f"{source.name}: holds all {told.before.synced:,} writes synced before the switch, none from after"
    )

    names = ("photos.bin", "early.txt")
    for name in names:
        if digest(file_of_ext4(destination, name, work)) != digest(file_of_crashed_ext4(source, name, work)):
            raise ImageError(f"{name} differs between the two disks")
    screen.good(f"{' and '.join(names)}: the same on both disks")
    if file_of_ext4(destination, "late.txt", work).read_text() != "written after the switch\n":
        raise ImageError(f"late.txt is not on {destination.name}")
    screen.good(f"late.txt: on {destination.name}")


def summarise(screen: Screen, told: Outcome) -> None:
    screen.title("What you have seen")
    text = (
        "A virtual machine wrote to its disk all the time. Its disk was copied to a second one underneath "
        "it, kept in step, and then replaced by it. The machine was not stopped and noticed nothing: its "
        f"requests were held for {told.pause_ms:.2f} ms, and the slowest of its writes around the switch "
        f"took {told.slowest_ms:.0f} ms. Everything that it had synced before the switch is on both disks, "
        "everything that it synced after it on the new one."
    )
    screen.paragraph(text)
    print(f"\nIt took {screen.seconds:.0f} s. Next: README.md; `./run serve --help` for a disk of your own.")


def story(screen: Screen, work: Path) -> None:
    screen.step("Make two disks")
    assets = guest_assets()
    disks = make_disks(screen, work)
    told = run_guest(screen, assets, work, *disks)
    verify(screen, assets, work, disks, told)
    summarise(screen, told)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run demo", description=(__doc__ or "").partition("\n\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ceph", action="store_true", help="into Ceph RBD and back, on a cluster of its own")
    which.add_argument(
        "--two-hosts", action="store_true", help="to a second host; then the first one dies (as root)"
    )
    which.add_argument(
        "--upgrade", action="store_true", help="the backend is replaced while the guest writes"
    )
    given = parser.parse_args()
    if given.ceph:
        return tell(demo_ceph.STEPS, demo_ceph.story)
    if given.two_hosts:
        return tell(demo_hosts.STEPS, demo_hosts.story)
    if given.upgrade:
        return tell(demo_upgrade.STEPS, demo_upgrade.story)
    return tell(STEPS, story)


if __name__ == "__main__":
    sys.exit(main())
