# SPDX-License-Identifier: Apache-2.0
"""The systemd units, and what `serve` tells the service manager. The tests play that manager's part."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon.rig import WAIT_S, Served, await_true, image, need_root
from tests.guest.backends import vhostsync_command
from tests.guest.processes import Process, wait_listening
from vhostsync.cli.arguments import make_parser
from vhostsync.host.service_manager import ServiceManager

UNITS = Path(__file__).parents[2] / "share" / "systemd"
MANAGER = Path(__file__).with_name("own_manager.sh")
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
    for unit in UNITS.glob("vhostsync@.*"):
        text = unit.read_text().replace("/usr/bin/vhostsync", sys.executable)
        (tmp_path / unit.name.replace("@", "@vm")).write_text(text)
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def analyze(units: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *words], capture_output=True, text=True, check=False, timeout=WAIT_S,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"},
    )  # fmt: skip


def test_the_unit_of_a_receiver_is_in_order(units: Path) -> None:
    text = (UNITS / "vhostsync-receive@.service").read_text().replace("/usr/bin/vhostsync", sys.executable)
    (units / "vhostsync-receive@vm.service").write_text(text)
    found = analyze(units, "verify", "--man=no", str(units / "vhostsync-receive@vm.service"))
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
    words = text[text.index("ExecStart=") :].split("\n")[0].split()[1:]
    given = {"${DISK}": "/d.img", "${LISTEN}": "0.0.0.0:7070", "$OPTIONS": "--create"}
    make_parser().parse_args([given.get(word, word).replace("%i", "vm") for word in words])


def test_the_unit_of_the_exporter_is_in_order_and_hardened(units: Path) -> None:
    text = (UNITS / "vhostsync-exporter.service").read_text().replace("/usr/bin/vhostsync", sys.executable)
    unit = units / "vhostsync-exporter.service"
    unit.write_text(text)
    found = analyze(units, "verify", "--man=no", str(unit))
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
    words = text[text.index("ExecStart=") :].split("\n")[0].split()[1:]
    make_parser().parse_args([word for word in words if word != "$OPTIONS"])
    found = analyze(units, "security", "--offline=yes", "--threshold=25", "--no-pager", str(unit))
    assert found.returncode == 0, found.stdout + found.stderr


def add_drop_ins(units: Path) -> None:
    folder = units / "vhostsync@vm.service.d"
    folder.mkdir()
    for drop_in in UNITS.glob("*.conf"):
        shutil.copy(drop_in, folder)


@pytest.mark.parametrize("with_drop_ins", [False, True])
def test_the_units_are_in_order(units: Path, with_drop_ins: bool) -> None:
    if with_drop_ins:
        add_drop_ins(units)
    found = analyze(units, "verify", "--man=no", *sorted(map(str, units.glob("vhostsync@vm.*t"))),
                    str(units / "vhostsync@vm.service"))  # fmt: skip
    ours = [line for line in found.stderr.splitlines() if "vhostsync@" in line or ".conf" in line]
    assert found.returncode == 0 and ours == [], found.stderr


@pytest.mark.parametrize("with_drop_ins", [False, True])
def test_the_service_is_hardened(units: Path, with_drop_ins: bool) -> None:
    """With metrics on a port, too; the drop-in is in force then."""
    if with_drop_ins:
        add_drop_ins(units)
    found = analyze(units, "security", "--offline=yes", f"--threshold={EXPOSURE_MAX * 10:.0f}", "--no-pager",
                    str(units / "vhostsync@vm.service"))  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert ("Service has access to the host's network" in found.stdout) == with_drop_ins, found.stdout


def documented_commands() -> tuple[str, str]:
    """The blocks of docs/operations.md: for each disk; once before that, where there is no package."""
    text = (UNITS.parents[1] / "docs" / "operations.md").read_text()
    section = text[text.index("### As a service") : text.index("* The control socket is")]
    each, once = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    return each, once


def run_in_root(words: str, root: Path, tools: Path) -> None:
    """The folders of the machine that they name are those of the root."""
    in_root = re.sub(r"(?<=[ >])/(etc|usr)/", rf"{root}/\1/", words)
    done = subprocess.run(
        ["sh", "-e", "-c", in_root], cwd=UNITS.parents[1], capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, timeout=WAIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_package_has_made_what_the_documented_commands_need(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in (UNITS.parents[1] / "debian/vhostsync.dirs").read_text().split():
        (root / folder).mkdir(parents=True)
    each, _ = documented_commands()
    run_in_root(each, root, noting_tools(tmp_path))
    assert (root / "etc/vhostsync/vm.conf").read_text().startswith("DISK=")
    assert (tmp_path / "noted").read_text() == "systemctl enable --now vhostsync@vm.socket\n"


def noting_tools(folder: Path) -> Path:
    """The user and the manager are the machine's: those commands are noted only, in the file `noted`."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("useradd", "systemctl"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{folder}/noted\n')
        (tools / name).chmod(0o755)
    return tools


