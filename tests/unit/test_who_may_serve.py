# SPDX-License-Identifier: Apache-2.0
"""Which disk a start is let go on with, which are refused, and what is asked."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.disk_fakes import A, B, C, disk
from vhostsync.errors import StateRecordError
from vhostsync.option_values import Answer
from vhostsync.record.state_record import StateRecord, Wanted, Worth
from vhostsync.record.who_may_serve import check_start, claims


def test_the_superseded_disk_is_refused_and_the_current_one_named() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False)
    assert record.epoch == 2
    assert check_start(record, B) == record
    with pytest.raises(StateRecordError, match=r"/disks/a was superseded.*--blk-file /disks/b"):
        check_start(record, A)


def test_failback() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=True)
    assert (record.peer, record.peer_worth) == (A, Worth.UP_TO_DATE)
    with pytest.raises(StateRecordError, match=r"other half of a mirror \(up-to-date\)"):
        check_start(record, A)
    back = record.switched(keep_mirror=False)
    assert check_start(back, A) == back
    with pytest.raises(StateRecordError, match="/disks/b was superseded"):
        check_start(back, B)


def test_the_peer_is_refused_with_what_it_is_worth() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.OUTDATED, "2026-01-02T03:04:05Z")
    with pytest.raises(
        StateRecordError, match=r"outdated since 2026-01-02.*without what the guest wrote since"
    ):
        check_start(record, B)


def test_a_name_may_hold_what_separates_the_parts_of_a_sentence() -> None:
    peer = replace(B, path="/disks/b; old", mark="1" * 32)
    record = StateRecord.first(A).with_peer(peer)
    copy = replace(peer, inode=999, path="/disks/c")
    with pytest.raises(StateRecordError, match=r"may be /disks/b; old, or a copy of it.*restore a backup"):
        check_start(record, copy)


def test_a_renamed_current_disk_is_accepted_and_called_by_its_new_name() -> None:
    renamed = replace(A, path="/disks/new")
    assert check_start(StateRecord.first(A).with_peer(B), renamed).current == renamed


def test_an_old_disk_moved_to_the_current_path_is_refused() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False)
    with pytest.raises(StateRecordError, match="superseded"):
        check_start(record, replace(A, path=B.path))


def test_a_new_file_at_the_current_path_is_a_question() -> None:
    restored = replace(A, inode=999)
    steady = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE)
    steady = steady.with_wanted(Wanted(B.path, "none"))
    with pytest.raises(
        StateRecordError, match=r"add --promote; .*lacks nothing.*--blk-file /disks/b --promote"
    ):
        check_start(steady, restored)
    outdated = steady.with_worth(Worth.OUTDATED, "2026-01-02T03:04:05Z")
    with pytest.raises(StateRecordError, match=r"add --promote; .*as of 2026-01-02.*/disks/b --promote"):
        check_start(outdated, restored)
    with pytest.raises(StateRecordError, match=r"/disks/b, is a copy that did not end, and of no use$"):
        check_start(steady.with_worth(Worth.INCONSISTENT), restored)
    after = check_start(steady, restored, answer=Answer.PROMOTE)
    assert (after.current, after.peer, after.wanted) == (restored, None, None)
    for lost in (A, B):
        with pytest.raises(StateRecordError, match="given up as lost"):
            check_start(after, lost)
    with pytest.raises(StateRecordError, match="certainly not"):
        check_start(steady, restored, answer=Answer.SAME_DISK)


def test_no_bitmap_is_kept_for_what_may_be_a_snapshot() -> None:
    """That of a btrfs subvolume, or of the volume below, has the inode numbers of what it was made of."""
    here = replace(A, mark="m", file_system="btrfs:1", serial="dm:LVM-1", boot_id="monday")
    record = StateRecord.first(here).with_peer(B, "token").with_worth(Worth.UP_TO_DATE)
    for snapshot in (replace(here, file_system="btrfs:2"), replace(here, serial="dm:LVM-2")):
        with pytest.raises(StateRecordError, match="--same-disk"):
            check_start(record, snapshot)
        answered = check_start(record, snapshot, answer=Answer.SAME_DISK)
        assert answered.peer == B and answered.bitmap is None
    unnamed = replace(here, file_system=None, serial=None)
    record = StateRecord.first(unnamed).with_peer(B, "token").with_worth(Worth.UP_TO_DATE)
    moved = replace(unnamed, path="/other", device=99, boot_id="tuesday")
    assert check_start(record, moved, answer=Answer.SAME_DISK).bitmap == "token"


def test_a_new_file_at_the_current_path_is_accepted_where_nothing_is_at_stake() -> None:
    restored = replace(A, inode=999)
    assert check_start(StateRecord.first(A), restored).current == restored


def test_a_new_file_at_a_superseded_path_is_refused_and_said_to_be_new() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False)
    with pytest.raises(StateRecordError, match="not the one that was recorded"):
        check_start(record, replace(A, inode=999))


def test_a_foreign_disk_is_refused() -> None:
    with pytest.raises(StateRecordError, match="belongs to other disks"):
        check_start(StateRecord.first(A), C)


def test_promotion_makes_the_peer_the_truth() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.OUTDATED).promoted(B)
    assert check_start(record, B) == record
    with pytest.raises(StateRecordError):
        check_start(record, A)


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=40))
def test_through_any_switches_only_the_current_disk_may_serve(steps: list[tuple[int, bool]]) -> None:
    disks = [disk(f"d{number}", number + 1) for number in range(31)]
    record, epochs = StateRecord.first(disks[0]), 1
    for number, keep in steps:
        if disks[number] == record.current:
            continue
        record = record.with_peer(disks[number]).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=keep)
        epochs += 1
    assert record.epoch == epochs
    for each in disks:
        if each == record.current:
            assert check_start(record, each).current == each
        else:
            with pytest.raises(StateRecordError):
                check_start(record, each)


def test_a_copy_that_did_not_end_is_known_as_one_when_another_takes_its_place() -> None:
    record = StateRecord.first(A).with_peer(B).with_peer(C)
    assert record.of_disk(B) is not None
    with pytest.raises(StateRecordError, match=r"half of a mirror, inconsistent.*copy that did not end"):
        check_start(record, B)
    with pytest.raises(StateRecordError, match="/disks/b is a copy that did not end"):
        check_start(record, B, answer=Answer.PROMOTE)
    back = record.with_peer(B).with_worth(Worth.UP_TO_DATE)
    assert check_start(back, B, answer=Answer.PROMOTE).current == B


def test_the_old_disk_overwritten_by_a_copy_that_did_not_end_is_not_promoted() -> None:
    switched = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False)
    assert check_start(switched, A, answer=Answer.PROMOTE).current == A
    overwritten = switched.with_peer(A).with_peer(C)
    with pytest.raises(StateRecordError, match="/disks/a is a copy that did not end"):
        check_start(overwritten, A, answer=Answer.PROMOTE)


def test_what_the_peer_was_worth_is_known_after_another_disk_was_promoted() -> None:
    record = StateRecord.first(A).with_peer(B)
    with pytest.raises(StateRecordError, match="is a copy that did not end"):
        check_start(record.promoted(C, "2026-01-02T03:04:05Z"), B, answer=Answer.PROMOTE)
    since = "2025-12-31T23:59:59Z"
    outdated = record.with_worth(Worth.OUTDATED, since).promoted(C, "2026-01-02T03:04:05Z")
    with pytest.raises(StateRecordError, match=f"given up as lost.*the disk as of {since}"):
        check_start(outdated, B)
    steady = record.with_worth(Worth.UP_TO_DATE).promoted(C, "2026-01-02T03:04:05Z")
    with pytest.raises(StateRecordError, match=r"given up as lost.*the disk as of 2026-01-02T03:04:05Z"):
        check_start(steady, B)


def test_what_may_be_a_copy_that_did_not_end_is_not_promoted() -> None:
    peer = replace(B, file_system=None, generation=None, mark=None)
    record = StateRecord.first(A).with_peer(peer)
    with pytest.raises(StateRecordError, match=r"may be a copy that did not end.*--new-disk"):
        check_start(record, replace(peer, boot_id="later"), answer=Answer.PROMOTE)


def test_a_former_peer_is_refused_where_nothing_tells_for_certain_what_it_is() -> None:
    peer = replace(B, file_system=None, generation=None)
    record = StateRecord.first(A).with_peer(peer).with_worth(Worth.OUTDATED, "2026-01-02").with_peer(C)
    later = replace(peer, boot_id="later")
    assert claims(record, later)
    with pytest.raises(StateRecordError, match=r"may be /disks/b.*other half of a mirror, outdated"):
        check_start(record, later)
