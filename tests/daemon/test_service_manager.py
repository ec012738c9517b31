# SPDX-License-Identifier: Apache-2.0
"""The systemd units, and what `serve` tells the service manager. The tests play that manager's part."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon.rig import WAIT_S, Served, image
from tests.guest.backends import vhostsync_command
from tests.guest.processes import Process, wait_listening
from vhostsync.service_manager import ServiceManager

UNITS = Path(__file__).parents[2] / "share" / "systemd"
EXPOSURE_MAX = 3.0
"""systemd-analyze's figure: 10 is unsafe, below 2 is "OK" to "SAFE" for what needs disks."""


def test_ready_stopping_and_a_socket_from_outside(work: Path) -> None:
    disk = image(work / "a.img")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        manager.bind(str(work / "notify"))
        manager.settimeout(WAIT_S)
        listener.bind(str(work / "vm.sock"))
        listener.listen()
        serve = Process(
            "vhostsync serve",
            [*vhostsync_command(), "serve", "--fd", str(listener.fileno()), "--blk-file", str(disk),
             "--control", str(work / "control")],
            work / "log",
            env={"NOTIFY_SOCKET": str(work / "notify"), "STATE_DIRECTORY": str(work / "state")},
            pass_fds=(listener.fileno(),),
        )  # fmt: skip
        try:
            assert manager.recv(4096) == f"READY=1\nSTATUS=serving {disk}".encode()
            wait_listening(serve, work / "control")
            with socket.socket(socket.AF_UNIX) as frontend:
                frontend.connect(str(work / "vm.sock"))
            assert serve.terminate() == 0
            assert manager.recv(4096).startswith(b"STOPPING=1")
        finally:
            serve.kill()


@pytest.mark.parametrize("kind", ["abstract", "path"])
def test_the_status_names_the_disk_that_the_guest_is_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With Landlock as well, which lets a process send to no abstract socket that was not there before."""
    one, other = image(work / "a.img"), work / "b.img"
    name = f"@vhostsync-test-{os.getpid()}" if kind == "abstract" else str(work / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if kind == "abstract" else name)
        manager.settimeout(WAIT_S)
        with Served(work, one, "--allow-path", work) as served:
            assert manager.recv(4096) == f"READY=1\nSTATUS=serving {one}".encode()
            served.start_mirror(other, create=True)
            assert manager.recv(4096) == f"STATUS=serving {one}, mirror syncing to {other}".encode()
            assert manager.recv(4096) == f"STATUS=serving {one}, mirror steady to {other}".encode()
            served.qmp.execute("switch")
            assert manager.recv(4096) == f"STATUS=serving {other}".encode()
            served.stop()
            assert manager.recv(4096).startswith(b"STOPPING=1")


def test_without_a_service_manager_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    ServiceManager().tell(READY=1)


def test_a_manager_that_was_restarted_and_one_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(place))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place))
        notifier = ServiceManager()
    place.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place))
        notifier.tell(READY=1, STATUS="x")
        assert manager.recv(64) == b"READY=1\nSTATUS=x"
    notifier.tell(READY=1)  # logged, and no more
    notifier.close()
    stranger = ServiceManager()
    stranger.tell(READY=1)
    stranger.close()


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they are, but for the program, which need not be installed for the tests."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("THIS TEST IS LEFT OUT: systemd-analyze cannot be had here")
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/usr/bin/vhostsync", sys.executable)
        (tmp_path / unit.name.replace("@", "@vm")).write_text(text)
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def test_the_units_are_in_order(units: Path) -> None:
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(map(str, units.glob("vhostsync@vm.*")))],
        capture_output=True, text=True, check=False, timeout=WAIT_S,
    )  # fmt: skip
    ours = [line for line in found.stderr.splitlines() if "vhostsync@" in line]
    assert found.returncode == 0 and ours == [], found.stderr


def test_the_service_is_hardened(units: Path) -> None:
    found = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE_MAX * 10:.0f}", "--no-pager",
         str(units / "vhostsync@vm.service")],
        capture_output=True, text=True, check=False, timeout=WAIT_S,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
