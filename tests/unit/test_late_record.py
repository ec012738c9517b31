# SPDX-License-Identifier: Apache-2.0
"""A start whose record cannot be written: refused where something waits for the record, else served."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.disk_fakes import B
from tests.unit.test_state_record import failing
from vhostsync.device.opening import check_record, follow_record
from vhostsync.errors import StateRecordError
from vhostsync.option_values import Answer
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord, Wanted, Worth
from vhostsync.storage import local as disks
from vhostsync.storage.local import LocalDisk
from vhostsync.storage.native import probe


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LocalDisk]:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(1 << 20))
    it = disks.open_disk(image, read_only=False, cache="writeback", lock_timeout_s=0, probe=probe)
    yield it
    it.close()


def left_by(disk: LocalDisk, record: StateRecord) -> StateRecord:
    return record.detached(disk.as_it_is(), record.peer, record.spared)


def start(
    path: Path, disk: LocalDisk, step: str = "write_durable", answer: Answer | None = None
) -> StateFile:
    state_file = StateFile(path, files=failing(step, 28))
    found, record = check_record(state_file, disk, answer)
    follow_record(state_file, found, record, disk, None)
    return state_file


@pytest.mark.parametrize("step", ["write_durable", "rename", "sync_directory"])
def test_where_nothing_waits_for_it_the_disk_is_served(tmp_path: Path, disk: LocalDisk, step: str) -> None:
    path = tmp_path / "record"
    assert start(path, disk, step).late, "the first record"
    first = StateRecord.first(disk.identity)
    with_peer = first.with_peer(B).with_wanted(Wanted(B.path, "none"))
    for record in (first, with_peer, with_peer.with_worth(Worth.OUTDATED, "then")):
        record = left_by(disk, record)
        StateFile(path).change(record)
        state_file = start(path, disk, step)
        assert state_file.late
        assert StateFile(path).load() in (record, replace(record, clean=False, current=disk.identity))


def test_where_something_waits_for_it_the_start_is_refused(tmp_path: Path, disk: LocalDisk) -> None:
    path = tmp_path / "record"
    mirrored = StateRecord.first(disk.identity).with_peer(B)
    steady = mirrored.with_worth(Worth.UP_TO_DATE)
    for record, why in (
        (steady, "calls /disks/b up to date"),
        (mirrored.with_bitmap("token"), "names a bitmap"),
        (mirrored.with_worth(Worth.OUTDATED).with_bitmap("token"), "names a bitmap"),
        (replace(mirrored, spared=((0, 512),)), "lists what the other disk holds better"),
    ):
        StateFile(path).change(left_by(disk, record))
        with pytest.raises(StateRecordError, match=rf"cannot be written: .*; what is there {why}.*make room"):
            start(path, disk)
    StateFile(path).announce(steady, steady.switched(keep_mirror=False)).settle()
    with pytest.raises(StateRecordError, match="speaks of a switch"):
        start(path, disk)


def test_a_promotion_that_cannot_be_written_is_refused(tmp_path: Path, disk: LocalDisk) -> None:
    """What is there would go on to name the disk that was given up, and refuse this one."""
    path = tmp_path / "record"
    former = StateRecord.first(B).with_peer(disk.identity).with_worth(Worth.OUTDATED, "then")
    StateFile(path).change(former)
    with pytest.raises(StateRecordError, match="what is there calls /disks/b the current disk"):
        start(path, disk, answer=Answer.PROMOTE)
    assert StateFile(path).load() == former


def test_any_record_that_is_written_ends_it(tmp_path: Path, disk: LocalDisk) -> None:
    state_file = start(tmp_path / "record", disk)
    state_file._files = StateFile(tmp_path / "record")._files
    state_file.prepare(StateRecord.first(disk.identity)).discard()
    assert state_file.late
    state_file.change(StateRecord.first(disk.identity))
    assert not state_file.late
