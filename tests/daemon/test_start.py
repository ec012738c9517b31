# SPDX-License-Identifier: Apache-2.0
"""How `serve` begins and ends: what it refuses and in which words, its sockets, its exit codes, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.daemon.rig import BLOCK, Served, await_true, block_of, flush, image, refused_start, write_block
from tests.frontend import Feature, Frontend, Status
from tests.guest.backends import vhostsync_command
from tests.guest.qmp_client import QmpError
from tests.vhost_client import Message, VhostUserClient, VhostUserTransport


def refusal(work: Path, disk: Path, *options: str) -> str:
    """The one sentence on stderr with which `serve` refuses this disk; it leaves nothing behind."""
    code, stderr = refused_start(
        "serve", "--blk-file", disk, "--socket-path", work / "no.sock", *options,
        env={"STATE_DIRECTORY": str(work / "state")},
    )
    assert code == 1
    assert not (work / "no.sock").exists() and not (work / "no.sock.control").exists()
    lines = stderr.strip().splitlines()
    assert len([line for line in lines if line.startswith("vhostsync: ")]) == 1, stderr
    assert "Traceback" not in stderr
    return lines[-1]


def qemu_reads(disk: Path) -> tuple[int, str]:
    """The exit code and stderr of qemu-io that reads a little. (`qemu-img info` is no test: of a raw image it
    asks for no permission at all.)"""
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-r", "-c", "read 0 512", disk], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def test_disks_that_cannot_serve(work: Path) -> None:
    assert "does not exist" in refusal(work, work / "missing.img")
    assert "no directory" in refusal(work, work / "nowhere" / "a.img")
    assert "a directory" in refusal(work, work)
    empty = work / "empty.img"
    empty.touch()
    assert "is empty (0 bytes)" in refusal(work, empty)
    short = work / "short.img"
    short.write_bytes(b"x" * 100)
    assert "less than one block" in refusal(work, short)
    fifo = work / "fifo"
    os.mkfifo(fifo)
    assert "a FIFO" in refusal(work, fifo)


def test_wrong_usage_ends_with_2(work: Path) -> None:
    disk = image(work / "a.img")
    there = ("--blk-file", disk, "--socket-path", work / "no.sock")
    for words in (
        (*there, "--block-size", "1000"),
        (*there, "--block-size", "8192"),
        (*there, "--num-queues", "0"),
        (*there, "--fd", "3"),
        (*there, "--no-such-option"),
        (*there, "--no-state-file", "--state-file", work / "r.json"),
        ("--blk-file", disk),
    ):
        code, stderr = refused_start("serve", *words)
        assert (code, "Traceback" in stderr) == (2, False), (words, stderr)
    assert list(work.iterdir()) == [disk]


def test_a_current_directory_that_is_gone(work: Path) -> None:
    gone = work / "gone"
    before = ("sh", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"', str(gone))
    for words in (
        ("serve", "--blk-file", "a.img", "--socket-path", "s"),
        ("mirror", "start", "b.img", "--control", "/c"),
    ):
        code, said = refused_start(*words, before=before)
        assert code == 2 and "Traceback" not in said and "write the whole path" in said, said
    image(work / "a.img")
    there = ("--blk-file", work / "missing.img", "--socket-path", work / "s", "--sandbox", "require")
    code, said = refused_start("serve", *there, before=before, env={"STATE_DIRECTORY": str(work / "state")})
    assert code == 1 and "does not exist" in said, said


def test_a_descriptor_that_is_no_socket(work: Path) -> None:
    disk = image(work / "a.img")
    env = {"STATE_DIRECTORY": str(work / "state")}
    code, stderr = refused_start("serve", "--blk-file", disk, "--fd", "0", env=env)
    assert code == 1 and "that descriptor is no socket" in stderr
    code, stderr = refused_start("serve", "--blk-file", disk, "--fd", "77", env=env)
    assert code == 1 and "Bad file descriptor" in stderr


def test_a_disk_that_is_served_is_nobody_elses(work: Path) -> None:
    disk = image(work / "a.img")
    with Served(work, disk) as served:
        sentence = refusal(work, disk)
        assert "is in use" in sentence and f"pid {served.process.pid}" in sentence
        code, stderr = qemu_reads(disk)
        assert code != 0 and "lock" in stderr
        served.stop()
    assert qemu_reads(disk) == (0, "")


def test_a_socket_path_where_somebody_listens(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served:
        code, stderr = refused_start(
            "serve", "--blk-file", image(work / "b.img"), "--socket-path", served.socket,
            "--control", work / "other.control", "--no-state-file",
        )
        assert code == 1 and "another process listens on it" in stderr
        assert served.qmp.execute("query-status")["status"] == "running"
        served.stop()


def test_capabilities() -> None:
    for words in (["--print-capabilities"], ["serve", "--print-capabilities"]):
        done = subprocess.run(
            [*vhostsync_command(), *words], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_quickly_and_cleanly(work: Path, number: signal.Signals) -> None:
    disk = image(work / "a.img")
    with Served(work, disk) as served:
        modes = [path.stat().st_mode & 0o777 for path in (served.control,)]
        assert modes == [0o600]
        with served.guest() as guest:
            write_block(guest, 3, 1)
            served.process.signal(number)
            assert served.process.wait(5) == 0
        assert not served.socket.exists() and not served.control.exists()
        record = served.record()
        assert record is not None and record.clean and record.current.path == str(disk)
        assert disk.read_bytes()[3 * BLOCK : 4 * BLOCK] == block_of(3, 1)


def test_impatience_does_not_kill_it(work: Path) -> None:
    """Not even while it writes its last words."""
    with Served(work, image(work / "a.img")) as served, served.guest() as guest:
        write_block(guest, 3, 1)
        while served.process.running:
            served.process.signal(signal.SIGTERM)
        assert served.process.wait(1) == 0
        record = served.record()
        assert record is not None and record.clean


def test_quit_ends_it(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served:
        served.qmp.execute("quit")
        assert served.process.wait(5) == 0
        assert not served.socket.exists() and not served.control.exists()


def test_a_killed_one_is_restarted_at_once(work: Path) -> None:
    disk = image(work / "a.img")
    for seed in range(1, 4):
        with Served(work, disk) as served, served.guest() as guest:
            write_block(guest, 7, seed)
            flush(guest)
            for number in range(64):  # I/O that outlives the process
                guest.write((100 + number) * BLOCK, block_of(100 + number, seed), kick=number == 63)
            served.kill()
    with Served(work, disk) as served, served.guest() as guest:
        assert guest.read_now(7 * BLOCK, BLOCK) == block_of(7, 3)
        guest.close()
        served.stop()


def test_read_only(work: Path) -> None:
    disk = image(work / "a.img")
    before = disk.read_bytes()
    with Served(work, disk, "--read-only") as served:
        with served.guest() as guest:
            transport = guest.transport
            assert isinstance(transport, VhostUserTransport) and transport.offered & Feature.RO
            assert guest.read_now(0, BLOCK) == before[:BLOCK]
            assert guest.write_now(0, block_of(0, 1)).status == Status.IOERR
            zero = guest.write_zeroes(0, BLOCK)
            guest.wait(zero)
            assert zero.status in (Status.IOERR, Status.UNSUPP)
        with pytest.raises(QmpError, match="read-only"):
            served.qmp.execute("mirror-start", destination=str(image(work / "b.img")))
        assert served.qmp.execute("query-status")["read-only"] is True
        # Readers may share it.
        assert qemu_reads(disk) == (0, "")
        served.stop()
    assert disk.read_bytes() == before
    assert not list(served.state_directory.glob("*.record.json"))


def test_the_block_size_that_was_asked_for(work: Path) -> None:
    disk = image(work / "a.img")
    with Served(work, disk, "--block-size", "4096") as served:
        assert served.qmp.execute("query-status")["block-size"] == 4096
        served.stop()


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_an_inherited_listening_socket(work: Path) -> None:
    disk = image(work / "a.img")
    with _listening(work / "vm.sock") as listener:
        fd = listener.fileno()
        with Served(work, disk, "--fd", str(fd), pass_fds=[fd]) as served:
            for seed in (1, 2):  # frontends come and go
                with served.guest() as guest:
                    write_block(guest, 1, seed)
            await_true(
                lambda: served.qmp.execute("query-status")["frontends"] == 0, "the frontends are gone"
            )
            served.stop()
    assert (work / "vm.sock").exists(), "the path of an inherited socket is somebody else's"


def test_an_inherited_connection_ends_with_its_frontend(work: Path) -> None:
    disk = image(work / "a.img")
    with _listening(work / "vm.sock") as listener:
        transport = VhostUserTransport(work / "vm.sock")
        connection, _ = listener.accept()
        fd = connection.fileno()
        with Served(work, disk, "--fd", str(fd), pass_fds=[fd]) as served:
            connection.close()
            with Frontend(transport) as guest:
                write_block(guest, 1, 1)
                flush(guest)
            assert served.process.wait(5) == 0
    assert disk.read_bytes()[BLOCK : 2 * BLOCK] == block_of(1, 1)


def test_a_frontend_that_sends_rubbish_ends_alone(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served, served.guest() as guest:
        rubbish = VhostUserClient(served.socket)
        rubbish.send(Message.SET_MEM_TABLE, b"\xff" * 5)
        with contextlib.suppress(ConnectionResetError):  # what it did not read of ours
            assert rubbish.socket.recv(1) == b""
        rubbish.close()
        served.qmp.wait_event("FRONTEND_DISCONNECTED")
        write_block(guest, 1, 1)
        guest.close()
        served.stop()
