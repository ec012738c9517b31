# SPDX-License-Identifier: Apache-2.0
"""`./run demo --ceph`: a running guest's disk is moved from a local image into Ceph RBD, and back, while the
guest writes. The cluster is real, too: a monitor and an OSD, started for the demo and gone with it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from tests.guest.assets import AssetError, GuestAssets, guest_assets
from tests.guest.backends import Vhostsync
from tests.guest.harness import Guest, GuestDisk, Load, Report, machine_command, verify_blocks
from tests.guest.images import check_clean, file_of_crashed_ext4, file_of_ext4
from tests.guest.story import (
    LOAD_BLOCKS,
    Screen,
    check_log,
    make_source,
    switch,
    tell,
    vhostsync,
)
from tests.network import ceph_cluster
from tests.network.ceph_cluster import CephCluster

STEPS = 7
IMAGE = f"rbd:{ceph_cluster.POOL}/vm1"


@dataclass(frozen=True)
class Outcome:
    """What the guest was told around the way back, and at the end."""

    load: Load
    before: Report  # the last sync reported before the second switch was called
    after: Report  # a sync that began after it had returned
    last: Report
    pauses_ms: tuple[float, float]


def run_guest(screen: Screen, assets: GuestAssets, work: Path, source: Path, back: Path) -> Outcome:
    """Steps 3 to 6."""
    screen.step("Serve the local disk to a Linux guest that writes and syncs all the time")
    screen.command("vhostsync serve --socket-path disk.sock --blk-file source.img")
    with Vhostsync(work, source, queues=2) as backend:
        with Guest(assets, work, machine_command([GuestDisk(backend.socket, queues=2)])) as guest:
            guest.run("mount -t ext4 /dev/vda /mnt")
            guest.run("echo 'written on the local disk' >/mnt/early.txt && sync")
            load = guest.start_load("/mnt/load.bin", blocks=LOAD_BLOCKS)
            screen.good(f"Linux {guest.run('uname -r')} is up; {load.next_report().synced:,} writes synced")

            screen.step(
                "Mirror it into Ceph, and move the guest there",
                "The image is made at the guest's size, locked for this backend alone, and holes stay holes. "
                "Once steady, every sync of the guest is durable in Ceph, too.",
            )
            vhostsync(screen, backend.control, "mirror", "start", IMAGE, "--create", "--wait")
            there_ms = switch(screen, backend)
            report = load.fresh_report()
            guest.run("echo 'written in Ceph' >/mnt/ceph.txt && sync")
            screen.good(f"the guest goes on in Ceph: {report.synced:,} writes synced")

            screen.step("Move it back to a local image, the same way")
            vhostsync(screen, backend.control, "mirror", "start", str(back), "--create", "--wait")
            before = load.fresh_report()
            back_ms = switch(screen, backend)
            after = load.fresh_report()
            screen.good(f"the guest goes on, on {back.name}: {after.synced:,} writes synced")

            screen.step("The guest writes some more, then powers off")
            guest.run("echo 'written after the way back' >/mnt/late.txt && sync")
            last = guest.stop_load(load)
            check_log(guest)
            guest.power_off()
            screen.good(f"{last.synced:,} writes synced in all; no I/O error in the guest's kernel log")
        backend.stop()
    return Outcome(load, before, after, last, (there_ms, back_ms))


def verify(
    screen: Screen, assets: GuestAssets, cluster: CephCluster, work: Path, back: Path, told: Outcome
) -> None:
    screen.step(
        "Verify both disks on the host",
        "The local disk was unmounted and must be clean as it is. The image in Ceph is what a power cut at "
        "the second switch would leave: it is exported, and its journal replayed.",
    )
    check_clean(back)
    new = file_of_ext4(back, "load.bin", work)
    verify_blocks(assets, new, told.load, synced=told.last.synced, issued=told.last.issued)
    screen.good(f"{back.name}: a clean file system that holds all {told.last.synced:,} synced writes")
    exported = work / "exported.img"
    cluster.rbd("export", "--no-progress", IMAGE.removeprefix("rbd:"), str(exported))
    old = file_of_crashed_ext4(exported, "load.bin", work)
    verify_blocks(assets, old, told.load, synced=told.before.synced, issued=told.after.issued)
    screen.good(
        f"{IMAGE}: all {told.before.synced:,} writes synced before the way back, none from after it"
    )


def story(screen: Screen, work: Path) -> None:
    if why := ceph_cluster.lacking():
        raise AssetError(f"this demo {why}")
    assets = guest_assets()
    screen.step("Start a Ceph cluster", "A monitor and an OSD of its own, with authentication, in memory.")
    began = time.monotonic()
    with CephCluster() as cluster:
        os.environ |= cluster.environment
        screen.good(f"up after {time.monotonic() - began:.1f} s, with a pool for block devices")
        screen.step("Make the guest's disk")
        source, back = make_source(screen, work), work / "back.img"
        told = run_guest(screen, assets, work, source, back)
        verify(screen, assets, cluster, work, back, told)
    screen.title("What you have seen")
    screen.paragraph(
        "A virtual machine's disk was moved from a file into Ceph, and from there to another file, while the "
        "machine wrote to it. The machine was not stopped and noticed nothing: its requests were held for "
        f"{told.pauses_ms[0]:.2f} ms on the way there and for {told.pauses_ms[1]:.2f} ms on the way back, "
        "and whatever it had synced by then is on both disks."
    )
    print(f"\nIt took {screen.seconds:.0f} s. Next: docs/network.md.")


if __name__ == "__main__":
    raise SystemExit(tell(STEPS, story))
