# SPDX-License-Identifier: Apache-2.0
"""Disks on a file system that hangs in one call after the other: the guest's requests go on, and so does the
control plane."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.rig import (
    BLOCK,
    WAIT_S,
    Served,
    await_true,
    block_of,
    flush,
    image,
    need_root,
    write_block,
)
from tests.frontend import Frontend
from tests.guest.backends import vhostsync_command
from tests.guest.qmp_client import QmpError
from tests.hanging_disk import HangingDisk, Op, hanging_disk
from tests.sizes import MIB

TIMEOUT = ("--destination-timeout", "1s")


@pytest.fixture
def hanging(work: Path) -> Iterator[HangingDisk]:
    need_root()
    if not Path("/dev/fuse").exists():
        pytest.skip("this machine has no FUSE")
    with hanging_disk(work / "hanging", 16 * MIB) as disk:
        yield disk


@contextmanager
def running(
    hanging: HangingDisk, work: Path, disk: Path, *options: str
) -> Iterator[tuple[Served, Frontend]]:
    with (
        Served(work, disk, *options) as served,
        served.guest(queues=2) as guest,
        hanging.goes_on_at_the_end(),
    ):
        yield served, guest


def assert_both_go_on(served: Served, guest: Frontend, seed: int) -> None:
    for number in range(8):
        write_block(guest, number, seed + number)
        assert guest.read_now(number * BLOCK, BLOCK) == block_of(number, seed + number)
    flush(guest)
    served.mirror()


@pytest.mark.parametrize("op", [Op.LSEEK, Op.FALLOCATE, Op.WRITE, Op.FSYNC])
def test_a_destination_that_hangs_is_given_up(work: Path, hanging: HangingDisk, op: Op) -> None:
    hanging.fill()
    source = image(work / "a.img", 16, filled_mib=1)
    with running(hanging, work, source, *TIMEOUT) as (served, guest):
        hanging.hang(op)
        served.qmp.execute("mirror-start", destination=str(hanging.path))
        hanging.await_hanging(op, WAIT_S)
        assert_both_go_on(served, guest, 1)
        served.await_state("degraded")
        assert_both_go_on(served, guest, 100)
        hanging.go_on()
        served.start_mirror(hanging.path)
        assert_both_go_on(served, guest, 200)


def test_a_destination_that_hangs_where_it_gets_its_mark(work: Path, hanging: HangingDisk) -> None:
    """The record waits no longer than five seconds for it; the copy then begins, and goes on."""
    source = image(work / "a.img", 16)
    with running(hanging, work, source) as (served, guest):
        hanging.hang(Op.SETXATTR)
        served.qmp.execute("mirror-start", destination=str(hanging.path))
        assert hanging.holds(Op.SETXATTR) and not hanging.attributes
        assert_both_go_on(served, guest, 1)
        record = served.record()
        assert record is not None and record.peer is not None
        assert record.peer.mark is not None and not record.peer.mark_is_set
        hanging.go_on()
        served.await_steady()
        assert list(hanging.attributes.values()) == [record.peer.mark.encode()]


def test_a_destination_that_hangs_in_its_close(work: Path, hanging: HangingDisk) -> None:
    source = image(work / "a.img", 16)
    with running(hanging, work, source, *TIMEOUT) as (served, guest):
        served.start_mirror(hanging.path)
        hanging.hang(Op.FLUSH)
        served.qmp.execute("mirror-cancel", force=True)
        hanging.await_hanging(Op.FLUSH, WAIT_S)
        assert_both_go_on(served, guest, 1)
        hanging.go_on()
        served.start_mirror(hanging.path)


def test_a_snapshot_that_cannot_be_looked_at_is_told_all_the_same(work: Path, hanging: HangingDisk) -> None:
    """What is seen of it later may be somebody else's change, so it does not count."""
    source = image(work / "a.img", 16, filled_mib=1)
    hanging.remembered_s = 0
    with running(hanging, work, source) as (served, guest):
        served.start_mirror(hanging.path)
        hanging.hang(Op.LOOKUP)
        command = [*vhostsync_command(), "snapshot", "--control", str(served.control)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
        assert (done.returncode, done.stderr) == (0, "")
        assert hanging.holds(Op.LOOKUP) and "Copies of one instant" in done.stdout
        assert_both_go_on(served, guest, 1)
        hanging.go_on()
        served.start_mirror(hanging.path)
        [*_, copied] = [line for line in served.process.log.read_text().splitlines() if '"copying"' in line]
        assert json.loads(copied)["everything_because"] == "no earlier copy of it is known"


@pytest.mark.parametrize("op", [Op.FLUSH, Op.LOOKUP])
def test_a_change_of_a_disk_that_was_let_go_of_late_is_not_missed(
    work: Path, hanging: HangingDisk, op: Op
) -> None:
    """It hangs where it is closed, or looked at; then somebody writes to it, and then it goes on."""
    hanging.remembered_s = 0
    source = image(work / "a.img", 16, filled_mib=1)
    with running(hanging, work, source) as (served, guest):
        served.start_mirror(hanging.path)
        hanging.hang(op)
        served.qmp.execute("mirror-cancel")
        hanging.await_hanging(op, WAIT_S)
        hanging.write(100 * BLOCK, b"somebody else's".ljust(BLOCK, b"!"))
        hanging.go_on()
        served.start_mirror(hanging.path)
        flush(guest)
        assert hanging.content() == source.read_bytes()


def test_a_change_while_it_does_not_close_is_not_missed_after_a_crash(
    work: Path, hanging: HangingDisk
) -> None:
    """Though the bitmap's heartbeat goes on until it is closed."""
    source, options = image(work / "a.img", 16, filled_mib=1), ("--bitmap", str(work / "bits"))
    hanging.remembered_s = 0
    with running(hanging, work, source, *options) as (served, guest):
        served.start_mirror(hanging.path)
        hanging.hang(Op.FLUSH)
        served.qmp.execute("mirror-cancel")
        hanging.await_hanging(Op.FLUSH, WAIT_S)
        hanging.write(100 * BLOCK, b"somebody else's".ljust(BLOCK, b"!"))
        hanging.go_on()
        served.kill()
    with running(hanging, work, source, *options) as (served, guest):
        served.start_mirror(hanging.path)
        flush(guest)
        assert hanging.content() == source.read_bytes()


def test_the_end_while_a_steady_destination_cannot_be_looked_at(work: Path, hanging: HangingDisk) -> None:
    hanging.killable, hanging.remembered_s = True, 0
    with running(hanging, work, image(work / "a.img", 16)) as (served, guest):
        served.start_mirror(hanging.path)
        hanging.hang(Op.LOOKUP)
        guest.close()
        assert served.process.terminate(WAIT_S) == 0
        record = served.record()
        assert record is not None and not record.clean


def while_it_hangs(
    hanging: HangingDisk, op: Op, served: Served, guest: Frontend, command: str, **arguments: Any
) -> None:
    """The command, with a look at the others each time when it hangs in this call. QmpError."""
    hanging.hang(op)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(served.client().execute, command, **arguments)
        hangs = 0
        while not answer.done():
            await_true(lambda: answer.done() or hanging.holds(op), f"{command} is over or hangs in {op.name}")
            if hanging.holds(op):
                hangs += 1
                try:
                    assert_both_go_on(served, guest, 10 * hangs)
                except BaseException:
                    hanging.go_on()
                    raise
                hanging.answer_held()
    assert hangs > 0
    hanging.go_on()
    answer.result()


def test_a_destination_that_is_refused_and_hangs_in_its_close(work: Path, hanging: HangingDisk) -> None:
    source = image(work / "a.img", 16)
    with hanging.path.open("r+b") as disk:
        disk.write(b"QFI\xfb" + (3).to_bytes(4))
    with (
        running(hanging, work, source) as (served, guest),
        pytest.raises(QmpError, match="holds something that would be lost"),
    ):
        while_it_hangs(hanging, Op.FLUSH, served, guest, "mirror-start", destination=str(hanging.path))


def test_a_source_that_hangs_where_it_is_asked_for_holes(work: Path, hanging: HangingDisk) -> None:
    other = image(work / "b.img", 16)
    with running(hanging, work, hanging.path, *TIMEOUT) as (served, guest):
        hanging.hang(Op.LSEEK)
        served.qmp.execute("mirror-start", destination=str(other))
        hanging.await_hanging(Op.LSEEK, WAIT_S)
        for number in range(8):  # writes wait in the kernel, which holds the file's lock meanwhile
            assert guest.read_now(number * BLOCK, BLOCK) == bytes(BLOCK)
        served.mirror()
        hanging.go_on()
        served.await_steady()


def test_a_source_that_hangs_in_its_close_is_left_all_the_same(work: Path, hanging: HangingDisk) -> None:
    other = image(work / "b.img", 16)
    with running(hanging, work, hanging.path) as (served, guest):
        served.start_mirror(other)
        hanging.hang(Op.FLUSH)
        served.qmp.execute("switch", max_pause_ms=500)
        hanging.await_hanging(Op.FLUSH, WAIT_S)
        assert_both_go_on(served, guest, 1)
        third = image(work / "c.img", 16)
        served.start_mirror(third)
        hanging.go_on()


def test_the_end_while_the_source_hangs(work: Path, hanging: HangingDisk) -> None:
    """All but the process itself, which the kernel keeps until the request is over, and the guest's
    connection with it, for the request may still write to its memory."""
    with running(hanging, work, hanging.path) as (served, guest):
        write_block(guest, 1, 1)
        flush(guest)
        hanging.hang(Op.READ)
        request = guest.read(BLOCK, BLOCK)
        hanging.await_hanging(Op.READ, WAIT_S)
        served.qmp.execute("quit", force=True)
        await_true(lambda: '"message": "ended"' in served.process.log.read_text(), "it has ended")
        assert not served.socket.exists() and not served.control.exists()
        assert served.process.running and not guest.poll() and not request.done
        hanging.go_on()
        assert served.process.wait(WAIT_S) == 0
    with Served(work, hanging.path) as served, served.guest() as guest:
        assert guest.read_now(BLOCK, BLOCK) == block_of(1, 1)
        guest.close()
        served.stop()
