# SPDX-License-Identifier: Apache-2.0
"""`--group-freeze`: when one disk of a group loses its destination, those of all are let go of at one
instant, and stay so; where that cannot be told of all of them, nothing says so, and the guest goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.daemon.group_rig import Counter, counted
from tests.daemon.named_host import Host
from tests.daemon.rig import await_true, image, tmpfs
from tests.frontend import Frontend
from tests.guest.images import new_image
from tests.guest.processes import Process
from tests.guest.qmp_client import Qmp
from tests.sizes import MIB
from vhostsync.record.names import Names
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord

DISKS = ("vm1-data", "vm1-log")


@dataclass(frozen=True)
class Disk:
    host: Host
    name: str
    process: Process
    other: Path

    def guest(self) -> Frontend:
        return self.host.guest(self.name)

    def record(self) -> StateRecord:
        lineage = Names(self.host.state).find(self.name)
        assert lineage is not None
        record = StateFile(lineage.record).load()
        assert record is not None
        return record



def lose(guest: Frontend) -> None:
    """The destination's file system is full, and a hole of the file is written to."""
    for number in range(8):
        assert guest.write_now(8 * MIB + number * MIB, bytes([1]) * MIB).ok


@contextmanager
def group(work: Path, *options: str) -> Iterator[tuple[Disk, Disk]]:
    """Of the second one the destination cannot hold all."""
    host = Host(work)
    with tmpfs(work, 4096) as small:
        others = (work / "data.copy", small.folder / "log.copy")
        for name, other in zip(DISKS, others, strict=True):
            disk = image(work / f"{name}.img", 32, filled_mib=1)
            host.tell("create", name, "--disk", disk, "--group", "vm1")
            new_image(other, 32)
        with host.serve(DISKS[0], *options) as one, host.serve(DISKS[1], *options) as two:
            members = zip(DISKS, (one, two), others, strict=True)
            disks = [Disk(host, *each) for each in members]
            for each in disks:
                host.mirror(each.name, each.other, create=False)
            yield disks[0], disks[1]


@pytest.mark.parametrize("by", ["a failure", "a command"])
def test_all_destinations_are_let_go_of_at_one_instant(work: Path, by: str) -> None:
    with group(work, "--group-freeze") as disks, Counter(disks, flush_every=1) as guest:
        data, log = disks
        guest.go_on(20)
        if by == "a failure":
            guest.do(lambda guests: lose(guests[1]))
        else:
            data.host.ask(data.name, "mirror-cancel")
        await_true(lambda: all(disk.record().cut for disk in disks), "both have recorded the cut")
        found = [counted(disk.other) for disk in disks]
        assert abs(found[0] - found[1]) == 1, f"{found} were never there at once"
        guest.go_on(20)
        assert [counted(disk.other) for disk in disks] == found, "it was written to afterwards"
        assert data.record().cut == log.record().cut
        for disk in disks:
            assert disk.record().wanted is None and disk.record().peer_worth == "outdated"
        assert "together are outdated, all of one instant" in data.host.tell("list")
        assert data.host.list()[data.name]["group-one-instant"] is True
        data.host.ask(data.name, "mirror-start", destination=str(data.other))
        data.host.await_state(data.name, "steady")
        assert data.host.list()[data.name]["group-one-instant"] is False


def test_without_it_only_one_is_let_go_of(work: Path) -> None:
    with group(work) as disks, Counter(disks, flush_every=1) as guest:
        guest.do(lambda guests: lose(guests[1]))
        disks[0].host.await_state(DISKS[1], "degraded")
        guest.go_on(20)
        assert disks[0].host.status(DISKS[0])["mirror"] == "steady"
        assert "together are outdated, and not of one instant" in disks[0].host.tell("list")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_does_not_answer_holds_the_guest_no_longer_than_it_may(
    work: Path, end: signal.Signals
) -> None:
    """And nobody says that there is a cut."""
    with group(work, "--group-freeze") as disks:
        data, log = disks
        os.kill(data.process.pid, end)
        with log.guest() as guest:
            lose(guest)
            assert guest.flush_now().ok
        assert log.record().cut is None and log.record().peer_worth == "outdated"
        assert log.record().wanted is not None
        os.kill(data.process.pid, signal.SIGCONT)


def test_who_asks_may_end_in_the_middle(work: Path) -> None:
    """The others go on, and nobody says that there is a cut. Who asks is played by the test."""
    with group(work, "--group-freeze") as disks, Counter(disks, flush_every=1) as guest:
        data, _ = disks
        asking = Qmp(data.host.run / data.name / "control")
        asking.execute("group-cut", step="ask", cut="5eed")
        assert asking.execute("group-cut", step="let-go", cut="5eed") == {"cut": "5eed"}
        data.host.await_state(data.name, "degraded")
        assert data.record().cut is None, "held, and not recorded yet"
        asking.close()
        guest.go_on(20)
        assert data.record().cut is None and data.record().peer_worth == "outdated"
        assert data.record().wanted is not None


def test_it_needs_a_group(work: Path) -> None:
    host = Host(work)
    host.tell("create", "alone", "--disk", image(work / "alone.img"))
    assert "alone is in no group" in host.tell("serve", "--name", "alone", "--group-freeze", code=1)
    words = ("--group-freeze", "--on-destination-error", "pause")
    assert "With --group-freeze a destination" in host.tell("serve", "--name", "alone", *words, code=2)
