# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter on all threads: system calls that a disk's backend never makes fail with EPERM.

A list of what is denied, and not of what is allowed. What Python, the C library and liburing call changes
with their versions; a call that an allow list had forgotten would stop a guest's disk, perhaps a year later
and on the path of an error. EPERM rather than a kill for the same reason: a disk goes on.

Made by libseccomp, through ctypes: it is installed wherever systemd is, knows the numbers of every
architecture, and guards against a second table of calls (x32, 32 bit). Its Python binding is not on PyPI, and
those that are there wrap the same calls.

What a filter cannot do: requests in an io_uring that exists already pass it by. So no other ring can be made;
which files may be opened is Landlock's matter, which binds a ring, too.
"""

import ctypes
import errno
import os
import socket
from typing import Any, Final

LIBRARY: Final = "libseccomp.so.2"

ACT_ALLOW: Final = 0x7FFF0000
ACT_ERRNO: Final = 0x00050000
ATTRIBUTE_TSYNC: Final = 4  # SCMP_FLTATR_CTL_TSYNC
CMP_NE, CMP_EQ, CMP_GT, CMP_MASKED_EQ = 1, 4, 6, 7
UNKNOWN_CALL: Final = -1  # __NR_SCMP_ERROR
CLONE_THREAD: Final = 0x10000

OTHER_PROGRAMS: Final = (
    "execve execveat fork vfork ptrace process_vm_readv process_vm_writev process_madvise kcmp "
    "pidfd_getfd"
)
OTHER_USERS: Final = (
    "setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset unshare setns "
    "personality"
)
FILE_SYSTEMS: Final = (
    "mount umount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick "
    "mount_setattr swapon swapoff quotactl quotactl_fd mknod mknodat name_to_handle_at open_by_handle_at "
    "fanotify_init acct"
)
THE_MACHINE: Final = (
    "init_module finit_module delete_module kexec_load kexec_file_load reboot bpf perf_event_open "
    "userfaultfd keyctl add_key request_key syslog sethostname setdomainname settimeofday clock_settime "
    "clock_adjtime adjtimex stime iopl ioperm modify_ldt vm86 vm86old uselib ustat sysfs lookup_dcookie "
    "nfsservctl _sysctl vhangup migrate_pages move_pages mbind set_mempolicy set_mempolicy_home_node "
    "remap_file_pages memfd_secret io_uring_setup io_setup"
)
DENIED: Final = tuple(f"{OTHER_PROGRAMS} {OTHER_USERS} {FILE_SYSTEMS} {THE_MACHINE}".split())


class _Comparison(ctypes.Structure):  # struct scmp_arg_cmp
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("one", ctypes.c_uint64),
        ("two", ctypes.c_uint64),
    )


class Filter:
    """The filter, made and not yet in force. OSError where libseccomp is not installed."""

    def __init__(self, *, internet: bool) -> None:
        """`internet`: metrics are served on a TCP port, so such sockets may be made."""
        self._library = ctypes.CDLL(LIBRARY)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(ACT_ALLOW)))
        if self._context.value is None:
            raise OSError(errno.ENOMEM, "libseccomp could not begin a filter")
        self._checked(
            self._library.seccomp_attr_set(self._context, ATTRIBUTE_TSYNC, ctypes.c_uint32(1)),
            "synchronising threads",
        )
        for name in DENIED:
            self._deny(name)
        self._deny_sockets(internet=internet)
        # A new process is refused, a new thread is not. The flags of clone3 lie in memory, which no filter
        # can read: told that there is no clone3, the C library uses clone.
        self._deny("clone", _Comparison(0, CMP_MASKED_EQ, CLONE_THREAD, 0))
        self._deny("clone3", number=errno.ENOSYS)

    def _deny_sockets(self, *, internet: bool) -> None:
        if not internet:
            for name in ("socket", "socketpair"):
                self._deny(name, _Comparison(0, CMP_NE, socket.AF_UNIX, 0))
            return
        families = {int(socket.AF_UNIX), int(socket.AF_INET), int(socket.AF_INET6)}
        self._deny("socketpair", _Comparison(0, CMP_NE, socket.AF_UNIX, 0))
        for family in set(range(max(families))) - families:
            self._deny("socket", _Comparison(0, CMP_EQ, family, 0))
        self._deny("socket", _Comparison(0, CMP_GT, max(families), 0))

    def _deny(self, name: str, *comparisons: _Comparison, number: int = errno.EPERM) -> None:
        call = self._library.seccomp_syscall_resolve_name(name.encode())
        if call == UNKNOWN_CALL:
            return  # newer than this libseccomp
        rule = (_Comparison * len(comparisons))(*comparisons)
        done = self._library.seccomp_rule_add_array(
            self._context, ctypes.c_uint32(ACT_ERRNO | number), call, len(comparisons), rule
        )
        # A call that this architecture does not have needs no rule.
        if done not in (-errno.EDOM, -errno.EACCES):
            self._checked(done, name)

    def load(self) -> None:
        """In force on all threads from here on. Needs no_new_privs, which all threads then have too."""
        self._checked(self._library.seccomp_load(self._context), "loading it")
        self._library.seccomp_release(self._context)

    @staticmethod
    def _checked(result: Any, doing: str) -> None:
        if result < 0:
            raise OSError(-result, f"the seccomp filter, {doing}: {os.strerror(-result)}")
