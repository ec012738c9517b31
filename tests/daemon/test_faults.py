# SPDX-License-Identifier: Apache-2.0
"""Real parts that fail: a destination that is full, one that hangs, a state record that cannot be written.
The guest goes on, and everybody is told the truth (docs/durability.md, rules 7 and 8)."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.daemon.rig import (
    BLOCK,
    Load,
    Served,
    await_true,
    block_of,
    ext4,
    flush,
    image,
    lacking,
    same_content,
    tmpfs,
    write_block,
)
from tests.frontend import Frontend, Request, Status
from tests.guest.images import new_image
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB
from vhostsync.record.state_record import Worth

NO_SPACE = "No space left on device"


def fill(guest: Frontend, first: int, blocks: int) -> None:
    """Writes that many blocks, 1 MiB at a time; every write is answered with success."""
    for number in range(first, first + blocks, 256):
        data = b"".join(block_of(each, 1) for each in range(number, min(number + 256, first + blocks)))
        assert guest.write_now(number * BLOCK, data).ok


# ---- a destination that is full ----------------------------------------------------


def test_a_full_destination_in_steady(work: Path) -> None:
    source = image(work / "a.img", 64, filled_mib=2)
    with tmpfs(work, 8192) as small:
        other = new_image(small.folder / "b.img", 64)
        with Served(work, source) as served, served.guest(queues=2) as guest:
            served.start_mirror(other)
            before = served.counts()["writes-flushed"]
            assert before is not None
            fill(guest, 1024, 4096)
            flush(guest)
            # Confirmed without the destination: the record has to say so already.
            record = served.record()
            assert record is not None and record.peer_worth is Worth.OUTDATED and record.outdated_since
            error = served.qmp.wait_event("IO_ERROR")
            assert (error["disk"], error["path"], error["operation"]) == ("destination", str(other), "write")
            assert NO_SPACE in error["error"]
            change = served.await_state("degraded")
            assert change["reason"] == "a write to the destination failed" and NO_SPACE in change["error"]
            found = served.mirror()
            assert (found["state"], found["worth"]) == ("degraded", "outdated")
            assert found["outdated-since"] == record.outdated_since
            assert NO_SPACE in found["last-error"] and found["reason"] == change["reason"]
            with pytest.raises(QmpError, match="it is degraded"):
                served.qmp.execute("switch")
            fill(guest, 6000, 512)
            flush(guest)
            assert guest.read_now(6000 * BLOCK, BLOCK) == block_of(6000, 1)
            served.qmp.execute("mirror-cancel")
            assert served.state == "passthrough"
            # Another one is accepted, and the guest is none the worse.
            good = image(work / "c.img", 64, filled_mib=0)
            served.start_mirror(good)
            guest.close()
            served.stop()
    assert lacking(good, dict.fromkeys(range(1024, 5120), 1)) == []
    assert same_content(source, good)


def test_a_full_destination_during_the_copy(work: Path) -> None:
    source = image(work / "a.img", 32, filled_mib=24)
    with tmpfs(work, 8192) as small:
        other = new_image(small.folder / "b.img", 32)
        with Served(work, source) as served, Load(served) as load:
            served.qmp.execute("mirror-start", destination=str(other))
            assert NO_SPACE in served.await_state("degraded")["error"]
            found = served.mirror()
            assert (found["state"], found["worth"]) == ("degraded", "inconsistent")
            record = served.record()
            assert record is not None and record.peer_worth is Worth.INCONSISTENT
            load.go_on()
            load.stop()
            served.stop()


def test_a_full_destination_under_load(work: Path) -> None:
    """Flushes are under way all the time; none fails, none is lost."""
    source = image(work / "a.img", 64, filled_mib=2)
    with tmpfs(work, 8192) as small:
        other = new_image(small.folder / "b.img", 64)
        with Served(work, source) as served:
            served.start_mirror(other)
            with Load(served, first=1024, blocks=8192, depth=64) as load:
                served.await_state("degraded")
                load.go_on()
                expected = load.stop()
                record = served.record()
                assert record is not None and record.peer_worth is Worth.OUTDATED
                assert lacking(source, expected) == []
            served.stop()


# ---- --on-destination-error pause ------------------------------------------------


def test_flushes_wait_for_the_next_mirror(work: Path) -> None:
    """Three ways out of it: a mirror, a cancel, and the end of the backend."""
    source, good = image(work / "a.img", 32, filled_mib=2), image(work / "c.img", 32, filled_mib=0)
    options = ("--on-destination-error", "pause", "--stop-timeout", "500ms")
    with tmpfs(work, 8192) as small:
        other = new_image(small.folder / "b.img", 32)
        with Served(work, source, *options) as served, served.guest() as guest:

            def pause(number: int) -> Request:
                """A flush that is held by it: the destination has no room for this block."""
                filler = small.folder / "filler"
                filler.unlink(missing_ok=True)
                served.start_mirror(other)
                with pytest.raises(OSError, match=NO_SPACE):
                    filler.write_bytes(bytes(8 * MIB))
                write_block(guest, number, 1)
                assert served.qmp.wait_event("FLUSHES_PAUSED") == {"paused": True, "released": 0}
                served.await_worth("outdated")
                held = guest.flush()
                write_block(guest, number, 2)
                assert guest.read_now(number * BLOCK, BLOCK) == block_of(number, 2)
                await_true(lambda: served.mirror()["paused-requests"] == 1, "the flush is held")
                found = served.mirror()
                assert (found["state"], found["paused"], held.done) == ("degraded", True, False)
                return held

            held = pause(1024)
            assert "start a mirror (mirror-start)" in served.process.log.read_text()
            served.start_mirror(good)
            guest.wait(held)
            assert held.ok and served.mirror()["paused"] is False
            assert lacking(good, {1024: 2}) == []
            served.qmp.execute("mirror-cancel")
            held = pause(2048)
            served.qmp.execute("mirror-cancel")
            guest.wait(held)
            assert held.ok and served.mirror()["paused-released"] == 0
            held = pause(3072)
            assert served.stop() < 10
            guest.poll()
            assert held.ok
    with Served(work, source, *options) as served:
        assert "a pause does not outlive the backend" in served.process.log.read_text()
        served.stop()


# ---- a destination that hangs ----------------------------------------------------


def test_a_hanging_destination_is_given_up_and_fenced(work: Path) -> None:
    source, spare = image(work / "a.img"), image(work / "c.img")
    with ext4(work) as files:
        other = image(files.folder / "b.img")
        with Served(work, source, "--destination-timeout", "1") as served, served.guest() as guest:
            served.start_mirror(other)
            write_block(guest, 1, 1)
            flush(guest)
            files.freeze()
            began = time.monotonic()
            write_block(guest, 2, 1)
            flush(guest)
            took = time.monotonic() - began
            record = served.record()
            assert record is not None and record.peer_worth is Worth.OUTDATED
            assert 0.9 < took < 5, f"the flush was answered after {took:.1f} s"
            change = served.await_state("degraded")
            assert change["reason"] == "the destination did not answer within destination_timeout"
            assert served.mirror()["worth"] == "outdated"
            # What was flushed before is on it.
            assert lacking(other, {1: 1}) == []
            write_block(guest, 3, 1)
            flush(guest)
            for again in (other, spare):
                with pytest.raises(QmpError, match="are not over yet and could still write there"):
                    served.qmp.execute("mirror-start", destination=str(again))
            files.thaw()
            served.start_mirror(other)
            guest.close()
            served.stop()
        assert same_content(source, other)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_hanging_destination_during_the_copy(work: Path, threads: str) -> None:
    source = image(work / "a.img", filled_mib=16)
    with ext4(work) as files:
        other = image(files.folder / "b.img")
        options = ("--destination-timeout", "1", "--threads", threads)
        with Served(work, source, *options) as served, Load(served) as load:
            served.qmp.execute("mirror-start", destination=str(other), speed=2 * MIB)
            files.freeze()
            change = served.await_state("degraded")
            assert change["reason"] == "the destination did not answer within destination_timeout"
            assert served.mirror()["worth"] == "inconsistent"
            load.go_on()
            files.thaw()
            served.start_mirror(other)
            expected = load.stop()
            served.stop()
        assert lacking(other, expected) == [] and same_content(source, other)


def test_stopping_a_ring_does_not_wait_for_a_hanging_destination(work: Path) -> None:
    """GET_VRING_BASE freezes a virtual machine: it has a timeout of its own."""
    source = image(work / "a.img")
    with ext4(work) as files:
        other = image(files.folder / "b.img")
        options = ("--destination-timeout", "60", "--stop-timeout", "0.5")
        with Served(work, source, *options) as served, served.guest() as guest:
            served.start_mirror(other)
            files.freeze()
            write_block(guest, 1, 1)
            held = guest.flush()
            await_true(lambda: served.in_flight() == 1, "the flush is taken up")
            began = time.monotonic()
            guest.stop()
            took = time.monotonic() - began
            guest.poll()
            assert held.ok and 0.4 < took < 5, f"{took:.1f} s"
            change = served.await_state("degraded")
            assert "within stop_timeout" in change["reason"]
            files.thaw()
            guest.close()
            served.stop()


def test_cancel_with_a_hanging_destination(work: Path) -> None:
    source = image(work / "a.img")
    with ext4(work) as files:
        other = image(files.folder / "b.img")
        with Served(work, source, "--destination-timeout", "1") as served, served.guest() as guest:
            served.start_mirror(other)
            files.freeze()
            write_block(guest, 1, 1)
            with pytest.raises(QmpError, match=r"could not be brought up to date.*--force"):
                served.qmp.execute("mirror-cancel", timeout_s=5)
            served.await_state("degraded")
            flush(guest)
            served.qmp.execute("mirror-cancel")
            assert served.state == "passthrough" and served.mirror()["worth"] == "outdated"
            files.thaw()
            served.start_mirror(other)
            # By force nothing is waited for.
            files.freeze()
            write_block(guest, 2, 1)
            held = guest.flush()
            began = time.monotonic()
            served.qmp.execute("mirror-cancel", force=True)
            assert time.monotonic() - began < 0.9
            guest.wait(held)
            assert held.ok
            record = served.record()
            assert record is not None and record.peer_worth is Worth.OUTDATED
            files.thaw()
            guest.close()
            served.stop()


@pytest.mark.parametrize(("force", "threads"), [(False, "1"), (True, "2")])
def test_the_end_with_a_hanging_destination(work: Path, force: bool, threads: str) -> None:
    """All but the process itself: the kernel lets go of that only when the last request is over, whatever a
    program does. So its sockets and its log say that it has ended, and the rest is over with the thaw."""
    source = image(work / "a.img")
    with ext4(work) as files:
        other = image(files.folder / "b.img")
        options = ("--destination-timeout", "1", "--threads", threads)
        with Served(work, source, *options) as served, served.guest() as guest:
            served.start_mirror(other)
            files.freeze()
            write_block(guest, 1, 1)
            held = guest.flush()
            await_true(lambda: served.in_flight() == 1, "the flush is taken up")
            began = time.monotonic()
            if force:
                served.qmp.execute("quit", force=True)
            else:
                served.process.signal(signal.SIGTERM)
            # A guest that is let go is not notified any more: it is when it comes back.
            await_true(lambda: bool(guest.poll()) or held.done, "the flush is answered")
            assert held.ok
            await_true(lambda: '"message": "ended"' in served.process.log.read_text(), "it has ended", 10)
            assert time.monotonic() - began < 8
            assert not served.socket.exists() and not served.control.exists()
            record = served.record()
            assert record is not None and record.peer_worth is Worth.OUTDATED
            files.thaw()
            assert served.process.wait(10) == 0
        # What it left is whole.
        with Served(work, source) as served, served.guest() as guest:
            assert guest.read_now(BLOCK, BLOCK) == block_of(1, 1)
            served.await_resumed()
            guest.close()
            served.stop()
        assert same_content(source, other)


def test_a_kill_with_a_hanging_destination(work: Path) -> None:
    """What a killed backend has under way may still be written: its locks hold until it is."""
    source = image(work / "a.img")
    with ext4(work) as files:
        other = image(files.folder / "b.img")
        with Served(work, source) as served, served.guest() as guest:
            served.start_mirror(other)
            files.freeze()
            write_block(guest, 1, 1)
            await_true(lambda: served.mirror()["lag-writes"] > 0, "a write to the destination hangs")
            served.process.signal(signal.SIGKILL)
            files.thaw()
            served.kill()
        with Served(work, source, "--resume-mirror", "off") as served, served.guest() as guest:
            assert guest.read_now(BLOCK, BLOCK) == block_of(1, 1)
            record = served.record()
            assert record is not None and record.peer_worth is Worth.OUTDATED
            served.start_mirror(other)
            guest.close()
            served.stop()
        assert same_content(source, other)


# ---- a state record that cannot be written -------------------------------------------


def scraped(metrics: Path) -> str:
    """The page of metrics on this unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(metrics))
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        with connection.makefile("rb") as answer:
            return answer.read().decode()


