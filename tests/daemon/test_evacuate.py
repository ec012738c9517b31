# SPDX-License-Identifier: Apache-2.0
"""`vhostsync evacuate` with real backends: all are moved, interrupted and started again, with a destination
that is full, and never onto somebody else's file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.daemon.evacuated_host import Evacuated, lines_of
from tests.daemon.rig import (
    BLOCK,
    await_true,
    block_of,
    flush,
    image,
    loop_device,
    need_root,
    same_content,
    tmpfs,
    write_block,
)
from tests.guest.backends import vhostsync_command
from tests.sizes import MIB
from tests.unit.test_host_disks import MIRROR, STATUS
from vhostsync.fleet import evacuation
from vhostsync.fleet.disks import host_disks
from vhostsync.fleet.evacuation import Progress
from vhostsync.fleet.evacuation_plan import plan_moves
from vhostsync.host.flocks import lock_holders

pytestmark = pytest.mark.timeout(300)  # many programs are started, one after the other


@contextmanager
def played_backend(control: Path, answers: Mapping[str, Sequence[Any]]) -> Iterator[None]:
    """What it says to each command, one after the other, the last of them again and again."""
    asked = Counter[str]()

    def converse(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines, suppress(OSError, ValueError):
            connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')
            for line in lines:
                request = json.loads(line)
                known = answers.get(request["execute"], [{}])
                said = known[min(asked[request["execute"]], len(known) - 1)]
                asked[request["execute"]] += 1
                connection.sendall(json.dumps({"return": said, "id": request["id"]}).encode() + b"\n")

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=converse, args=(listener.accept()[0],), daemon=True).start()

    control.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control))
        listener.listen()
        server = threading.Thread(target=serve, daemon=True)
        server.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()


@pytest.fixture
def host(work: Path) -> Evacuated:
    return Evacuated(work)


def test_ten_disks_are_moved_three_at_a_time(host: Evacuated, work: Path) -> None:
    disks = [image(host.old / f"{at}.img", 4, filled_mib=2) for at in range(10)]
    beside = image(work / "beside.img", 4)
    with host.serve_all(*disks, beside), host.guest("vm0") as guest:
        write_block(guest, 1, 7)
        flush(guest)
        before = sorted(host.new.iterdir())
        plan = json.loads(host.evacuate("--dry-run", "--json")[0])
        assert [each["destination"] for each in plan["plan"]] == [str(host.new / disk.name) for disk in disks]
        assert plan["needed-bytes"] >= 20 * MIB and sorted(host.new.iterdir()) == before
        out, err = host.evacuate("--switch", "--parallel", "3", "--total-speed", "60M", "--json")
        *changes, result = lines_of(out)
        assert (result, err) == ({"done": 10, "failed": []}, "")
        under_way: set[str] = set()
        for change in changes:
            if change["phase"] in ("copying", "switching"):
                under_way.add(change["label"])
            else:
                under_way.discard(change["label"])
            assert len(under_way) <= 3
        for at, disk in enumerate(disks):
            assert host.status(f"vm{at}")["disk"] == str(host.new / disk.name)
            assert at == 0 or same_content(disk, host.new / disk.name)
        assert guest.read_now(BLOCK, BLOCK) == block_of(1, 7)
        assert host.status("vm10")["disk"] == str(beside)
        assert "no disk of this host lies at" in host.evacuate("--switch")[0]


def test_interrupted_and_started_again_it_goes_on(host: Evacuated) -> None:
    disks = [image(host.old / f"{at}.img", 8, filled_mib=8) for at in range(4)]
    with host.serve_all(*disks):
        with host.begin("--switch", "--parallel", "2", "--total-speed", "1M", "--json") as program:
            assert program.stdout is not None
            began: set[str] = set()
            while len(began) < 2:
                change = json.loads(program.stdout.readline())
                assert change["phase"] in ("copying", "waiting"), change
                began.add(change["label"])
            program.send_signal(signal.SIGINT)
            _, err = program.communicate(timeout=60)
        assert (program.returncode, err) == (
            130, "vhostsync: The copies that run go on; start it again to go on with the rest.\n",
        )  # fmt: skip
        for label in began:
            mirror = host.ask(label, "query-mirror")
            assert (mirror["state"], mirror["wanted"]) == ("syncing", True)
            assert mirror["speed-bytes-per-s"] == MIB // 2
        out, _ = host.evacuate("--switch", "--parallel", "4", "--total-speed", "400M", "--json")
        assert lines_of(out)[-1] == {"done": 4, "failed": []}
        for at, disk in enumerate(disks):
            assert host.status(f"vm{at}")["disk"] == str(host.new / disk.name)
            assert same_content(disk, host.new / disk.name)
            begun = (host.work / f"vm{at}.log").read_text().count('"message": "copying"')
            assert begun == 1  # what ran was not begun anew


def test_one_that_finds_no_room_stops_no_other(host: Evacuated, work: Path) -> None:
    disks = [image(host.old / f"{at}.img", 6, filled_mib=6) for at in range(3)]
    with tmpfs(work, 15 * 1024) as mount, host.serve_all(*disks):
        out, err = host.evacuate("--switch", "--parallel", "1", to=mount.folder, code=1)
        assert out.splitlines()[-1] == "2 of 3 moved"
        [sentence] = err.splitlines()
        failed = sentence.split(": ")[1]
        assert failed in ("vm0", "vm1", "vm2") and "No space left" in sentence
        assert host.status(failed)["disk"].startswith(str(host.old))
        subprocess.run(["mount", "-o", "remount,size=40m", mount.folder], check=True)
        out, err = host.evacuate("--switch", to=mount.folder)
        assert (out.splitlines()[-1], err) == ("1 of 1 moved", "")
        for disk in disks:
            assert same_content(disk, mount.folder / disk.name)
        # Before what they have open is unmounted.
        for at in range(3):
            host.ask(f"vm{at}", "quit")


def test_nothing_of_others_is_overwritten(host: Evacuated) -> None:
    disks = []
    for at in range(3):
        (host.old / str(at)).mkdir()
        disks.append(image(host.old / str(at) / ("same.img" if at < 2 else "other.img"), 4))
    foreign = host.new / "other.img"
    foreign.write_bytes(b"precious" * 1024 * 1024)  # of the right size, and nothing that is recognised
    content = foreign.read_bytes()
    with host.serve_all(*disks):
        _, err = host.evacuate("--json", code=1)
        assert f"vhostsync: vm2: {foreign} exists already" in err
        assert foreign.read_bytes() == content
        assert {path.name for path in host.new.iterdir()} == {"same-vm0.img", "same-vm1.img", "other.img"}
        for at in range(2):
            assert host.status(f"vm{at}")["mirror"] == "steady"
        foreign.unlink()
        assert host.evacuate("--switch")[0].splitlines()[-1] == "3 of 3 moved"
        for at, disk in enumerate(disks):
            assert same_content(disk, Path(host.status(f"vm{at}")["disk"]))


def test_a_file_that_took_the_place_of_a_mirror_is_not_overwritten(host: Evacuated) -> None:
    disk = image(host.old / "a.img", 4)
    with host.serve_all(disk):
        host.evacuate()
        host.ask("vm0", "mirror-cancel")
        copy = host.new / "a.img"
        copy.rename(host.new / "aside.img")
        copy.write_bytes(b"precious" * 1024 * 1024)
        assert "exists already, and is not known as a mirror" in host.evacuate(code=1)[1]
        assert copy.read_bytes() == b"precious" * 1024 * 1024
        (host.new / "aside.img").rename(copy)
        host.evacuate("--switch")  # its own, which is brought up to date
        assert host.status("vm0")["disk"] == str(copy)


def test_a_block_device_becomes_an_image_file(host: Evacuated, work: Path) -> None:
    backing = image(work / "backing", 8, filled_mib=8)
    with loop_device(backing) as device:
        with host.serve_all(device, image(host.old / "0.img", 4)), host.guest("vm0") as guest:
            write_block(guest, 1, 7)
            flush(guest)
            assert host.evacuate("--switch", where=device)[0].splitlines()[-1] == "1 of 1 moved"
            moved = host.new / f"{device.name}.img"
            assert host.status("vm0")["disk"] == str(moved)
            assert same_content(backing, moved)
            write_block(guest, 2, 8)
            flush(guest)
        assert moved.read_bytes()[2 * BLOCK : 3 * BLOCK] == block_of(2, 8)


def test_a_backend_that_does_not_run_is_named(host: Evacuated) -> None:
    one, other = image(host.old / "0.img", 4), image(host.old / "1.img", 4)
    host.tell("create", "stopped", "--disk", other)
    with host.serve_all(one):
        table = host.evacuate("--dry-run", code=1)[0]
        assert "1 to move" in table and "no backend runs for it" in table
        out, err = host.evacuate("--switch", code=1)
        assert "vhostsync: stopped: no backend runs for it" in err
        assert out.splitlines()[-1] == "1 of 2 moved"


def test_one_that_says_nothing_holds_up_no_other(host: Evacuated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is stopped while it copies."""
    monkeypatch.setattr(evacuation, "ANSWER_S", 3.0)
    monkeypatch.setattr(evacuation, "COMMAND_S", 10.0)
    monkeypatch.setattr(evacuation, "COME_BACK_S", 1.0)
    disks = [image(host.old / f"{at}.img", 4, filled_mib=4) for at in range(3)]
    with ExitStack() as stack:
        served = [
            stack.enter_context(host.serve(f"vm{at}", "--blk-file", disk)) for at, disk in enumerate(disks)
        ]

        def tell(changed: Progress) -> None:
            if (changed.label, changed.phase) == ("vm0", evacuation.COPYING):
                os.kill(served[0].pid, signal.SIGSTOP)

        async def evacuate() -> dict[int, Progress]:
            found = await host_disks(host.state, host.run)
            moves = await plan_moves(found, str(host.old), str(host.new))
            running = evacuation.Evacuation(moves, parallel=1, total_speed=MIB, switch=True, tell=tell)
            with anyio.fail_after(200):
                await running.run()
            return running.progress

        ends = {each.label: each for each in anyio.run(evacuate).values()}
        assert [ends[f"vm{at}"].phase for at in range(3)] == [
            evacuation.FAILED, evacuation.MOVED, evacuation.MOVED
        ]  # fmt: skip
        assert "does not answer" in str(ends["vm0"].error)


