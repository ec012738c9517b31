# SPDX-License-Identifier: Apache-2.0
"""Opens a destination and judges whether it may be one, before the engine gets it. Everything here blocks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import structlog

from vhostsync.errors import DiskError, MirrorError
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.state_record import StateRecord
from vhostsync.storage import kinds
from vhostsync.storage.disk import Disk
from vhostsync.storage.identity import DiskIdentity, Likeness, same

log = structlog.get_logger(__name__)

DESTINATION_LOCK_S: Final = 1.0
RESUMED_LOCK_S: Final = 5.0  # what a killed predecessor has under way there may take its time


@dataclass(frozen=True)
class Place:
    """A disk that the engine has: how it is called and recognised."""

    name: str
    identity: DiskIdentity
    why_no_source: str | None = None  # no guest can be served from it

    @classmethod
    def of(cls, disk: Disk) -> "Place":
        return cls(disk.name, disk.identity, disk.why_no_source)

    @classmethod
    def of_identity(cls, identity: DiskIdentity) -> "Place":
        return cls(identity.path, identity)


def open_destination(
    target: MirrorTarget, source: Place, capacity_bytes: int, block_bytes: int, lock_timeout_s: float,
    known: Iterable[DiskIdentity] = (),
) -> tuple[Disk, object | None]:
    """Open, lock and judge a destination for a guest's disk of this capacity and logical block; make it first
    if asked to: then what was made is told, for `discard`. `known`: the record's disks. DiskError, and
    nothing was changed."""
    check_distinct(source, target.name)
    kind = kinds.kind_of(target.name)
    made = kind.create(target.name, capacity_bytes) if target.create else None
    disk = None
    try:
        disk = kinds.open_disk(
            target.name, read_only=False, cache=target.cache, lock_timeout_s=lock_timeout_s, known=known
        )
        if made is not None and not kind.is_made(disk, made):
            raise DiskError(f"another file has taken the place of {disk.name} while it was made; try again")
        _check_another(source, disk)
        check_destination(disk, capacity_bytes=capacity_bytes, guest_block_bytes=block_bytes)
    except BaseException:
        if disk is not None:
            disk.close()
        if made is not None:
            kind.remove(target.name, made)
        raise
    return disk, made


def discard(disk: Disk, made: object | None) -> None:
    """A destination that `open_destination` has opened, and perhaps made, and that is not to be one."""
    disk.close()
    if made is not None:
        kinds.kind_of(disk.name).remove(disk.name, made)


def check_distinct(source: Place, destination: str) -> None:
    """DiskError when both names lead to the same bytes: by symlinks or hard links, loop devices of one file,
    a partition and its disk. To be asked before the destination is opened, whose lock would only say "in
    use". A destination that does not exist is distinct, and so is one that has the source's name by now."""
    if not kinds.is_named(source.name, source.identity):
        return  # what is opened is looked at once more (_check_another)
    try:
        shared = kinds.overlap(source.name, destination)
    except OSError as error:
        raise DiskError(f"{error.filename} cannot be examined: {error.strerror}") from error
    if shared is not None:
        raise DiskError(f"{destination} and the source {source.name} are the same storage ({shared})")


def _check_another(source: Place, destination: Disk) -> None:
    if same(source.identity, destination.identity):
        raise DiskError(f"{destination.name} is the source, which was {source.name} when it was opened")


def check_destination(destination: Disk, *, capacity_bytes: int, guest_block_bytes: int) -> None:
    """DiskError unless the destination can take the guest: `capacity_bytes` is what the guest sees,
    `guest_block_bytes` its logical block."""
    if destination.read_only:
        raise DiskError(f"the destination {destination.name} is open for reading only")
    if destination.bytes < capacity_bytes:
        lacking = capacity_bytes - destination.bytes
        raise DiskError(
            f"the destination {destination.name} is too small: {destination.bytes} bytes, the guest's disk "
            f"has {capacity_bytes} ({lacking} more); enlarge it or take another"
        )
    if destination.logical_block_bytes > guest_block_bytes:
        raise DiskError(
            f"the destination {destination.name} has logical blocks of "
            f"{destination.logical_block_bytes} bytes and the guest writes blocks of "
            f"{guest_block_bytes}; take a destination with smaller blocks, or an image file with "
            f"cache=writeback"
        )


def check_holds_nothing(disk: Disk) -> None:
    """DiskError when signatures tell that there is something on the disk."""
    try:
        found = disk.signatures()
    except OSError as error:
        raise DiskError(
            f"what {disk.name} holds cannot be found out ({error.strerror}), and it would be lost; if it may "
            f"be, start the mirror with --force"
        ) from error
    if found:
        raise DiskError(
            f"{disk.name} holds something that would be lost: {', '.join(found)}; name another destination, "
            f"or, if it may be overwritten, start the mirror with --force"
        )


def check_former(disk: Disk, former: DiskIdentity) -> None:
    """MirrorError unless this is certainly the disk that was the destination before."""
    if same(former, disk.identity):
        return
    raise MirrorError(
        f"{disk.name} is not known to be the disk that was mirrored to before, and what is on it would be "
        f"lost; if it is the right one, start the mirror to it yourself: vhostsync mirror start {disk.name}"
    )


def put_mark_back(disk: Disk, place: Place) -> None:
    """The engine has refused the disk, and the record is to know it by its former mark again."""
    disk.close()
    mark = disk.identity.mark
    if mark is None or mark == place.identity.mark:
        return
    try:
        again = kinds.open_disk(
            disk.name, read_only=False, cache="writeback", lock_timeout_s=0, known=[place.identity]
        )
    except DiskError as error:
        log.error("the disk keeps a mark that the record does not have", error=str(error))
        return
    try:
        if same(again.identity, place.identity):
            again.with_mark(mark).bear_mark()
    finally:
        again.close()


def was_of_this_guest(record: StateRecord, disk: DiskIdentity) -> bool:
    """The last destination, or one that was the source once: what it holds is the guest's."""
    return any(same(former, disk) for former in record.disks if former is not record.current)


def look_again(place: Place) -> DiskIdentity | None:
    """How the disk looks now that the engine has let go of it; None when it cannot be told."""
    try:
        found = kinds.identify(place.name)
    except OSError as error:
        log.warning("a disk cannot be looked at again", path=place.name, error=error.strerror)
        return None
    if found.likeness(place.identity) is not Likeness.SAME:
        log.warning("another file has taken the disk's place while it was served", path=place.name)
        return None
    return found