def test_flushes_fail_while_the_record_cannot_be_written(work: Path) -> None:
    source = image(work / "a.img", 64, filled_mib=2)
    (work / "records").mkdir()
    with tmpfs(work, 8192) as small, tmpfs(work / "records", 64) as tiny:
        other, record = new_image(small.folder / "b.img", 64), tiny.folder / "r.json"
        options = ("--state-file", record, "--metrics", work / "metrics")
        with Served(work, source, *options) as served, served.guest(queues=2) as guest:
            served.qmp.execute("mirror-start", destination=str(other))
            served.await_steady()
            await_true(lambda: b'"up-to-date"' in record.read_bytes(), "the record says so")
            ballast = tiny.folder / "ballast"
            with pytest.raises(OSError, match=NO_SPACE), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            fill(guest, 1024, 4096)  # the writes themselves go on
            served.await_state("degraded")
            for _ in range(3):
                assert guest.flush_now().status == Status.IOERR
            write_block(guest, 1, 1)
            assert guest.read_now(BLOCK, BLOCK) == block_of(1, 1)
            assert b'"up-to-date"' in record.read_bytes()
            found = served.mirror()
            assert found["state"] == "degraded" and "cannot be written" in found["last-error"]
            assert found["flushes-fail"] and "cannot be written" in found["record-error"]
            assert 'vhostsync_flushes_fail{vm="vm"} 1\n' in scraped(work / "metrics")
            with pytest.raises(QmpError, match="it cannot be written"):
                served.qmp.execute("mirror-start", destination=str(image(work / "c.img", 64)))
            ballast.unlink()
            await_true(lambda: guest.flush_now().ok, "flushes are confirmed again")
            assert b'"outdated"' in record.read_bytes()
            found = served.mirror()
            assert (found["flushes-fail"], found["record-error"]) == (False, None)
            assert 'vhostsync_record_unwritable{vm="vm"} 0\n' in scraped(work / "metrics")
            served.qmp.execute("mirror-start", destination=str(work / "c.img"))
            served.await_steady()
            guest.close()
            served.stop()


def test_the_end_while_the_record_cannot_be_written(work: Path) -> None:
    source = image(work / "a.img", 64, filled_mib=2)
    (work / "records").mkdir()
    with tmpfs(work, 8192) as small, tmpfs(work / "records", 64) as tiny:
        other, record = new_image(small.folder / "b.img", 64), tiny.folder / "r.json"
        with Served(work, source, "--state-file", record) as served, served.guest() as guest:
            served.qmp.execute("mirror-start", destination=str(other))
            served.await_steady()
            await_true(lambda: b'"up-to-date"' in record.read_bytes(), "the record says so")
            with pytest.raises(OSError, match=NO_SPACE), (tiny.folder / "x").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            fill(guest, 1024, 4096)
            served.await_state("degraded")
            assert served.stop() < 10
        (tiny.folder / "x").unlink()
        # The next one must not believe the old word: the guest's flushes go on without the peer.
        with Served(work, source, "--state-file", record, "--resume-mirror", "off") as served:
            assert b'"outdated"' in record.read_bytes()
            served.stop()