def test_no_guest_is_moved_to_a_place_that_is_gone(host: Evacuated) -> None:
    disks = [image(host.old / f"{at}.img", 4, filled_mib=2) for at in range(2)]
    with host.serve_all(*disks):
        host.evacuate()
        shutil.rmtree(host.new)
        host.new.mkdir()
        out, err = host.evacuate("--switch", code=1)
        assert out.splitlines()[-1] == "0 of 2 moved" and err.count("does not lead to the disk") == 2
        assert [host.status(f"vm{at}")["disk"] for at in range(2)] == [str(disk) for disk in disks]


def test_there_is_one_evacuation_of_a_place_at_a_time(host: Evacuated) -> None:
    disks = [image(host.old / f"{at}.img", 8, filled_mib=8) for at in range(2)]
    with host.serve_all(*disks):
        with host.begin("--switch", "--total-speed", "1M", "--json") as program:
            assert program.stdout is not None
            assert json.loads(program.stdout.readline())["phase"] in ("copying", "waiting")
            _, err = host.evacuate("--switch", code=1)
            assert f"is locked by process {program.pid}: another evacuation" in err
            inner = host.old / "inner"
            inner.mkdir()
            _, err = host.evacuate("--switch", code=1, where=inner)
            assert f"{host.old} is locked by process {program.pid}: another evacuation" in err
            assert json.loads(host.evacuate("--dry-run", "--json")[0])["plan"]
            program.send_signal(signal.SIGINT)
            program.communicate(timeout=60)
        assert host.evacuate("--switch")[0].splitlines()[-1] == "2 of 2 moved"


