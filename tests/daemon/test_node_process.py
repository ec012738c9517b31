# SPDX-License-Identifier: Apache-2.0
"""What a backend that a node has forked is to the kernel: its user, its signals, the cgroups it lies in."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.daemon.node_rig import ForkedServed, Node
from tests.daemon.rig import WAIT_S, Served, await_true, image, need_root, same_content, write_block
from tests.daemon.test_node import status_of
from tests.daemon.test_privileges import NOBODY, give_to
from tests.guest.backends import vhostsync_command
from vhostsync.host.mounts import read_mounts

pytestmark = pytest.mark.timeout(240)

ENTER: Sequence[str] = (
    "sh", "-c", 'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs"; shift; done; shift; exec "$@"', "sh",
)  # fmt: skip
READ_ONLY: Sequence[str] = (
    "unshare", "--mount", "sh", "-c",
    'while [ "$1" != -- ]; do mount -o remount,bind,ro "$1"; shift; done; shift; exec "$@"', "sh",
)  # fmt: skip


def test_root_s_node_forks_backends_of_other_users(work: Path) -> None:
    need_root()
    user = pwd.getpwnam(NOBODY)
    disk = image(work / "a.img")
    with Node(work) as node:
        (work / "vm").mkdir()
        give_to(NOBODY, work)
        with ForkedServed(node, work / "vm", disk, "--user", NOBODY) as backend:
            for task in Path(f"/proc/{backend.process.pid}/task").iterdir():
                status = status_of(int(task.name))
                assert set(status["Uid"].split()) == {str(user.pw_uid)}, status["Name"]
                assert set(status["Gid"].split()) == {str(user.pw_gid)}, status["Name"]
                assert set(status["Groups"].split()) <= {str(user.pw_gid)}, status["Name"]
                assert (int(status["CapEff"], 16), int(status["CapPrm"], 16)) == (0, 0), status["Name"]
                assert status["NoNewPrivs"] == "1", status["Name"]
            with backend.guest() as guest:
                assert write_block(guest, 1, 1).ok
                backend.start_mirror(work / "vm" / "b.img", create=True)
                assert write_block(guest, 2, 2).ok
            backend.stop()
        assert (work / "vm" / "b.img").stat().st_uid == user.pw_uid
        assert same_content(disk, work / "vm" / "b.img")
        assert set(status_of(node.pid)["Uid"].split()) == {"0"}
        os.chown(work, 0, 0)  # root without its capabilities is one of the others
        with ForkedServed(node, work / "root", image(work / "c.img")) as other:
            assert set(status_of(other.process.pid)["Uid"].split()) == {"0"}, "the next one is the node's"


def signals_of(process: int) -> dict[str, str]:
    """Which are blocked, ignored, and caught by a handler."""
    return {name: word for name, word in status_of(process).items() if re.match(r"Sig(Blk|Ign|Cgt)$", name)}


def test_signals_are_those_of_a_backend_that_was_started_alone(work: Path) -> None:
    with (
        Node(work) as node,
        ForkedServed(node, work / "forked", image(work / "a.img")) as forked,
        Served(work, image(work / "b.img")) as alone,
    ):
        assert signals_of(forked.process.pid) == signals_of(alone.process.pid)
        forked.process.signal(signal.SIGINT)
        assert forked.process.wait(WAIT_S) == 0
        assert node.running


@dataclass(frozen=True)
class Groups:
    """A cgroup of the tests' own, of version 2 and of version 1 where there is one."""

    name: str
    mounts: Sequence[Path]

    @property
    def folders(self) -> list[str]:
        return [str(mount / self.name) for mount in self.mounts]

    def of(self, process: int) -> int:
        """In how many of them that process is."""
        lines = Path(f"/proc/{process}/cgroup").read_text().splitlines()
        return sum(line.endswith(f"/{self.name}") for line in lines)


def is_gone(folder: str) -> bool:
    with contextlib.suppress(OSError):
        Path(folder).rmdir()
    return not Path(folder).exists()


@pytest.fixture
def groups() -> Iterator[Groups]:
    need_root()
    seen = [each for each in read_mounts() if each.kind == "cgroup2" or "pids" in each.options]
    made = Groups(f"vhostsync-test-{os.getpid()}", [each.folder for each in seen])
    if not seen:
        pytest.skip("no cgroups are mounted here")
    try:
        for folder in made.folders:
            Path(folder).mkdir()
        yield made
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        pytest.skip(f"cgroups cannot be made here: {error}")
    finally:
        for folder in made.folders:
            await_true(lambda folder=folder: is_gone(folder), f"nobody is in {folder}")  # type: ignore[misc]


@contextlib.contextmanager
def forked_within(groups: Groups, node: Node, work: Path) -> Iterator[int]:
    """A backend that somebody in these groups has asked for; its process."""
    control = work / "c"
    ask = [*ENTER, *groups.folders, "--", *vhostsync_command(), "serve", "--from-node", str(node.socket)]
    with (work / "out").open("w") as out, (work / "log").open("w") as log:
        subprocess.run(
            [*ask, "--socket-path", "s", "--blk-file", image(work / "a.img"), "--control", "c"],
            env={**os.environ, "STATE_DIRECTORY": str(work / "state")},
            cwd=work, stdout=out, stderr=log, timeout=WAIT_S, check=True,
        )  # fmt: skip
    process = int((work / "out").read_text())
    try:
        await_true(control.exists, "it listens")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        await_true(lambda: not Path(f"/proc/{process}/exe").exists(), "it has ended")


def test_it_lies_in_the_cgroups_of_whoever_asked(groups: Groups, work: Path) -> None:
    with Node(work) as node, forked_within(groups, node, work) as process:
        assert groups.of(process) == len(groups.folders)
        assert groups.of(node.pid) == 0
        for task in Path(f"/proc/{process}/task").iterdir():
            assert groups.of(int(task.name)) == len(groups.folders), "with all its threads"


def test_where_it_may_not_be_put_there_it_serves_and_says_so(groups: Groups, work: Path) -> None:
    before = [*READ_ONLY, *map(str, groups.mounts), "--"]
    with Node(work, before=before) as node, forked_within(groups, node, work) as process:
        assert groups.of(process) == 0
        told = (work / "log").read_text()
        for folder in groups.folders:
            assert f'"Read-only file system", "asked_for": "{folder}"' in told, told
