# SPDX-License-Identifier: Apache-2.0
"""What the mirror does, with a disk of each kind that there is over a network: nothing in the mirror asks
which kind it has, and here is the proof (docs/network.md, "What each kind can do")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.daemon.rig import (
    BLOCK,
    Load,
    Served,
    answered,
    await_true,
    block_of,
    flush,
    image,
    lacking,
    loop_device,
    same_content,
    write_block,
)
from tests.daemon.test_source_failure import GOOD_MIB, LAST, SIZE_MIB, small_disk
from tests.frontend import Frontend
from tests.network.far_disks import FarDisk, RbdDisk, certificates_of_both, nbd_disk, received_disk
from tests.network.receivers import needs_programs
from tests.sizes import MIB
from tests.vhost_client import VhostUserTransport
from vhostsync.record.state_record import Worth

pytestmark = [*needs_programs, pytest.mark.timeout(240)]

REGION = 64 << 10
Make = Callable[[int], FarDisk]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates_of_both(tmp_path_factory.mktemp("pki"))


@pytest.fixture(
    params=["nbd", "receive", pytest.param("rbd", marks=pytest.mark.xdist_group("ceph"))]
)
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes a disk of this kind, of so many MiB."""
    begun: list[AbstractContextManager[FarDisk]] = []
    there = tmp_path / "there"
    there.mkdir()

    def make(mibs: int) -> FarDisk:
        if request.param == "rbd":
            return RbdDisk(request.getfixturevalue("cluster"), there, mibs)
        if request.param == "nbd":
            begun.append(nbd_disk(there, mibs))
        else:
            begun.append(received_disk(there, mibs, request.getfixturevalue("certificates")))
        return begun[-1].__enter__()

    yield make
    for each in begun:
        each.__exit__(None, None, None)


# ---- what it does not answer in time ------------------------------------------------------


def test_the_guest_gets_ahead_of_it_and_it_catches_up(work: Path, far: Make) -> None:
    other = far(16)
    source = image(work / "a.img", 16)
    pull_ahead = ("--on-congestion", "pull-ahead", "--max-lag-ms", "200", "--destination-timeout", "60s")
    with Served(work, source, *pull_ahead, *other.options) as served, served.guest() as guest:
        served.start_mirror(other.name)
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        with other.stopped():
            write_block(guest, 0, 1)
            change = served.await_state("ahead")
            assert change["former"] == "steady" and "too slow" in change["reason"]
            flush(guest)  # confirmed by the source alone: the record must say so already
            record = served.record()
            assert record is not None and record.peer_worth is Worth.OUTDATED
            for number in range(100, 110):
                write_block(guest, number * 16, 2)
            flush(guest)
            assert served.mirror()["differing-bytes"] >= 10 * REGION
        assert served.await_state("syncing")["former"] == "ahead"
        served.await_state("steady")
        served.await_worth("up-to-date")
        assert 10 * REGION <= served.mirror()["copy-bytes-total"] <= 12 * REGION
        guest.close()
        served.stop()
    assert same_content(source, other.content())


def test_flushes_wait_for_it_where_the_guest_would_rather_wait(work: Path, far: Make) -> None:
    """--on-destination-error pause: what is flushed while it is lost is answered once it is on both again."""
    other = far(16)
    source = image(work / "a.img", 16)
    pause = ("--on-destination-error", "pause", "--destination-timeout", "1s", "--destination-retry", "5s")
    with Served(work, source, *pause, *other.options) as served, served.guest(timeout_s=60) as guest:
        served.start_mirror(other.name)
        with other.stopped():
            write_block(guest, 1, 1)
            assert served.qmp.wait_event("FLUSHES_PAUSED")["paused"] is True
            held = guest.flush()
            await_true(lambda: served.mirror()["paused-requests"] == 1, "the flush is held")
            guest.poll()
            assert not held.done
            write_block(guest, 2, 2)
        assert served.qmp.wait_event("FLUSHES_PAUSED", 60) == {"paused": False, "released": 0}
        guest.wait(held)
        assert held.ok
        assert lacking(other.content(), {1: 1, 2: 2}) == []
        served.await_resumed()
        guest.close()
        served.stop()
    assert same_content(source, other.content())


def test_that_it_has_fallen_silent_is_noticed_while_the_guest_is_idle(work: Path, far: Make) -> None:
    """Nothing is asked of it: the mirror is not called steady for ever all the same."""
    other = far(16)
    with Served(work, image(work / "a.img", 16), "--destination-timeout", "1s", *other.options) as served:
        served.start_mirror(other.name)
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        with other.stopped():
            assert "did not answer within" in served.await_state("degraded")["reason"]
            served.await_worth("outdated")
        await_true(lambda: served.state == "steady", "it is back", 120)
        served.stop()


# ---- what differs -------------------------------------------------------------------------


