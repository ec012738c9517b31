# SPDX-License-Identifier: Apache-2.0
"""The few system calls of this program that Python's `os` does not have.

By ctypes on the C library, and no package: PyPI's `prctl` is of 2010, `pyprctl` of 2021 and `landlock` a
development version, and each is a few lines around these calls. One class, so that tests can put another
kernel in its place. Every call raises OSError.
"""

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Final

PR_SET_DUMPABLE: Final = 4  # <linux/prctl.h>
PR_CAPBSET_READ: Final = 23
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
PR_SET_MDWE: Final = 65
PR_MDWE_REFUSE_EXEC_GAIN: Final = 1

CAP_DAC_OVERRIDE: Final = 1 << 1  # <linux/capability.h>
CAPABILITY_VERSION_3: Final = 0x20080522

# The same on every architecture: they came after the tables were made one.
SYS_LANDLOCK_CREATE_RULESET: Final = 444
SYS_LANDLOCK_ADD_RULE: Final = 445
SYS_LANDLOCK_RESTRICT_SELF: Final = 446

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@cache  # the sandbox may keep the file away later
def this_boot() -> str:
    """Changes whenever the machine starts; what was in the page cache is gone then. OSError."""
    return BOOT_ID.read_text().strip()


def why_denied(error: OSError) -> str | None:
    """What the system says of an error; to root, who is used to be denied nothing, why."""
    if error.errno not in (errno.EACCES, errno.EPERM) or os.geteuid() != 0 or _may_override_modes():
        return error.strerror
    return (
        f"{error.strerror} (it runs as root without capabilities, see --sandbox, so owner and mode have to "
        f"allow it)"
    )


def _may_override_modes() -> bool:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return True
    held = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(held & CAP_DAC_OVERRIDE)


def file_system_type(fd: int) -> int:
    """f_type of <linux/magic.h>, which Python's statvfs leaves out. OSError."""
    answer = (ctypes.c_long * 32)()  # struct statfs begins with it
    _checked(ctypes.CDLL(None, use_errno=True).fstatfs(ctypes.c_int(fd), answer))
    return answer[0] & 0xFFFFFFFF


class Kernel:
    """The kernel of this machine."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def threads(self) -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def prctl(self, option: int, argument: int = 0) -> int:
        words = [ctypes.c_ulong(word) for word in (argument, 0, 0, 0)]
        return _checked(self._libc.prctl(ctypes.c_int(option), *words))

    def drop_capabilities(self) -> None:
        """The calling thread's effective, permitted and inheritable ones: all of them."""
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        _checked(self._libc.capset(header, (ctypes.c_uint32 * 6)()))

    def landlock_abi(self) -> int:
        return self._syscall(SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)

    def landlock_create(self, attributes: bytes) -> int:
        """A descriptor of the new ruleset."""
        return self._syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)

    def landlock_add_rule(self, ruleset: int, kind: int, attributes: bytes) -> None:
        self._syscall(SYS_LANDLOCK_ADD_RULE, ruleset, kind, attributes, 0)

    def landlock_restrict(self, ruleset: int) -> None:
        self._syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)

    def _syscall(self, number: int, *arguments: int | bytes | None) -> int:
        words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
        return _checked(self._libc.syscall(ctypes.c_long(number), *words))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
