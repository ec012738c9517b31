# SPDX-License-Identifier: Apache-2.0
"""A look at a disk that a state record knows, without opening it for anything: is it there, is it that disk,
does it answer, who has it. For the worst day: a disk may be dead, or hang whoever touches it. So a process of
its own looks, which is left behind where it does not come back."""

import json
import os
import select
import signal
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from vhostsync.disk_identity import DiskIdentity, Likeness
from vhostsync.disk_signatures import read_block
from vhostsync.disk_users import users_of_device, users_of_file
from vhostsync.disks import holders, is_locked
from vhostsync.identify import identify

LOOK_S: Final = 5.0


class Condition(StrEnum):
    THERE = "there"
    UNSURE = "unsure"  # at its path is a disk of which nobody can tell whether it is the one
    OTHER = "other"  # at its path is certainly another one
    MISSING = "missing"
    FAILING = "failing"  # it is there and does not answer, or not in time


IN_WORDS: Final = {
    Condition.THERE: "there",
    Condition.UNSURE: "perhaps there: the disk at that path cannot be told from a copy of it",
    Condition.OTHER: "not there: at that path is another disk",
    Condition.MISSING: "not there",
    Condition.FAILING: "does not answer",
}


@dataclass(frozen=True)
class Look:
    """What was found at the path of a disk. `reason`: of a failure. `users`: who has it, in words."""

    condition: Condition
    reason: str | None = None
    users: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        return self.condition in (Condition.THERE, Condition.UNSURE)

    def in_words(self) -> str:
        text = IN_WORDS[self.condition] + (f" ({self.reason})" if self.reason else "")
        return f"{text}, in use: {'; '.join(self.users)}" if self.users else text


def look(disk: DiskIdentity, timeout_s: float = LOOK_S) -> Look:
    """Blocks, no longer than `timeout_s`. The process must have no other thread."""
    text = _in_a_child(lambda: json.dumps(asdict(look_here(disk))).encode(), timeout_s)
    if text is None:
        return Look(Condition.FAILING, f"no answer within {timeout_s:g} s")
    found = json.loads(text)
    return Look(Condition(found["condition"]), found["reason"], tuple(found["users"]))


def look_here(disk: DiskIdentity) -> Look:
    """As `look`, in this process, for as long as it takes."""
    path = Path(disk.path)
    try:
        fd = _open(path)
    except FileNotFoundError:
        return Look(Condition.MISSING)
    except OSError as error:
        return Look(Condition.FAILING, error.strerror)
    try:
        likeness = disk.likeness(identify(fd, path))
        if likeness is Likeness.OTHER:
            return Look(Condition.OTHER)
        users = _users(fd, path)
        read_block(fd, 0)
        condition = Condition.THERE if likeness is Likeness.SAME else Condition.UNSURE
        return Look(condition, users=users)
    except OSError as error:
        return Look(Condition.FAILING, error.strerror)
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    """For direct I/O where there is some: what is in the page cache says nothing about the disk."""
    if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISBLK(mode)):
        raise OSError(0, "it is neither a file nor a block device")
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:
        return os.open(path, flags)


def _users(fd: int, path: Path) -> tuple[str, ...]:
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        found = users_of_device(status.st_rdev)
    else:
        found = users_of_file(fd, writing=True)
    if is_locked(fd):
        found.insert(0, f"locked by {holders(path)}")
    return tuple(found)


def _in_a_child(make: Callable[[], bytes], timeout_s: float) -> bytes | None:
    """What `make` returns in a child; None if that does not end in time, or dies."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            os.write(writer, make())  # a few hundred bytes: a pipe has room for them
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], timeout_s)
        text = os.read(reader, 65536) if ready else b""
    finally:
        os.close(reader)
    if text:
        os.waitpid(child, 0)
        return text
    # It may hang in the kernel, where no signal reaches it: nobody waits for it.
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, os.WNOHANG)
    return None
