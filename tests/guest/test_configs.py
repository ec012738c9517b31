# SPDX-License-Identifier: Apache-2.0
"""Every launch in qemu-configs/ does what it says: the QEMU ones are booted, the others checked as far as
one can without their program."""

from __future__ import annotations

import hashlib
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
from tests.guest.images import make_ext2, new_image
from tests.guest.processes import Process
from tests.sizes import MIB

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120)]

CONFIGS = Path(__file__).resolve().parents[2] / "qemu-configs"
SECTOR = 512
PARTITION_MIB = 7


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


def boot_image(work: Path, data: bytes) -> Path:
    """A disk from which GRUB boots, laid out as by its own installer, with an ext2 partition. GRUB says what
    it finds in the file `data`, writes down that it was there, and restarts the machine."""
    modules = ["biosdisk", "part_msdos", "ext2", "serial", "terminal", "echo", "hashsum", "gcry_sha256"]
    modules += ["loadenv", "reboot"]
    config = (
        "serial --unit=0 --speed=115200",
        "terminal_output serial",
        "sha256sum (hd0,msdos1)/data",
        "load_env -f (hd0,msdos1)/env",
        "echo found=$found",
        "set found=twice",
        "save_env -f (hd0,msdos1)/env found",
        "reboot",
    )
    (work / "early.cfg").write_text("\n".join(config) + "\n")
    core = ("grub-mkimage", "-O", "i386-pc", "-p", "(hd0,msdos1)/", "-c", work / "early.cfg")
    run(*core, "-o", work / "core.img", *modules)
    files = work / "files"
    files.mkdir()
    (files / "data").write_bytes(data)
    run("grub-editenv", files / "env", "create")
    run("grub-editenv", files / "env", "set", "found=once")
    image = new_image(work / "disk.img", 1 + PARTITION_MIB)
    make_ext2(image, files, offset=MIB)
    entry = struct.pack("<B3xB3xII", 0x80, 0x83, MIB // SECTOR, PARTITION_MIB * MIB // SECTOR)
    code = Path("/usr/lib/grub/i386-pc/boot.img").read_bytes()[:440]
    with image.open("r+b") as file:
        file.write(code.ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa")
        file.write((work / "core.img").read_bytes())
        assert file.tell() <= MIB
    return image


def test_boot_disk_through_seabios(work: Path) -> None:
    """A real boot loader reads, and writes, through SeaBIOS's driver: twice, with what it has written."""
    if shutil.which("grub-mkimage") is None:
        pytest.skip("NOT TESTED: GRUB (package grub-pc-bin) is not installed")
    data = os.urandom(3 * MIB + 12345)
    image = boot_image(work, data)
    with start_backend(work, image, queues=2) as backend:
        for number, found in enumerate(("once", "twice")):
            serial = work / f"serial{number}"
            more = ["-serial", f"file:{serial}", "-no-reboot", "-monitor", "none"]
            command = [str(CONFIGS / "boot-disk.sh"), str(backend.socket), *more]
            with Process("QEMU", command, work / f"qemu{number}.log") as process:
                assert process.wait(90) == 0, process.last_output() + serial.read_text(errors="replace")
            said = serial.read_text(errors="replace")
            assert hashlib.sha256(data).hexdigest() in said
            assert f"found={found}" in said
        backend.stop()


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
