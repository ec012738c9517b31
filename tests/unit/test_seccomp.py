# SPDX-License-Identifier: Apache-2.0
"""The seccomp filter on the kernel of this machine: each call is made by a process that has sealed itself."""

import ast
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# `attempt` notes the error of a call, 0 for none.
SEALED = """
import ctypes, errno, fcntl, os, resource, signal, socket, stat, sys, termios, threading
from pathlib import Path
from vhostsync.host.kernel import PR_SET_NO_NEW_PRIVS, Kernel
from vhostsync.confine.seccomp import Filter
results = {}
def attempt(name, do):
    try: do()
    except OSError as error: results[name] = error.errno
    else: results[name] = 0
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *words):
    if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, words)) < 0:
        raise OSError(ctypes.get_errno(), "a system call")
def seal():
    Kernel().prctl(PR_SET_NO_NEW_PRIVS, 1)
    Filter(internet=INTERNET).load()
TRIES
print(results)
"""


def sealed(tries: str, *arguments: str | Path, internet: bool = False) -> dict[str, int]:
    """What a process that runs `tries` has noted. It seals itself by `seal()`."""
    text = SEALED.replace("TRIES", tries).replace("INTERNET", str(internet))
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=30, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = ast.literal_eval(done.stdout)
    return found


def check_results(results: dict[str, int]) -> None:
    """What is called "may ..." is done, all else refused."""
    for name, error in results.items():
        assert error == (0 if name.startswith("may ") else errno.EPERM), name


EVERY_THREAD = """
go = threading.Event()
def unshare():
    if libc.unshare(0) < 0: raise OSError(ctypes.get_errno(), "unshare")
def tries(who):
    attempt(who + "execve", lambda: os.execv("/bin/true", ["true"]))
    attempt(who + "fork", os.fork)
    attempt(who + "inet", lambda: socket.socket(socket.AF_INET).close())
    attempt(who + "netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close())
    attempt(who + "unix", lambda: socket.socket(socket.AF_UNIX).close())
    attempt(who + "setuid", lambda: os.setuid(os.getuid()))
    attempt(who + "unshare", unshare)
early = threading.Thread(target=lambda: (go.wait(), tries("early ")))
early.start()
seal()
go.set(); early.join(); tries("main ")
late = threading.Thread(target=lambda: tries("late "))
late.start(); late.join()
"""


@pytest.mark.parametrize("internet", [False, True])
def test_the_filter_holds_for_every_thread(internet: bool) -> None:
    """Those that ran before it was loaded as well, and threads can still be started."""
    results = sealed(EVERY_THREAD, internet=internet)
    for who in ("early", "main", "late"):
        for denied in ("execve", "fork", "netlink", "unshare", "setuid"):
            assert results[f"{who} {denied}"] == errno.EPERM, (who, denied)
        assert results[f"{who} inet"] == (0 if internet else errno.EPERM)
        assert results[f"{who} unix"] == 0


TERMINAL = """
import array
master, slave = os.openpty()
typed = ctypes.create_string_buffer(b"x")
IOCTL = {"x86_64": 16, "aarch64": 29}.get(os.uname().machine)
seal()
for name, request in (("type", termios.TIOCSTI), ("console", termios.TIOCLINUX), ("owner", 0x8901),
                      ("discipline", termios.TIOCSETD), ("foreground", termios.TIOCSPGRP)):
    attempt(name, lambda: fcntl.ioctl(slave, request, b"x" * 8))
    if IOCTL is not None:  # the kernel looks at the lower half of the word only
        attempt(name + " in disguise", lambda: call(IOCTL, slave, request | 1 << 32, ctypes.addressof(typed)))
attempt("may ask for its size", lambda: os.get_terminal_size(slave))
attempt("may ask what waits", lambda: fcntl.ioctl(master, termios.FIONREAD, array.array("i", [0])))
"""


def test_nothing_is_typed_into_a_terminal() -> None:
    check_results(sealed(TERMINAL))


