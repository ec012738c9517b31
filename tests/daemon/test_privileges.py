# SPDX-License-Identifier: Apache-2.0
"""What a `serve` that is up may still do, and that it does its work so, on the kernel of this machine."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.rig import (
    BLOCK,
    Load,
    Served,
    await_true,
    block_of,
    flush,
    image,
    lacking,
    need_root,
    refused_start,
    write_block,
)
from tests.guest.processes import Process, ProcessError, wait_listening
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB

NOBODY = "nobody"
ALONE = "games"  # no other test has processes of this user
LAST = 24 * MIB // BLOCK - 1

# All that runs as this user shares one limit of locked memory: one test at a time.
pytestmark = pytest.mark.xdist_group("nobody")


def status_of(pid: int, thread: str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def threads_of(served: Served) -> list[str]:
    return [entry.name for entry in Path(f"/proc/{served.process.pid}/task").iterdir()]


def logged(served: Served) -> dict[str, Any]:
    """What `serve` says about its privileges."""
    for line in served.process.log.read_text().splitlines():
        entry: dict[str, Any] = json.loads(line)
        if entry.get("message") == "privileges":
            return entry
    raise AssertionError("nothing is said about privileges")


def has_landlock(served: Served) -> bool:
    return "landlock" in logged(served)["held"]


def give_to(user: str, folder: Path) -> None:
    """The folder of a test is of a user that is to work in it; the folders above let it through."""
    entry = pwd.getpwnam(user)
    for path in (folder, *folder.iterdir()):
        os.chown(path, entry.pw_uid, entry.pw_gid)
    for above in folder.parents:
        if not above.stat().st_mode & 0o001:
            pytest.skip(f"{user} cannot reach {folder}, as {above} is closed to others")


def work_it(served: Served, other: Path) -> None:
    """Mirror to a destination that is made, switch there and back under load; nothing is lost."""
    with Load(served) as load:
        served.start_mirror(other, create=True)
        load.go_on()
        served.qmp.execute("switch", **{"keep-mirror": True})
        load.go_on()
        served.qmp.execute("switch", **{"keep-mirror": True})
        load.go_on()
        expected = load.stop()
    served.stop()
    assert lacking(other, expected) == []


def test_every_thread_has_nothing_left(work: Path) -> None:
    with Served(work, image(work / "a.img"), "--threads", "3") as served, served.guest() as guest:
        write_block(guest, 0, 1)
        flush(guest)
        statuses = [status_of(served.process.pid, thread) for thread in threads_of(served)]
        assert "io-uring" in logged(served)["held"]
        names = [status["Name"] for status in statuses]
        assert names.count("vhostsync-data") == 1 and names.count("vhostsync-io") == 2, names
        for status in statuses:
            for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
                assert int(status[name], 16) == 0, (status["Name"], name)
            if os.geteuid() == 0:
                assert int(status["CapBnd"], 16) == 0, status["Name"]
            assert status["NoNewPrivs"] == "1", status["Name"]
            assert status["Seccomp"] == "2", status["Name"]
        guest.close()
        served.stop()


# Runs `serve`; when it is ready, tries as whoever had taken it over what would lead out of it.
TAKEN_OVER = """
import json, os, signal, sys
from pathlib import Path
from vhostsync.cli.main import main
from vhostsync.host.service_manager import ServiceManager
results, tell = Path(os.environ["RESULTS"]), ServiceManager.tell
kept, neighbour = results.open("w"), int(os.environ["NEIGHBOUR"])
def attempts():
    yield "passwords", lambda: open("/etc/shadow").close()
    yield "cron", lambda: open("/etc/cron.d/vhostsync-test", "w").close()
    yield "core_pattern", lambda: open("/proc/sys/kernel/core_pattern", "w").close()
    yield "mode", lambda: os.chmod("/etc/passwd", 0o644)
    yield "set-user-ID", lambda: os.open(results.parent / "root", os.O_CREAT | os.O_WRONLY, 0o4755)
    yield "memory", lambda: open(f"/proc/{neighbour}/mem", "r+b").close()
    yield "signal", lambda: os.kill(neighbour, 0)
    yield "affinity", lambda: os.sched_setaffinity(neighbour, {0})
def told(self, **fields):
    if "READY" in fields:
        found = {}
        for name, do in attempts():
            try: do()
            except OSError as error: found[name] = type(error).__name__
            else: found[name] = "done"
        json.dump(found, kept)
        kept.close()
    tell(self, **fields)
