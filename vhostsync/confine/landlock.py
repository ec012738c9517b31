# SPDX-License-Identifier: Apache-2.0
"""Landlock: which files this process may open from now on (Documentation/userspace-api/landlock.rst).

What is open already stays usable: only opening, making and removing are judged. Each kernel knows a number of
rights, told by its ABI version; those that it knows are all handled, so what no rule grants is denied. The
rules hold for the calling thread and the threads that it starts afterwards.
"""

import errno
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostsync.host.kernel import Kernel

# LANDLOCK_ACCESS_FS_*
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << bit for bit in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
BIND_TCP, CONNECT_TCP = 1, 2
SCOPE_ABSTRACT_SOCKET, SCOPE_SIGNAL = 1, 2

RULE_PATH, RULE_PORT = 1, 2

READ: Final = READ_FILE | READ_DIR
WRITE: Final = READ | WRITE_FILE | REMOVE_FILE | MAKE_REG | MAKE_SOCK | TRUNCATE | IOCTL_DEV
OF_A_FILE: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

UNKNOWN_TO: Final = (errno.ENOSYS, errno.EOPNOTSUPP)
"""What a kernel without Landlock, or with Landlock switched off, answers."""


@dataclass(frozen=True)
class Grants:
    """Directories (with all beneath) or files. `tcp_port`: may be listened on; 0 is any free one.
    `tcp_peers`: ports to which connections may be made; None: to any. `run`: programs, and the libraries that
    they load."""

    read: tuple[Path, ...]
    write: tuple[Path, ...]
    tcp_port: int | None = None
    run: tuple[Path, ...] = ()
    tcp_peers: tuple[int, ...] | None = ()


def abi(kernel: Kernel) -> int:
    """The kernel's version of the interface; 0 where it has none."""
    try:
        return kernel.landlock_abi()
    except OSError as error:
        if error.errno in UNKNOWN_TO:
            return 0
        raise


def rights_known(version: int) -> int:
    """All rights on files that a kernel of this version can withhold."""
    known = (1 << 13) - 1
    for since, right in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV)):
        if version >= since:
            known |= right
    return known


def restrict(kernel: Kernel, version: int, grants: Grants) -> None:
    """From here on only `grants`. The calling thread must have no_new_privs set. OSError."""
    known = rights_known(version)
    attributes = struct.pack("=Q", known)
    if version >= 4:
        attributes += struct.pack("=Q", BIND_TCP | (CONNECT_TCP if grants.tcp_peers is not None else 0))
    if version >= 6:
        attributes += struct.pack("=Q", SCOPE_ABSTRACT_SOCKET | SCOPE_SIGNAL)
    ruleset = kernel.landlock_create(attributes)
    try:
        _grant(kernel, ruleset, grants.read, READ & known)
        _grant(kernel, ruleset, grants.write, WRITE & known)
        _grant(kernel, ruleset, grants.run, (READ | EXECUTE) & known)
        if version >= 4 and grants.tcp_port is not None:
            kernel.landlock_add_rule(ruleset, RULE_PORT, struct.pack("=QQ", BIND_TCP, grants.tcp_port))
        for port in (grants.tcp_peers or ()) if version >= 4 else ():
            kernel.landlock_add_rule(ruleset, RULE_PORT, struct.pack("=QQ", CONNECT_TCP, port))
        kernel.landlock_restrict(ruleset)
    finally:
        os.close(ruleset)


def _grant(kernel: Kernel, ruleset: int, paths: Iterable[Path], rights: int) -> None:
    for path in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what cannot be reached cannot be opened either
        try:
            # The kernel refuses a rule that grants a file what only a directory can have.
            beneath = rights if stat.S_ISDIR(os.fstat(fd).st_mode) else rights & OF_A_FILE
            kernel.landlock_add_rule(ruleset, RULE_PATH, struct.pack("=Qi", beneath, fd))
        finally:
            os.close(fd)
