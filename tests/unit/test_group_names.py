# SPDX-License-Identifier: Apache-2.0
"""Which disks are in a group: all of them or a sentence, never some."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_names import recorded
from vhostsync.errors import ControlError
from vhostsync.fleet.group import controls_of_group, is_one_instant
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.record.files import RealFileSystem
from vhostsync.record.names import Lineage, Names
from vhostsync.record.state_record import StateRecord, Worth
from vhostsync.storage.identity import DiskIdentity


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("VHOSTSYNC_RUNTIME_DIRECTORY", str(tmp_path / "run"))


def in_group(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    record = recorded(folder, None)
    Names(folder).give(Lineage(name, record, "vm1"))


def test_a_name_that_cannot_be_read_may_be_of_the_group(tmp_path: Path) -> None:
    in_group(tmp_path, "vm1-root")
    in_group(tmp_path / "data", "vm1-data")
    with pytest.raises(ControlError, match=r"vm1-data: no backend runs; vm1-root: no backend runs\.$"):
        controls_of_group("vm1")
    (tmp_path / "data" / "vm1-data.name.json").write_bytes(b"torn")
    why = r"cannot be told which disks are in the group vm1, and nothing was done: .*vm1-data.* is damaged"
    with pytest.raises(ControlError, match=why):
        controls_of_group("vm1")


def test_so_may_all_names_of_a_directory_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_group(tmp_path, "vm1-root")
    in_group(tmp_path / "data", "vm1-data")
    names = RealFileSystem.names

    def refused(files: RealFileSystem, path: Path) -> list[str]:
        if path.name == "data":
            raise PermissionError(13, "Permission denied")
        return names(files, path)

    monkeypatch.setattr(RealFileSystem, "names", refused)
    with pytest.raises(ControlError, match=r"nothing was done: .*/data, cannot be read: Permission denied"):
        controls_of_group("vm1")


def test_copies_of_one_instant_are_cut_alike_and_none_differs() -> None:
    current, peer = (DiskIdentity(f"/{name}.img", "file", 27, inode, 1) for inode, name in enumerate("ab"))
    lost = StateRecord.first(current).with_peer(peer).with_worth(Worth.OUTDATED)
    cut = lost.with_cut("1f")

    def of(*records: StateRecord | None) -> bool:
        return is_one_instant([HostDisk(record=record) for record in records])

    assert of(cut, cut) and of(cut, cut.with_doubt(((0, 512),), ()))
    assert not of(cut, lost) and not of(cut, None) and not of(cut, cut.with_cut("2e"))
    assert not of(cut, cut.with_difference("2026-01-01T00:00:00Z"))
    assert not of(cut, cut.with_peer(peer)), "its mirror was started again"
