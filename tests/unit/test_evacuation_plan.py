# SPDX-License-Identifier: Apache-2.0
"""Which disks an evacuation takes, and where each goes: by what lies where, and never onto another's file."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from vhostsync.errors import ConfigError, DiskError
from vhostsync.fleet import evacuation_plan
from vhostsync.fleet.evacuation_plan import Move, lies_at, plan_moves
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.storage.file import create_image


class Places:
    def __init__(self, folder: Path) -> None:
        self.old, self.new = folder / "old", folder / "new"
        for each in (self.old, self.new):
            each.mkdir()

    def disk(self, name: str, place: Path | str, other: Path | str | None = None, **more: Any) -> HostDisk:
        """A disk whose backend runs."""
        if isinstance(place, Path):
            place.parent.mkdir(exist_ok=True, parents=True)
            place.touch()
        state = more.pop("state", "passthrough")
        return HostDisk(
            name=name, control=Path("/control"),
            status={"disk": str(place), "capacity": 4096, "name": name, "read-only": False, **more},
            mirror={"state": state, "destination": None if other is None else str(other), "worth": None},
        )  # fmt: skip

    def plan(self, *disks: HostDisk, to: str | None = None, where: str | None = None) -> dict[str, Move]:
        moves = anyio.run(plan_moves, disks, where or str(self.old), to or str(self.new))
        return {move.label: move for move in moves}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


def test_what_lies_there_goes_by_where_the_name_leads_to(places: Places, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.img").touch()
    linked, away = tmp_path / "linked.img", places.old / "away.img"
    inside = places.disk("in", places.old / "deep" / "a.img")
    linked.symlink_to(places.old / "b.img")
    away.symlink_to(tmp_path / "elsewhere.img")
    (places.old / "b.img").touch()
    found = places.plan(
        inside, places.disk("linked", str(linked)), places.disk("away", str(away)),
        places.disk("beside", tmp_path / "older" / "c.img"),
    )  # fmt: skip
    assert {label: move.destination for label, move in found.items()} == {
        "in": f"{places.new}/a.img", "linked": f"{places.new}/linked.img",
    }  # fmt: skip
    (tmp_path / "mount").symlink_to(places.old)
    assert set(places.plan(inside, where=str(tmp_path / "mount"))) == {"in"}


def test_a_device_lies_where_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_block_device", lambda path: True)
    assert lies_at("/dev/vg/a", "/dev/vg") and lies_at("/dev/sdb", "/dev")
    assert not lies_at("/dev/vg2/a", "/dev/vg")
    assert lies_at("rbd:pool/a", "rbd:pool") and not lies_at("rbd:pool2/a", "rbd:pool")
    assert not lies_at("rbd:pool/a", "/") and not lies_at("/a", "rbd:pool")


def test_two_of_one_name_get_their_own(places: Places) -> None:
    one, other = (places.disk(name, places.old / name / "disk.img") for name in ("vm1", "vm2"))
    found = places.plan(one, other)
    assert [move.destination for move in found.values()] == [
        f"{places.new}/disk-vm1.img", f"{places.new}/disk-vm2.img",
    ]  # fmt: skip
    # Also if the other one is there already, or on its way; and what was begun goes on to where it goes.
    for there in (places.disk("vm2", places.new / "disk.img"),
                  places.disk("vm2", "/x/y.img", places.new / "disk.img")):  # fmt: skip
        assert places.plan(one, there)["vm1"].destination == f"{places.new}/disk-vm1.img"
    begun = places.disk("vm1", places.old / "vm1" / "disk.img", places.new / "disk.img", state="syncing")
    found = places.plan(begun, other)
    assert found["vm1"].destination == f"{places.new}/disk.img"
    assert found["vm2"].destination == f"{places.new}/disk-vm2.img"


def test_no_two_get_one_name(places: Places) -> None:
    one, other = (places.disk(name, places.old / name / "disk.img") for name in ("vm1", "vm2"))
    called_so = places.disk("vm3", places.old / "disk-vm2.img")
    found = places.plan(one, other, called_so)
    destinations = [move.destination for move in found.values() if move.destination is not None]
    assert len(destinations) == len(set(destinations)) == 2
    assert "another disk gets that name" in str(found["vm3"].why_not)


def test_a_file_system_that_hangs_costs_those_disks_that_lie_there(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it may be that they do not."""
    released, look = threading.Event(), evacuation_plan._look

    def hangs(name: str, where: str, to: str) -> evacuation_plan._Lies:
        if name.startswith("/hung"):
            released.wait(60)
        return look(name, where, to)

    monkeypatch.setattr(evacuation_plan, "_look", hangs)
    monkeypatch.setattr(evacuation_plan, "LOOK_S", 0.3)
    try:
        hung = [places.disk(f"vm{at}", f"/hung/{at}.img") for at in range(3)]
        found = places.plan(*hung, places.disk("vm9", places.old / "a.img"))
    finally:
        released.set()
    assert found["vm9"].destination == f"{places.new}/a.img"
    assert all("does not answer" in str(found[f"vm{at}"].why_not) for at in range(3))


def test_a_place_that_is_not_there(places: Places) -> None:
    with pytest.raises(ConfigError, match="There is no"):
        places.plan(where=str(places.old / "none"))
    gone = places.disk("vm1", f"{places.old}/none/a.img")
    assert set(places.plan(gone, where=str(places.old / "none"))) == {"vm1"}


def test_images_of_a_pool_have_no_suffix_and_devices_become_files(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = places.disk("vm1", places.old / "a.img")
    assert places.plan(disk, to="rbd:pool")["vm1"].destination == "rbd:pool/a"
    in_pool = places.disk("vm2", "rbd:pool/b")
    assert places.plan(in_pool, where="rbd:pool")["vm2"].destination == f"{places.new}/b.img"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"state": "steady", "other": "/third/a.img"}, "it is mirrored to /third/a.img"),
        ({"read-only": True}, "served read-only"),
    ],
)
def test_one_that_cannot_be_moved_is_named(places: Places, given: dict[str, Any], reason: str) -> None:
    [move] = places.plan(places.disk("vm1", places.old / "a.img", **given)).values()
    assert move.why_not is not None and reason in move.why_not


def test_one_without_a_backend_and_one_of_which_nothing_is_known_are_named(places: Places) -> None:
    lost = HostDisk(name="vm2", record_path=Path("/r"), problem="the record is damaged")
    no_answer = places.disk("vm1", places.old / "a.img")
    stopped = HostDisk(
        name="vm3", record_path=Path("/s"), record=None, problem="the backend does not answer"
    )
    found = places.plan(no_answer, lost, stopped)
    assert found["vm1"].why_not is None
    assert (found["vm2"].why_not, found["vm3"].why_not) == (
        "the record is damaged", "the backend does not answer",
    )  # fmt: skip


def test_where_nothing_can_go(places: Places, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory; make it"):
        places.plan(to=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"lies in .* itself"):
        (places.old / "below").mkdir()
        places.plan(to=str(places.old / "below"))
    with pytest.raises(ConfigError, match="name a directory, or rbd:POOL"):
        places.plan(to="nbd://host/x")


def test_no_image_file_is_made_among_the_device_nodes() -> None:
    """There it would lie in memory, and the guest with it."""
    with pytest.raises(ConfigError, match="would lie in memory"):
        anyio.run(plan_moves, [], "/mnt/old", "/dev")
    with pytest.raises(DiskError, match="would lie in memory"):
        create_image(Path("/dev/vhostsync-test.img"), 4096)
    assert not os.path.lexists("/dev/vhostsync-test.img")