def test_nobody_else_keeps_a_place_from_being_evacuated(host: Evacuated) -> None:
    """Whoever may read a directory may lock it."""
    need_root()
    host.old.chmod(0o755)
    disk = image(host.old / "a.img", 4, filled_mib=2)
    with host.serve_all(disk), ExitStack() as stack:
        fd = os.open(host.old, os.O_RDONLY)
        stack.callback(os.close, fd)
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        locks = [*nobody, "flock", "--shared", f"/proc/self/fd/{fd}", "cat"]
        with subprocess.Popen(locks, stdin=subprocess.PIPE, pass_fds=(fd,)) as holder:
            await_true(lambda: lock_holders(host.old) != frozenset(), "it is locked")
            assert host.evacuate("--switch")[0].splitlines()[-1] == "1 of 1 moved"
            assert lock_holders(host.old) != frozenset()
            holder.communicate()


def test_a_lock_of_a_file_or_of_an_odd_process_keeps_nobody_from_evacuating(host: Evacuated) -> None:
    """As that of a wrapper, which lets one run at a time."""
    disk = image(host.old / "a.img", 4, filled_mib=2)
    lock = host.old / ".lock"
    odd = "import sys; open('/proc/self/comm', 'wb').write(b'\\xff'); sys.stdin.read()"
    words = ["flock", "--no-fork", lock, sys.executable, "-c", odd, "evacuate"]
    with (
        host.serve_all(disk),
        subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE) as holder,
    ):
        comm = Path(f"/proc/{holder.pid}/comm")
        await_true(lambda: comm.read_bytes() == b"\xff\n" and lock_holders(lock) != frozenset(), "it is odd")
        assert host.evacuate("--switch")[0].splitlines()[-1] == "1 of 1 moved"
        holder.communicate()


