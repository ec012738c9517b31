# SPDX-License-Identifier: Apache-2.0
"""Every launch in qemu-configs/ does what it says: the QEMU ones are booted, the others checked as far as
one can without their program."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.guest.assets import AssetError, GuestAssets, cache_folder, run, unpack_package
from tests.guest.backends import start_backend
from tests.guest.harness import Guest
from tests.guest.images import MIB, new_image
from tests.guest.processes import Process

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120)]

CONFIGS = Path(__file__).resolve().parents[2] / "qemu-configs"
HERE = Path(__file__).resolve().parent
SECTOR = 512


@pytest.fixture(autouse=True)
def without_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL", "tcg")


def test_one_queue(assets: GuestAssets, work: Path) -> None:
    image = new_image(work / "disk.img", 32)
    with start_backend(work, image, queues=1) as backend:
        machine = [str(CONFIGS / "one-queue.sh"), str(backend.socket), "-no-reboot"]
        with Guest(assets, work, machine) as guest:
            assert guest.run("ls /sys/block/vda/mq").split() == ["0"]
            guest.run("vhs-load write /dev/vda --blocks 1024 --count 500")
            guest.run("vhs-load verify /dev/vda --blocks 1024 --synced 500")
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()


def test_many_queues_beside_a_disk_on_an_iothread(assets: GuestAssets, work: Path) -> None:
    image, scratch = new_image(work / "disk.img", 32), new_image(work / "scratch.img", 16)
    with start_backend(work, image, queues=4) as backend:
        machine = [str(CONFIGS / "many-queues.sh"), str(backend.socket), str(scratch), "-no-reboot"]
        with Guest(assets, work, machine) as guest:
            sizes = {name: int(guest.run(f"cat /sys/block/{name}/size")) for name in ("vda", "vdb")}
            ours = next(name for name, sectors in sizes.items() if sectors == 32 * MIB // SECTOR)
            other = next(name for name in sizes if name != ours)
            assert len(guest.run(f"ls /sys/block/{ours}/mq").split()) == 4
            guest.run(f"vhs-load write /dev/{ours} --blocks 1024 --threads 8 --count 1000")
            guest.run(f"vhs-load write /dev/{other} --blocks 1024 --count 200")
            guest.run(f"vhs-load verify /dev/{ours} --blocks 1024 --threads 8 --synced 1000")
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()


def test_boot_disk_through_seabios(work: Path) -> None:
    """SeaBIOS loads the boot sector from our disk; that reads and writes through SeaBIOS's driver."""
    image = new_image(work / "disk.img", 8)
    run("cc", "-c", "-m32", "-o", work / "boot.o", HERE / "boot-sector.S")
    run("ld", "-m", "elf_i386", "-Ttext=0x7c00", "--oformat=binary", "-o", work / "boot.bin", work / "boot.o")
    sectors = [(work / "boot.bin").read_bytes()]
    assert len(sectors[0]) == SECTOR
    sectors += [struct.pack("<I", number) + os.urandom(SECTOR - 4) for number in range(1, 64)]
    with image.open("r+b") as file:
        file.write(b"".join(sectors))
    serial = work / "serial"
    with start_backend(work, image, queues=2) as backend:
        more = ["-serial", f"file:{serial}", "-no-reboot", "-monitor", "none"]
        command = [str(CONFIGS / "boot-disk.sh"), str(backend.socket), *more]
        with Process("QEMU", command, work / "qemu.log") as process:
            assert process.wait(60) == 0, process.last_output()
        assert "read 63, wrote 1" in serial.read_text()
        backend.stop()
    content = image.read_bytes()
    assert content[100 * SECTOR : 101 * SECTOR] == sectors[1]
    assert content[: 64 * SECTOR] == b"".join(sectors)


def libvirt_schema() -> Path | None:
    """libvirt's schema of domains, of the system or out of a package; None where it cannot be had."""
    system = Path("/usr/share/libvirt/schemas/domain.rng")
    if system.exists():
        return system
    folder = cache_folder() / "libvirt-schemas"
    for package in ("libvirt-common", "libvirt0"):  # newer distributions have it in the former
        schema = folder / package / "usr/share/libvirt/schemas/domain.rng"
        if not schema.exists():
            try:
                unpack_package(package, folder / package)
            except AssetError:
                continue
        if schema.exists():
            return schema
    return None


def test_libvirt_domain_has_what_the_disk_needs() -> None:
    domain = ElementTree.parse(CONFIGS / "libvirt-domain.xml").getroot()
    assert domain.find("memoryBacking/source[@type='memfd']") is not None
    assert domain.find("memoryBacking/access[@mode='shared']") is not None
    disk = domain.find("devices/disk[@type='vhostuser']")
    assert disk is not None
    assert disk.find("source[@type='unix']/reconnect[@enabled='yes']") is not None
    # libvirt refuses these on a vhost-user disk.
    assert all(disk.find(name) is None for name in ("iotune", "readonly", "serial", "shareable"))
    driver = disk.find("driver")
    assert driver is not None
    assert set(driver.attrib) == {"name", "type", "queues", "queue_size"}


def test_libvirt_domain_fits_the_schema() -> None:
    schema = libvirt_schema()
    if schema is None or shutil.which("xmllint") is None:
        pytest.skip("libvirt's schema or xmllint cannot be had here")
    run("xmllint", "--noout", "--relaxng", schema, CONFIGS / "libvirt-domain.xml")


def test_cloud_hypervisor_command(work: Path) -> None:
    """What would be run has shared memory and a vhost-user disk with as many queues as processors. The real
    program, where there is one, must take the arguments."""
    script = CONFIGS / "cloud-hypervisor.sh"
    environment = {**os.environ, "CLOUD_HYPERVISOR": "echo", "CPUS": "3"}
    command = [str(script), "/run/vm.sock", "/boot/kernel", "--api-socket", "/run/ch"]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    words = said.stdout.split()
    options = dict(zip(words[::2], words[1::2], strict=False))
    assert options["--memory"] == "size=1G,shared=on"
    assert options["--cpus"] == "boot=3"
    disk = dict(pair.split("=") for pair in options["--disk"].split(","))
    assert disk == {"vhost_user": "true", "socket": "/run/vm.sock", "num_queues": "3", "queue_size": "256"}
    assert words[-2:] == ["--api-socket", "/run/ch"]

    if shutil.which("cloud-hypervisor") is not None:
        # No such kernel: it must get as far as to say that, past its own check of the command line.
        tried = subprocess.run(
            [script, str(work / "no.sock"), str(work / "no-kernel")],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "usage" not in tried.stderr.lower()
