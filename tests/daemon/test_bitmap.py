# SPDX-License-Identifier: Apache-2.0
"""The dirty bitmap outlives the process and the machine; one that cannot be believed costs a full copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.daemon.rig import WAIT_S, Served, await_true, flush, image, refused_start, write_block
from tests.guest.backends import vhostsync_command
from vhostsync.record.bitmap import HEADER_BYTES, Header
from vhostsync.record.heartbeat import LANDING_NS
from vhostsync.record.heartbeat import WORDS as HEARTBEAT

REGION = 64 << 10
EXTENT = 4 << 20
SIZE = 16 << 20
HOUR_NS = 3_600_000_000_000


class Disks:
    def __init__(self, work: Path) -> None:
        self.work = work
        self.source, self.destination = image(work / "a.img"), image(work / "b.img")
        self.bitmap = work / "bits"

    def serve(self, *, bitmap: bool = True) -> Served:
        """Each test starts the mirror itself, to look at what there was before."""
        options = ("--bitmap", self.bitmap) if bitmap else ()
        return Served(self.work, self.source, "--resume-mirror", "off", *options)

    def settled(self, served: Served) -> None:
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")

    def attach(self, served: Served) -> tuple[int, str | None]:
        """How much was copied, and why everything."""
        served.start_mirror(self.destination)
        mirror = served.mirror()
        return mirror["copy-bytes-total"], mirror["full-copy-reason"]

    @contextmanager
    def settled_mirror(self) -> Iterator[Served]:
        with self.serve() as served:
            self.attach(served)
            self.settled(served)
            yield served

    def copied_at_the_next_start(self) -> tuple[int, str | None]:
        """And then both disks hold the same."""
        with self.serve() as served:
            copied = self.attach(served)
            served.stop()
        assert self.equal()
        return copied

    def mirrored_once(self) -> None:
        with self.serve() as served:
            assert self.attach(served)[1] == "no earlier copy of it is known"
            self.settled(served)
            served.stop()

    def header(self) -> Header:
        return Header.decode(self.bitmap.read_bytes()[:HEADER_BYTES])

    def put_header(self, header: Header) -> None:
        with self.bitmap.open("r+b") as file:
            file.write(header.encode())

    def last_beat(self) -> int:
        """Until when changes are the last run's own."""
        block = self.bitmap.read_bytes()[:HEADER_BYTES]
        current_ns, peer_ns = HEARTBEAT.unpack(block[-HEARTBEAT.size :])
        return int(max(current_ns, peer_ns))

    def equal(self) -> bool:
        return self.source.read_bytes() == self.destination.read_bytes()


def write_later(path: Path, moment_ns: int) -> None:
    """As somebody else, and later than what can pass for the backend's own."""
    await_true(lambda: time.time_ns() > moment_ns + LANDING_NS + 20_000_000, "the moment is past")
    with path.open("r+b") as file:
        file.seek(100 * REGION)
        file.write(b"somebody else")


@pytest.fixture
def disks(work: Path) -> Disks:
    return Disks(work)


def test_after_an_end_in_order_only_what_was_written_is_copied(disks: Disks) -> None:
    disks.mirrored_once()
    assert disks.header().clean
    with disks.serve() as served, served.guest() as guest:
        assert served.mirror()["differing-bytes"] == 0
        write_block(guest, 200, 1)
        flush(guest)
        guest.close()
        assert disks.attach(served) == (REGION, None)
        served.stop()
    assert disks.equal()


def test_after_a_kill_only_what_may_differ_is_copied(disks: Disks) -> None:
    with disks.settled_mirror() as served, served.guest() as guest:
        for number in (0, 100, 2000):
            write_block(guest, number, 1)
        flush(guest)
        served.kill()
    with disks.serve() as served:
        assert served.mirror()["worth"] == "outdated"
        copied, why = disks.attach(served)
        assert why is None and copied <= 3 * REGION
        served.stop()
    assert disks.equal()


@pytest.mark.parametrize("changed", ["source", "destination"])
def test_what_somebody_else_writes_after_a_crash_is_noticed(disks: Disks, changed: str) -> None:
    """Later than what the last run itself can have brought about."""
    with disks.settled_mirror() as served:
        served.kill()
    path = disks.source if changed == "source" else disks.destination
    write_later(path, disks.last_beat())
    with disks.serve() as served:
        copied, why = disks.attach(served)
        assert copied == SIZE and why is not None and f"somebody else has written to {path}" in why
        assert why in served.process.log.read_text()
        disks.settled(served)
        served.stop()
    assert disks.equal()