def test_what_has_rotted_there_is_found_and_repaired(work: Path, far: Make) -> None:
    rotten = 9 * MIB
    other = far(16)
    source = image(work / "a.img", 16, filled_mib=12)

    def verify(**arguments: bool) -> str:
        served.qmp.execute("verify", **arguments)
        return str(served.qmp.wait_event("VERIFY_COMPLETED", 60)["state"])

    with Served(work, source, *other.options) as served:
        served.start_mirror(other.name)
        with Load(served, blocks=1024) as load:
            load.go_on()
            assert verify() == "equal"
            other.spoil(rotten, b"rot")
            assert verify() == "different"
            differing = served.qmp.execute("query-verify")["differing"]
            assert differing == [{"offset": rotten, "length": 512}]
            assert verify(repair=True) == "repaired"
            load.go_on()
            load.stop()
        assert served.state == "steady"
        served.stop()
    assert same_content(source, other.content())


def test_holes_stay_holes_and_what_is_discarded_becomes_one(work: Path, far: Make) -> None:
    other = far(64)
    source = image(work / "a.img", 64, filled_mib=8)
    with Served(work, source, *other.options) as served:
        served.start_mirror(other.name)
        assert other.used_bytes() <= 9 * MIB
        with served.guest() as guest:
            assert answered(guest, guest.discard(0, 4 * MIB))
            assert answered(guest, guest.write_zeroes(4 * MIB, 2 * MIB))
            flush(guest)
        served.stop()
    assert same_content(source, other.content())
    assert other.used_bytes() <= 5 * MIB


# ---- a source that fails ------------------------------------------------------------------


def test_it_answers_the_reads_that_the_source_fails(work: Path, far: Make) -> None:
    other = far(SIZE_MIB)
    backing = image(work / "backing.img", SIZE_MIB, filled_mib=SIZE_MIB)
    with (
        loop_device(backing, 512) as device,
        Served(work, device, "--read-fallback", *other.options) as served,
        served.guest() as guest,
    ):
        served.start_mirror(other.name)
        write_block(guest, LAST, 7)
        with backing.open("r+b") as file:
            file.truncate(GOOD_MIB * MIB)
        assert guest.read_now(LAST * BLOCK, BLOCK) == block_of(LAST, 7)
        assert served.qmp.wait_event("IO_ERROR")["disk"] == "source"
        assert (served.state, served.mirror()["reads-from-destination"]) == ("steady", 1)
        guest.close()
        served.stop()


def test_the_guest_goes_to_it_when_the_source_fails(work: Path, far: Make) -> None:
    other = far(64)
    with (
        small_disk(work) as device,
        Served(work, device, "--on-source-error", "switch", *other.options) as served,
    ):
        served.start_mirror(other.name)
        with Load(served, blocks=8192, depth=64) as load:
            found = served.qmp.wait_event("SOURCE_FAILOVER")
            assert (found["former"], found["source"]) == (str(device), other.name)
            assert found["switched"] and found["reason"] is None
            load.go_on()
            expected = load.stop()
        record = served.record()
        assert record is not None and record.current.path == other.name
        served.stop()
    assert lacking(other.content(), expected) == []


# ---- live migration -----------------------------------------------------------------------


def migrate(guest: Frontend, served: Served) -> None:
    """As QEMU does: the receiving side has connected before the guest's rings stop on the other one."""
    arriving = VhostUserTransport(served.socket, timeout_s=guest.timeout_s)
    assert served.qmp.execute("query-status")["frontends"] == 2
    guest.stop()
    left, guest.transport = guest.transport, arriving
    guest.start()
    left.close()
    await_true(lambda: served.qmp.execute("query-status")["frontends"] == 1, "the other side has left")


def test_a_guest_is_migrated_while_it_is_mirrored_to_it_and_while_it_is_on_it(work: Path, far: Make) -> None:
    other = far(16)
    source = image(work / "a.img", 16)
    with Served(work, source, *other.options) as served, served.guest(queues=2) as guest:
        served.start_mirror(other.name)
        write_block(guest, 1, 1)
        migrate(guest, served)
        assert guest.read_now(BLOCK, BLOCK) == block_of(1, 1)
        write_block(guest, 2, 2)
        flush(guest)
        assert served.state == "steady" and lacking(other.content(), {1: 1, 2: 2}) == []
        served.qmp.execute("switch", keep_mirror=True)
        write_block(guest, 3, 3)
        migrate(guest, served)
        assert guest.read_now(3 * BLOCK, BLOCK) == block_of(3, 3)
        write_block(guest, 4, 4)
        flush(guest)
        assert (served.state, served.mirror()["source"]) == ("steady", other.name)
        served.qmp.execute("switch", keep_mirror=True)
        write_block(guest, 5, 5)
        flush(guest)
        assert (served.state, served.mirror()["source"]) == ("steady", str(source))
        guest.close()
        served.stop()
    written = {number: number for number in (1, 2, 3, 4, 5)}
    assert lacking(source, written) == [] and lacking(other.content(), written) == []
