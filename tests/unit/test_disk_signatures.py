# SPDX-License-Identifier: Apache-2.0
"""What a disk holds is seen by its signatures, by whatever descriptor it is open."""

import contextlib
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sizes import MIB
from tests.unit.test_disks import opened
from vhostsync.errors import DiskError
from vhostsync.mirror.destination import check_holds_nothing
from vhostsync.storage.file import create_image
from vhostsync.storage.local import open_disk
from vhostsync.storage.native import probe
from vhostsync.storage.signatures import image_format, signatures


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    create_image(path, 16 * MIB)
    return path


@contextlib.contextmanager
def open_fd(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def made(path: Path, *words: str) -> None:
    """Runs a program that makes something on a disk; the test is left out where there is none."""
    program = shutil.which(words[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if program is None:
        pytest.skip(f"needs {words[0]}")
    subprocess.run([program, *words[1:], path], check=True, capture_output=True)


def found(path: Path) -> list[str]:
    with open_fd(path) as fd:
        return signatures(fd)


@pytest.mark.parametrize("kind", ["qcow2", "qed", "vmdk", "vhdx", "vpc", "vdi", "parallels"])
def test_formats_of_images_as_qemu_makes_them(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, "16M"], check=True)
    name = {"qcow2": "qcow2", "vpc": "VHD", "parallels": "Parallels"}.get(kind, kind.upper())
    with open_fd(path) as fd:
        assert image_format(fd) == name
    assert f"{name} image" in found(path)


def test_a_fixed_vhd_has_nothing_but_its_last_sector(tmp_path: Path) -> None:
    path = tmp_path / "image"
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    options = ("-f", "vpc", "-o", "subformat=fixed,force_size=on")
    subprocess.run(["qemu-img", "create", "-q", *options, path, "16M"], check=True)
    with open_fd(path) as fd:
        assert image_format(fd) == "VHD"


def test_a_text_that_describes_a_vmdk(image: Path) -> None:
    image.write_bytes(b"# Disk DescriptorFile\nversion=1\n".ljust(1024))
    with open_fd(image) as fd:
        assert image_format(fd) == "VMDK"


def test_what_lies_on_a_raw_disk_is_no_format(image: Path) -> None:
    made(image, "mkfs.ext4", "-q", "-F")
    with open_fd(image) as fd:
        assert image_format(fd) is None


def test_nothing_is_found_on_an_empty_disk_and_in_noise(image: Path) -> None:
    assert found(image) == []
    image.write_bytes(b"\xa5" * 4 * MIB)
    assert found(image) == []


def test_file_systems_and_swap(image: Path) -> None:
    made(image, "mkfs.ext4", "-q", "-F")
    assert found(image) == ["ext4 (file system)"]
    made(image, "mkswap")
    assert "swap" in found(image)


def test_partition_tables_by_their_headers(image: Path) -> None:
    entry = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x83, b"\xff\xff\xff", 2048, 8192)
    with image.open("r+b") as file:
        file.write(bytes(446) + entry + bytes(48) + b"\x55\xaa")
    assert found(image) == ["dos partition table"]
    entries = bytes(128 * 128)
    places = (1, 32767, 34, 32734)  # of both headers, and of what can be used
    header = struct.pack(
        "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *places, b"u" * 16, 2, 128, 128,
        zlib.crc32(entries),
    )
    header = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    with image.open("r+b") as file:
        file.write(bytes(446) + struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, 32767))
        file.seek(512)
        file.write(header.ljust(512, b"\0") + entries)
    assert found(image) == ["gpt partition table"]


def test_luks_and_lvm_by_their_headers(image: Path) -> None:
    with image.open("r+b") as file:
        file.write(b"LUKS\xba\xbe\x00\x01")
    assert found(image) == ["crypto_LUKS (encrypted)"]
    label = struct.pack("<8sQII8s32s", b"LABELONE", 1, 0, 32, b"LVM2 001", b"x" * 32)
    sector = bytearray(label.ljust(512, b"\0"))
    struct.pack_into("<I", sector, 16, lvm_checksum(bytes(sector[20:])))
    with image.open("r+b") as file:
        file.write(bytes(512) + sector)
    assert found(image) == ["LVM2_member (part of a RAID or LVM)"]


def lvm_checksum(text: bytes) -> int:
    """CRC-32 as LVM begins it."""
    crc = 0xF597A6CF
    for byte in text:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc


def test_a_descriptor_for_direct_io_is_enough(image: Path) -> None:
    made(image, "mkfs.ext4", "-q", "-F")
    disk = open_disk(image, read_only=False, cache="none", lock_timeout_s=0, probe=probe)
    with contextlib.closing(disk):
        assert signatures(disk.fd.fileno()) == ["ext4 (file system)"]
        with pytest.raises(DiskError, match=r"ext4 \(file system\); name another destination, or, .*--force"):
            check_holds_nothing(disk)


def test_what_cannot_be_read_is_not_called_empty(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    disk = opened(image)
    with contextlib.closing(disk), monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(DiskError, match="cannot be found out"):
            check_holds_nothing(disk)
