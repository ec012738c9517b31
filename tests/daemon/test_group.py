# SPDX-License-Identifier: Apache-2.0
"""Two disks of one guest, switched or copied by one command, under a guest that writes to both in turn: all
or none, whatever becomes of the coordinator.

VHOSTSYNC_SNAPSHOTS is how many snapshots are taken (4 unless told)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Literal

import pytest

from tests.daemon.group_rig import Coordinator, Counter, GoBetween, counted, two_disks
from tests.daemon.named_host import Host
from tests.daemon.rig import Served, await_true, image

SNAPSHOTS = int(os.environ.get("VHOSTSYNC_SNAPSHOTS", "4"))

STEPS = ["group-prepare", "group-close", "group-carry-out", "group-open"]


def disk_of(served: Served) -> Path:
    """Which the guest is on; the record says the same, once what was begun is over."""
    await_true(lambda: settled(served), "the record is settled")
    record = served.record()
    disk = Path(served.qmp.execute("query-status")["disk"])
    assert record is not None and record.current.path == str(disk)
    return disk


def settled(served: Served) -> bool:
    (path,) = served.state_directory.glob("*.record.json")
    return b"announced" not in path.read_bytes()


@pytest.mark.parametrize("keep", [False, True])
def test_all_disks_of_a_guest_are_switched(work: Path, keep: bool) -> None:
    with two_disks(work) as both, Counter(both) as guest:
        options = ["--keep-mirror"] if keep else []
        with Coordinator("switch", *(each.control for each in both), options=options) as it:
            result = it.result()
        assert 0 < result["pause-us"] < 500_000 and result["attempts"] >= 1
        assert [member["control"] for member in result["members"]] == [str(each.control) for each in both]
        for each, member in zip(both, result["members"], strict=True):
            assert member["source-path"] == str(each.folder / "b.img")
            assert 0 < member["pause-us"] <= result["pause-us"]
            assert each.qmp.wait_event("SWITCH_COMPLETED")["source-path"] == member["source-path"]
        if not keep:
            left = [counted(each.folder / "a.img") for each in both]
            assert abs(left[0] - left[1]) == 1, "the old disks are those of one instant"
        guest.go_on()
        last = guest.stop()
        for each in both:
            assert disk_of(each) == each.folder / "b.img"
            assert each.state == ("steady" if keep else "passthrough")
        for each in both:
            each.stop()
        assert sorted(counted(each.folder / "b.img") for each in both) == [last - 1, last]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("action", "step"), [(action, step) for action in ("switch", "snapshot") for step in STEPS]
)
def test_a_coordinator_that_is_killed(
    work: Path, action: str, step: str, when: Literal["before", "after"]
) -> None:
    """At each step, when all backends but one have taken it, or that one too."""
    with two_disks(work) as both, Counter(both) as guest:
        one, two = both
        with (
            GoBetween(work / "z.control", two.control, step, when) as between,
            Coordinator(action, one.control, between.path, options=["--max-pause", "60s"]) as it,
        ):
            between.await_reached()
            if step == "group-open":
                one.qmp.wait_event("SWITCH_COMPLETED" if action == "switch" else "MIRROR_STATE_CHANGE")
            it.kill()
        guest.go_on()
        moved = [each for each in both if each.state == "passthrough"]
        opened = {("group-open", "before"): [one], ("group-open", "after"): [one, two]}.get((step, when), [])
        assert moved == opened
        for each in both:
            switched = action == "switch" and each in moved
            assert disk_of(each) == each.folder / ("b.img" if switched else "a.img")
            assert each.state == ("passthrough" if each in moved else "steady")
        rest = [each.control for each in both if each not in moved]
        if rest and action == "switch":
            with Coordinator("switch", *rest) as again:
                again.result()
            guest.go_on()
            assert [disk_of(each) for each in both] == [each.folder / "b.img" for each in both]
        last = guest.stop()
        disks = [disk_of(each) for each in both]
        for each in both:
            each.stop()
        assert sorted(map(counted, disks)) == [last - 1, last]


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_coordinator_that_stands_still_holds_no_guest(work: Path, step: str) -> None:
    with two_disks(work) as both, Counter(both) as guest:
        one, two = both
        with (
            GoBetween(work / "z.control", two.control, step, "after") as between,
            Coordinator("switch", one.control, between.path, options=["--max-pause", "1s"]) as it,
        ):
            between.await_reached()
            it.process.send_signal(signal.SIGSTOP)
            began_s = time.monotonic()
            guest.go_on()
            assert time.monotonic() - began_s < 15
            between.release()
            it.process.send_signal(signal.SIGCONT)
            code, _, err = it.outcome()
        where = [disk_of(each) for each in both]
        if step == "group-open":
            assert where == [each.folder / "b.img" for each in both]
        else:
            assert len({disk.name for disk in where}) == 1, (code, err)
        guest.go_on()


def test_of_two_coordinators_one_is_refused(work: Path) -> None:
    with two_disks(work) as both, Counter(both) as guest:
        one, two = both
        with (
            GoBetween(work / "z.control", two.control, "group-close", "before") as between,
            Coordinator("switch", one.control, between.path, options=["--max-pause", "60s"]) as first,
        ):
            between.await_reached()
            with Coordinator("switch", one.control, two.control) as second:
                code, _, err = second.outcome()
            assert code == 1
            assert f"All is as it was: {one.control}: switch has to wait: switch is under way" in err
            between.release()
            first.result()
        guest.go_on()
        assert [disk_of(each) for each in both] == [each.folder / "b.img" for each in both]


def test_where_one_cannot_be_switched_none_is(work: Path) -> None:
    with two_disks(work) as both, Counter(both) as guest:
        one, two = both
        two.qmp.execute("mirror-cancel")
        with Coordinator("switch", *(each.control for each in both)) as it:
            code, _, err = it.outcome()
        assert code == 1 and f"{two.control}: a switch needs the mirror in the steady state" in err
        guest.go_on()
        assert [disk_of(each) for each in both] == [each.folder / "a.img" for each in both]
        assert one.state == "steady" and one.mirror()["worth"] == "up-to-date"


def test_a_backend_that_is_killed_meanwhile_serves_what_its_record_names(work: Path) -> None:
    """Exchanged, and not opened: its restart serves the new disk, which holds the same."""
    with two_disks(work) as both:
        one, two = both
        between = GoBetween(work / "z.control", two.control, "group-open", "before")
        with two.guest() as guest, between:
            assert guest.write_now(0, b"x" * 4096).ok
            patient = ["--max-pause", "60s", "--deadline", "2s"]
            with Coordinator("switch", one.control, between.path, options=patient) as it:
                between.await_reached()
                one.qmp.wait_event("SWITCH_COMPLETED")
                two.kill()
                between.release()
                code, _, err = it.outcome()
                assert code == 1 and f"done on {one.control}" in err and "--control" in err
        record = two.record()
        assert record is not None and record.current.path == str(two.folder / "b.img")
        with Served(two.folder, two.folder / "b.img", "--resume-mirror", "off") as restarted:
            assert (two.folder / "b.img").read_bytes()[:4096] == b"x" * 4096
            restarted.stop()


@pytest.mark.timeout(120 + 5 * SNAPSHOTS)
def test_snapshots_are_of_one_instant(work: Path) -> None:
    with two_disks(work) as both, Counter(both) as guest:
        pauses_us = []
        for count in range(SNAPSHOTS):
            guest.go_on(5)
            before = guest.written
            with Coordinator("snapshot", *(each.control for each in both)) as it:
                result = it.result()
            pauses_us.append(result["pause-us"])
            copies = [Path(member["destination-path"]) for member in result["members"]]
            assert copies == [each.folder / "b.img" for each in both]
            found = [counted(copy) for copy in copies]
            assert abs(found[0] - found[1]) == 1, f"snapshot {count}: {found} were never there at once"
            assert before - 1 <= max(found) <= guest.written + 1
            guest.go_on(5)
            assert [counted(copy) for copy in copies] == found, "it was written to afterwards"
            for each in both:
                record = each.record()
                assert record is not None and record.peer_worth == "outdated" and record.wanted is None
                each.await_state("passthrough")
                each.start_mirror(each.folder / "b.img")
                assert each.mirror()["full-copy-reason"] is None
        print(f"pause of {SNAPSHOTS} snapshots: up to {max(pauses_us) / 1000:.1f} ms")


@pytest.mark.timeout(240)
def test_a_group_by_its_name(work: Path) -> None:
    host = Host(work)
    names = ["vm1-data", "vm1-root"]
    for name in names:
        host.tell("create", name, "--disk", image(work / f"{name}.img"), "--group", "vm1")
    assert "No disk of this host is in a group vm2" in host.tell("switch", "--group", "vm2", code=1)
    with host.serve(names[0]):
        host.mirror(names[0], work / "data.new")
        sentence = host.tell("snapshot", "--group", "vm1", code=1)
        assert "vm1-root: no backend runs" in sentence and "nothing was done" in sentence
        assert host.status(names[0])["mirror"] == "steady"
        with host.serve(names[1]):
            host.mirror(names[1], work / "root.new")
            await_true(lambda: host.list()[names[0]]["group-worth"] == "up-to-date", "all are up to date")
            assert "group vm1: its other disks together are up-to-date\n" in host.tell("list")
            host.ask(names[0], "mirror-cancel")
            found = host.list()
            assert [found[name]["group-worth"] for name in names] == ["outdated"] * 2
            left = "switch the rest: vhostsync switch --name vm1-root"
            assert left in host.tell("list")
            host.mirror(names[0], work / "data.new", create=False)
            host.tell("switch", "--group", "vm1", "--keep-mirror")
            assert [host.status(name)["disk"] for name in names] == [
                str(work / "data.new"), str(work / "root.new"),
            ]  # fmt: skip
            text = host.tell("snapshot", *(word for name in names for word in ("--name", name)))
            assert f"{work}/vm1-data.img  of {work}/data.new" in text
            assert [host.status(name)["mirror"] for name in names] == ["passthrough"] * 2