@pytest.mark.parametrize("command", [("mirror", "cancel"), ("snapshot",)])
def test_what_somebody_else_writes_to_what_was_let_go_of_is_noticed_after_a_crash(
    disks: Disks, command: Sequence[str]
) -> None:
    """As soon as the command has returned."""
    with disks.settled_mirror() as served:
        words = [*vhostsync_command(), *command, "--control", str(served.control)]
        subprocess.run(words, check=True, capture_output=True, timeout=WAIT_S)
        with disks.destination.open("r+b") as file:
            file.seek(100 * REGION)
            file.write(b"somebody else")
        served.kill()
    copied, why = disks.copied_at_the_next_start()
    assert copied == SIZE and f"somebody else has written to {disks.destination}" in str(why)


def test_a_clock_that_was_set_back_after_a_crash_costs_a_full_copy(disks: Disks) -> None:
    """To the next start, the last run's writes then lie in the future, and what is later may look earlier."""
    with disks.settled_mirror() as served:
        served.kill()
    with disks.bitmap.open("r+b") as file:
        file.seek(HEADER_BYTES - HEARTBEAT.size)
        file.write(HEARTBEAT.pack(*(time.time_ns() + HOUR_NS,) * 2))
    copied, why = disks.copied_at_the_next_start()
    assert copied == SIZE and why is not None and "the clock has been set back since" in why


def test_what_is_written_before_the_peer_is_attached_again_stays_noticed(disks: Disks) -> None:
    """The guest's writes to the current disk say nothing of a peer that is not attached."""
    with disks.settled_mirror() as served:
        served.kill()
    write_later(disks.destination, disks.last_beat())
    with disks.serve() as served, served.guest() as guest:
        write_block(guest, 7, 1)
        flush(guest)
        served.kill()
    copied, why = disks.copied_at_the_next_start()
    assert copied == SIZE and why is not None and str(disks.destination) in why


def test_starts_that_are_cut_off_are_nobody_else_s_changes(disks: Disks) -> None:
    with disks.settled_mirror() as served, served.guest() as guest:
        write_block(guest, 5, 1)
        flush(guest)
        served.kill()
    for _ in range(2):
        with disks.serve() as served:
            served.kill()
    with disks.serve() as served:
        copied, why = disks.attach(served)
        assert why is None and copied <= REGION
        served.kill()
    assert disks.copied_at_the_next_start()[1] is None


def test_a_kill_under_load_leaves_it_believed(disks: Disks) -> None:
    for turn in range(2):
        with disks.serve() as served, served.guest() as guest:
            _, why = disks.attach(served)
            assert turn == 0 or why is None
            for number in range(0, 4096, 3):
                write_block(guest, number, turn + 1)
            served.kill()
    assert disks.copied_at_the_next_start()[1] is None


def test_a_kill_amid_the_first_copy_does_not_begin_it_anew(disks: Disks) -> None:
    with disks.serve() as served:
        served.qmp.execute("mirror-start", destination=str(disks.destination), speed=2 << 20)
        await_true(lambda: served.mirror()["differing-bytes"] <= SIZE - (2 << 20), "a part is settled")
        served.kill()
    copied, why = disks.copied_at_the_next_start()
    assert why is None and copied < SIZE


def test_after_a_host_crash_the_active_extents_are_copied(disks: Disks) -> None:
    """What the page cache held of the bits is gone: here the blocks of the bitmap as they were before."""
    disks.mirrored_once()
    with disks.settled_mirror() as served, served.guest() as guest:
        before = disks.bitmap.read_bytes()
        write_block(guest, 1500, 1)  # in the second extent
        flush(guest)
        served.kill()
    # The activity log is durable before the write; the bits may be as old as the last flush of the file.
    now = disks.bitmap.read_bytes()
    bits_at = len(now) - 4096
    disks.bitmap.write_bytes(now[:bits_at] + before[bits_at:])
    disks.put_header(replace(disks.header(), boot_id="another"))
    copied, why = disks.copied_at_the_next_start()
    assert why is None and copied == EXTENT


def test_a_damaged_block_differs_as_a_whole(disks: Disks) -> None:
    disks.mirrored_once()
    with disks.bitmap.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"x")
    assert disks.copied_at_the_next_start() == (SIZE, None)


