# SPDX-License-Identifier: Apache-2.0
"""`--group-freeze`: when one disk of a group loses its destination, those of all are let go of at one
instant, and stay so; where that cannot be told of all of them, nothing says so, and the guest goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.group_rig import Counter, counted
from tests.daemon.named_host import Host
from tests.daemon.rig import await_true, image, tmpfs
from tests.daemon.test_verify import rot
from tests.frontend import Frontend
from tests.guest.images import new_image
from tests.guest.processes import Process
from tests.guest.qmp_client import Qmp, QmpError
from tests.sizes import MIB
from vhostsync.record.names import find_name
from vhostsync.record.state_record import StateRecord

pytestmark = pytest.mark.timeout(240)  # many programs are started, one after the other

DISKS = ("vm1-data", "vm1-log", "vm1-root")


@dataclass(frozen=True)
class Disk:
    host: Host
    name: str
    process: Process
    other: Path

    def guest(self) -> Frontend:
        return self.host.guest(self.name)

    @property
    def control(self) -> Path:
        return self.host.run / self.name / "control"

    def record(self) -> StateRecord:
        return self.host.recorded(self.name)

    def meant(self) -> dict[str, Any]:
        """What a disk of the group says of this one when it asks."""
        lineage = find_name(self.name, self.host.state)
        assert lineage.group is not None
        return {"group": lineage.group, "record": lineage.record.name}


def lose(guest: Frontend) -> None:
    """The destination's file system is full, and a hole of the file is written to."""
    for number in range(8):
        assert guest.write_now(8 * MIB + number * MIB, bytes([1]) * MIB).ok


@contextmanager
def group(work: Path, *options: str, disks: int = 2) -> Iterator[Sequence[Disk]]:
    """All destinations but the first one cannot hold all."""
    host = Host(work)
    with ExitStack() as stack:
        members: list[Disk] = []
        for name in DISKS[:disks]:
            (folder := work / f"of {name}").mkdir()
            full_soon = stack.enter_context(tmpfs(folder, 4096)).folder if members else folder
            disk, other = image(work / f"{name}.img", 32, filled_mib=1), full_soon / "copy"
            host.tell("create", name, "--disk", disk, "--group", "vm1")
            new_image(other, 32)
            process = stack.enter_context(host.serve(name, *options))
            members.append(Disk(host, name, process, other))
        for each in members:
            host.mirror(each.name, each.other, create=False)
        yield members


def at_once(*errands: Callable[[], object]) -> None:
    with ThreadPoolExecutor(len(errands)) as pool:
        for each in [pool.submit(errand) for errand in errands]:
            each.result(60)


def cancel(disk: Disk) -> None:
    """Twice where it was let go of with another one at that very moment: that is not as of the command."""
    try:
        disk.host.ask(disk.name, "mirror-cancel")
    except QmpError as refused:
        assert "could not be brought up to date" in str(refused)
        disk.host.ask(disk.name, "mirror-cancel")


def await_cut(disks: Sequence[Disk]) -> None:
    """All have recorded the same one, and want no mirror."""
    await_true(lambda: all(disk.record().cut for disk in disks), "all have recorded a cut")
    records = [disk.record() for disk in disks]
    assert len({record.cut for record in records}) == 1
    assert all(record.wanted is None and record.peer_worth == "outdated" for record in records)
    assert "together are outdated, all of one instant" in disks[0].host.tell("list")


@pytest.mark.parametrize("by", ["a failure", "a command"])
def test_all_destinations_are_let_go_of_at_one_instant(work: Path, by: str) -> None:
    with group(work, "--group-freeze") as disks, Counter(disks, flush_every=1) as guest:
        data = disks[0]
        guest.go_on(20)
        if by == "a failure":
            guest.do(lambda guests: lose(guests[1]))
        else:
            data.host.ask(data.name, "mirror-cancel")
        await_cut(disks)
        found = [counted(disk.other) for disk in disks]
        assert abs(found[0] - found[1]) == 1, f"{found} were never there at once"
        guest.go_on(20)
        assert [counted(disk.other) for disk in disks] == found, "it was written to afterwards"
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


def test_who_ends_while_others_are_asked_does_not_hide_that_its_destination_is_lost(work: Path) -> None:
    with group(work, "--group-freeze") as disks:
        data, log = disks
        with log.guest() as guest:
            os.kill(data.process.pid, signal.SIGSTOP)
            lose(guest)
        log.process.terminate()
        os.kill(data.process.pid, signal.SIGCONT)
        record = log.record()
        assert (record.clean, record.peer_worth, record.cut) == (True, "outdated", None)


