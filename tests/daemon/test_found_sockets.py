# SPDX-License-Identifier: Apache-2.0
"""A command by a disk's name reaches the process that holds the lock of its record and no other, wherever
links lead; and that is the disk's backend, however it was started."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest

from tests.daemon.named_host import Host
from tests.daemon.node_rig import ForkedServed, Node
from tests.daemon.rig import WAIT_S, Served, image, need_root
from tests.guest.backends import vhostsync_command
from tests.hanging_disk import Op, hanging_disk
from tests.watched.exporter import Exporter, up
from vhostsync.fleet.disks import ANSWER_S, host_disks
from vhostsync.record.names import find_name
from vhostsync.record.state_file import backend_link

pytestmark = pytest.mark.timeout(240)  # many programs are started, one after the other

UNREACHABLE = 3


class TwoDisks:
    """vm1, which listens elsewhere than in the place of its name and is found by its record; and vm2, to
    which somebody would lead what is meant for vm1."""

    def __init__(self, host: Host, served: Served) -> None:
        self.host, self.served = host, served
        self.record = find_name("vm1", host.state).record
        self.other = host.run / "vm2" / "control"

    def replace(self, path: Path, target: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def is_served(self, name: str) -> bool:
        return bool(self.host.list()[name]["running"])


def exported(host: Host) -> str:
    """The page of metrics."""
    words = [*vhostsync_command(), "exporter", "--once"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=WAIT_S, env=host.environment
    )
    return done.stdout


@pytest.fixture
def disks(work: Path) -> Iterator[TwoDisks]:
    host, old = Host(work), work / "old"
    old.mkdir()
    for name in ("vm1", "vm2"):
        host.tell("create", name, "--disk", image(old / f"{name}.img"))
    with Served(work, old / "vm1.img") as served, host.serve("vm2"):
        assert host.list()["vm1"]["control"] == str(served.control)
        yield TwoDisks(host, served)


def test_a_records_link_to_another_backend_leads_no_command_there(disks: TwoDisks) -> None:
    disks.replace(backend_link(disks.record), disks.other)
    said = disks.host.tell("quit", "--name", "vm1", code=UNREACHABLE)
    assert f"does not hold {disks.record}.lock: it is not that disk's backend" in said
    shown = disks.host.list(code=1)
    assert shown["vm1"]["state"] == "unknown" and "does not hold" in shown["vm1"]["problem"]
    assert (shown["vm2"]["running"], shown["vm2"]["problem"]) == (True, None)
    disks.replace(backend_link(disks.record), disks.served.control)
    assert disks.is_served("vm1")


def test_nor_an_evacuation_or_a_page_of_metrics(disks: TwoDisks, work: Path) -> None:
    place = work / "new"
    place.mkdir()
    disks.replace(backend_link(disks.record), disks.other)
    assert up(exported(disks.host)) == {"vm1": 0, "vm2": 1}
    disks.host.tell("evacuate", work / "old", "--to", place, code=1)
    assert [each.name for each in place.iterdir()] == ["vm2.img"]


def test_a_link_in_the_place_of_a_name_is_not_followed(disks: TwoDisks) -> None:
    place = disks.host.run / "vm1" / "control"
    place.parent.mkdir()
    place.symlink_to(disks.other)
    disks.host.tell("quit", "--name", "vm1")
    assert disks.served.process.wait(WAIT_S) == 0
    # Nobody holds the lock any more with which the other one could be compared.
    disks.host.tell("quit", "--name", "vm1", code=UNREACHABLE)
    assert disks.is_served("vm2")


def test_nor_one_in_the_place_of_a_records_lock(disks: TwoDisks) -> None:
    disks.served.kill()
    disks.replace(Path(f"{disks.record}.lock"), Path(f"{find_name('vm2', disks.host.state).record}.lock"))
    disks.replace(backend_link(disks.record), disks.other)
    disks.host.tell("quit", "--name", "vm1", code=UNREACHABLE)
    assert disks.is_served("vm2")


def test_a_socket_that_stands_in_the_place_of_a_name_is_not_believed(disks: TwoDisks, work: Path) -> None:
    """As long as the record's lock is held by somebody else: its link leads there."""
    place = disks.host.run / "vm1"
    place.mkdir()
    with Served(work, image(work / "c.img"), "--no-state-file", name="other", control=place / "control"):
        assert disks.host.list()["vm1"]["control"] == str(disks.served.control)
        disks.replace(backend_link(disks.record), place / "control")
        said = disks.host.tell("quit", "--name", "vm1", code=UNREACHABLE)
        assert f"does not hold {disks.record}.lock" in said
        disks.served.stop()
        said = json.loads(disks.host.tell("status", "--name", "vm1", "--json"))
        assert said["status"]["disk"] == str(work / "c.img")


