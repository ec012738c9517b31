# SPDX-License-Identifier: Apache-2.0
"""Whose lock an image of a Ceph cluster has: a note at the image, of the process that took it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vhostsync.host import kernel


def _this_machine() -> str:
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Note:
    """Of the process that has the lock, kept at the image. `client`: its address in the cluster, by which the
    lock tells who has it; a note that is older than the lock says nothing."""

    client: str
    number: int  # of the same client
    machine: str
    boot: str
    pids: str  # the namespace that its number belongs to
    pid: int
    began: int  # ticks after the boot: another process may get the number
    shut_out: tuple[str, ...]

    @classmethod
    def of_this_process(cls, client: str, number: int, shut_out: tuple[str, ...]) -> "Note":
        pid, boot = os.getpid(), kernel.this_boot()
        began = _began(pid) or 0
        return cls(client, number, _this_machine(), boot, _pid_namespace(), pid, began, shut_out)

    @classmethod
    def read(cls, text: str | None) -> "Note | None":
        """None: there is none, or one that another version has written."""
        try:
            body = json.loads(text or "")
            return cls(**{**body, "shut_out": tuple(body["shut_out"])})
        except (ValueError, TypeError, KeyError):
            return None

    def text(self) -> str:
        return json.dumps(self.__dict__)

    def owner_is_gone(self, owner: str, is_open_here: Callable[[int], bool]) -> bool:
        """Certainly: whoever cannot be looked for may be there. `is_open_here`: whether the client of this
        number has an image open in this process."""
        if self.client != owner or not self.machine or self.machine != _this_machine():
            return False
        if self.boot != kernel.this_boot():
            return True
        if self.pids != _pid_namespace():
            return False
        if _began(self.pid) != self.began:
            return True
        # One of this process's own, which could not give the lock back when it was closed.
        return self.pid == os.getpid() and not is_open_here(self.number)

    def in_words(self) -> str:
        here = self.machine and self.machine == _this_machine()
        return f"process {self.pid} of {'this host' if here else 'another host'}"


def _pid_namespace() -> str:
    return str(Path("/proc/self/ns/pid").readlink())


def _began(pid: int) -> int | None:
    """None: there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])
