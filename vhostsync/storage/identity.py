# SPDX-License-Identifier: Apache-2.0
"""How a disk is recognised (docs/durability.md, "Which disk is which").

Names and device numbers change: files are renamed and copied, a host numbers its devices anew at boot. So a
disk is what lasts of it: the file system that an image file lies in, its inode there and the inode's
generation; the names that hardware gives itself; and a mark of our own, a random number in an attribute of
the image file.

No single one of them decides. A mark can be copied along with a file, so it proves nothing where the rest
speaks against it; device numbers hold until the next boot at most; a path is a hint. Where what is known
does not suffice, the answer is UNSURE, and whoever asks must not guess.
"""

import os
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from vhostsync.typed_fields import typed

# Of file systems that are named by the server and what it exports (identify.py).
NETWORK_NAMES: Final = frozenset({"nfs", "cifs", "smb3", "ceph", "lustre", "fuse.glusterfs"})


class Likeness(Enum):
    SAME = "same"
    OTHER = "other"
    UNSURE = "unsure"


SAME, OTHER, UNSURE = Likeness.SAME, Likeness.OTHER, Likeness.UNSURE


@dataclass(frozen=True)
class DiskIdentity:
    """`device` is st_dev of a file and st_rdev of a block device; it means something within the boot
    `boot_id` only (None: not known, in records of version 1). `generation` tells a file from an earlier
    one with the same inode number (file systems that have it); `file_system` names the file system for
    good; `mark` is our own, and `mark_is_set` once the disk was seen to bear it: in a record there may be
    one that it was only going to get. `serial`, `wwn` and `partuuid` are of the block device, or of that
    which the file system lies on; `place` is where a block device that has none of them is plugged in, or a
    lasting name of it, and `disk_sequence` which of the disks of this boot has its number. `ctime_ns` is
    recorded at a clean detach only, so that a file that somebody changed meanwhile is seen."""

    path: str
    kind: str  # "file", "block", or that of a registered kind (kinds.py)
    device: int
    inode: int
    bytes: int
    ctime_ns: int | None = None
    generation: int | None = None
    serial: str | None = None
    wwn: str | None = None
    partuuid: str | None = None
    file_system: str | None = None
    boot_id: str | None = None
    mark: str | None = None
    place: str | None = None
    mark_is_set: bool = False
    disk_sequence: int | None = None

    def likeness(self, other: "DiskIdentity") -> Likeness:
        """Whether both are the same disk, as far as can be seen. Sizes do not count: disks grow."""
        if self.kind != other.kind:
            return OTHER
        if self.kind in ("file", "block"):
            return self._like_file(other) if self.kind == "file" else self._like_block(other)
        return self._like_its_serial(other)

    def _like_its_serial(self, other: "DiskIdentity") -> Likeness:
        """Of a kind whose disks have one that is theirs alone, and nothing else."""
        serials = _equal(self.serial, other.serial)
        if serials is None:
            return UNSURE if self.path == other.path else OTHER
        return SAME if serials else OTHER

    def _like_file(self, other: "DiskIdentity") -> Likeness:
        marks = _equal(self.mark, other.mark)
        if marks is False and not (self.mark_is_set and other.mark_is_set):
            marks = None  # it was going to get another one, when all stopped
        if marks is False:
            return OTHER
        numbers = self._like_numbers(other, marked=marks is True)
        # A copy that took the mark along, or the original at another place: nobody but the operator can tell.
        return UNSURE if marks and numbers is OTHER else numbers

    def _like_numbers(self, other: "DiskIdentity", *, marked: bool) -> Likeness:
        generations = _equal(self.generation, other.generation)
        same_path = self.path == other.path
        same_volume = self._same_file_system(other)
        if generations is False or same_volume is False:
            return OTHER
        if self.inode != other.inode:
            # The inode numbers of one file system differ: two files. Of two file systems (or one that is not
            # recognised) a shared path is a hint, no more.
            return UNSURE if same_volume is None and same_path else OTHER
        if same_volume:
            if self._below_is_another(other):
                return UNSURE  # the file system itself was copied (a snapshot, a clone), or has moved
            # Without a generation the number may have been given to another file since: one that bears no
            # mark, where this one has borne its own.
            at_home = same_path and not self._lacks_a_mark_of(other)
            return SAME if generations or marked or at_home else UNSURE
        if same_path:
            return SAME if generations or marked else UNSURE
        return UNSURE if generations or marked or self.device == other.device else OTHER

    def _lacks_a_mark_of(self, other: "DiskIdentity") -> bool:
        """Whether one of them bears none, and the other has certainly borne one."""
        return (self.mark is None and other.mark_is_set) or (other.mark is None and self.mark_is_set)

    def _same_file_system(self, other: "DiskIdentity") -> bool | None:
        """None: it cannot be told."""
        names = _equal(self.file_system, other.file_system)
        if names is False and self.path == other.path and self._remote and other._remote:
            return None  # one server has many names and addresses, and its clients' configuration changes
        if names is not None:
            return names
        if self.device != other.device:
            return None
        if _equal(self.boot_id, other.boot_id):
            return True
        # A record of version 1 does not say of which boot the number is: it counts where more speaks for it.
        old = self.boot_id is None or other.boot_id is None
        more = self.path == other.path or _equal(self.generation, other.generation)
        return True if old and more else None

    @property
    def _remote(self) -> bool:
        return (self.file_system or "").partition(":")[0] in NETWORK_NAMES

    def lies_elsewhere(self, other: "DiskIdentity") -> bool:
        """Whether anything says that it is not in its old place, so that it may be a copy, or a snapshot of
        an earlier moment."""
        return (
            self.inode != other.inode
            or _equal(self.file_system, other.file_system) is False
            or self._below_is_another(other)
        )

    def _below_is_another(self, other: "DiskIdentity") -> bool:
        """Whether the two file systems of one name lie on two devices."""
        if any(_equal(mine, theirs) is False for mine, theirs in self._hardware(other)):
            return True
        if any(_equal(mine, theirs) for mine, theirs in self._hardware(other)[:2]):
            return False
        # Two devices that do not name themselves, in one boot. (Major 0: not a device but a mount.)
        in_one_boot = _equal(self.boot_id, other.boot_id) is True
        return in_one_boot and self.device != other.device and os.major(self.device) != 0

    def _hardware(self, other: "DiskIdentity") -> tuple[tuple[str | None, str | None], ...]:
        return (self.wwn, other.wwn), (self.serial, other.serial), (self.partuuid, other.partuuid)

    def _like_block(self, other: "DiskIdentity") -> Likeness:
        if any(_equal(mine, theirs) is False for mine, theirs in self._hardware(other)):
            return OTHER
        # A copied disk has the partition UUIDs of its original, so these alone prove nothing.
        if any(_equal(mine, theirs) for mine, theirs in self._hardware(other)[:2]):
            return SAME
        same_path, same_number = self.path == other.path, self.device == other.device
        # A number that was free for a while may be another disk's, or that of the same one, plugged in again.
        came_later = _equal(self.disk_sequence, other.disk_sequence) is False
        if same_number and not came_later and _equal(self.boot_id, other.boot_id):
            return SAME
        places = _equal(self.place, other.place)
        if places:
            return SAME
        if places is None and same_path and same_number and (self.boot_id is None or other.boot_id is None):
            return SAME  # a record of version 1: all that it has says so
        return UNSURE if same_path or same_number else OTHER

    def lasting_words(self) -> str:
        """What tells it from every other disk, whatever it is called. A volume without a name has its number,
        which may name another one after a boot: then the path tells the two apart."""
        volume: list[str | None]
        if self.kind == "block":
            volume = [self.wwn, self.serial, self.partuuid]
            volume += [] if self.wwn or self.serial else [self.place or self.path]
        elif self.kind == "file":
            volume = [str(self.device), self.path] if self.file_system is None else [self.file_system]
        else:
            volume = [self.serial or self.path]
        return repr((self.kind, volume, self.inode, self.generation, self.mark))

    @property
    def changes_show(self) -> bool:
        """Whether a change while nobody watched can be seen. Not on block devices."""
        return self.kind == "file"

    def changed_since(self, detached: "DiskIdentity") -> str | None:
        """Why the content may differ from what it was at the clean detach recorded in `detached`: a phrase,
        or None when nothing speaks for a change. Ask `changes_show` what that None is worth."""
        if detached.likeness(self) is not SAME:
            return "it is another disk"
        if self.bytes != detached.bytes:
            return f"its size was {detached.bytes} bytes and is {self.bytes}"
        if self.changes_show and (detached.ctime_ns is None or self.ctime_ns != detached.ctime_ns):
            return "it was changed since (ctime)"
        return None


def same(one: DiskIdentity, other: DiskIdentity) -> bool:
    return one.likeness(other) is SAME


def decode_identity(body: Any) -> DiskIdentity:
    """TypeError where fields are missing, unknown, or of another type."""
    disk: DiskIdentity = typed(DiskIdentity, body)
    if min(disk.device, disk.inode, disk.bytes) < 0:
        raise TypeError("a number or a size below zero")
    if disk.boot_id is None and (disk.serial or "").startswith("loop:"):
        disk = replace(disk, serial=None)  # version 1 named a loop device by its file's device number
    return disk


def _equal(mine: object, theirs: object) -> bool | None:
    """None where one of them is not known."""
    return None if mine is None or theirs is None else mine == theirs