def test_the_documented_commands_taken_literally(tmp_path: Path) -> None:
    """Without the package, in a root of their own."""
    root, noted = tmp_path / "root", tmp_path / "noted"
    for folder in ("etc/systemd/system", "usr/bin"):  # wherever systemd is installed
        (root / folder).mkdir(parents=True)
    each, once = documented_commands()
    run_in_root(once + each, root, noting_tools(tmp_path))
    service = (root / "etc/systemd/system/vhostsync@.service").read_text()
    wanted = re.search(r"^EnvironmentFile=-(.*)$", service, re.MULTILINE)
    user = re.search(r"^User=(.*)$", service, re.MULTILINE)
    assert wanted is not None and user is not None
    assert (root / wanted[1].replace("%i", "vm").lstrip("/")).read_text().startswith("DISK=")
    started = re.findall(r"^Exec\w+=(/usr/\S+)", service, re.MULTILINE)
    assert started and all((root / path.lstrip("/")).is_symlink() for path in started)
    made, reloaded, enabled = noted.read_text().splitlines()
    assert made.endswith(f" {user[1]}")
    assert (reloaded, enabled) == ("systemctl daemon-reload", "systemctl enable --now vhostsync@vm.socket")
    if shutil.which("systemctl") is not None:
        subprocess.run(["systemctl", f"--root={root}", "enable", "vhostsync@vm.socket"], check=True,
                       capture_output=True, timeout=WAIT_S)  # fmt: skip
        assert (root / "etc/systemd/system/sockets.target.wants/vhostsync@vm.socket").is_symlink()


# Of the service unit: what the manager does with the backend. To withhold the rest takes rights that a test's
# manager does not have.
KEPT = {
    *("Type", "NotifyAccess", "EnvironmentFile", "RuntimeDirectory", "RuntimeDirectoryPreserve"),
    *("StateDirectory", "Restart", "RestartSec", "TimeoutStopSec"),
    *("ExecStartPre", "ExecStart", "ExecReload", "ExecStopPost"),
}

ASKING = """
import json, socket, subprocess, sys, threading, time
from pathlib import Path

SERVICE = "vhostsync@vm.service"

def ask(unit, name):
    words = ["systemctl", "--user", "show", "--value", "-p", name, unit]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

def tell(*words):
    subprocess.run(["systemctl", "--user", *words], check=True)

def client(*words):
    command = [*PROGRAM, *words, "--control", "/run/vhostsync/vm/control"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
"""

RECONNECTING = """
conf, disk, lost = map(Path, sys.argv[1:])

def await_it(what, condition):
    "As a machine that reconnects: it tries again whenever it is let down."
    deadline = time.monotonic() + 60
    machine = None
    while not condition():
        assert time.monotonic() < deadline, what
        assert ask("vhostsync@vm.socket", "ActiveState") == "active", f"{what}: the socket is closed"
        if machine is None:
            machine = socket.socket(socket.AF_UNIX)
            machine.connect("/run/vhostsync/vm/vm.sock")
            machine.settimeout(0.1)
        try:
            if not machine.recv(1):
                machine = None
        except TimeoutError:
            pass
        except OSError:
            machine = None

conf.write_text(f"DISK={lost}\\n")
tell("start", "vhostsync@vm.socket")
await_it("refused, and tried again", lambda: int(ask(SERVICE, "NRestarts")) >= 2)
conf.write_text(f"DISK={disk}\\n")
await_it("served", lambda: ask(SERVICE, "StatusText") == f"serving {disk}")
assert ask(SERVICE, "StartLimitIntervalUSec") == "0"
first = ask(SERVICE, "MainPID")
tell("kill", "--signal=KILL", SERVICE)
await_it("started again after a crash", lambda: ask(SERVICE, "MainPID") not in ("0", first))
await_it("served again", lambda: ask(SERVICE, "ActiveState") == "active")

# After a switch nothing is edited: the .conf still says which disk it began with.
copy = disk.with_name("copy.img")
client("mirror", "start", str(copy), "--create", "--wait")
client("switch")
tell("restart", SERVICE)
assert ask(SERVICE, "StatusText") == f"serving {copy}", ask(SERVICE, "StatusText")
tell("stop", "vhostsync@vm.socket", SERVICE)
assert ask(SERVICE, "Result") == "success", ask(SERVICE, "Result")
"""

