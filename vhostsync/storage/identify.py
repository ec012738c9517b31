# SPDX-License-Identifier: Apache-2.0
"""What is to be seen of a disk by which it is recognised later (identity.py). Everything here blocks.

A file system is named by what lasts of it: the UUID in its super block, folded into statfs's f_fsid by
those that have it there, or asked for; of a network file system the server and its export. Those that have
neither (FUSE, overlay) have no name, and their files are known by their mark.

The mark is a `user.` attribute of an image file: 128 random bits, written to the open and locked file once
the first record that mentions it is durable. Nothing depends on it alone: without it (no attributes on that
file system, no right, no room) the numbers decide.
"""

import errno
import fcntl
import os
import secrets
import stat
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from vhostsync.host import kernel
from vhostsync.storage.identity import NETWORK_NAMES, DiskIdentity
from vhostsync.storage.layers import block_identifiers, lasting_place, loop_backing

log = structlog.get_logger(__name__)

MARK_NAME: Final = "user.vhostsync"
MARK_CHARACTERS: Final = 32

FS_IOC_GETVERSION: Final = 0x80087601  # _IOR('v', 1, long), <linux/fs.h>
BLKGETDISKSEQ: Final = 0x80081280  # _IOR(0x12, 128, __u64), <linux/fs.h>, Linux 5.15
FS_IOC_GETFSUUID: Final = 0x80111500  # _IOR(0x15, 0, struct fsuuid2), Linux 6.9
XFS_IOC_FSGEOMETRY_V1: Final = 0x80705864  # _IOR('X', 100, struct xfs_fsop_geom_v1), <xfs/xfs_fs.h>
XFS_UUID_AT: Final = 64

# File systems whose f_fsid is made from a UUID of theirs (<linux/magic.h>): for good, and for a tmpfs as long
# as it is mounted. Elsewhere it may be a device number.
FSID_LASTS: Final = {
    0xEF53: "ext", 0x9123683E: "btrfs", 0x01021994: "tmpfs", 0x2FC12FC1: "zfs", 0xCA451A4E: "bcachefs",
}  # fmt: skip
XFS_MAGIC: Final = 0x58465342
OVERLAY_MAGIC: Final = 0x794C7630
# Mounts whose source names the server and what it exports, and whose inode numbers are the server's.
NETWORK_TYPES: Final = NETWORK_NAMES | {"nfs4"}


def identify(fd: int, path: Path, *, with_ctime: bool = False) -> DiskIdentity:
    """How the open disk is recognised later. `with_ctime`: at a clean detach, after the last write."""
    status = os.fstat(fd)
    name = str(path.absolute())
    if stat.S_ISBLK(status.st_mode):
        found = block_identifiers(status.st_rdev)
        return DiskIdentity(
            name, "block", status.st_rdev, 0, os.lseek(fd, 0, os.SEEK_END),
            serial=found.serial or _loop_file(status.st_rdev), wwn=found.wwn, partuuid=found.partuuid,
            boot_id=_boot_id(), place=lasting_place(status.st_rdev, path), disk_sequence=_disk_sequence(fd),
        )  # fmt: skip
    mark = read_mark(fd)
    below = block_identifiers(status.st_dev) if os.major(status.st_dev) else None
    return DiskIdentity(
        name, "file", status.st_dev, status.st_ino, status.st_size,
        ctime_ns=status.st_ctime_ns if with_ctime else None, generation=_generation(fd),
        serial=below.serial or _loop_file(status.st_dev) if below is not None else None,
        wwn=below.wwn if below is not None else None,
        partuuid=below.partuuid if below is not None else None,
        file_system=file_system(fd, status.st_dev), boot_id=_boot_id(),
        mark=mark, mark_is_set=mark is not None,
    )  # fmt: skip


def _boot_id() -> str | None:
    try:
        return kernel.this_boot()
    except OSError:
        return None


def _generation(fd: int) -> int | None:
    """Tells apart two files that had the same inode number one after the other; None where unknown."""
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, FS_IOC_GETVERSION, buffer, True)
    except OSError:
        return None
    return int.from_bytes(buffer[:4], "little")


