# SPDX-License-Identifier: Apache-2.0
"""`vhostsync node`: backends that are forked from a warm process are backends like all others, and have
nothing of each other's."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.daemon.named_host import Host
from tests.daemon.node_rig import ForkedServed, Node
from tests.daemon.rig import WAIT_S, Served, await_true, flush, image, same_content, write_block
from tests.daemon.test_stderr import fill, into, unread
from tests.guest.backends import vhostsync_command
from vhostsync.errors import ControlError, UnreachableError
from vhostsync.host.parcel import receive_parcel, send_parcel
from vhostsync.host.unix_socket import BACKLOG
from vhostsync.node.process import REQUEST_S
from vhostsync.node.request import Request, _descriptor_of, start
from vhostsync.storage import receive

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def node(work: Path) -> Iterator[Node]:
    with Node(work) as running:
        yield running


def status_of(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def open_files(process: int) -> list[str]:
    return [str(each.readlink()) for each in Path(f"/proc/{process}/fd").iterdir()]


def test_eight_backends_outlive_their_node(node: Node, work: Path) -> None:
    with contextlib.ExitStack() as stack:
        served: list[ForkedServed] = []
        for number in range(8):
            disk, other = image(work / f"{number}-a.img"), image(work / f"{number}-b.img", filled_mib=0)
            backend = stack.enter_context(ForkedServed(node, work / f"vm{number}", disk))
            guest = stack.enter_context(backend.guest())
            write_block(guest, number, 1)
            backend.start_mirror(other)
            write_block(guest, number + 8, 2)
            flush(guest)
            served.append(backend)
        assert len({each.process.pid for each in served}) == 8

        served[0].process.signal(signal.SIGKILL)
        assert served[0].process.wait(WAIT_S) == -signal.SIGKILL
        served[1].process.signal(signal.SIGTERM)
        assert served[1].process.wait(WAIT_S) == 0  # its guest is let go first
        assert same_content(work / "1-a.img", work / "1-b.img")

        node.kill_alone()
        for backend in served[2:]:
            assert backend.process.running
            assert backend.state == "steady"

        with Node(work):  # on the place of the one that was killed
            again = stack.enter_context(ForkedServed(node, work / "vm0", work / "0-a.img"))
            again.await_resumed()
            with again.guest() as guest:
                assert write_block(guest, 3, 3).ok
            for backend in [again, *served[2:]]:
                backend.stop()
            for number in (0, *range(2, 8)):
                assert same_content(work / f"{number}-a.img", work / f"{number}-b.img")


def test_a_backend_has_nothing_of_another_or_of_the_node(node: Node, work: Path) -> None:
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(ForkedServed(node, work / name, image(work / f"{name}.img")))
            for name in ("one", "two")
        )
        for backend, other in ((first, second), (second, first)):
            process = backend.process.pid
            files = open_files(process)
            assert str(backend.folder / "vm.log") in files
            assert not [each for each in files if str(other.folder) in each or f"{other.folder}.img" in each]
            of_node = open_files(node.pid)
            nodes = {each for each in of_node if each.startswith("socket:") or "node.log" in each}
            assert nodes and not nodes & set(files)
            # Standard streams, the disk, the record's lock, and what an engine and an event loop have.
            assert len(files) < 30
            status = status_of(process)
            assert (status["Seccomp"], status["NoNewPrivs"], int(status["CapEff"], 16)) == ("2", "1", 0)
            assert status["SigCgt"] != status_of(node.pid)["SigCgt"]
            assert os.getsid(process) == process
            assert Path(f"/proc/{process}/cwd").readlink() == backend.folder
            # Its environment is what was asked for: this is where its record went.
            assert backend.record() is not None


def test_forked_backends_are_found_wherever_they_listen(node: Node, work: Path) -> None:
    host = Host(work)
    disk = image(work / "a.img")
    host.tell("create", "vm1", "--disk", disk)
    folder = work / "a place of its own"
    with ForkedServed(node, folder, disk, state_directory=host.state) as backend:
        found = host.list()["vm1"]
        assert (found["running"], found["control"]) == (True, str(backend.control))
        plan = json.loads(host.tell("evacuate", work, "--to", work.parent, "--dry-run", "--json"))["plan"]
        assert [(each["label"], each["why-not"]) for each in plan] == [("vm1", None)]
        assert 'vhostsync_up{vm="vm1"} 1' in host.tell("exporter", "--once")
        assert json.loads(host.tell("status", "--name", "vm1", "--json"))["status"]["disk"] == str(disk)
        backend.kill()
        assert host.list()["vm1"]["state"] == "stopped"


def read_until(fd: int, text: bytes) -> None:
    seen = b""
    while text not in seen:
        assert select.select([fd], [], [], WAIT_S)[0], seen
        seen += os.read(fd, 1 << 16)


def test_a_log_that_nobody_reads_holds_up_nobody(work: Path) -> None:
    with unread(work) as (pipe, fd):
        fill(fd)
        with Node(work, before=into(str(pipe))) as node:
            with pipe.open("r+b", buffering=0) as full, Path(os.devnull).open("rb") as nothing:
                ask = Request(("--no-such-option",), {"PATH": os.defpath}, str(work), 0o077, (0, 1, 2))
                waits = start(node.socket, ask, [nothing.fileno(), full.fileno(), full.fileno()])
            with contextlib.closing(waits):
                assert asks_wrongly(node, work) == 2
                with pytest.raises(TimeoutError):
                    waits.wait(0.1)  # its own log holds it up, and nobody else
                read_until(fd, b"backend forked")
                assert waits.wait(WAIT_S) == 2
            assert node.terminate() == 0


@pytest.mark.parametrize(
    ("words", "descriptors"),
    [
        (["--fd", "5"], (5,)),
        (["--fd=5", "--name", "--fd=6"], (6,)),
        (["--fd", "5", "--fd", "7"], (7,)),
        (["--name=--fd=6", "--fd=5", "--fds=8"], (5,)),
        (["--fd", "--fd"], ()),
        (["--fd", "\u0663"], ()),
        (["--fd"], ()),
    ],
)
def test_the_descriptor_is_that_which_serve_takes(words: list[str], descriptors: tuple[int, ...]) -> None:
    assert _descriptor_of(words) == descriptors


def test_a_start_that_is_refused_is_told(node: Node, work: Path) -> None:
    def asks(*words: str) -> int:
        with Path(os.devnull).open("r+b") as nothing:
            request = Request(words, {"PATH": os.defpath}, str(work), 0o077, (0, 1, 2))
            with contextlib.closing(start(node.socket, request, [nothing.fileno()] * 3)) as started:
                return started.wait(WAIT_S)

    assert asks("--no-such-option") == 2
    assert asks("--socket-path", "s", "--blk-file", str(work / "missing"), "--no-state-file") == 1
    with pytest.raises(ControlError, match="stands in it once more"):
        asks("--from-node", "x")
    assert node.running


INFINITE = b'{"words": [], "environment": {}, "directory": "/", "umask": Infinity, "descriptors": []}'


@pytest.mark.parametrize("data", [b"", b"[]", b'{"words": []}', b"\xff" * 100, b"[" * 5000, INFINITE])
def test_rubbish_is_refused_and_the_node_goes_on(node: Node, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(node.socket))
        send_parcel(asker, data)
        answer, _ = receive_parcel(asker, 1 << 16, 0)
        assert b"refuses the request" in answer
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(node.socket))
        silent.settimeout(WAIT_S)
        answer, _ = receive_parcel(silent, 1 << 16, 0)  # it is waited for, but not for long
        assert b"refuses the request" in answer
    assert node.running


def asks_wrongly(node: Node, work: Path) -> int:
    with Path(os.devnull).open("r+b") as nothing:
        request = Request(("--no-such-option",), {"PATH": os.defpath}, str(work), 0o077, (0, 1, 2))
        with contextlib.closing(start(node.socket, request, [nothing.fileno()] * 3)) as started:
            return started.wait(WAIT_S)


def test_who_sends_byte_by_byte_holds_up_nobody_for_long(node: Node, work: Path) -> None:
    ended = threading.Event()

    def drip() -> None:
        with socket.socket(socket.AF_UNIX) as asker, contextlib.suppress(OSError):
            asker.connect(str(node.socket))
            asker.send(struct.pack("=I", 1 << 20))
            while not ended.wait(REQUEST_S / 4):
                asker.send(b"x", socket.MSG_NOSIGNAL)

    slow = threading.Thread(target=drip)
    slow.start()
    try:
        ended.wait(REQUEST_S / 4)
        assert asks_wrongly(node, work) == 2
    finally:
        ended.set()
        slow.join()


def test_many_who_ask_at_once_all_get_their_turn(node: Node, work: Path) -> None:
    node.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(2 * BACKLOG) as pool:
        asked = [pool.submit(asks_wrongly, node, work) for _ in range(2 * BACKLOG)]
        time.sleep(0.5)
        node.signal(signal.SIGCONT)
        assert [each.result() for each in asked] == [2] * len(asked)


def test_nothing_is_started_for_who_has_given_up(
    node: Node, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhostsync.node.request.ANSWER_S", 0.5)
    node.signal(signal.SIGSTOP)
    try:
        with pytest.raises(UnreachableError, match="has not answered"):
            asks_wrongly(node, work)
    finally:
        node.signal(signal.SIGCONT)
    await_true(lambda: "has given up" in node.last_output(), "it is refused")
    assert "backend forked" not in node.last_output()


def test_two_forks_are_two_instances_to_a_receiver() -> None:
    """Else a backend that another has followed would be let in again, and write beside it (receiver.py)."""
    here, there = os.pipe()
    process = os.fork()
    if process == 0:
        os.write(there, receive._instance.encode())
        os._exit(0)
    os.waitpid(process, 0)
    os.close(there)
    with os.fdopen(here) as told:
        assert told.read() != receive._instance


def test_the_socket_is_for_its_user(node: Node) -> None:
    assert node.socket.stat().st_mode & 0o777 == 0o600
    node.terminate()
    assert not node.socket.exists()


def test_the_command_line_prints_the_process(node: Node, work: Path) -> None:
    disk, control = image(work / "a.img"), work / "c"
    ask = [*vhostsync_command(), "serve", "--from-node", str(node.socket), "--socket-path", "s"]
    with (work / "out").open("w") as out:  # the backend keeps it, so a pipe would not end
        subprocess.run(
            [*ask, "--blk-file", str(disk), "--control", "c", "--no-state-file", "--log-level", "error"],
            cwd=work, stdout=out, stderr=subprocess.DEVNULL, timeout=60, check=True,
        )  # fmt: skip
    process = int((work / "out").read_text())
    try:
        await_true(control.exists, "it listens")
        subprocess.run([*vhostsync_command(), "quit", "--control", str(control)], timeout=60, check=True)
        await_true(lambda: not Path(f"/proc/{process}/exe").exists(), "it has ended")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    node.terminate()
    refused = subprocess.run(ask, cwd=work, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 3
    assert "No node can be reached" in refused.stderr


def test_it_costs_less_memory_than_a_backend_of_its_own(node: Node, work: Path) -> None:
    def own_kib(backend: Served) -> int:
        for line in Path(f"/proc/{backend.process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1])
        raise AssertionError("no Private_Dirty")

    with (
        ForkedServed(node, work / "forked", image(work / "a.img")) as forked,
        Served(work, image(work / "b.img")) as alone,
    ):
        for backend in (forked, alone):
            backend.qmp.execute("query-status")
        assert own_kib(forked) < 0.85 * own_kib(alone)
