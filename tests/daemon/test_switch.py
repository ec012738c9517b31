# SPDX-License-Identifier: Apache-2.0
"""The switch on real disks: under load, there and back, when it cannot succeed, and what a restart makes of
it.

VHOSTSYNC_SWITCHES is how often the guest goes there and back (6 times unless told)."""

from __future__ import annotations

import os
import statistics
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.rig import (
    BLOCK,
    Load,
    Served,
    await_true,
    block_of,
    ext4,
    fingerprint,
    flush,
    image,
    lacking,
    refused_start,
    same_content,
    write_block,
)
from tests.frontend import FrontendTimeout
from tests.guest.qmp_client import QmpError

SWITCHES = int(os.environ.get("VHOSTSYNC_SWITCHES", "6"))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_switch_under_load(work: Path, threads: int) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, source, "--threads", str(threads)) as served, Load(served) as load:
        served.start_mirror(other)
        load.go_on()
        result = served.qmp.execute("switch")
        assert result["source-path"] == str(other) and result["destination-path"] is None
        assert 0 < result["pause-us"] < 5_000_000
        left = fingerprint(source)
        old = source.read_bytes()
        load.go_on()
        expected = load.stop()
        status = served.qmp.execute("query-status")
        assert (status["disk"], status["mirror"], status["epoch"]) == (str(other), "passthrough", 2)
        served.qmp.wait_event("SWITCH_STARTED")
        assert served.qmp.wait_event("SWITCH_COMPLETED")["source-path"] == str(other)
        assert lacking(other, expected) == []
        assert source.read_bytes() == old and fingerprint(source) == left, "the old disk is left alone"
        engine = served.qmp.execute("query-stats")["engine"]
        assert engine["threads"] == threads and (engine["lent-operations"] > 0) == (threads > 1)
        tasks = [task.read_text().strip() for task in Path(f"/proc/{served.process.pid}/task").glob("*/comm")]
        assert tasks.count("vhostsync-io") == threads - 1
        served.stop()


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced", "its folder removed"])
def test_no_guest_is_moved_to_a_disk_that_nobody_would_find_again(work: Path, how: str) -> None:
    """Nor is a copy called one that has no name."""
    (work / "to").mkdir()
    other, aside = work / "to" / "b.img", work / "aside.img"
    with Served(work, image(work / "a.img")) as served, served.guest() as guest:
        served.start_mirror(other, create=True)
        write_block(guest, 1, 1)
        flush(guest)
        other.rename(aside)
        if how == "removed":
            aside.unlink()
        elif how == "replaced":
            image(other, filled_mib=0)
        elif how == "its folder removed":
            (work / "to").rmdir()
        with pytest.raises(QmpError, match="does not lead to the disk that is mirrored to any more"):
            served.qmp.execute("switch")
        assert served.qmp.execute("query-status")["disk"] == str(work / "a.img")
        assert served.state == "steady"
        write_block(guest, 2, 2)
        flush(guest)
        if how == "renamed":
            aside.rename(other)
            served.qmp.execute("switch")
            assert served.qmp.execute("query-status")["disk"] == str(other)


@pytest.mark.timeout(60 + SWITCHES)
def test_there_and_back_with_the_mirror_kept(work: Path) -> None:
    disks = image(work / "a.img"), image(work / "b.img")
    with Served(work, disks[0]) as served, Load(served) as load:
        served.start_mirror(disks[1])
        pauses_ms = []
        for turn in range(1, SWITCHES + 1):
            load.go_on(2)
            result = served.qmp.execute("switch", keep_mirror=True)
            pauses_ms.append(result["pause-us"] / 1000)
            assert result["source-path"] == str(disks[turn % 2])
            assert result["destination-path"] == str(disks[(turn + 1) % 2])
            found, record = served.mirror(), served.record()
            assert (found["state"], found["worth"]) == ("steady", "up-to-date")
            assert record is not None and record.epoch == 1 + turn
            assert record.current.path == found["source"] == str(disks[turn % 2])
            assert record.peer is not None and record.peer.path == found["destination"]
        load.go_on()
        expected = load.stop()
        for disk in disks:
            assert lacking(disk, expected) == []
        counts = served.counts()
        assert counts["writes-flushed"] == counts["writes-mirrored"] == counts["source-generation"]
        served.stop()
    assert same_content(*disks)
    print(f"{SWITCHES} switches under {max(expected.values())} writes: pause median", end="")
    print(f" {statistics.median(pauses_ms):.2f} ms, longest {max(pauses_ms):.2f} ms")