def test_a_socket_that_was_left_in_the_place_of_a_name_hides_no_backend(disks: TwoDisks) -> None:
    place = disks.host.run / "vm1" / "control"
    place.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as former:
        former.bind(str(place))
    assert disks.is_served("vm1")
    assert up(exported(disks.host)) == {"vm1": 1, "vm2": 1}
    disks.host.tell("quit", "--name", "vm1")
    assert disks.served.process.wait(WAIT_S) == 0


def test_a_link_that_leads_nowhere_hides_no_backend_in_its_place(disks: TwoDisks) -> None:
    """As from another view of the directories, or left by one that was killed."""
    disks.replace(backend_link(find_name("vm2", disks.host.state).record), disks.host.work / "nowhere")
    shown = disks.host.list()
    assert set(shown) == {"vm1", "vm2"}
    assert shown["vm2"]["control"] == str(disks.other)
    assert up(exported(disks.host)) == {"vm1": 1, "vm2": 1}
    disks.host.tell("status", "--name", "vm2")


def test_a_backend_whose_place_is_spelled_in_two_ways_is_one(work: Path) -> None:
    host = Host(work)
    host.tell("create", "vm1", "--disk", image(work / "a.img"))
    (host.run / "vm1").mkdir(parents=True)
    (work / "also").symlink_to(host.run)
    with Served(work, work / "a.img", control=work / "also" / "vm1" / "control"):
        assert set(host.list()) == {"vm1"}
        assert up(exported(host)) == {"vm1": 1}


def test_a_backend_without_a_control_socket_is_not_called_stopped(work: Path) -> None:
    host = Host(work)
    host.tell("create", "vm1", "--disk", image(work / "a.img"))
    record = find_name("vm1", host.state).record
    with Path(f"{record}.lock").open("w") as lock:  # one that is named by nothing is none
        fcntl.flock(lock, fcntl.LOCK_EX)
        shown = host.list(code=1)["vm1"]
    assert (shown["state"], shown["running"]) == ("unknown", False)
    assert shown["problem"] == "its backend runs, and has no control socket to be asked at"


def test_one_that_hangs_is_not_asked_again_for_one_between_two_backends(disks: TwoDisks) -> None:
    record = find_name("vm2", disks.host.state).record
    disks.host.tell("quit", "--name", "vm2")
    disks.served.process.signal(signal.SIGSTOP)
    try:
        os.utime(record)
        began = time.monotonic()
        shown = disks.host.list(code=1)
        took_s = time.monotonic() - began
    finally:
        disks.served.process.signal(signal.SIGCONT)
    assert (shown["vm1"]["state"], shown["vm2"]["state"]) == ("unknown", "stopped")
    assert took_s < 2 * ANSWER_S


@pytest.mark.parametrize("name", ["x.record.json", "x.name.json"])
def test_no_link_of_another_users_directory_is_followed(work: Path, name: str) -> None:
    need_root()
    host = Host(work)
    host.tell("create", "vm1", "--disk", image(work / "a.img"))
    (host.state / "another").mkdir()
    with hanging_disk(work / "hung", 4096) as hung, host.serve("vm1"):
        hung.killable = True
        hung.hang(Op.LOOKUP, Op.GETATTR)
        (host.state / "another" / name).symlink_to(hung.path)
        assert host.list(code=1 if name == "x.record.json" else 0)["vm1"]["running"]
        assert up(exported(host)) == {"vm1": 1}


