# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter on all threads: system calls that a disk's backend never makes fail with EPERM.

A list of what is denied, and not of what is allowed. What Python, the C library and liburing call changes
with their versions; a call that an allow list had forgotten would stop a guest's disk, perhaps a year later
and on the path of an error. EPERM rather than a kill for the same reason: a disk goes on.

Made by libseccomp, through ctypes: it is installed wherever systemd is, knows the numbers of every
architecture, and guards against a second table of calls (x32, 32 bit). Its Python binding is not on PyPI, and
those that are there wrap the same calls.

A filter sees the words that a call is given, and no memory that they point to. So what is denied here is
denied by number: of the terminal's requests, of modes, of processes. Requests in an io_uring that exists
pass it by: no other ring can be made, and c_shim/base/uring.c restricts each to the operations that the
engine has. Which files may be opened is Landlock's matter, which binds a ring, too.
"""

import ctypes
import errno
import fcntl
import os
import socket
import stat
import termios
from typing import Any, Final

LIBRARY: Final = "libseccomp.so.2"

ACT_ALLOW: Final = 0x7FFF0000
ACT_ERRNO: Final = 0x00050000
ATTRIBUTE_TSYNC: Final = 4  # SCMP_FLTATR_CTL_TSYNC
CMP_NE, CMP_EQ, CMP_GT, CMP_MASKED_EQ = 1, 4, 6, 7
UNKNOWN_CALL: Final = -1  # __NR_SCMP_ERROR
CLONE_THREAD: Final = 0x10000
INT_BITS: Final = 0xFFFFFFFF
"""Where the kernel looks at no more of a word, neither may a rule: else one bit above gets past it."""

# setpriv asks for the capabilities that it has; where none are left, none can be had.
RUNNING_PROGRAMS: Final = "execve execveat fork vfork capset"
OTHER_PROGRAMS: Final = (
    "ptrace process_vm_readv process_vm_writev process_madvise kcmp "
    "pidfd_getfd pidfd_send_signal process_mrelease"
)
OTHER_USERS: Final = (
    "setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid unshare setns "
    "personality"
)
FILE_SYSTEMS: Final = (
    "mount umount umount2 pivot_root chroot move_mount open_tree open_tree_attr fsopen fsconfig "
    "fsmount fspick mount_setattr swapon swapoff quotactl quotactl_fd mknod mknodat name_to_handle_at "
    "open_by_handle_at fanotify_init acct"
)
# The owner, mode and attributes of files by name, and owners altogether. By descriptor there are fchmod
# (without the set-ID bits, see below), fsetxattr and fremovexattr: an image may carry an attribute of ours.
FILES: Final = (
    "chmod fchmodat fchmodat2 chown lchown fchown fchownat chown32 lchown32 fchown32 setxattr lsetxattr "
    "setxattrat removexattr lremovexattr removexattrat file_setattr"
)
THE_MACHINE: Final = (
    "init_module finit_module delete_module kexec_load kexec_file_load reboot bpf perf_event_open "
    "userfaultfd keyctl add_key request_key syslog sethostname setdomainname settimeofday clock_settime "
    "clock_adjtime adjtimex stime iopl ioperm modify_ldt vm86 vm86old uselib ustat sysfs lookup_dcookie "
    "nfsservctl _sysctl vhangup migrate_pages move_pages mbind set_mempolicy set_mempolicy_home_node "
    "remap_file_pages memfd_secret io_uring_setup io_uring_register io_setup"
)
DENIED: Final = tuple(
    f"{RUNNING_PROGRAMS} {OTHER_PROGRAMS} {OTHER_USERS} {FILE_SYSTEMS} {FILES} {THE_MACHINE}".split()
)

# What libseccomp 2.5 has no name for. The numbers are the same on every architecture: they came after the
# tables were made one.
NUMBERS: Final = {
    "mount_setattr": 442, "quotactl_fd": 443, "memfd_secret": 447, "process_mrelease": 448,
    "set_mempolicy_home_node": 450, "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466,
    "open_tree_attr": 467, "file_setattr": 469,
}  # fmt: skip

# Typing into a terminal, the console's own requests, another line discipline, taking the foreground; and
# (FIOSETOWN, SIOCSPGRP of <asm-generic/sockios.h>) naming the process that a descriptor sends signals to.
IOCTLS: Final = (termios.TIOCSTI, termios.TIOCLINUX, termios.TIOCSETD, termios.TIOCSPGRP, 0x8901, 0x8902)
# The same by fcntl: with F_SETSIG, SIGKILL to any process of this user.
FCNTLS: Final = (fcntl.F_SETOWN, fcntl.F_SETSIG, 15)  # F_SETOWN_EX

PRIO_PROCESS: Final = 0
IOPRIO_WHO_PROCESS: Final = 1
# O_TMPFILE is this bit and O_DIRECTORY.
TMPFILE_BIT: Final = os.O_TMPFILE & ~os.O_DIRECTORY


class _Comparison(ctypes.Structure):  # struct scmp_arg_cmp
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("one", ctypes.c_uint64),
        ("two", ctypes.c_uint64),
    )


class Filter:
    """The filter, made and not yet in force. OSError where libseccomp is not installed."""

    def __init__(self, *, internet: bool, programs: bool = False) -> None:
        """`internet`: metrics are served on a TCP port, so such sockets may be made. `programs`: some may be
        run, which have this filter, too; and they may be sent signals."""
        self._library = ctypes.CDLL(LIBRARY)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(ACT_ALLOW)))
        if self._context.value is None:
            raise OSError(errno.ENOMEM, "libseccomp could not begin a filter")
        self._checked(
            self._library.seccomp_attr_set(self._context, ATTRIBUTE_TSYNC, ctypes.c_uint32(1)),
            "synchronising threads",
        )
        running = RUNNING_PROGRAMS.split()
        for name in DENIED:
            if not programs or name not in running:
                self._deny(name)
        self._deny_sockets(internet=internet)
        self._deny_requests()
        self._deny_set_id()
        self._deny_settings_of_others()
        if programs:
            return
        self._deny_signals(os.getpid())
        # A new process is refused, a new thread is not. The flags of clone3 lie in memory, which no filter
        # can read: told that there is no clone3, the C library uses clone.
        self._deny("clone", _Comparison(0, CMP_MASKED_EQ, CLONE_THREAD, 0))
        self._deny("clone3", number=errno.ENOSYS)

    def _deny_requests(self) -> None:
        for name, requests in (("ioctl", IOCTLS), ("fcntl", FCNTLS), ("fcntl64", FCNTLS)):
            for request in requests:
                self._deny(name, _Comparison(1, CMP_MASKED_EQ, INT_BITS, request))

    def _deny_set_id(self) -> None:
        """No file gets the bits that lend its owner's or group's rights. Those of openat2 lie in memory."""
        for bit in (stat.S_ISUID, stat.S_ISGID):
            for name, place in (("fchmod", 1), ("creat", 1)):
                self._deny(name, _Comparison(place, CMP_MASKED_EQ, bit, bit))
            for name, flags in (("open", 1), ("openat", 2)):
                mode = _Comparison(flags + 1, CMP_MASKED_EQ, bit, bit)
                for making in (os.O_CREAT, TMPFILE_BIT):
                    self._deny(name, _Comparison(flags, CMP_MASKED_EQ, making, making), mode)
        self._deny("openat2", number=errno.ENOSYS)

    def _deny_signals(self, pid: int) -> None:
        """They go to this process (0 is its group). tkill names no process: this one's first thread is all
        that can be told."""
        for name in ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
            self._deny(name, _Comparison(0, CMP_NE, pid, 0))

    def _deny_settings_of_others(self) -> None:
        """Limits and priorities are those of the thread that asks."""
        self._deny("prlimit64", _Comparison(0, CMP_NE, 0, 0))
        for what in ("affinity", "attr", "param", "scheduler"):
            self._deny(f"sched_set{what}", _Comparison(0, CMP_NE, 0, 0))
        for name, one in (("setpriority", PRIO_PROCESS), ("ioprio_set", IOPRIO_WHO_PROCESS)):
            self._deny(name, _Comparison(0, CMP_NE, one, 0))
            self._deny(name, _Comparison(1, CMP_NE, 0, 0))

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
            call = NUMBERS.get(name, UNKNOWN_CALL)
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
