# SPDX-License-Identifier: Apache-2.0
"""A switch that is announced in the state record (vhostsync/record/state_file.py): what a start finds
after a kill and after a power cut, at every step of it."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.disk_fakes import A, B, CrashError, VolatileFileSystem
from vhostsync.device.opening import check_record, follow_record
from vhostsync.host import kernel
from vhostsync.record.state_file import PreparedFile, StateFile
from vhostsync.record.state_record import StateRecord, Worth
from vhostsync.storage import local as disks
from vhostsync.storage.native import probe

FORMER = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE)
SWITCHED = FORMER.switched(keep_mirror=True)
ANNOUNCED = SWITCHED.with_worth(Worth.OUTDATED)
RECORD = Path("/state/record")


def boot(name: str) -> Callable[[], str]:
    return lambda: name


def switch(state_file: StateFile) -> None:
    """Step by step, where there is no memory for a mark."""
    state_file.announce(FORMER, ANNOUNCED).settle()
    prepared = state_file.prepare(SWITCHED)
    prepared.change()
    prepared.settle()


@pytest.mark.parametrize("steps", range(24))
def test_a_kill_at_any_step_leaves_the_disk_that_the_guest_was_on(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "this_boot", boot("this"))
    files = VolatileFileSystem()
    StateFile(RECORD, files=files).change(FORMER)
    files.steps_left = steps
    renamed: list[StateRecord] = []
    change = PreparedFile.change

    def noting(prepared: PreparedFile) -> None:
        change(prepared)
        renamed.append(prepared.record)

    monkeypatch.setattr(PreparedFile, "change", noting)
    with contextlib.suppress(CrashError):  # the last of them end in order
        switch(StateFile(RECORD, files=files))
    files.steps_left = 1 << 30
    found = StateFile(RECORD, files=files).load()
    # The exchange comes after the rename; one that was cut off has been done or has not.
    assert found == SWITCHED if SWITCHED in renamed else found in (FORMER, SWITCHED)
    monkeypatch.setattr(kernel, "this_boot", boot("another"))
    possible = (ANNOUNCED, SWITCHED) if ANNOUNCED in renamed else (FORMER, ANNOUNCED)
    assert StateFile(RECORD, files=files).load() in possible


def test_it_is_durable_for_a_power_cut_before_the_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_file = StateFile(tmp_path / "record")
    state_file.change(FORMER)
    state_file.announce(FORMER, ANNOUNCED).settle()
    assert StateFile(tmp_path / "record").load() == FORMER
    monkeypatch.setattr(kernel, "this_boot", boot("after a power cut"))
    assert StateFile(tmp_path / "record").load() == ANNOUNCED


def test_the_mark_outlives_the_process_and_belongs_to_one_announcement(tmp_path: Path) -> None:
    path = tmp_path / "record"
    with StateFile(path) as state_file:
        state_file.lock(0)
        state_file.change(FORMER)
        announcement = state_file.announce(FORMER, ANNOUNCED)
        announcement.settle()
        mark = announcement.mark
        assert mark is not None
        assert StateFile(path).load() == FORMER
        struct.pack_into("=Q", mark.memory, 0, mark.value)  # as the engine does
        assert StateFile(path).load() == ANNOUNCED
    with StateFile(path) as state_file:
        state_file.lock(0)
        assert state_file.load() == ANNOUNCED
        state_file.announce(FORMER, ANNOUNCED).settle()
        assert state_file.load() == FORMER, "the mark of the one before says nothing"


def test_a_start_writes_down_what_it_has_understood(tmp_path: Path) -> None:
    """The lock's file may be removed by somebody who takes it for a leftover."""
    path, image = tmp_path / "record", tmp_path / "a.img"
    image.write_bytes(bytes(1 << 20))
    disk = disks.open_disk(image, read_only=False, cache="writeback", lock_timeout_s=1, probe=probe)
    try:
        gone = StateRecord.first(B).with_peer(disk.identity).with_worth(Worth.UP_TO_DATE)
        with StateFile(path) as state_file:
            state_file.lock(0)
            announcement = state_file.announce(gone, gone.switched(keep_mirror=False))
            announcement.settle()
            assert announcement.mark is not None
            struct.pack_into("=Q", announcement.mark.memory, 0, announcement.mark.value)
            found, record = check_record(state_file, disk)
            assert record == gone.switched(keep_mirror=False)
            follow_record(state_file, found, record, disk, None)
        Path(f"{path}.lock").unlink()
        assert StateFile(path).load() == gone.switched(keep_mirror=False)
    finally:
        disk.close()