# ---- a switch that cannot succeed -------------------------------------------------


PATIENT = ("--destination-timeout", "60", "--max-lag-ms", "60000")
"""The destination may hang for long, and the guest's writes do not wait for it."""


class Switch:
    """A `switch` command under way in a thread; `error` is its refusal."""

    def __init__(self, served: Served, **arguments: Any) -> None:
        self._client = served.client()
        self._arguments = arguments
        self.error: str | None = None
        self.result: Any = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._client.execute("switch", **self._arguments)
        except QmpError as refusal:
            self.error = str(refusal)

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float = 30.0) -> None:
        self._thread.join(timeout_s)
        assert self.over, "the switch was not answered"


def hangs_in_the_kernel(served: Served) -> bool:
    tasks = Path(f"/proc/{served.process.pid}/task").glob("*/stat")
    return any(task.read_text().rpartition(")")[2].split()[0] == "D" for task in tasks)


def test_a_destination_that_hangs_before_the_switch_prepares(work: Path) -> None:
    source = image(work / "a.img")
    with ext4(work) as files:
        other = image(files.folder / "b.img")
        with Served(work, source, *PATIENT) as served, served.guest() as guest:
            served.start_mirror(other)
            files.freeze()
            write_block(guest, 1, 1)
            before = served.record()
            switch = Switch(served, deadline_ms=500)
            switch.wait()
            assert switch.error is not None and f"the guest is still on {source}" in switch.error
            write_block(guest, 2, 1)  # a gate that stayed closed would hold it
            held = guest.flush()
            assert served.record() == before
            files.thaw()
            guest.wait(held)
            assert held.ok and served.state == "steady"
            assert served.qmp.execute("switch")["source-path"] == str(other)
            write_block(guest, 3, 1)
            flush(guest)
            guest.close()
            served.stop()
        assert lacking(other, {1: 1, 2: 1, 3: 1}) == []


@pytest.mark.parametrize("max_pause_ms", [300, 60_000])
def test_a_destination_that_hangs_behind_the_gate(work: Path, max_pause_ms: int) -> None:
    """The destination answers while the switch prepares, and hangs when the gate is closed. The state record
    on a frozen file system holds the switch between the two. With the long pause it is the command's deadline
    that ends the wait at the gate, with the short one the pause."""
    source = image(work / "a.img")
    (work / "files").mkdir()
    (work / "records").mkdir()
    with ext4(work / "files") as files, ext4(work / "records") as records:
        other, record = image(files.folder / "b.img"), records.folder / "r.json"
        with Served(work, source, *PATIENT, "--state-file", record) as served, served.guest() as guest:
            served.qmp.execute("mirror-start", destination=str(other))
            served.await_steady()
            await_true(lambda: b'"up-to-date"' in record.read_bytes(), "the record says so")
            before = record.read_bytes()
            records.freeze()
            switch = Switch(served, deadline_ms=6000, max_pause_ms=max_pause_ms)
            await_true(lambda: hangs_in_the_kernel(served), "the record is being written")
            files.freeze()
            write_block(guest, 1, 1)
            await_true(lambda: served.mirror()["lag-writes"] > 0, "the destination hangs")
            records.thaw()
            if max_pause_ms > 6000:
                with pytest.raises(FrontendTimeout):  # until one is not taken up
                    while not switch.over:
                        guest.wait(guest.write(BLOCK, block_of(1, 1)), timeout_s=1)
            switch.wait()
            assert switch.error is not None and f"the guest is still on {source}" in switch.error
            write_block(guest, 2, 1)
            assert guest.read_now(2 * BLOCK, BLOCK) == block_of(2, 1)
            held = guest.flush()
            assert record.read_bytes() == before
            files.thaw()
            guest.wait(held)
            assert held.ok and served.state == "steady"
            assert served.qmp.execute("query-status")["disk"] == str(source)
            served.qmp.execute("switch")
            write_block(guest, 3, 1)
            flush(guest)
            guest.close()
            served.stop()
        assert lacking(other, {1: 1, 2: 1, 3: 1}) == []


