# SPDX-License-Identifier: Apache-2.0
"""The control groups that processes belong to (cgroups(7)): one in the hierarchy of version 2, one in each of
version 1, or both beside each other, as on hosts that systemd calls hybrid. Everything here blocks."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .mounts import Mount, read_mounts
from .owned_fd import OwnedFd


@dataclass(frozen=True)
class Cgroup:
    """`folder`: where this process finds it, on that device; None: no mount that it sees shows it."""

    path: str
    folder: Path | None
    device: int = 0

    def enter(self) -> None:
        """With this process, which has one thread. OSError."""
        if self.folder is None:
            raise FileNotFoundError(None, "its hierarchy is not mounted here")
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with OwnedFd(os.open(self.folder / "cgroup.procs", flags)) as fd:
            # Something may be mounted over it.
            if os.fstat(fd.fileno()).st_dev != self.device:
                raise FileNotFoundError(None, "another file system lies in the place of its hierarchy")
            os.write(fd.fileno(), b"0")


def groups_apart(process: int) -> list[Cgroup]:
    """Those of that process in which this one is not. OSError."""
    there, here = (_paths_of(each) for each in (str(process), "self"))
    apart = [(hierarchy, path) for hierarchy, path in there.items() if path != here.get(hierarchy)]
    mounts = read_mounts() if apart else []
    return [_found(hierarchy, path, mounts) for hierarchy, path in apart]


def _paths_of(process: str) -> dict[str, str]:
    """By the hierarchy: what it controls, or its name; nothing for version 2."""
    # Of all that is white space only \n is in no name.
    lines = os.fsdecode(Path(f"/proc/{process}/cgroup").read_bytes()).split("\n")
    return {hierarchy: path for _, hierarchy, path in (line.split(":", 2) for line in lines if line)}


def _found(hierarchy: str, path: str, mounts: Iterable[Mount]) -> Cgroup:
    wanted = frozenset(hierarchy.split(","))
    for mount in mounts:
        is_it = mount.kind == "cgroup" and wanted <= mount.options if hierarchy else mount.kind == "cgroup2"
        # One outside of this process's namespace begins with /.. and lies below no mount.
        if is_it and ".." not in Path(path).parts and Path(path).is_relative_to(mount.root):
            return Cgroup(path, mount.folder / Path(path).relative_to(mount.root), mount.device)
    return Cgroup(path, None)
