# SPDX-License-Identifier: Apache-2.0
"""What a disk holds, as far as its signatures tell: file systems, partition tables, parts of RAID, LVM or
LUKS, and images of another format than raw. Everything here blocks.

libblkid knows what may lie on a disk; it is installed wherever util-linux is, and is what `blkid -p` and
`wipefs` ask. Through ctypes and not as a program, because a backend that serves may start none (seccomp.py).
Formats of images are no business of it: those are in a table here.

A guest writes what it likes to its disk, also a header of such a format (QEMU's CVE-2008-2004). So nobody
asks here about a disk that a state record knows: it is raw, whatever it begins with.
"""

import ctypes
import mmap
import os
from functools import cache
from typing import Final

import structlog

log = structlog.get_logger(__name__)

LIBRARY: Final = "libblkid.so.1"

# What begins, or ends, an image of a format in which the guest's first byte is not the file's first byte.
_AT_THE_BEGINNING: Final = (
    (0, b"QFI\xfb", "qcow2"),  # qcow, too, of which this is the second version
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
)
_VHD_FOOTER: Final = b"conectix"  # of a VHD of fixed size it is all that there is
_FOOTER_BYTES: Final = 512

READ_BYTES: Final = 4096  # no disk has larger logical blocks
_SUPERBLOCKS_TYPE: Final = 1 << 5  # BLKID_SUBLKS_TYPE
_SUPERBLOCKS_USAGE: Final = 1 << 7  # BLKID_SUBLKS_USAGE
_USAGES: Final = {"filesystem": "file system", "raid": "part of a RAID or LVM", "crypto": "encrypted"}


def image_format(fd: int) -> str | None:
    """The format of the image on this open disk (which may be open for direct I/O), unless it is raw.
    OSError."""
    size = os.lseek(fd, 0, os.SEEK_END)
    beginning = read_block(fd, 0)
    for offset, magic, name in _AT_THE_BEGINNING:
        if beginning[offset : offset + len(magic)] == magic:
            return name
    footer = size - _FOOTER_BYTES
    if footer >= 0:
        aligned = footer - footer % READ_BYTES
        last = read_block(fd, aligned)[footer - aligned :]
        if last.startswith(_VHD_FOOTER):
            return "VHD"
    return None


def signatures(fd: int) -> list[str]:
    """All that is found on this open disk, in words; nothing found does not mean that it is empty. OSError.
    Where there is no libblkid, only formats of images are known."""
    found = image_format(fd)
    words = [] if found is None else [f"{found} image"]
    library = load_library()
    if library is not None:
        # Not by `fd`, which may be open for direct I/O, and libblkid reads at any offset.
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            words += _probed(library, own)
        finally:
            os.close(own)
    return words


def read_block(fd: int, offset: int) -> bytes:
    """The block at this offset, in memory that direct I/O can use."""
    with mmap.mmap(-1, READ_BYTES) as memory:
        return memory[: os.preadv(fd, [memory], offset)]


@cache
def load_library() -> ctypes.CDLL | None:
    """To be called before the sandbox closes: loading is reading a file."""
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError as error:
        log.warning("what a disk holds is not looked for, but for formats of images", reason=str(error))
        return None
    probe = ctypes.c_void_p
    library.blkid_new_probe.restype = probe
    library.blkid_new_probe.argtypes = ()
    library.blkid_free_probe.restype = None
    library.blkid_free_probe.argtypes = (probe,)
    library.blkid_probe_set_device.argtypes = (probe, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    for name in ("blkid_probe_set_superblocks_flags", "blkid_probe_enable_partitions"):
        getattr(library, name).argtypes = (probe, ctypes.c_int)
    library.blkid_do_probe.argtypes = (probe,)
    library.blkid_probe_lookup_value.argtypes = (
        probe, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_size_t),
    )  # fmt: skip
    return library


def _probed(library: ctypes.CDLL, fd: int) -> list[str]:
    probe = library.blkid_new_probe()
    if not probe:
        raise MemoryError
    try:
        _checked(library.blkid_probe_set_device(probe, fd, 0, 0))
        library.blkid_probe_set_superblocks_flags(probe, _SUPERBLOCKS_TYPE | _SUPERBLOCKS_USAGE)
        library.blkid_probe_enable_partitions(probe, 1)
        words: list[str] = []
        while _checked(library.blkid_do_probe(probe)) == 0:
            words += _words(library, probe)
        return words
    finally:
        library.blkid_free_probe(probe)


def _words(library: ctypes.CDLL, probe: int) -> list[str]:
    """Of the signature at which the probe stands."""
    kind, table = _value(library, probe, b"TYPE"), _value(library, probe, b"PTTYPE")
    usage = _USAGES.get(_value(library, probe, b"USAGE") or "")
    found = []
    if kind is not None:
        found.append(f"{kind} ({usage})" if usage else kind)
    if table is not None:
        found.append(f"{table} partition table")
    return found


def _value(library: ctypes.CDLL, probe: int, name: bytes) -> str | None:
    value = ctypes.c_char_p()
    if library.blkid_probe_lookup_value(probe, name, ctypes.byref(value), None) or value.value is None:
        return None
    return value.value.decode(errors="replace")


def _checked(result: int) -> int:
    """libblkid answers 0, 1 for nothing (more), or less than 0 with errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