def test_a_link_into_a_file_system_that_hangs_costs_nobody_else_a_line(disks: TwoDisks, work: Path) -> None:
    need_root()
    with hanging_disk(work / "hung", 4096) as hung:
        disks.replace(backend_link(disks.record), hung.path)
        hung.killable = True
        hung.hang(Op.LOOKUP)
        shown = disks.host.list(code=1)
        assert shown["vm1"]["problem"] == f"the backend at {hung.path} does not answer"
        assert (shown["vm2"]["running"], shown["vm2"]["problem"]) == (True, None)
        disks.host.tell("status", "--name", "vm1", code=UNREACHABLE)


def test_a_backend_is_not_called_stopped_while_it_is_upgraded(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two nobody listens, and for a moment nobody holds the lock."""
    host, disk = Host(work), image(work / "a.img")
    host.tell("create", "vm1", "--disk", disk)
    for name, value in host.environment.items():
        monkeypatch.setenv(name, value)
    states = Counter[str]()
    with Served(work, disk) as served, ThreadPoolExecutor(1) as upgrader:
        for _ in range(5):
            upgraded = upgrader.submit(served.hand_over)
            while not upgraded.done():
                states.update(each.state for each in anyio.run(host_disks))
            assert upgraded.result() == 0
    assert "stopped" not in states and states["passthrough"] > 10, states


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_backend_is_not_missed_while_it_is_upgraded(work: Path, elsewhere: bool) -> None:
    """By the exporter, nor by commands that name it, where it listens in the place of its name."""
    host, disk = Host(work), image(work / "a.img")
    host.tell("create", "vm1", "--disk", disk)
    control = None if elsewhere else host.run / "vm1" / "control"
    (host.run / "vm1").mkdir(parents=True)
    pages, asked = Counter[str](), 0
    with (
        Served(work, disk, control=control) as served,
        Exporter(work, env=host.environment) as exporter,
        ThreadPoolExecutor(1) as upgrader,
    ):
        for _ in range(5):
            upgraded = upgrader.submit(served.hand_over)
            while not upgraded.done():
                pages.update(re.findall(r"^vhostsync_(?:up|stopped){.*$", exporter.page(), re.MULTILINE))
                if not elsewhere:
                    asked += bool(host.tell("status", "--name", "vm1"))
            assert upgraded.result() == 0
        said = [each["message"] for each in exporter.lines]
    assert set(pages) == {'vhostsync_up{vm="vm1"} 1', 'vhostsync_stopped{vm="vm1"} 0'}, pages
    assert pages.total() >= 10 and "backend is down" not in said
    assert elsewhere or asked >= 5


@pytest.mark.parametrize("how", ["itself", "with a socket from outside", "by a node", "in a namespace"])
def test_a_backend_is_believed_however_it_was_started(work: Path, how: str) -> None:
    host, disk = Host(work), image(work / "a.img")
    host.tell("create", "vm1", "--disk", disk)

    def is_found() -> None:
        assert json.loads(host.tell("status", "--name", "vm1", "--json"))["status"]["disk"] == str(disk)
        assert host.list()["vm1"]["running"]

    with ExitStack() as stack:
        if how == "by a node":
            node = stack.enter_context(Node(work))
            served: Served = ForkedServed(node, work / "own", disk, state_directory=host.state)
        elif how == "with a socket from outside":
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(work / "outside.sock"))
            listener.listen()
            number = listener.fileno()
            served = Served(work, disk, "--fd", str(number), pass_fds=(number,))
        elif how == "in a namespace":
            need_root()
            served = Served(work, disk, before=("unshare", "--pid", "--fork", "--kill-child"))
        else:
            served = Served(work, disk)
        stack.enter_context(served)
        is_found()
        if how in ("itself", "with a socket from outside"):
            assert served.hand_over() == 0
            is_found()


def test_who_cannot_see_the_backends_process_finds_it_in_the_place_of_its_name(work: Path) -> None:
    """From within a container that shares the directories."""
    need_root()
    if shutil.which("unshare") is None:
        pytest.skip("NOT TESTED: there is no unshare")
    host = Host(work)
    host.tell("create", "vm1", "--disk", image(work / "a.img"))
    with host.serve("vm1"):
        words = ["unshare", "--pid", "--fork", "--mount-proc", *vhostsync_command()]
        for command in (["status", "--name", "vm1"], ["list"]):
            subprocess.run([*words, *command], check=True, timeout=WAIT_S, env=host.environment)
