# SPDX-License-Identifier: Apache-2.0
"""A source that fails under a real `serve` (docs/durability.md, rule 5).

The bad disk is a loop device. Reads beyond the end of its backing file, which was cut off, are I/O errors of
the block layer; so are writes for which the file system behind it has no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    loop_device,
    tmpfs,
    write_block,
)
from tests.frontend import Frontend, Status
from tests.guest.images import fill_random, new_image
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB
from vhostsync.record.heartbeat import Heartbeat
from vhostsync.record.state_record import decode_record

SIZE_MIB = 16
GOOD_MIB = 12
UNKNOWN = "what the last run's copy lacks is not known, for no --bitmap has kept it"
LAST = SIZE_MIB * MIB // BLOCK - 1


def write_until_one_fails(guest: Frontend) -> None:
    """One MiB after the other, until the disk has no room."""
    status, number = None, 0
    while status != Status.IOERR:
        request = guest.write(number * MIB, b"x" * MIB)
        guest.wait(request)
        status, number = request.status, number + 1


@contextmanager
def cut_off(work: Path) -> Iterator[Path]:
    """A disk whose end cannot be read."""
    backing = image(work / "backing.img", SIZE_MIB, filled_mib=SIZE_MIB)
    with loop_device(backing, 512) as device:
        with backing.open("r+b") as file:
            file.truncate(GOOD_MIB * MIB)
        yield device


def test_a_copy_around_what_cannot_be_read(work: Path) -> None:
    other = image(work / "b.img", SIZE_MIB, filled_mib=0)
    fill_random(other, 0, SIZE_MIB * MIB)
    old = other.read_bytes()
    with cut_off(work) as device, Served(work, device) as served, served.guest() as guest:
        served.qmp.execute("mirror-start", destination=str(other))
        error = served.qmp.wait_event("IO_ERROR")
        assert (error["disk"], error["operation"]) == ("source", "read")
        served.await_steady()
        bad = {"offset": GOOD_MIB * MIB, "length": (SIZE_MIB - GOOD_MIB) * MIB}
        assert served.mirror()["unreadable"] == [bad]
        read = guest.read(LAST * BLOCK, BLOCK)
        guest.wait(read)
        assert read.status == Status.IOERR
        with pytest.raises(QmpError, match=r"1 range\(s\) of the source could not be read"):
            served.qmp.execute("switch")
        with pytest.raises(QmpError, match="may differ where the source is in doubt or unreadable"):
            served.qmp.execute("switch", accept_unreadable=True, keep_mirror=True)
        write_block(guest, LAST, 7)
        flush(guest)
        bad["length"] -= BLOCK
        assert served.mirror()["unreadable"] == [bad]
        result = served.qmp.execute("switch", accept_unreadable=True)
        assert result["accepted"] == {"doubt": [], "unreadable": [bad]}
        assert served.mirror()["unreadable"] == []
        assert guest.read_now(LAST * BLOCK, BLOCK) == block_of(LAST, 7)
        assert guest.read_now(GOOD_MIB * MIB, BLOCK) == old[GOOD_MIB * MIB :][:BLOCK]
        guest.close()
        served.stop()
    with (work / "backing.img").open("rb") as file:
        good = file.read(GOOD_MIB * MIB)
    content = other.read_bytes()
    assert content[: GOOD_MIB * MIB] == good
    assert content[GOOD_MIB * MIB : -BLOCK] == old[GOOD_MIB * MIB : -BLOCK]


def promised_ns(bitmap: Path) -> int:
    """Until when the changes of the destination are the backend's own."""
    with bitmap.open("rb") as file:
        return Heartbeat.read(file.fileno()).peer_ns