def test_output_that_nobody_takes_is_no_traceback(host: Evacuated) -> None:
    disks = [image(host.old / f"{at}.img", 4, filled_mib=2) for at in range(2)]
    words = [*vhostsync_command(), "evacuate", host.old, "--to", host.new]
    with host.serve_all(*disks), Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [str(word) for word in words], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, **host.environment}, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1, "vhostsync: The output cannot be written: No space left on device.\n",
    )  # fmt: skip


@pytest.mark.parametrize("said", [{}, [], {"source": "/\0"}, {"copy-bytes-done": "x"}, {"worth": 10**400}])
def test_a_backend_that_answers_nonsense_costs_no_other_disk(host: Evacuated, said: Any) -> None:
    """Once it was asked which disk it has: it may have been taken over by its guest meanwhile."""
    good = {**MIRROR, "state": "passthrough", "destination": None, "worth": None, "source": "/x"}
    status = {**STATUS, "name": "evil", "disk": str(host.old / "evil.img")}
    answers = {"query-status": [status], "query-mirror": [good, {**good, **said} if said else said]}
    with (
        host.serve_all(image(host.old / "a.img", 4, filled_mib=2)),
        played_backend(host.run / "evil" / "control", answers),
    ):
        out, err = host.evacuate("--switch", code=1)
        assert "Traceback" not in err and "vhostsync: evil: " in err
        assert out.splitlines()[-1] == "1 of 2 moved"


def test_a_terminal_gets_a_bar_for_each_and_one_for_all(host: Evacuated) -> None:
    disks = [image(host.old / f"{at}.img", 4, filled_mib=4) for at in range(2)]
    with host.serve_all(*disks):
        ours, theirs = os.openpty()
        words = [*vhostsync_command(), "evacuate", host.old, "--to", host.new, "--total-speed", "4M"]
        program = subprocess.Popen(
            [str(word) for word in words], stdout=theirs, stderr=theirs,
            env={**os.environ, **host.environment, "COLUMNS": "120"},
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        with os.fdopen(ours, "rb", buffering=0) as terminal:
            try:
                while data := terminal.read(4096):
                    shown += data
            except OSError:
                pass  # EIO: the program has closed it
        assert program.wait(timeout=60) == 0
    text = shown.decode()
    assert "] vm0: copying" in text and "] vm1: copying" in text
    assert "\x1b[3A" in text  # three lines, rewritten in place
    assert "] 100.0 %  2 of 2 disks" in text and "left" in text
    assert text.rstrip().splitlines()[-1].removeprefix("\x1b[J") == "2 of 2 up to date in both places"
