# SPDX-License-Identifier: Apache-2.0
"""What this program takes for a file of its own.

A path that an operator names may lead to a disk, by a slip or by a link. So before a file is truncated,
written to or removed it is looked at: it must be a regular file that is empty or begins as files of that kind
do. Anything else stays as it is, and the error says what it seems to be.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from vhostsync.printable import size

LOOKED_AT_BYTES: Final = 128 * 1024

_SIGNS: Final = (  # where, what, of what
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
    (0, b"XFSB", "an XFS file system"),
    (0x438, b"\x53\xef", "an ext file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (0x8001, b"CD001", "an ISO 9660 image"),
    (512, b"EFI PART", "a disk with a partition table"),
    (4096, b"EFI PART", "a disk with a partition table"),
    (510, b"\x55\xaa", "a disk with a boot sector"),
    (0, b'{\n "kind": "state-record"', "a state record"),
    (0, b'{\n "kind": "state-pointer"', "a pointer to a state record"),
    (0, b'{\n "kind": "dirty-bitmap"', "a dirty bitmap"),
)


class ForeignFileError(OSError):
    """Something that is not of this program, and stays as it is; `strerror` says what it is."""

    def __init__(self, what: str) -> None:
        super().__init__(0, f"it is {what}, and is left alone")


def beginning(kind: str) -> bytes:
    """How the text of every file of this kind begins (state_record.encode_checked)."""
    return f'{{\n "kind": "{kind}'.encode()


def could_be(kind: str, head: bytes, length: int) -> bool:
    """Whether a text of this length and beginning is of this kind, whole or cut short, as by a power cut."""
    begins = beginning(kind)
    cut_short = length <= LOOKED_AT_BYTES and begins.startswith(head.rstrip(b"\0"))
    return cut_short or head.startswith(begins)


def kind_of(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a directory"), (stat.S_ISCHR, "a character device"), (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"), (stat.S_ISBLK, "a block device"), (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISREG, "a file"),
    ):  # fmt: skip
        if test(mode):
            return name
    return "something unknown"


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of the regular file at `path`; with O_CREAT made (mode 0600) where nothing is. OSError;
    ForeignFileError where something else is, which is not even opened: a FIFO would wait, a tape rewind."""
    with suppress(FileNotFoundError):
        _check_regular(path.lstat().st_mode)
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _check_regular(os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ForeignFileError(kind_of(mode))


def seems_to_be(fd: int) -> str:
    """What a regular file holds, by its first bytes, and how much of it."""
    return in_words(os.pread(fd, LOOKED_AT_BYTES, 0), os.fstat(fd).st_size)


def in_words(head: bytes, length: int) -> str:
    what = next((name for at, sign, name in _SIGNS if head[at : at + len(sign)] == sign), None)
    if what is None:
        what = "of unknown content" if head.strip(b"\0") else "of zeros"
        return f"a file of {size(length)} {what}" if length else "an empty file"
    return f"{what} of {size(length)}"


def remove_leftover(path: Path, kind: str) -> None:
    """What a process that died has left under this temporary name; nothing, where nothing is. It may be cut
    short, or zeros, as after a power cut. OSError; ForeignFileError where something else is."""
    try:
        fd = open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        if not could_be(kind, os.pread(fd, LOOKED_AT_BYTES, 0), os.fstat(fd).st_size):
            raise ForeignFileError(seems_to_be(fd))
    finally:
        os.close(fd)
    path.unlink()
