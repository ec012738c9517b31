# SPDX-License-Identifier: Apache-2.0
"""A destination before the engine has it, and disks after it had them. Everything here blocks."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from vhostsync import disks
from vhostsync.config import MirrorTarget
from vhostsync.disk_identity import DiskIdentity, Likeness, same
from vhostsync.disks import Disk
from vhostsync.engine import probe
from vhostsync.errors import DiskError, MirrorError
from vhostsync.identify import identify
from vhostsync.state_record import StateRecord

log = structlog.get_logger(__name__)

DESTINATION_LOCK_S: Final = 1.0
RESUMED_LOCK_S: Final = 5.0  # what a killed predecessor has under way there may take its time


@dataclass(frozen=True)
class Place:
    """A disk that the engine has: how it is called and recognised."""

    path: Path
    identity: DiskIdentity

    @classmethod
    def of(cls, disk: Disk) -> "Place":
        return cls(disk.path, disk.identity)

    @classmethod
    def of_identity(cls, identity: DiskIdentity) -> "Place":
        return cls(Path(identity.path), identity)


def open_destination(
    target: MirrorTarget, source: Path, capacity_bytes: int, block_bytes: int, lock_timeout_s: float
) -> tuple[Disk, os.stat_result | None]:
    """Open, lock and judge a destination for a guest's disk of this capacity and logical block; make it first
    if asked to: then it is told as which file. DiskError, and nothing was changed."""
    disks.check_distinct(source, target.path)
    made = disks.create_image(target.path, capacity_bytes) if target.create else None
    disk = None
    try:
        disk = disks.open_disk(
            target.path, read_only=False, cache=target.cache, lock_timeout_s=lock_timeout_s, probe=probe
        )
        if made is not None and not os.path.samestat(os.fstat(disk.fd.fileno()), made):
            raise DiskError(f"another file has taken the place of {disk.path} while it was made; try again")
        disks.check_destination(disk, capacity_bytes=capacity_bytes, guest_block_bytes=block_bytes)
    except BaseException:
        if disk is not None:
            disk.close()
        if made is not None:
            disks.remove_image(target.path, made)
        raise
    return disk, made


def discard(disk: Disk, made: os.stat_result | None) -> None:
    """A destination that `open_destination` has opened, and perhaps made, and that is not to be one."""
    disk.close()
    if made is not None:
        disks.remove_image(disk.path, made)


def check_former(disk: Disk, former: DiskIdentity) -> None:
    """MirrorError unless this is certainly the disk that was the destination before."""
    if same(former, disk.identity):
        return
    raise MirrorError(
        f"{disk.path} is not known to be the disk that was mirrored to before, and what is on it would be "
        f"lost; if it is the right one, start the mirror to it yourself: vhostsync mirror start {disk.path}"
    )


def was_of_this_guest(record: StateRecord, disk: DiskIdentity) -> bool:
    """The last destination, or one that was the source once: what it holds is the guest's."""
    return any(same(former, disk) for former in record.disks if former is not record.current)


def look(disk: Disk) -> DiskIdentity:
    """How a disk looks before the mirror writes to it."""
    return identify(disk.fd.fileno(), disk.path, with_ctime=True)


def look_again(place: Place) -> DiskIdentity | None:
    """How the disk looks now that the engine has let go of it; None when it cannot be told."""
    try:
        fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = identify(fd, place.path, with_ctime=True)
        finally:
            os.close(fd)
    except OSError as error:
        log.warning("a disk cannot be looked at again", path=str(place.path), error=error.strerror)
        return None
    if found.likeness(place.identity) is not Likeness.SAME:
        log.warning("another file has taken the disk's place while it was served", path=str(place.path))
        return None
    return found
