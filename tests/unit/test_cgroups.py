# SPDX-License-Identifier: Apache-2.0
"""Where the cgroups of another process are found: what the kernel shows, and which mount leads there."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostsync.host.cgroups import Cgroup, _found, _paths_of
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
    assert _found(hierarchy, path, ALL).folder == (None if folder is None else Path(folder))


def test_a_mount_shows_what_is_below_its_root() -> None:
    part = mounted("/mnt/part", "cgroup2", root="/a.slice")
    assert _found("", "/a.slice/b", [part]).folder == Path("/mnt/part/b")
    assert _found("", "/a.slice2/b", [part]).folder is None
    assert _found("", "/c", [part, V2]).folder == Path("/sys/fs/cgroup/unified/c")


def test_one_that_is_not_mounted_cannot_be_entered() -> None:
    with pytest.raises(FileNotFoundError) as told:
        Cgroup("/x", None).enter()
    assert told.value.strerror == "its hierarchy is not mounted here"


def test_what_lies_over_a_hierarchy_is_not_written_to(tmp_path: Path) -> None:
    """A file of a cgroup's name, or none at all, or a link: nothing is made, cut off or followed."""
    procs, victim = tmp_path / "cgroup.procs", tmp_path / "victim"
    group = Cgroup("/x", tmp_path, tmp_path.stat().st_dev + 1)
    with pytest.raises(OSError, match="No such file"):
        group.enter()
    assert not procs.exists()
    victim.write_text("precious")
    procs.symlink_to(victim)
    with pytest.raises(OSError, match="Too many levels"):
        group.enter()
    procs.unlink()
    procs.write_text("precious, too")
    with pytest.raises(FileNotFoundError) as told:
        group.enter()
    assert told.value.strerror == "another file system lies in the place of its hierarchy"
    assert (procs.read_text(), victim.read_text()) == ("precious, too", "precious")


@pytest.mark.parametrize("odd", ["\r", "\x1c", "\u2028", "\x85", ":", " "])
def test_a_cgroup_may_have_any_name(monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    text = f"2:pids:/a{odd}9:name=systemd:/forged\n0::/b{odd}c\n"
    monkeypatch.setattr(Path, "read_bytes", lambda _: text.encode())
    assert _paths_of("1") == {"pids": f"/a{odd}9:name=systemd:/forged", "": f"/b{odd}c"}
