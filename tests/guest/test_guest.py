# SPDX-License-Identifier: Apache-2.0
"""A real Linux guest under QEMU reads and writes through the backend."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.guest.assets import GuestAssets
from tests.guest.backends import Vhostsync, start_backend, storage_daemon_wanted
from tests.guest.harness import (
    Guest,
    GuestDisk,
    GuestOptions,
    machine_command,
    rings_are_packed,
    verify_blocks,
)
from tests.guest.images import digest, new_image
from tests.sizes import MIB

pytestmark = [pytest.mark.guest, pytest.mark.timeout(180)]


@pytest.mark.parametrize("properties", ["", "packed=on"], ids=["split", "packed"])
def test_write_sync_read_back_and_discard(assets: GuestAssets, work: Path, properties: str) -> None:
    if properties and storage_daemon_wanted():
        pytest.skip("qemu-storage-daemon has no packed rings")
    image = new_image(work / "disk.img", 64)
    with (
        start_backend(work, image) as backend,
        Guest(assets, work, machine_command([GuestDisk(backend.socket, properties=properties)])) as guest,
    ):
        assert rings_are_packed(guest) == bool(properties)
        assert int(guest.run("cat /sys/block/vda/size")) == 64 * MIB // 512
        guest.run("head -c 8388608 /dev/urandom >/tmp/data")
        guest.run("dd if=/tmp/data of=/dev/vda bs=64k seek=16 oflag=direct conv=fsync 2>&1")
        wanted = guest.run("sha256sum </tmp/data").split()[0]
        # Synced, so it is in the image now, while the guest runs.
        assert digest(image, MIB, 8 * MIB) == wanted
        guest.run("echo 3 >/proc/sys/vm/drop_caches")
        assert (
            guest.run("dd if=/dev/vda bs=1M skip=1 count=8 iflag=direct 2>/dev/null | sha256sum").split()[0]
            == wanted
        )

        guest.run("blkdiscard -o 1048576 -l 4194304 /dev/vda")
        zeroes = hashlib.sha256(bytes(4 * MIB)).hexdigest()
        assert (
            guest.run("dd if=/dev/vda bs=1M skip=1 count=4 iflag=direct 2>/dev/null | sha256sum").split()[0]
            == zeroes
        )
        assert guest.io_trouble() == []
        guest.power_off()
        assert digest(image, MIB, 4 * MIB) == zeroes
        backend.stop()


def test_file_system_over_a_reboot(assets: GuestAssets, work: Path) -> None:
    """What one guest wrote and unmounted, the next guest on the same backend finds; the file system is
    clean."""
    image = new_image(work / "disk.img", 128)
    with start_backend(work, image) as backend:
        machine = machine_command([GuestDisk(backend.socket)])
        with Guest(assets, work, machine, name="first") as guest:
            guest.run("mke2fs -F /dev/vda 2>&1")
            guest.run("mount -t ext4 /dev/vda /mnt")
            guest.run("cp /bin/busybox /mnt/copy && mkdir /mnt/d")
            guest.run("for i in $(seq 200); do echo $i >/mnt/d/$i; done; sync")
            guest.run("rm /mnt/d/1* && fstrim -v /mnt")
            assert guest.io_trouble() == []
            guest.power_off()
        with Guest(assets, work, machine, name="second") as guest:
            guest.run("mount -t ext4 /dev/vda /mnt")
            guest.run("cmp /bin/busybox /mnt/copy && test $(cat /mnt/d/77) = 77 && test ! -e /mnt/d/1")
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()


@pytest.mark.parametrize(("queues", "queue_size"), [(4, 256), (2, 1024)])
def test_several_queues_under_load(assets: GuestAssets, work: Path, queues: int, queue_size: int) -> None:
    image = new_image(work / "disk.img", 64)
    options = GuestOptions(cpus=queues)
    with start_backend(work, image, queues=queues) as backend:
        disk = GuestDisk(backend.socket, queues=queues, queue_size=queue_size)
        with Guest(assets, work, machine_command([disk], options)) as guest:
            assert len(guest.run("ls /sys/block/vda/mq").split()) == queues
            load = guest.start_load("/dev/vda", blocks=8192, threads=16)
            for _ in range(3):
                report = load.fresh_report()
                verify_blocks(assets, image, load, synced=report.synced)
            last = guest.stop_load(load)
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()
    verify_blocks(assets, image, load, synced=last.synced, issued=last.issued)


def test_power_cut_keeps_what_was_synced(assets: GuestAssets, work: Path) -> None:
    """QEMU is killed under load: the backend goes on, the image holds all that was synced, the next guest
    works."""
    image = new_image(work / "disk.img", 64)
    with start_backend(work, image) as backend:
        machine = machine_command([GuestDisk(backend.socket)])
        with Guest(assets, work, machine, name="first") as guest:
            load = guest.start_load("/dev/vda", blocks=4096)
            report = load.fresh_report()
            guest.kill()
        with Guest(assets, work, machine, name="second") as guest:
            guest.run(f"vhs-load verify /dev/vda {load.options} --synced {report.synced}")
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()


def test_stop_and_continue(assets: GuestAssets, work: Path) -> None:
    """QEMU's stop and cont end and start the rings under load; nothing is lost or answered twice."""
    image = new_image(work / "disk.img", 64)
    with (
        start_backend(work, image) as backend,
        Guest(assets, work, machine_command([GuestDisk(backend.socket)])) as guest,
    ):
        load = guest.start_load("/dev/vda", blocks=4096, threads=8)
        with guest.qmp() as monitor:
            for _ in range(5):
                load.fresh_report()
                monitor.execute("stop")
                monitor.execute("cont")
        load.fresh_report()
        last = guest.stop_load(load)
        assert guest.io_trouble() == []
        guest.power_off()
        backend.stop()
    verify_blocks(assets, image, load, synced=last.synced, issued=last.issued)


def test_a_disk_that_grows(assets: GuestAssets, work: Path) -> None:
    """The running guest is told of the new size, by the backend's own request, and uses it."""
    image, mirror = new_image(work / "disk.img", 64), new_image(work / "mirror.img", 64)
    with (
        Vhostsync(work, image) as backend,
        Guest(assets, work, machine_command([GuestDisk(backend.socket)])) as guest,
    ):
        backend.start_mirror(mirror)
        backend.wait_steady()
        for disk in (image, mirror):
            os.truncate(disk, 96 * MIB)
        assert backend.qmp.execute("resize") == {"capacity": 96 * MIB}
        sectors = 96 * MIB // 512
        guest.run(f"until [ $(cat /sys/block/vda/size) = {sectors} ]; do sleep 0.1; done")
        guest.run("head -c 1048576 /dev/urandom >/tmp/data")
        guest.run("dd if=/tmp/data of=/dev/vda bs=1M seek=95 oflag=direct conv=fsync 2>&1")
        wanted = guest.run("sha256sum </tmp/data").split()[0]
        assert guest.io_trouble() == []
        guest.power_off()
        backend.stop()
    assert digest(image, 95 * MIB, MIB) == digest(mirror, 95 * MIB, MIB) == wanted