def test_a_record_that_cannot_be_written_leaves_the_guest_where_it_is(work: Path) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    record = work / "record" / "r.json"
    with Served(work, source, "--state-file", record) as served, Load(served) as load:
        served.qmp.execute("mirror-start", destination=str(other))
        served.await_steady()
        await_true(lambda: b'"up-to-date"' in record.read_bytes(), "the record says so")
        kept = record.read_bytes()
        # A folder cannot be replaced by a rename: the commit fails, with the gate closed.
        record.unlink()
        (record / "full").mkdir(parents=True)
        with pytest.raises(QmpError, match=r"still on .*a\.img.*cannot be replaced"):
            served.qmp.execute("switch")
        load.go_on()
        assert served.state == "steady"
        (record / "full").rmdir()
        record.rmdir()
        record.write_bytes(kept)
        served.qmp.execute("switch")
        load.go_on()
        expected = load.stop()
        assert lacking(other, expected) == []
        served.stop()


# ---- after the switch ---------------------------------------------------------------


@pytest.mark.parametrize("end", ["in order", "killed"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_restart_follows_the_record(work: Path, end: str, keep: bool) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    env = {"STATE_DIRECTORY": str(work / "state")}

    def refused(disk: Path, current: Path) -> None:
        code, stderr = refused_start("serve", "--blk-file", disk, "--socket-path", work / "x.sock", env=env)
        assert code == 1 and f"the current disk is {current}" in stderr, stderr

    def ended(served: Served) -> None:
        if end == "killed":
            served.kill()
        else:
            served.stop()

    with Served(work, source) as served, served.guest() as guest:
        served.start_mirror(other)
        served.qmp.execute("switch", keep_mirror=keep)
        write_block(guest, 1, 1)
        flush(guest)
        ended(served)
    for _ in range(2):
        refused(source, other)
    with Served(work, other) as served, served.guest() as guest:
        assert guest.read_now(BLOCK, BLOCK) == block_of(1, 1)
        found = served.mirror()
        assert served.qmp.execute("query-status")["epoch"] == 2
        # Failback.
        if keep:
            served.await_resumed()
        else:
            assert (found["state"], found["worth"]) == ("passthrough", None)
            served.start_mirror(source)
        served.qmp.execute("switch")
        write_block(guest, 1, 2)
        flush(guest)
        ended(served)
    refused(other, source)
    with Served(work, source) as served, served.guest() as guest:
        assert guest.read_now(BLOCK, BLOCK) == block_of(1, 2)
        status = served.qmp.execute("query-status")
        assert (status["epoch"], status["mirror"]) == (3, "passthrough")
        guest.close()
        served.stop()


def test_a_mirror_that_ended_in_order_is_not_mistaken_for_the_current_disk(work: Path) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(other)
        served.stop()
        record = served.record()
        assert record is not None and record.clean and record.peer_worth == "up-to-date"
    code, stderr = refused_start(
        "serve", "--blk-file", other, "--socket-path", work / "x.sock",
        env={"STATE_DIRECTORY": str(work / "state")},
    )
    assert code == 1 and "is the other half of a mirror (up-to-date)" in stderr
    with Served(work, source, "--resume-mirror", "off") as served:
        record = served.record()
        assert record is not None and record.peer_worth == "outdated"
        served.stop()