ServiceManager.tell = told
sys.argv[0] = "vhostsync"
sys.exit(main())
"""


def test_what_root_could_do_from_inside(work: Path) -> None:
    """Root without capabilities still owns what the machine runs by, and its neighbours are root's too."""
    need_root()
    with subprocess.Popen(["sleep", "60"]) as neighbour:
        process = Process(
            "vhostsync serve",
            [sys.executable, "-c", TAKEN_OVER, "serve", "--blk-file", str(image(work / "a.img")),
             "--allow-path", str(work), "--socket-path", str(work / "vm.sock")],
            work / "log",
            env={"STATE_DIRECTORY": str(work / "state"), "RESULTS": str(work / "results"),
                 "NEIGHBOUR": str(neighbour.pid)},
        )  # fmt: skip
        try:
            wait_listening(process, work / "vm.sock.control")
            await_true(lambda: (work / "results").read_text().endswith("}"), "all is tried")
            assert process.terminate() == 0
        finally:
            process.kill()
            neighbour.kill()
    if '"landlock"' not in process.log.read_text():
        pytest.skip("THIS TEST IS LEFT OUT, as this kernel has no Landlock")
    assert set(json.loads((work / "results").read_text()).values()) == {"PermissionError"}


def test_off_leaves_all_as_it_was(work: Path) -> None:
    with Served(work, image(work / "a.img"), "--sandbox", "off") as served:
        mine, its = (status_of(pid, str(pid)) for pid in (os.getpid(), served.process.pid))
        for name in ("CapPrm", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp"):
            assert its[name] == mine[name], name
        assert logged(served)["sandbox"] == "off"
        served.stop()


def test_mirror_switch_bitmap_metrics(work: Path) -> None:
    options = ("--bitmap", work / "a.bitmap", "--metrics", work / "metrics.sock")
    with Served(work, image(work / "a.img"), *options) as served:
        work_it(served, work / "b.img")
    assert not (work / "vm.sock").exists(), "its socket goes with it"


def test_all_that_an_operator_may_ask_for_under_require(work: Path) -> None:
    """Metrics over TCP, a bitmap, a destination that is made elsewhere, a comparison, a switch, a disk that
    grows, and the same again in the next process."""
    near, far = work / "near", work / "far"
    near.mkdir()
    far.mkdir()
    one, other = image(near / "a.img"), far / "b.img"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = (
        *("--sandbox", "require", "--allow-path", far),
        *("--bitmap", near / "bits", "--metrics", f"127.0.0.1:{port}"),
    )
    try:
        served = Served(near, one, *options)
    except ProcessError as error:
        if "--sandbox require" not in str(error):
            raise
        pytest.skip(f"THIS TEST IS LEFT OUT, as this kernel lacks a part of the sandbox: {error}")
    with served, served.guest() as guest:
        (far / "held.img").write_bytes(b"LUKS\xba\xbe\x00\x01".ljust(16 * MIB, b"\0"))
        with pytest.raises(QmpError, match="would be lost: crypto_LUKS"):
            served.qmp.execute("mirror-start", destination=str(far / "held.img"))
        served.start_mirror(other, create=True)
        write_block(guest, 1, 1)
        flush(guest)
        served.qmp.execute("verify")
        assert served.qmp.wait_event("VERIFY_COMPLETED")["state"] == "equal"
        served.qmp.execute("switch", keep_mirror=True)
        for disk in (one, other):
            os.truncate(disk, 24 * MIB)
        assert served.qmp.execute("resize") == {"capacity": 24 * MIB}
        write_block(guest, LAST, 2)
        flush(guest)
        served.qmp.execute("mirror-cancel")
        write_block(guest, 2, 3)
        flush(guest)
        served.start_mirror(one)
        assert served.mirror()["full-copy-reason"] is None
        assert f'vhostsync_capacity_bytes{{vm="vm"}} {24 * MIB}\n' in metrics_page(port)
        guest.close()
        served.stop()
    with Served(near, other, *options) as served, served.guest() as guest:
        served.await_resumed()
        assert served.mirror()["full-copy-reason"] is None
        assert guest.read_now(LAST * BLOCK, BLOCK) == block_of(LAST, 2)
        assert f'vhostsync_capacity_bytes{{vm="vm"}} {24 * MIB}\n' in metrics_page(port)
        guest.close()
        served.stop()
    assert lacking(one, {1: 1, 2: 3, LAST: 2}) == lacking(other, {1: 1, 2: 3, LAST: 2}) == []


def metrics_page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text: str = page.read().decode()
        return text


def test_as_another_user(work: Path) -> None:
    need_root()
    disk = image(work / "a.img")
    give_to(NOBODY, work)
    options = ("--user", NOBODY, "--bitmap", work / "a.bitmap", "--metrics", work / "metrics.sock")
    with Served(work, disk, *options) as served:
        entry = pwd.getpwnam(NOBODY)
        for thread in threads_of(served):
            status = status_of(served.process.pid, thread)
            assert set(status["Uid"].split()) == {str(entry.pw_uid)}, status["Name"]
            assert set(status["Gid"].split()) == {str(entry.pw_gid)}, status["Name"]
            assert "0" not in status["Groups"].split(), "root's groups are gone"
        work_it(served, work / "b.img")
    with Served(work, disk, *options) as served:
        served.await_resumed()
        served.qmp.execute("mirror-cancel")
        served.stop()
    assert (work / "b.img").stat().st_uid == entry.pw_uid
    assert not (work / "vm.sock").exists()


@pytest.mark.parametrize(
    ("limit", "threads", "told"),
    [
        ("--nproc=1:1", 16, "starting the thread of {disk} (no more threads are allowed; raise the limit"),
        ("--nproc=3:3", 16, "failed in pthread_create (no more threads are allowed; raise the limit"),
        # Whose thread it is that cannot be had, one of ours or of the interpreter's, is a matter of time.
        ("--nproc=3:3", 1, "(no more threads are allowed; raise the limit"),
        ("--nofile=19:19", 16, "(the limit on open files is too small; raise it"),
    ],
)
def test_a_limit_that_is_too_low_for_the_threads(work: Path, limit: str, threads: int, told: str) -> None:
    """Some of them run already, or none; what others run as this user would count, too."""
    need_root()
    disk = image(work / "a.img")
    (work / "state").mkdir()
    give_to(ALONE, work)
    code, stderr = refused_start(
        "serve", "--blk-file", disk, "--socket-path", work / "no.sock", "--user", ALONE,
        "--threads", str(threads), env={"STATE_DIRECTORY": str(work / "state")}, before=("prlimit", limit),
    )  # fmt: skip
    *logged_before, sentence = stderr.splitlines()
    assert code == 1 and told.format(disk=disk) in sentence, stderr
    assert all(line.startswith("{") for line in logged_before), stderr
    assert not (work / "no.sock").exists()


def test_a_user_who_cannot_write_the_state_is_told_at_the_start(work: Path) -> None:
    need_root()
    disk = image(work / "a.img")
    (work / "state").mkdir(mode=0o700)
    code, stderr = refused_start(
        "serve", "--blk-file", disk, "--socket-path", work / "no.sock", "--user", NOBODY,
        env={"STATE_DIRECTORY": str(work / "state")},
    )  # fmt: skip
    assert code == 1
    assert "Permission denied" in stderr and "Traceback" not in stderr


def test_an_unknown_user(work: Path) -> None:
    words = ("serve", "--blk-file", image(work / "a.img"), "--socket-path", work / "no.sock")
    code, stderr = refused_start(*words, "--user", "no-such-user")
    assert code == 1 and "this machine has no user no-such-user" in stderr


def test_destinations_lie_where_they_may(work: Path) -> None:
    """Once it is said where they may, elsewhere is refused in a sentence that says what to do."""
    near, far = work / "near", work / "far"
    near.mkdir()
    far.mkdir()
    with Served(near, image(near / "a.img"), "--allow-path", near) as served:
        if not has_landlock(served):
            pytest.skip("THIS TEST IS LEFT OUT, as this kernel has no Landlock")
        with pytest.raises(QmpError, match=f"lies outside the directories.*--allow-path {far}"):
            served.qmp.execute("mirror-start", destination=str(far / "b.img"), create=True)
        assert served.state == "passthrough" and list(far.iterdir()) == []
        served.stop()
    shutil.rmtree(near / "state")
    with Served(near, near / "a.img", "--allow-path", far) as served:
        served.start_mirror(far / "b.img", create=True)
        served.kill()
    with Served(near, near / "a.img", "--allow-path", near) as served:
        served.await_resumed()  # what the record names is within reach
        served.stop()