def _disk_sequence(fd: int) -> int | None:
    """Tells apart two block devices that had the same number one after the other in one boot; None where
    unknown."""
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, BLKGETDISKSEQ, buffer, True)
    except OSError:
        return None
    return int.from_bytes(buffer, "little")


# ---- the file system ---------------------------------------------------------


def file_system(fd: int, device: int) -> str | None:
    """A name of the file system that lasts; None where it has none."""
    try:
        magic = kernel.file_system_type(fd)
        if (name := FSID_LASTS.get(magic)) is not None:
            fsid = os.fstatvfs(fd).f_fsid
            return f"{name}:{fsid:016x}" if fsid else None
        if magic == XFS_MAGIC:
            geometry = bytearray(112)
            fcntl.ioctl(fd, XFS_IOC_FSGEOMETRY_V1, geometry, True)
            return f"xfs:{bytes(geometry[XFS_UUID_AT : XFS_UUID_AT + 16]).hex()}"
    except OSError:
        return None
    # An overlay's UUID may be one of this mount only.
    return _mount_source(device) or (_uuid(fd) if magic != OVERLAY_MAGIC else None)


def _uuid(fd: int) -> str | None:
    answer = bytearray(17)
    try:
        fcntl.ioctl(fd, FS_IOC_GETFSUUID, answer, True)
    except OSError:
        return None
    length = answer[0]
    return f"uuid:{bytes(answer[1 : 1 + length]).hex()}" if length and any(answer[1:]) else None


def _mount_source(device: int) -> str | None:
    """`type:source` of a network file system: the line "… MAJOR:MINOR … - TYPE SOURCE …" of mountinfo."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        mount, _, rest = line.partition(" - ")
        words = rest.split()
        if number in mount.split()[2:3] and len(words) > 1 and words[0] in NETWORK_TYPES:
            return f"{words[0].removesuffix('4')}:{words[1]}"
    return None


def _loop_file(device: int) -> str | None:
    """A loop device is its file."""
    backing = loop_backing(device)
    if backing is None:
        return None
    path, offset = backing
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        within = file_system(fd, status.st_dev)
        return f"loop-file:{within}:{status.st_ino}:{_generation(fd)}:{offset}" if within else None
    except OSError:
        return None
    finally:
        os.close(fd)


# ---- the mark -----------------------------------------------------------------


def read_mark(fd: int) -> str | None:
    """Of an open image file; None where there is none."""
    try:
        text = os.getxattr(fd, MARK_NAME)
    except OSError:
        return None
    mark = text.decode("ascii", errors="replace")
    fits = len(mark) == MARK_CHARACTERS and all(each in "0123456789abcdef" for each in mark)
    return mark if fits else None


def with_mark(fd: int, disk: DiskIdentity, wanted: str | None) -> DiskIdentity:
    """`disk`, which is open at `fd`, as it is once it bears this mark, or a new one (None). To be recorded
    before `bear_mark`: a disk whose mark nobody knows, the next start would take for one of its own."""
    if disk.kind != "file" or (wanted is not None and wanted == disk.mark) or not _can_bear_marks(fd):
        return disk
    mark = wanted if wanted is not None else secrets.token_hex(MARK_CHARACTERS // 2)
    return replace(disk, mark=mark, mark_is_set=False)


def bear_mark(fd: int, disk: DiskIdentity) -> DiskIdentity:
    """The disk bears its mark from here on; where it cannot, how it is recognised then."""
    if disk.kind != "file" or disk.mark is None or disk.mark_is_set:
        return disk
    try:
        os.setxattr(fd, MARK_NAME, disk.mark.encode())
    except OSError as error:
        log.debug("the disk bears no mark", path=disk.path, reason=error.strerror)
        former = read_mark(fd)
        return replace(disk, mark=former, mark_is_set=former is not None)
    return replace(disk, mark_is_set=True)


def _can_bear_marks(fd: int) -> bool:
    try:
        os.getxattr(fd, MARK_NAME)
    except OSError as error:
        return error.errno == errno.ENODATA
    return True
