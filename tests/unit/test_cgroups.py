# SPDX-License-Identifier: Apache-2.0
"""Where the cgroups of another process are found: what the kernel shows, and which mount leads there."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostsync.host.cgroups import Cgroup, _folder_of
from vhostsync.host.mounts import Mount


def mounted(folder: str, kind: str, *options: str, root: str = "/") -> Mount:
    return Mount(1, 0, Path(folder), kind, Path(root), kind, frozenset(options))


V2 = mounted("/sys/fs/cgroup/unified", "cgroup2", "rw")
PIDS = mounted("/sys/fs/cgroup/pids", "cgroup", "rw", "pids")
CPU = mounted("/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw", "cpu", "cpuacct")
NAMED = mounted("/sys/fs/cgroup/systemd", "cgroup", "rw", "name=systemd")
DISK = mounted("/", "ext4", "rw", "pids")
ALL = (DISK, PIDS, CPU, NAMED, V2)


@pytest.mark.parametrize(
    ("hierarchy", "path", "folder"),
    [
        ("", "/a.slice/b", "/sys/fs/cgroup/unified/a.slice/b"),
        ("", "/", "/sys/fs/cgroup/unified"),
        ("pids", "/x", "/sys/fs/cgroup/pids/x"),
        ("cpu,cpuacct", "/x", "/sys/fs/cgroup/cpu,cpuacct/x"),
        ("cpuacct,cpu", "/x", "/sys/fs/cgroup/cpu,cpuacct/x"),
        ("name=systemd", "/x:y", "/sys/fs/cgroup/systemd/x:y"),
        ("memory", "/x", None),
        ("", "/../other", None),
    ],
)
def test_the_mount_that_shows_it(hierarchy: str, path: str, folder: str | None) -> None:
    assert _folder_of(hierarchy, path, ALL) == (None if folder is None else Path(folder))


def test_a_mount_shows_what_is_below_its_root() -> None:
    part = mounted("/mnt/part", "cgroup2", root="/a.slice")
    assert _folder_of("", "/a.slice/b", [part]) == Path("/mnt/part/b")
    assert _folder_of("", "/a.slice2/b", [part]) is None
    assert _folder_of("", "/c", [part, V2]) == Path("/sys/fs/cgroup/unified/c")


def test_one_that_is_not_mounted_cannot_be_entered() -> None:
    with pytest.raises(FileNotFoundError) as told:
        Cgroup("/x", None).enter()
    assert told.value.strerror == "its hierarchy is not mounted here"