RELOADING = """
from tests.daemon.rig import block_of
from tests.frontend import Frontend
from tests.guest_ring import GuestMemory
from tests.sizes import MIB
from tests.vhost_client import VhostUserTransport

conf, disk = map(Path, sys.argv[1:])
conf.write_text(f"DISK={disk}\\n")
tell("start", "vhostsync@vm.socket")
transport = VhostUserTransport(Path("/run/vhostsync/vm/vm.sock"), timeout_s=60)
with Frontend(transport, memory=GuestMemory((32 * MIB,)), timeout_s=60) as guest:
    client("mirror", "start", str(disk.with_name("copy.img")), "--create", "--wait")
    end, slowest_s = threading.Event(), []

    def write_on():
        number = 0
        while not end.is_set():
            number, began = number + 1, time.monotonic()
            request = guest.write(0, block_of(0, number))
            guest.wait(request)
            assert request.ok
            guest.recycle(request)
            slowest_s.append(time.monotonic() - began)

    def check_status():
        deadline = time.monotonic() + 60
        while (status := json.loads(client("status", "--json")))["mirror"]["state"] != "steady":
            assert time.monotonic() < deadline, status
        assert status["mirror"]["full-copy-reason"] is None and status["status"]["frontends"] == 1, status

    writer = threading.Thread(target=write_on)
    writer.start()
    pauses_ms, former = [], ask(SERVICE, "MainPID")
    try:
        for _ in range(5):
            slowest_s.clear()
            tell("reload", SERVICE)
            now = ask(SERVICE, "MainPID")
            assert now not in ("0", former), now
            former = now
            assert ask(SERVICE, "ActiveState") == "active"
            check_status()
            pauses_ms.append(1000 * max(slowest_s))
    finally:
        end.set()
        writer.join()
assert ask(SERVICE, "NRestarts") == "0"

# The manager notices that the successor has crashed, and stops it in order.
tell("kill", "--signal=KILL", SERVICE)
deadline = time.monotonic() + 60
while ask(SERVICE, "NRestarts") != "1" or ask(SERVICE, "ActiveState") != "active":
    assert time.monotonic() < deadline, "it is not started again after a crash"
    time.sleep(0.05)
tell("reload", SERVICE)
tell("stop", "vhostsync@vm.socket", SERVICE)
assert ask(SERVICE, "Result") == "success", ask(SERVICE, "Result")
print("the slowest write around each reload:", ", ".join(f"{each:.0f} ms" for each in pauses_ms))
"""


def remove_cgroups(name: str) -> None:
    """They are busy until the last process of the manager's namespace has ended."""

    def gone() -> bool:
        for hierarchy in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
            for folder, _, _ in os.walk(hierarchy / name, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
        root = Path("/sys/fs/cgroup")
        return not (root / name).exists() and not list(root.glob(f"*/{name}"))

    await_true(gone, "the cgroups of the test's manager are empty")


def beside_a_manager(tmp_path: Path, work: Path, script: str, *arguments: Path) -> str:
    """What `script` says, to whose service manager the units are known. It may write the .conf, which is its
    first argument."""
    need_root()
    folder, conf = tmp_path / "units", work / "vm.conf"
    folder.mkdir()
    service, section = [], ""
    for line in (UNITS / "vhostsync@.service").read_text().splitlines():
        section = line if line.startswith("[") else section
        if section != "[Service]" or line.startswith("[") or line.split("=")[0] in KEPT:
            service.append(line)
    text = "\n".join(service).replace("/usr/bin/vhostsync", " ".join(vhostsync_command()))
    text = text.replace("/etc/vhostsync/%i.conf", str(conf)).replace("sleep 5", "sleep 0.5")
    (folder / "vhostsync@.service").write_text(text)
    listening = (UNITS / "vhostsync@.socket").read_text()
    (folder / "vhostsync@.socket").write_text(re.sub(r"(?m)^Socket(User|Group)=.*$", "", listening))
    cgroup = f"vhostsync-test-{os.getpid()}"
    program = f"PROGRAM = {vhostsync_command()!r}\n{ASKING}{script}"
    command = (sys.executable, "-c", program, conf, *arguments)
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", MANAGER, folder, cgroup]
    try:
        done = subprocess.run(
            [str(word) for word in (*words, *command)],
            capture_output=True, text=True, check=False, timeout=8 * WAIT_S, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    finally:
        remove_cgroups(cgroup)
    if done.returncode == 77:
        pytest.skip(f"THIS TEST IS LEFT OUT, as no service manager comes up here: {done.stderr[-500:]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(360)  # many programs are started, one after the other
def test_a_machine_that_reconnects_outlives_refused_starts(tmp_path: Path, work: Path) -> None:
    """With a manager that runs: a start limit closed the socket for good, before anybody could change the
    configuration."""
    beside_a_manager(tmp_path, work, RECONNECTING, image(work / "a.img"), work / "lost.img")


@pytest.mark.timeout(360)
def test_a_guest_goes_on_over_a_reload(tmp_path: Path, work: Path) -> None:
    """`systemctl reload`: the successor is the unit's main process from then on, and the mirror stays
    steady."""
    print(beside_a_manager(tmp_path, work, RELOADING, image(work / "a.img")))
