# SPDX-License-Identifier: Apache-2.0
"""What lies beneath a block device, as far as sysfs and udev tell: loop devices on their files, partitions on
their disks, and the names that hardware gives itself.

Not looked through: device-mapper and RAID (the kernel's O_EXCL claim keeps their parts from being opened),
and remote storage under two names.
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

SECTOR_BYTES = 512  # of sysfs, whatever the device's block
ENDLESS = 1 << 63
LAYERS_MAX = 8

SYS_BLOCK = Path("/sys/dev/block")
DEVICES = Path("/dev")
UDEV_DATA = Path("/run/udev/data")


@dataclass(frozen=True)
class Layer:
    """Bytes `start` to `end` of a file or block device: of one of the things that a disk lies on."""

    kind: str
    device: int
    inode: int
    start: int
    end: int

    def overlaps(self, other: "Layer") -> bool:
        same = (self.kind, self.device, self.inode) == (other.kind, other.device, other.inode)
        return same and self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class BlockIdentifiers:
    serial: str | None = None
    wwn: str | None = None
    partuuid: str | None = None


def overlap(one: Path, other: Path) -> str | None:
    """Where both lie on the same bytes, a phrase that says how; None when they do not, or when one is
    missing. Raises OSError."""
    try:
        first, second = layers(one), layers(other)
    except FileNotFoundError:
        return None
    if first[0].overlaps(second[0]):
        return "one file under two names" if first[0].kind == "file" else "one device under two names"
    if any(a.overlaps(b) for a in first for b in second):
        return "one lies upon the other, or both on the same part of a third"
    return None


def layers(path: Path) -> list[Layer]:
    """The disk itself, then what it lies on, downwards. Raises OSError."""
    status = path.stat()
    if not stat.S_ISBLK(status.st_mode):
        return [Layer("file", status.st_dev, status.st_ino, 0, ENDLESS)]
    found = [Layer("block", status.st_rdev, 0, 0, ENDLESS)]
    device, start, end = status.st_rdev, 0, ENDLESS
    while len(found) < LAYERS_MAX:
        below = _below(device)
        if below is None:
            break
        kind, base, inode, offset, length = below
        start, end = start + offset, offset + min(end, length)
        found.append(Layer(kind, base, inode, start, end))
        if kind == "file":
            break
        device = base
    return found


def _below(device: int) -> tuple[str, int, int, int, int] | None:
    """What a block device lies on: kind, device, inode, and where on it (offset and length in bytes)."""
    node = _sys_node(device)
    loop = node / "loop"
    backing = _read(loop / "backing_file")
    if backing is not None:
        try:
            status = Path(backing).stat()
        except OSError:
            return None  # deleted, or in another mount namespace
        offset = int(_read(loop / "offset") or 0)
        length = _sectors(node / "size") or ENDLESS
        if stat.S_ISBLK(status.st_mode):
            return "block", status.st_rdev, 0, offset, length
        return "file", status.st_dev, status.st_ino, offset, length
    if (node / "partition").exists():
        parent = _read(node.resolve().parent / "dev")
        if parent is None:
            return None
        major, minor = parent.split(":")
        base = os.makedev(int(major), int(minor))
        return "block", base, 0, _sectors(node / "start"), _sectors(node / "size")
    return None


def block_identifiers(device: int) -> BlockIdentifiers:
    """What outlives a reboot, where it can be read. Numbers that hardware made up from its model's name alone
    are left out: they would make two disks one."""
    node = _sys_node(device)
    udev = _udev(device)
    if (mapped := _read(node / "dm" / "uuid")) is not None:
        return BlockIdentifiers(serial=f"dm:{mapped}", partuuid=udev.get("ID_PART_ENTRY_UUID"))
    whole = node.resolve().parent if (node / "partition").exists() else node
    serial = _first(whole / "serial", whole / "device" / "serial") or udev.get("ID_SERIAL_SHORT")
    wwn = _first(whole / "wwid", whole / "device" / "wwid") or udev.get("ID_WWN_WITH_EXTENSION")
    if wwn is not None and not re.match(r"(naa\.|eui\.|uuid\.|nvme\.|0x)", wwn):
        wwn = None
    partuuid = udev.get("ID_PART_ENTRY_UUID") or _uevent(node).get("PARTUUID")
    if (node / "partition").exists() and partuuid is None:
        # Two partitions of one disk have nothing but their place to tell them apart.
        partuuid = f"at:{_sectors(node / 'start')}"
    return BlockIdentifiers(serial=serial, wwn=wwn, partuuid=partuuid)


def loop_backing(device: int) -> tuple[Path, int] | None:
    """The file of a loop device or of its partition, and where that begins there; None where it is none."""
    node = _sys_node(device)
    start = 0
    if (node / "partition").exists():
        start, node = _sectors(node / "start"), node.resolve().parent
    backing = _read(node / "loop" / "backing_file")
    if backing is None:
        return None
    return Path(backing), int(_read(node / "loop" / "offset") or 0) + start


def lasting_place(device: int, path: Path) -> str | None:
    """Where a block device is plugged in, or by which lasting name it was given: a symbolic link below /dev,
    which udev or LVM made, and not the kernel's own name, which goes by the order in which devices were
    found; nor a link of the operator's own, who may lead it to another device."""
    node = _sys_node(device)
    part = f"+{_sectors(node / 'start')}" if (node / "partition").exists() else ""
    if (place := _udev(device).get("ID_PATH")) is not None:
        return f"{place}{part}"
    slot = re.search(r"/([0-9a-f:.]+|virtio-mmio\.\d+)/virtio\d+/block/", str(node.resolve()))
    if slot is not None:
        return f"virtio:{slot[1]}{part}"
    while path.is_symlink() and not path.is_relative_to(DEVICES):
        path = path.parent / path.readlink()
    return f"link:{path}" if path.is_symlink() else None


def _sys_node(device: int) -> Path:
    return SYS_BLOCK / f"{os.major(device)}:{os.minor(device)}"


def _udev(device: int) -> dict[str, str]:
    text = _read(UDEV_DATA / f"b{os.major(device)}:{os.minor(device)}") or ""
    lines = (line[2:].partition("=") for line in text.splitlines() if line.startswith("E:"))
    return {name: value for name, _, value in lines if value}


def _uevent(node: Path) -> dict[str, str]:
    lines = (line.partition("=") for line in (_read(node / "uevent") or "").splitlines())
    return {name: value for name, _, value in lines if value}


def _first(*paths: Path) -> str | None:
    return next((text for path in paths if (text := _read(path))), None)


def _sectors(path: Path) -> int:
    return int(_read(path) or 0) * SECTOR_BYTES


def _read(path: Path) -> str | None:
    """The text without the white space around it; None when there is none."""
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None
