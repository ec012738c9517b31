# SPDX-License-Identifier: Apache-2.0
"""The control groups that processes belong to (cgroups(7)): one in the hierarchy of version 2, one in each of
version 1, or both beside each other, as on hosts that systemd calls hybrid. Everything here blocks."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .mounts import Mount, read_mounts


@dataclass(frozen=True)
class Cgroup:
    """`folder`: where this process finds it; None: no mount that it sees shows it."""

    path: str
    folder: Path | None

    def enter(self) -> None:
        """With this process, which has one thread. OSError."""
        if self.folder is None:
            raise FileNotFoundError(None, "its hierarchy is not mounted here")
        (self.folder / "cgroup.procs").write_text("0")


def groups_apart(process: int) -> list[Cgroup]:
    """Those of that process in which this one is not. OSError."""
    there, here = (_paths_of(each) for each in (str(process), "self"))
    apart = [(hierarchy, path) for hierarchy, path in there.items() if path != here.get(hierarchy)]
    mounts = read_mounts() if apart else []
    return [Cgroup(path, _folder_of(hierarchy, path, mounts)) for hierarchy, path in apart]


def _paths_of(process: str) -> dict[str, str]:
    """By the hierarchy: what it controls, or its name; nothing for version 2."""
    lines = Path(f"/proc/{process}/cgroup").read_text(errors="surrogateescape").splitlines()
    return {hierarchy: path for _, hierarchy, path in (line.split(":", 2) for line in lines)}


def _folder_of(hierarchy: str, path: str, mounts: Iterable[Mount]) -> Path | None:
    wanted = frozenset(hierarchy.split(","))
    for mount in mounts:
        is_it = mount.kind == "cgroup" and wanted <= mount.options if hierarchy else mount.kind == "cgroup2"
        # One outside of this process's namespace begins with /.. and lies below no mount.
        if is_it and ".." not in Path(path).parts and Path(path).is_relative_to(mount.root):
            return mount.folder / Path(path).relative_to(mount.root)
    return None