def test_a_run_without_it_makes_it_stale(disks: Disks) -> None:
    disks.mirrored_once()
    with disks.serve(bitmap=False) as served, served.guest() as guest:
        write_block(guest, 7, 1)
        flush(guest)
        guest.close()
        served.stop()
    assert disks.copied_at_the_next_start() == (SIZE, "no earlier copy of it is known")


def test_yesterday_s_copy_of_it_is_not_believed(disks: Disks) -> None:
    disks.mirrored_once()
    shutil.copy(disks.bitmap, disks.work / "yesterday")
    for number in range(2):
        with disks.serve() as served, served.guest() as guest:
            write_block(guest, number, 1)
            flush(guest)
            guest.close()
            served.stop()
    shutil.copy(disks.work / "yesterday", disks.bitmap)
    assert disks.copied_at_the_next_start()[0] == SIZE


def test_a_disk_that_somebody_changed_meanwhile_gets_everything(disks: Disks) -> None:
    for disk in (disks.source, disks.destination):
        disks.mirrored_once() if disk is disks.source else None
        fd = os.open(disk, os.O_WRONLY)
        os.pwrite(fd, b"y" * 512, 5 << 20)
        os.close(fd)
        with disks.serve() as served:
            copied, why = disks.attach(served)
            assert copied == SIZE and why is not None
            disks.settled(served)
            served.stop()
        assert disks.equal()


@pytest.mark.parametrize("damage", ["cut", "cut to nothing", "damaged"])
def test_a_file_that_is_of_no_use(disks: Disks, damage: str) -> None:
    disks.mirrored_once()
    whole = disks.bitmap.read_bytes()
    damaged = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    disks.bitmap.write_bytes({"cut": whole[:9000], "cut to nothing": b"", "damaged": damaged}[damage])
    assert disks.copied_at_the_next_start()[0] == SIZE


def test_another_destination_gets_everything(disks: Disks) -> None:
    disks.mirrored_once()
    disks.destination = image(disks.work / "c.img")
    assert disks.copied_at_the_next_start()[0] == SIZE


def test_a_switch_that_keeps_the_mirror_keeps_it(disks: Disks) -> None:
    with disks.settled_mirror() as served, served.guest() as guest:
        served.qmp.execute("switch", **{"keep-mirror": True})
        write_block(guest, 3, 1)
        flush(guest)
        served.kill()
    disks.source, disks.destination = disks.destination, disks.source
    copied, why = disks.copied_at_the_next_start()
    assert why is None and copied <= REGION


def test_a_file_that_is_cut_short_while_in_use(disks: Disks) -> None:
    """The guest goes on, and nobody believes the file afterwards."""
    with disks.serve() as served, served.guest() as guest:
        disks.attach(served)
        os.truncate(disks.bitmap, HEADER_BYTES)
        for number in range(0, 4000, 500):
            write_block(guest, number, 1)
        flush(guest)
        await_true(lambda: served.mirror()["bitmap"] is None, "the bitmap is given up")
        write_block(guest, 1, 2)
        flush(guest)
        guest.close()
        assert served.mirror()["state"] == "steady"
        record = served.record()
        assert record is not None and record.bitmap is None
        served.stop()
    assert disks.equal()


def test_what_is_refused(disks: Disks) -> None:
    places = ("--socket-path", disks.work / "s", "--bitmap", disks.bitmap)
    options = ("serve", *places, "--blk-file", disks.source)
    code, said = refused_start(*options, "--no-state-file")
    assert code != 0 and "--bitmap needs the state record" in said
    code, said = refused_start(*options, "--al-extents", "64", "--al-extent-size", "1M")
    assert code != 0 and "--al-extent-size" in said
    with disks.serve() as served:
        other = image(disks.work / "o.img")
        code, said = refused_start(
            "serve", *places, "--blk-file", other, "--state-file", disks.work / "other-state",
        )  # fmt: skip
        assert code != 0 and "in use, as a bitmap or as a disk" in said
        served.stop()


def test_writes_within_the_working_set_cost_no_flush_of_it(disks: Disks) -> None:
    with disks.serve() as served, served.guest() as guest:
        disks.attach(served)

        def flushes() -> int:
            return int(served.qmp.execute("query-stats")["engine"]["bitmap-flushes"])

        for number in range(0, 4096, 8):
            write_block(guest, number, 1)
        warm = flushes()
        assert warm <= 4  # an extent each
        for turn in range(2):
            for number in range(turn, 4096, 8):
                write_block(guest, number, 2)
        assert flushes() == warm
        guest.close()
        served.stop()
    assert disks.equal()
