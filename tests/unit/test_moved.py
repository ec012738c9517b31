# SPDX-License-Identifier: Apache-2.0
"""A block device that is called otherwise than its record says. The devices are played by image files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from vhostsync.storage import moved
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.layers import BlockIdentifiers
from vhostsync.storage.moved import name_today


class Devices:
    """By path: what the hardware calls itself."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.nodes = folder / "dev", folder / "class"
        self.folder.mkdir()
        self.nodes.mkdir()
        self.serials: dict[Path, str | None] = {}
        self.opened: list[str] = []
        monkeypatch.setattr(moved, "NODES", self.nodes)
        monkeypatch.setattr(moved, "_device", lambda node: self.folder / node.name)
        monkeypatch.setattr(moved, "lasting_place", lambda number, path: None)
        monkeypatch.setattr(moved, "loop_backing", lambda number: None)
        monkeypatch.setattr(moved, "block_identifiers", lambda number: BlockIdentifiers("S1"))
        monkeypatch.setattr(moved, "_may_be", self.may_be)
        monkeypatch.setattr(moved, "identify", self.identify)

    def add(self, name: str, serial: str | None) -> Path:
        path = self.folder / name
        path.touch()
        (self.nodes / name).touch()
        self.serials[path] = serial
        return path

    def identity(self, path: Path) -> DiskIdentity:
        number = sorted(self.serials).index(path) + 1
        return DiskIdentity(str(path), "block", number, 0, 4096, serial=self.serials[path], boot_id="now")

    def may_be(self, disk: DiskIdentity, number: int, path: Path) -> bool:
        return disk.serial is not None and self.serials[path] == disk.serial

    def identify(self, fd: int, path: Path) -> DiskIdentity:
        assert os.fstat(fd).st_ino == path.stat().st_ino
        self.opened.append(path.name)
        return self.identity(path)


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Devices:
    return Devices(tmp_path, monkeypatch)


def test_it_keeps_its_path_where_that_leads_to_it(devices: Devices) -> None:
    path = devices.add("sdb", "S1")
    devices.add("sdc", "S2")
    assert name_today(devices.identity(path)) == str(path)
    assert "sdc" not in devices.opened


def test_it_is_found_by_what_the_hardware_calls_itself(devices: Devices) -> None:
    path = devices.add("sdb", "S1")
    disk = replace(devices.identity(path), boot_id="before", device=99)
    devices.serials[path] = "S2"
    devices.add("sda", "S3")
    other = devices.add("sdc", "S1")
    assert name_today(disk) == str(other)
    assert devices.opened == ["sdc"]  # and nothing that is certainly another one


def test_two_that_look_like_it_are_none(devices: Devices) -> None:
    disk = replace(devices.identity(devices.add("sdb", "S1")), path="/gone", device=99)
    devices.add("sdc", "S1")
    assert name_today(disk) == "/gone"


def test_what_nothing_names_is_not_looked_for(devices: Devices) -> None:
    disk = replace(devices.identity(devices.add("sdb", None)), path="/gone", device=99)
    assert name_today(disk) == "/gone"
    assert name_today(replace(disk, kind="file")) == "/gone"
    assert devices.opened == []
