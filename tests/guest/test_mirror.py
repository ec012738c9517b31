# SPDX-License-Identifier: Apache-2.0
"""A running guest's disk is mirrored and switched under load; nothing that it synced is lost on either
disk."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.guest.assets import GuestAssets
from tests.guest.backends import Vhostsync, start_backend, storage_daemon_wanted, vhostsync_command
from tests.guest.harness import Guest, GuestDisk, GuestOptions, machine_command, verify_blocks
from tests.guest.images import check_clean, digest, fill_random, make_ext4, new_image
from tests.sizes import MIB

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

vhostsync_only = pytest.mark.skipif(storage_daemon_wanted(), reason="qemu-storage-daemon cannot do this")


def test_switch_under_load(assets: GuestAssets, work: Path) -> None:
    source, destination = new_image(work / "source.img", 128), new_image(work / "destination.img", 128)
    fill_random(source, 64 * MIB, 48 * MIB)  # the load writes the first 32 MiB, the last 16 MiB stay a hole
    with start_backend(work, source, queues=2) as backend:
        disk = GuestDisk(backend.socket, queues=2)
        with Guest(assets, work, machine_command([disk])) as guest:
            load = guest.start_load("/dev/vda", blocks=8192, threads=8)
            load.next_report()
            backend.start_mirror(destination)
            backend.wait_steady()
            # In steady whatever was synced is on both disks, now.
            steady = load.fresh_report()
            verify_blocks(assets, source, load, synced=steady.synced)
            verify_blocks(assets, destination, load, synced=steady.synced)

            before = load.fresh_report()
            backend.switch()
            after = load.fresh_report()
            old = digest(source)
            verify_blocks(assets, source, load, synced=before.synced, issued=after.issued)
            verify_blocks(assets, destination, load, synced=after.synced)

            load.fresh_report()
            last = guest.stop_load(load)
            assert last.synced > after.issued
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()
    verify_blocks(assets, destination, load, synced=last.synced, issued=last.issued)
    assert digest(source) == old, "the old disk was written after the switch"
    assert digest(destination, 32 * MIB) == digest(source, 32 * MIB)
    assert source.stat().st_size == destination.stat().st_size


@vhostsync_only
def test_keep_mirror_there_and_back_with_a_file_system(assets: GuestAssets, work: Path) -> None:
    """Four switches with --keep-mirror under a mounted ext4, with trims between; in the end both disks are
    the same clean file system."""
    (work / "contents").mkdir()
    (work / "contents" / "load.bin").write_bytes(bytes(range(256)) * (16 * MIB // 256))
    source, destination = new_image(work / "source.img", 160), new_image(work / "destination.img", 160)
    make_ext4(source, work / "contents")
    with Vhostsync(work, source, queues=2) as backend:
        disk = GuestDisk(backend.socket, queues=2)
        with Guest(assets, work, machine_command([disk], GuestOptions(cpus=2))) as guest:
            guest.run("mount -t ext4 /dev/vda /mnt")
            load = guest.start_load("/mnt/load.bin", blocks=4096)
            backend.start_mirror(destination)
            backend.wait_steady()
            for round_ in range(4):
                guest.run(f"dd if=/dev/urandom of=/mnt/file{round_} bs=1M count=8 conv=fsync 2>/dev/null")
                backend.switch(keep_mirror=True)
                guest.run(f"rm /mnt/file{round_} && sync && fstrim /mnt")
                load.fresh_report()
            assert backend.status()["state"] == "steady"
            last = guest.stop_load(load)
            guest.run(f"vhs-load verify /mnt/load.bin {load.options} --synced {last.synced}")
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()
    assert digest(source) == digest(destination)
    check_clean(source)
    check_clean(destination)


@vhostsync_only
def test_restart_after_a_switch(assets: GuestAssets, work: Path) -> None:
    """The state record outlives the process: the old disk is refused, by name of the new one, which is
    served."""
    source, destination = new_image(work / "source.img", 32), new_image(work / "destination.img", 32)
    with Vhostsync(work, source) as backend:
        with Guest(assets, work, machine_command([GuestDisk(backend.socket)]), name="first") as guest:
            backend.start_mirror(destination)
            backend.wait_steady()
            backend.switch()
            load = guest.start_load("/dev/vda", blocks=1024, more="--count 500")
            last = load.finish()
            guest.power_off()
        backend.stop()
    command = [
        *vhostsync_command(),
        "serve",
        "--socket-path",
        str(work / "again.sock"),
        "--blk-file",
        str(source),
    ]
    refused = subprocess.run(
        [*command, "--state-file", str(work / "disk.state")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert refused.returncode == 1
    assert str(destination) in refused.stderr
    with Vhostsync(work, destination) as backend:
        with Guest(assets, work, machine_command([GuestDisk(backend.socket)]), name="second") as guest:
            guest.run(f"vhs-load verify /dev/vda {load.options} --synced {last.synced}")
            guest.power_off()
        backend.stop()
