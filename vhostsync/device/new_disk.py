# SPDX-License-Identifier: Apache-2.0
"""`vhostsync create`: a disk gets its name and, where it has none yet, its state record, without a backend.
With --mirror the record says, too, that a mirror is wanted, which the first start begins. Everything here
blocks."""

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

import structlog

from vhostsync.config import ServeConfig
from vhostsync.confine.privileges import User, change_user
from vhostsync.device.opening import Opened, open_device
from vhostsync.errors import ConfigError, DiskError, StateRecordError
from vhostsync.lineage_name import check_lineage_name, socket_of
from vhostsync.mirror.destination import (
    DESTINATION_LOCK_S,
    Place,
    check_holds_nothing,
    discard,
    open_destination,
)
from vhostsync.mirror_target import MirrorTarget
from vhostsync.record.files import RealFileSystem
from vhostsync.record.names import Lineage, Names
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_index import Index, default_directory, make_directory
from vhostsync.record.state_record import Wanted, named
from vhostsync.record.who_may_serve import check_start
from vhostsync.storage import kinds
from vhostsync.storage.disk import Disk
from vhostsync.storage.identity import same
from vhostsync.storage.network import use_network

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class NewDisk:
    """What `create` is told."""

    name: str
    disk: str
    group: str | None = None
    mirror: MirrorTarget | None = None

    def __post_init__(self) -> None:
        check_lineage_name(self.name)
        if self.group is not None:
            check_lineage_name(self.group, "--group")

    @property
    def as_served(self) -> ServeConfig:
        return ServeConfig(blk_file=self.disk, name=self.name, socket_path=socket_of(self.name))


def create_disk(new: NewDisk) -> Lineage:
    """The name means the disk's record from here on. Refused, with nothing changed, where the name is taken,
    or the disk has another name, is in use, or is not the current one of its record. ConfigError, DiskError,
    StateRecordError."""
    directory = default_directory()
    _become_owner(directory)
    make_directory(directory)
    names = Names(directory)
    names.check_free(new.name, None)
    use_network(new.as_served.network_use)
    place = _record_that_knows(new, directory)
    if place is not None:
        names.check_free(new.name, place)
    if place is None or new.mirror is not None:
        place = _begin_record(new, directory)
    lineage = Lineage(new.name, place, new.group)
    names.give(lineage)
    return lineage


def _become_owner(directory: Path) -> None:
    """What root made there, the backend's own user could not read; and what that user may not open, its
    backend could not serve."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return
    if os.geteuid() != 0 or status.st_uid == 0:
        return
    try:
        entry = pwd.getpwuid(status.st_uid)
    except KeyError as error:
        raise ConfigError(
            f"{directory} belongs to user {status.st_uid}, whom this machine does not know; give it to "
            f"the user of the backends"
        ) from error
    groups = os.getgrouplist(entry.pw_name, status.st_gid)
    change_user(User(entry.pw_name, status.st_uid, status.st_gid, tuple(groups)))


def _record_that_knows(new: NewDisk, directory: Path) -> Path | None:
    """Of this very disk, as the current one; a backend may be using it. None: there is no record yet."""
    try:
        disk = kinds.identify(new.disk)
    except OSError as error:
        raise DiskError(f"{new.disk} cannot be looked at: {error.strerror}") from error
    place = Index(directory, RealFileSystem()).record_of(disk)
    record = StateFile(place).load()
    if record is None:
        return None
    if not same(record.current, disk):
        check_start(record, disk, place)  # it says what the disk is instead
        return None
    if new.mirror is not None and record.peer is not None:
        raise StateRecordError(
            f"{named(place)} knows another disk beside {new.disk} already, {record.peer.path}; leave out "
            f"--mirror, and start a mirror once the backend runs"
        )
    return place


def _begin_record(new: NewDisk, directory: Path) -> Path:
    """As a first start does, and ended in order."""
    opened = open_device(new.as_served, directory, lambda: None)
    try:
        store, record = opened.store, opened.record
        assert isinstance(store, StateFile) and record is not None
        peer = None
        if new.mirror is not None:
            peer = _attach(new.mirror, opened)
        try:
            known = store.load()
            assert known is not None
            now = opened.disk.as_it_is()
            store.change(known.detached(now, peer.as_it_is() if peer is not None else None))
        finally:
            if peer is not None:
                peer.close()
        return store.path
    finally:
        opened.close()


def _attach(target: MirrorTarget, opened: Opened) -> Disk:
    """The destination, which the record has as one that is wanted and worth nothing yet."""
    store, record, shape = opened.store, opened.record, opened.shape
    assert store is not None and record is not None
    disk, made = open_destination(
        target, Place.of(opened.disk), shape.capacity_bytes, shape.block_bytes, DESTINATION_LOCK_S,
        record.disks,
    )  # fmt: skip
    try:
        if not (target.create or target.force):
            check_holds_nothing(disk)
        if not target.force and (other := store.other_record(disk.identity)) is not None:
            raise StateRecordError(
                f"{disk.name} belongs to {named(other)}; name another destination or, if it is needed "
                f"there no more, add --force"
            )
        copied = any(each.mark == disk.identity.mark for each in record.disks)
        copied = copied or store.is_copied_mark(disk.identity)
        marked = disk.with_mark(None if copied else disk.identity.mark)
        wanted = Wanted(target.name, target.cache, target.speed_bytes_per_s)
        store.change(record.with_peer(marked.identity).with_wanted(wanted))
    except BaseException:
        discard(disk, made)
        raise
    borne = marked.bear_mark()
    if borne.identity != marked.identity:
        store.change(record.with_peer(borne.identity).with_wanted(wanted))
    return borne