@pytest.mark.parametrize("repeat", range(2))
def test_two_that_are_cancelled_at_once_are_one_set(work: Path, repeat: int) -> None:
    with group(work, "--group-freeze") as disks, Counter(disks, flush_every=1) as guest:
        guest.go_on(5 + repeat)
        at_once(*(partial(cancel, disk) for disk in disks))
        await_cut(disks)
        for disk in disks:
            assert disk.host.status(disk.name)["mirror"] == "passthrough"


def test_two_of_three_that_are_lost_at_once_are_one_set_with_the_third(work: Path) -> None:
    words = ("--group-freeze", "--sandbox", "require", "--allow-path", str(work))
    with group(work, *words, disks=3) as disks, ExitStack() as stack:
        guests = [stack.enter_context(disk.guest()) for disk in disks[1:]]
        at_once(*(partial(lose, guest) for guest in guests))
        at_once(*(guest.flush_now for guest in guests))
        await_cut(disks)


def test_who_asks_may_end_in_the_middle(work: Path) -> None:
    """Who has let go for it asks the others as well. Who asks is played by the test."""
    with group(work, "--group-freeze") as disks, Counter(disks, flush_every=1) as guest:
        data = disks[0]
        with Qmp(data.control) as asking:
            asking.execute("group-cut", step="ask", **data.meant())
            assert asking.execute("group-cut", step="let-go", **data.meant())["loss"]
        await_cut(disks)
        guest.go_on(20)


def test_what_comes_late_from_one_that_is_gone_is_void(work: Path) -> None:
    """Who was asked has stood still meanwhile."""
    with group(work, "--group-freeze") as disks:
        data = disks[0]
        with Qmp(data.control) as asking:
            asking.execute("group-cut", step="ask", **data.meant())
            os.kill(data.process.pid, signal.SIGSTOP)
            asking.send("group-cut", {"step": "let-go", **data.meant()})
        os.kill(data.process.pid, signal.SIGCONT)
        log = data.host.work / f"{data.name}.log"
        await_true(lambda: "who has asked for it is gone" in log.read_text(), "it was looked at")
        assert [disk.host.status(disk.name)["mirror"] for disk in disks] == ["steady", "steady"]


@pytest.mark.parametrize("their_group", ["vm1", "vm2"])
def test_another_machines_disk_in_the_place_of_one_of_the_group_keeps_its_destination(
    work: Path, their_group: str
) -> None:
    """Two state directories with one runtime directory."""
    with group(work, "--group-freeze") as disks, ExitStack() as stack:
        data, log = disks
        data.process.kill()
        (elsewhere := work / "elsewhere").mkdir()
        others = Host(elsewhere, run=data.host.run)
        others.tell("create", data.name, "--disk", image(elsewhere / "a.img", 32), "--group", their_group)
        stack.enter_context(others.serve(data.name, "--group-freeze"))
        others.mirror(data.name, elsewhere / "b.img")
        with log.guest() as guest:
            lose(guest)
            assert guest.flush_now().ok
        assert others.status(data.name)["mirror"] == "steady"
        assert log.record().cut is None and log.record().wanted is not None
        error = log.host.ask(log.name, "query-mirror")["last-error"]
        assert f"no consistent set: {data.name}: its backend serves a.img-" in error
        assert f"of the group {their_group}, and not {data.name}.img-" in error
        assert "runtime directory of its own" in (elsewhere / f"{data.name}.log").read_text()


def test_one_that_is_known_to_differ_is_no_part_of_a_set(work: Path) -> None:
    """It keeps its mirror, and nobody says that there is a set."""
    with group(work, "--group-freeze") as disks:
        data, log = disks
        rot(data.other, MIB // 2)
        with Qmp(data.control) as client:
            client.execute("verify")
            assert client.wait_event("VERIFY_COMPLETED", 30)["state"] == "different"
        with log.guest() as guest:
            lose(guest)
            assert guest.flush_now().ok
        assert log.record().cut is None and log.record().wanted is not None
        assert data.host.status(data.name)["mirror"] == "steady"
        error = log.host.ask(log.name, "query-mirror")["last-error"]
        assert "no consistent set: vm1-data: a verification has found" in error
        assert "not of one instant" in data.host.tell("list")


def test_it_needs_a_group(work: Path) -> None:
    host = Host(work)
    host.tell("create", "alone", "--disk", image(work / "alone.img"))
    assert "alone is in no group" in host.tell("serve", "--name", "alone", "--group-freeze", code=1)
    words = ("--group-freeze", "--on-destination-error", "pause")
    assert "With --group-freeze a destination" in host.tell("serve", "--name", "alone", *words, code=2)