NEIGHBOURS = """
other, me = int(sys.argv[1]), os.getpid()
watched = os.pidfd_open(other)
one, _ = socket.socketpair()
signal.signal(signal.SIGUSR1, lambda *_: None)
seal()
infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
attempt("kill", lambda: os.kill(other, signal.SIGSTOP))
attempt("kill the group", lambda: os.kill(0, 0))
attempt("kill everybody", lambda: os.kill(-1, 0))
attempt("pidfd", lambda: signal.pidfd_send_signal(watched, signal.SIGSTOP))
attempt("owner", lambda: fcntl.fcntl(one, fcntl.F_SETOWN, other))
attempt("owner, extended", lambda: fcntl.fcntl(one, 15, bytes(8)))
attempt("which signal", lambda: fcntl.fcntl(one, fcntl.F_SETSIG, signal.SIGKILL))
attempt("limit", lambda: resource.prlimit(other, resource.RLIMIT_CORE, (0, 0)))
attempt("affinity", lambda: os.sched_setaffinity(other, {0}))
attempt("scheduler", lambda: os.sched_setscheduler(other, os.SCHED_BATCH, os.sched_param(0)))
attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, other, 19))
attempt("priority of a group", lambda: os.setpriority(os.PRIO_PGRP, 0, 1))
attempt("may kill", lambda: os.kill(me, 0))
attempt("may thread", lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1))
attempt("may raise", lambda: signal.raise_signal(signal.SIGUSR1))
attempt("may limit", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard)))
attempt("may affinity", lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)))
attempt("may priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0)))
attempt("may set status flags", lambda: fcntl.fcntl(one, fcntl.F_SETFL, os.O_NONBLOCK))
"""


def test_other_processes_are_left_alone() -> None:
    """A neighbour of the same user is neither stopped nor slowed down."""
    with subprocess.Popen(["sleep", "60"]) as neighbour:
        try:
            results = sealed(NEIGHBOURS, str(neighbour.pid))
            assert neighbour.poll() is None
            state = Path(f"/proc/{neighbour.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            assert state != "T", "it was stopped"
            assert os.sched_getaffinity(neighbour.pid) == os.sched_getaffinity(0)
        finally:
            neighbour.send_signal(signal.SIGKILL)
    check_results(results)


FILES = """
os.chdir(sys.argv[1])
Path("file").write_bytes(b"x")
os.symlink("file", "link")
fd = os.open("file", os.O_RDWR)
has_attributes = True
try: os.setxattr("file", "user.test", b"1")
except OSError: has_attributes = False
me, group = os.getuid(), os.getgid()
O_PATH, EMPTY_PATH, SETXATTRAT, REMOVEXATTRAT, OPEN_TREE_ATTR, FCHMODAT2, FILE_SETATTR = (
    os.O_PATH, 0x1000, 463, 466, 467, 452, 469)
seal()
attempt("chmod", lambda: os.chmod("file", 0o640))
attempt("chmod at", lambda: os.chmod("file", 0o640, dir_fd=os.open(".", os.O_PATH)))
attempt("fchmodat2", lambda: call(FCHMODAT2, -100, 0, 0o640, EMPTY_PATH))
attempt("chown", lambda: os.chown("file", me, group))
attempt("lchown", lambda: os.lchown("link", me, group))
attempt("fchown", lambda: os.fchown(fd, me, group))
attempt("setxattr", lambda: os.setxattr("file", "user.other", b"1"))
attempt("lsetxattr", lambda: os.setxattr("file", "user.other", b"1", follow_symlinks=False))
attempt("removexattr", lambda: os.removexattr("file", "user.test"))
attempt("setxattrat", lambda: call(SETXATTRAT, -100, 0, 0, 0, 0, 0))
attempt("removexattrat", lambda: call(REMOVEXATTRAT, -100, 0, 0, 0))
attempt("open_tree_attr", lambda: call(OPEN_TREE_ATTR, -100, 0, 0, 0, 0))
attempt("file_setattr", lambda: call(FILE_SETATTR, -100, 0, 0, 0, 0))
attempt("set-user-ID", lambda: os.fchmod(fd, 0o4755))
attempt("set-group-ID", lambda: os.fchmod(fd, 0o2755))
attempt("made with set-user-ID", lambda: os.open("new", os.O_CREAT | os.O_WRONLY, 0o4755))
attempt("made with set-group-ID", lambda: os.open("new", os.O_CREAT | os.O_WRONLY, 0o2755))
attempt("made without a name", lambda: os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o4755))
attempt("may fchmod", lambda: os.fchmod(fd, 0o640))
attempt("may make", lambda: os.open("new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
attempt("may truncate", lambda: os.truncate("file", 2))
attempt("may mkdir", lambda: os.mkdir("folder", 0o700))
attempt("may rename", lambda: os.rename("new", "newer"))
if has_attributes:
    attempt("may set an attribute of what is open", lambda: os.setxattr(fd, "user.test", b"2"))
    attempt("may read an attribute of what is open", lambda: os.getxattr(fd, "user.test"))
    attempt("may read an attribute", lambda: os.getxattr("file", "user.test"))
    attempt("may list attributes", lambda: os.listxattr(fd))
attempt("openat2", lambda: call(437, -100, 0, 0, 0))
"""


def test_modes_owners_and_attributes_of_files_stay(tmp_path: Path) -> None:
    results = sealed(FILES, tmp_path)
    assert results.pop("openat2") == errno.ENOSYS, "what lies in memory no filter can read"
    check_results(results)
    assert (tmp_path / "file").stat().st_mode & 0o7777 == 0o640