@pytest.mark.parametrize("options", [("--bitmap", "bits"), ()])
def test_what_is_in_doubt_outlives_a_kill(work: Path, options: tuple[str, ...]) -> None:
    """Neither is the destination overwritten with it, nor a switch made; not even if everything is copied."""
    other = image(work / "b.img", 64, filled_mib=0)
    options = tuple(str(work / word) if word == "bits" else word for word in options)
    with small_disk(work) as device:
        with Served(work, device, *options) as served, served.guest() as guest:
            served.start_mirror(other)
            write_until_one_fails(guest)
            doubt = served.mirror()["doubt"]
            assert [row["length"] for row in doubt] == [MIB]
            (record,) = served.state_directory.glob("*.record.json")
            await_true(lambda: decode_record(record.read_bytes()).spared != (), "it is recorded")
            good = b"good" * (MIB // 4)  # what the destination may still hold there
            with other.open("r+b") as file:
                file.seek(doubt[0]["offset"])
                file.write(good)
            guest.wait(guest.write(0, b"x" * MIB))  # so that the change before it passes for one of ours
            if options:
                await_true(lambda: promised_ns(Path(options[1])) >= other.stat().st_ctime_ns, "the heartbeat")
            served.kill()
        with Served(work, device, *options) as served:
            served.await_resumed()
            found = served.mirror()
            assert found["doubt"] == doubt
            assert found["full-copy-reason"] == (None if options else UNKNOWN)
            with pytest.raises(QmpError, match=r"failed in 1 range\(s\)"):
                served.qmp.execute("switch")
            served.qmp.execute("switch", accept_unreadable=True)
            assert decode_record(record.read_bytes()).doubt == ()
            served.stop()
        assert other.read_bytes()[doubt[0]["offset"] :][:MIB] == good


def test_what_somebody_has_changed_since_is_not_spared(work: Path) -> None:
    """After a clean end, too."""
    other = image(work / "b.img", 64, filled_mib=0)
    with small_disk(work) as device:
        with Served(work, device) as served, served.guest() as guest:
            served.start_mirror(other)
            write_until_one_fails(guest)
            [doubt] = served.mirror()["doubt"]
            (record,) = served.state_directory.glob("*.record.json")
            await_true(lambda: decode_record(record.read_bytes()).spared != (), "it is recorded")
            served.qmp.execute("mirror-cancel")
            somebodys = b"evil" * (MIB // 4)
            with other.open("r+b") as file:
                file.seek(doubt["offset"])
                file.write(somebodys)
            guest.close()
            served.stop()
        with Served(work, device) as served:
            served.start_mirror(other)
            assert served.mirror()["doubt"] == [doubt]
            served.stop()
        assert other.read_bytes()[doubt["offset"] :][:MIB] != somebodys


# ---- reads from the destination -----------------------------------------------------


def test_reads_are_answered_by_the_destination(work: Path) -> None:
    other = image(work / "b.img", SIZE_MIB, filled_mib=0)
    backing = image(work / "backing.img", SIZE_MIB, filled_mib=SIZE_MIB)
    with loop_device(backing, 512) as device, Served(work, device, "--read-fallback") as served:
        with served.guest() as guest:
            served.start_mirror(other)
            write_block(guest, LAST, 7)
            with backing.open("r+b") as file:
                file.truncate(GOOD_MIB * MIB)
            assert guest.read_now(LAST * BLOCK, BLOCK) == block_of(LAST, 7)
            assert served.qmp.wait_event("IO_ERROR")["disk"] == "source"
            assert (served.state, served.mirror()["reads-from-destination"]) == ("steady", 1)
            guest.close()
        served.stop()


# ---- a switch because the source fails ------------------------------------------------


@contextmanager
def small_disk(work: Path) -> Iterator[Path]:
    """A disk that fails writes when 8 MiB of it are used."""
    with tmpfs(work, 8192) as small:
        backing = new_image(small.folder / "a.img", 64)
        with loop_device(backing, 512) as device:
            yield device


def test_a_source_that_fails_under_load_is_left_and_the_guest_sees_nothing(work: Path) -> None:
    other = image(work / "b.img", 64, filled_mib=0)
    with small_disk(work) as device, Served(work, device, "--on-source-error", "switch") as served:
        served.start_mirror(other)
        with Load(served, blocks=8192, depth=64) as load:
            found = served.qmp.wait_event("SOURCE_FAILOVER")
            assert (found["former"], found["source"]) == (str(device), str(other))
            assert found["switched"] and found["reason"] is None and found["pause-us"] > 0
            assert "write of" in found["error"]
            load.go_on()
            expected = load.stop()
        assert lacking(other, expected) == []
        status, mirror = served.qmp.execute("query-status"), served.mirror()
        assert (status["disk"], status["mirror"], status["epoch"]) == (str(other), "passthrough", 2)
        assert (mirror["source-failovers"], mirror["doubt"]) == (1, [])
        record = served.record()
        assert record is not None and record.current.path == str(other)
        served.stop()


def test_where_no_switch_is_possible_the_error_is_the_guests(work: Path) -> None:
    """The state record cannot be written, so the guest stays; nothing is left behind."""
    other = image(work / "b.img", 64, filled_mib=0)
    with small_disk(work) as device, Served(work, device, "--on-source-error", "switch") as served:
        with served.guest() as guest:
            served.start_mirror(other)
            (record,) = served.state_directory.glob("*.record.json")
            record.rename(record.with_name("aside"))
            record.mkdir()  # no file can take its place
            failed = []
            for number in range(0, 4096, 256):
                request = guest.write(number * BLOCK, b"x" * 256 * BLOCK)
                guest.wait(request)
                failed.append(request.status)
            assert failed.count(Status.IOERR) > 0
            found = served.qmp.wait_event("SOURCE_FAILOVER")
            assert not found["switched"] and found["source"] == str(device) and found["reason"]
            assert served.state == "steady" and served.mirror()["doubt"]
            record.rmdir()  # nothing is put back: it may be written anew at any moment from here on
            result = served.qmp.execute("switch", accept_unreadable=True)
            assert result["source-path"] == str(other) and result["accepted"]["doubt"]
            guest.close()
        served.stop()
