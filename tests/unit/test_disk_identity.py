# SPDX-License-Identifier: Apache-2.0
"""How a disk is recognised: SAME, OTHER, or not to be told."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given

from tests.unit.disk_fakes import C, disk, identities
from vhostsync.storage import layers as disk_layers
from vhostsync.storage.identity import DiskIdentity, Likeness, decode_identity


@given(identities)
def test_a_disk_is_like_itself(identity: DiskIdentity) -> None:
    assert identity.likeness(identity) is Likeness.SAME


@given(identities, identities)
def test_likeness_is_symmetric(one: DiskIdentity, other: DiskIdentity) -> None:
    assert one.likeness(other) is other.likeness(one)


def test_an_inode_number_used_again_is_another_disk() -> None:
    assert disk("a", 5, generation=1).likeness(disk("a", 5, generation=2)) is Likeness.OTHER


EXT4 = DiskIdentity(
    "/disks/a", "file", 0x801, 12, 1, generation=77, file_system="ext:1", boot_id="monday", mark="m",
    mark_is_set=True,
)  # fmt: skip
UNMARKED = replace(EXT4, mark=None, mark_is_set=False)
NFS = replace(UNMARKED, device=27, generation=None, file_system="nfs:host:/export")
FUSE = replace(UNMARKED, device=27, generation=None, file_system=None)
TUESDAY = "tuesday"


def test_a_host_that_numbers_its_devices_anew_at_boot() -> None:
    assert EXT4.likeness(replace(EXT4, device=0x811, boot_id=TUESDAY)) is Likeness.SAME
    unmarked = replace(EXT4, mark=None)
    assert unmarked.likeness(replace(unmarked, path="/x", device=0x811, boot_id=TUESDAY)) is Likeness.SAME
    assert NFS.likeness(replace(NFS, device=28, boot_id=TUESDAY)) is Likeness.SAME
    marked = replace(FUSE, mark="m")
    assert marked.likeness(replace(marked, device=28, boot_id=TUESDAY)) is Likeness.SAME
    assert FUSE.likeness(replace(FUSE, device=28, boot_id=TUESDAY)) is Likeness.UNSURE


def test_a_server_that_is_called_otherwise_is_no_proof_of_another_file() -> None:
    now = replace(NFS, file_system="nfs:10.0.0.1:/export", device=28, boot_id=TUESDAY)
    assert NFS.likeness(now) is Likeness.UNSURE
    assert NFS.likeness(replace(now, path="/other/mount/a")) is Likeness.OTHER
    assert NFS.likeness(replace(now, file_system="ext:1")) is Likeness.OTHER


def test_device_numbers_that_changed_places_prove_nothing() -> None:
    one, other = replace(FUSE, path="/one/d"), replace(FUSE, path="/two/d", device=28)
    one_now, other_now = (
        replace(one, device=28, boot_id=TUESDAY), replace(other, device=27, boot_id=TUESDAY)
    )  # fmt: skip
    for now in (one_now, other_now):
        for before in (one, other):
            assert now.likeness(before) is Likeness.UNSURE
    named_one, named_other = replace(one, file_system="tmpfs:1"), replace(other, file_system="tmpfs:2")
    assert named_one.likeness(replace(one_now, file_system="tmpfs:1")) is Likeness.SAME
    assert named_one.likeness(replace(other_now, file_system="tmpfs:2")) is Likeness.OTHER
    assert named_other.likeness(replace(one_now, file_system="tmpfs:1")) is Likeness.OTHER


def test_within_a_boot_the_number_of_the_device_is_good() -> None:
    assert FUSE.likeness(replace(FUSE, bytes=2)) is Likeness.SAME
    assert FUSE.likeness(replace(FUSE, inode=13)) is Likeness.OTHER
    assert FUSE.likeness(replace(FUSE, path="/moved")) is Likeness.UNSURE, "another may have its number"
    assert FUSE.likeness(replace(FUSE, boot_id=TUESDAY)) is Likeness.UNSURE, "and so may a device"
    marked = replace(FUSE, mark="m")
    assert marked.likeness(replace(marked, path="/moved")) is Likeness.SAME


def test_a_number_that_another_file_has_by_now() -> None:
    """Where no generation tells the two apart, the mark does, if the disk is known to have borne it."""
    for place in (FUSE, NFS):
        told = replace(place, mark="m")
        borne = replace(told, mark_is_set=True)
        assert borne.likeness(place) is place.likeness(borne) is Likeness.UNSURE
        assert told.likeness(place) is Likeness.SAME, "it was going to get the mark, when all stopped"
        assert borne.likeness(borne) is Likeness.SAME
        assert replace(borne, generation=77).likeness(replace(place, generation=77)) is Likeness.SAME


def test_a_mark_can_be_copied_along_and_so_proves_nothing_alone() -> None:
    copy = replace(EXT4, inode=13, generation=78)
    assert EXT4.likeness(replace(copy, path="/disks/copy")) is Likeness.UNSURE
    assert EXT4.likeness(copy) is Likeness.UNSURE, "a backup that was restored"
    assert EXT4.likeness(replace(copy, file_system="ext:2")) is Likeness.UNSURE, "moved to another disk"
    assert EXT4.likeness(replace(EXT4, mark="other")) is Likeness.OTHER, "overwritten, mark and all"
    assert EXT4.likeness(UNMARKED) is Likeness.SAME, "an attribute may be lost"
    told = replace(EXT4, mark="other", mark_is_set=False)
    assert told.likeness(EXT4) is Likeness.SAME, "a kill before it got a mark in place of another's"
    assert EXT4.likeness(replace(copy, mark=None)) is Likeness.OTHER


def test_a_file_system_that_was_copied_as_a_whole() -> None:
    on_lvm = replace(EXT4, serial="dm:LVM-1")
    assert on_lvm.likeness(replace(on_lvm, device=0x811, boot_id=TUESDAY)) is Likeness.SAME
    snapshot = replace(on_lvm, path="/mnt/snapshot/a", device=0x811, serial="dm:LVM-2")
    assert on_lvm.likeness(snapshot) is Likeness.UNSURE
    assert EXT4.likeness(replace(EXT4, path="/mnt/a", device=0x811)) is Likeness.UNSURE, "two in one boot"
    btrfs = replace(EXT4, device=27, file_system="btrfs:1")
    assert btrfs.likeness(replace(btrfs, device=28)) is Likeness.SAME, "mounted again"


def test_an_identity_of_a_record_from_before_there_were_marks() -> None:
    old = DiskIdentity("/disks/a", "file", 27, 12, 1)
    now = replace(old, file_system="nfs:host:/export", boot_id=TUESDAY, mark="m")
    assert old.likeness(now) is Likeness.SAME
    assert old.likeness(replace(now, device=28)) is Likeness.UNSURE
    assert old.likeness(replace(now, path="/disks/b")) is Likeness.UNSURE
    assert old.likeness(replace(now, path="/disks/b", device=28)) is Likeness.OTHER
    with_generation = replace(old, generation=7)
    assert with_generation.likeness(replace(now, path="/disks/b", generation=7)) is Likeness.SAME
    loop = DiskIdentity("/dev/loop1", "block", 0x701, 0, 1, serial="loop:27:12:0")
    assert decode_identity(asdict(loop)).serial is None, "it was named by a number that changes"


def test_block_devices_are_known_by_their_hardware_not_their_copied_uuids() -> None:
    sda1 = DiskIdentity("/dev/sda1", "block", 0x801, 0, 1, wwn="naa.1", partuuid="u")
    assert sda1.likeness(replace(sda1, path="/dev/sdb1", device=0x811)) is Likeness.SAME
    assert sda1.likeness(replace(sda1, device=0x811, wwn="naa.2")) is Likeness.OTHER
    bare = replace(sda1, wwn=None)
    assert bare.likeness(replace(bare, path="/dev/sdb1", device=0x811)) is Likeness.OTHER


def test_a_block_device_that_does_not_name_itself() -> None:
    vdb = DiskIdentity("/dev/vdb", "block", 0xFE10, 0, 1, boot_id="monday")
    assert vdb.likeness(replace(vdb, path="/dev/disk/x")) is Likeness.SAME
    assert vdb.likeness(replace(vdb, boot_id=TUESDAY)) is Likeness.UNSURE, "disks change places"
    assert vdb.likeness(replace(vdb, path="/dev/vdc", boot_id=TUESDAY)) is Likeness.UNSURE
    placed = replace(vdb, place="pci-0000:00:05.0")
    now = replace(placed, path="/dev/vdc", device=0xFE20, boot_id=TUESDAY)
    assert placed.likeness(now) is Likeness.SAME
    other_place = replace(placed, place="pci-0000:00:06.0", boot_id=TUESDAY)
    assert placed.likeness(other_place) is Likeness.UNSURE
    assert placed.likeness(replace(other_place, path="/dev/vdc", device=0xFE20)) is Likeness.OTHER


def test_a_device_number_that_another_disk_has_by_now() -> None:
    vdb = DiskIdentity("/dev/vdb", "block", 0xFE10, 0, 1, boot_id="monday", disk_sequence=7)
    assert vdb.likeness(replace(vdb, path="/dev/disk/x")) is Likeness.SAME
    later = replace(vdb, disk_sequence=8)
    assert vdb.likeness(later) is Likeness.UNSURE, "or the same one, plugged in again"
    assert vdb.likeness(replace(later, boot_id=TUESDAY)) is Likeness.UNSURE
    assert vdb.likeness(replace(later, disk_sequence=None)) is Likeness.SAME, "of a record that has none"
    assert replace(vdb, wwn="naa.1").likeness(replace(later, wwn="naa.1")) is Likeness.SAME


def test_a_change_after_a_clean_detach_is_seen() -> None:
    detached = disk("a", ctime_ns=5)
    assert detached.changed_since(detached) is None
    assert "ctime" in (replace(detached, ctime_ns=6).changed_since(detached) or "")
    assert "size" in (replace(detached, bytes=1).changed_since(detached) or "")
    assert "another disk" in (C.changed_since(detached) or "")
    assert disk("a").changed_since(disk("a")), "never cleanly detached"


def test_a_link_of_the_operators_own_is_no_lasting_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lead to another device tomorrow. What it leads through in /dev was made by udev or LVM."""
    devices = tmp_path / "dev"
    devices.mkdir()
    monkeypatch.setattr(disk_layers, "DEVICES", devices)
    (devices / "lasting").symlink_to(devices / "nbd0")
    own, through = tmp_path / "own", tmp_path / "through"
    own.symlink_to(devices / "nbd0")
    through.symlink_to(devices / "lasting")
    none_such = os.makedev(4095, 1)
    assert disk_layers.lasting_place(none_such, own) is None
    assert disk_layers.lasting_place(none_such, through) == f"link:{devices / 'lasting'}"
    assert disk_layers.lasting_place(none_such, devices / "lasting") == f"link:{devices / 'lasting'}"
