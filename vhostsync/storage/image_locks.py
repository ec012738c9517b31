# SPDX-License-Identifier: Apache-2.0
"""QEMU's image locks (block/file-posix.c), so QEMU and this program keep each other out: a read lock on byte
100 + p says "I use permission p", one on byte 200 + p "I do not let others use p"; having set its own,
everybody looks whether somebody else's stand against them. All are open-file-description locks.
"""

import fcntl
import os
import stat
import struct
from pathlib import Path

PERMISSION_BASE = 100
UNSHARED_BASE = 200
READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)
PERMISSIONS = (READ, WRITE, WRITE_UNCHANGED, RESIZE)
WRITER_USES = frozenset({READ, WRITE, WRITE_UNCHANGED})
READER_USES = frozenset({READ})
WRITER_SHARES: frozenset[int] = frozenset()
READER_SHARES = frozenset({READ})

FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux


def try_lock(fd: int, *, uses: frozenset[int], shares: frozenset[int]) -> bool:
    """Takes QEMU's image locks on the open file description, or takes none and returns False."""
    own = [PERMISSION_BASE + p for p in uses]
    own += [UNSHARED_BASE + p for p in PERMISSIONS if p not in shares]
    # What stands against us: somebody uses what we do not share, or does not share what we use.
    against = [PERMISSION_BASE + p for p in PERMISSIONS if p not in shares]
    against += [UNSHARED_BASE + p for p in uses]
    for byte in own:
        _set_lock(fd, fcntl.F_RDLCK, byte)
    if not any(_held_by_another(fd, byte) for byte in against):
        return True
    for byte in own:
        _set_lock(fd, fcntl.F_UNLCK, byte)
    return False


def _set_lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_another(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def is_locked(fd: int) -> bool:
    """Whether another open file description has QEMU's image locks. Takes none."""
    places = (base + p for base in (PERMISSION_BASE, UNSHARED_BASE) for p in PERMISSIONS)
    return any(_held_by_another(fd, byte) for byte in places)


def holders(path: Path) -> str:
    """Who has it open, as far as may be seen: the owner of such a lock is not recorded, so every process that
    has the file open is named."""
    try:
        wanted = path.stat()
    except OSError:
        return "nobody that can be seen"
    found = []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda entry: int(entry.name)):
        try:
            descriptors = list((process / "fd").iterdir())
            name = (process / "comm").read_text(errors="replace").strip()  # cut off after 15 bytes
        except OSError:
            continue
        if any(_leads_to(entry, wanted) for entry in descriptors) and process.name != str(os.getpid()):
            found.append(f"{name} (pid {process.name})")
    return ", ".join(found[:4]) or "a process that cannot be seen from here"


def _leads_to(descriptor: Path, wanted: os.stat_result) -> bool:
    try:
        status = descriptor.stat()
    except OSError:
        return False
    if stat.S_ISBLK(wanted.st_mode):
        return stat.S_ISBLK(status.st_mode) and status.st_rdev == wanted.st_rdev
    return (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino)
