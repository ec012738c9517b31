# SPDX-License-Identifier: Apache-2.0
"""The device before its engine runs: its disk, opened and locked; what the state record says of it; its
bitmap; what the guest will see. What has to be durable before the guest is served is written here. Blocks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from vhostsync import disks
from vhostsync.bitmap import BitmapFile, Shape, Trust
from vhostsync.config import ServeConfig
from vhostsync.disk_signatures import image_format
from vhostsync.disks import Disk
from vhostsync.engine import bitmap_file_bytes, probe
from vhostsync.errors import DiskError, StateRecordError
from vhostsync.state_file import StateFile
from vhostsync.state_index import open_state_file
from vhostsync.state_record import DiskIdentity, Likeness, StateRecord, Worth, check_start
from vhostsync.virtio_blk import DeviceShape

log = structlog.get_logger(__name__)

# A killed predecessor's I/O goes on for tens of milliseconds in the kernel, and its lock with it.
SOURCE_LOCK_S = 5.0


@dataclass(frozen=True)
class Opened:
    """The device before its engine runs."""

    disk: Disk
    state_file: StateFile | None
    record: StateRecord | None
    bitmap: BitmapFile | None = None
    peer_left: DiskIdentity | None = None  # how the peer looked at the last clean end
    spared: tuple[tuple[int, int], ...] = ()  # what the peer held better when the last run ended

    @property
    def peer_known(self) -> bool:
        """The bitmap tells where the peer differs."""
        record = self.record
        return self.bitmap is not None and record is not None and record.bitmap == self.bitmap.token

    def close(self) -> None:
        self.disk.close()
        if self.bitmap is not None:
            self.bitmap.close(clean=True)
        if self.state_file is not None:
            self.state_file.close()


def open_device(
    config: ServeConfig, state_directory: Path | None, become_user: Callable[[], None]
) -> Opened:
    """Open and lock the disk as whoever started this; the rest, which is opened again later, after
    `become_user`. Follow the state record. Blocks. DiskError, StateRecordError."""
    disk = disks.open_disk(
        config.blk_file,
        read_only=config.read_only,
        cache=config.cache,
        lock_timeout_s=SOURCE_LOCK_S,
        probe=probe,
    )
    state_file, bitmap = None, None
    try:
        become_user()
        if config.no_state_file:
            check_raw(config, disk)
            return Opened(disk, None, None)
        state_file = open_state_file(
            config.state_file, disk.identity, lock_timeout_s=SOURCE_LOCK_S, directory=state_directory
        )
        found, record = check_record(state_file, disk)
        if found is None or found.current.likeness(disk.identity) is Likeness.OTHER:
            check_raw(config, disk)
        if config.bitmap is not None and not config.read_only:
            bitmap = _open_bitmap(config, disk, record)
        spared = record.spared if record is not None else ()
        record = follow_record(state_file, found, record, disk, bitmap)
        left = found.peer if found is not None and found.clean else None
        return Opened(disk, state_file, record, bitmap, left, spared)
    except BaseException:
        if bitmap is not None:
            bitmap.close(clean=False)
        disk.close()
        if state_file is not None:
            state_file.close()
        raise


def check_raw(config: ServeConfig, disk: Disk) -> None:
    """DiskError when a disk that no record knows is an image of another format: the guest would see the
    container, and perhaps write into it. One that is known is raw: its guest may write such a header."""
    if config.disk_format == "raw":
        return
    try:
        found = image_format(disk.fd.fileno())
    except OSError as error:
        raise DiskError(f"{disk.path} cannot be read: {error.strerror}") from error
    if found is not None:
        raise DiskError(
            f"{disk.path} is a {found} image, and only raw disks can be served; convert it (qemu-img convert "
            f"-O raw), or attach it to a block device with qemu-nbd and serve that, or, if it is a raw disk "
            f"on which the guest keeps such an image, use --format raw"
        )


def check_record(state_file: StateFile, disk: Disk) -> tuple[StateRecord | None, StateRecord | None]:
    """What was found, and with what this run may begin. StateRecordError."""
    found = state_file.load()
    if found is None:
        return None, None
    record = check_start(found, disk.identity, state_file.path)
    now = disks.identify(disk.fd.fileno(), disk.path, with_ctime=True)
    if found.clean and record.bitmap is not None and (why := now.changed_since(found.current)):
        log.warning("somebody changed the disk: its peer needs a full copy", path=str(disk.path), why=why)
        record = record.with_bitmap(None)
    return found, _without_lost_peer(state_file, record)


def _without_lost_peer(state_file: StateFile, record: StateRecord) -> StateRecord:
    """A peer that another lineage has taken meanwhile is not ours to write to, or to speak of."""
    if record.peer is None:
        return record
    try:
        other = state_file.other_record(record.peer)
        if other is None:
            return record
        log.warning(
            "the last destination belongs to another state record by now: no mirror is resumed to it",
            path=record.peer.path, record=str(other),
        )  # fmt: skip
    except StateRecordError as error:
        log.warning("no mirror is resumed to the last destination", path=record.peer.path, reason=str(error))
    return record.without_peer()


def _open_bitmap(config: ServeConfig, disk: Disk, record: StateRecord | None) -> BitmapFile:
    assert config.bitmap is not None
    capacity = device_shape(config, disk).capacity_bytes
    region_bytes = config.region_bytes(capacity)
    shape = Shape(capacity, region_bytes, max(config.al_extent_bytes, region_bytes), config.al_extents)
    return BitmapFile.open(
        config.bitmap, shape, bitmap_file_bytes(shape), record, lock_timeout_s=SOURCE_LOCK_S
    )


def follow_record(
    state_file: StateFile, found: StateRecord | None, record: StateRecord | None, disk: Disk,
    bitmap: BitmapFile | None,
) -> StateRecord | None:
    """Writes what has to be known durably before the guest is served."""
    if disk.read_only:
        return record
    if record is None:
        return _first_record(state_file, disk)
    assert found is not None
    # A bitmap that sees not every write of this run is worth nothing after it.
    trusted = bitmap is not None and bitmap.trust is not Trust.FRESH
    token = bitmap.token if bitmap is not None and trusted else None
    record = replace(record, clean=False, bitmap=token, spared=())
    if record.peer_worth is Worth.UP_TO_DATE:
        # From here on the guest's flushes are confirmed without the peer.
        record = record.with_worth(Worth.OUTDATED, _since_last_time(found))
    if record != found or state_file.announced:
        _write(state_file, record, _what_waits_for_it(state_file, found))
    return record


def _first_record(state_file: StateFile, disk: Disk) -> StateRecord:
    """From here on the disk is known to be raw, whatever its guest writes to it."""
    record = StateRecord.first(disk.identity)
    _write(state_file, record, None)
    return record


def _what_waits_for_it(state_file: StateFile, found: StateRecord) -> str | None:
    """What the record that was found would say wrongly once the guest has written; None: nothing. That the
    last run has ended in order, it says of nothing but these."""
    if state_file.announced:
        return "speaks of a switch"
    if found.peer is not None and found.peer_worth is Worth.UP_TO_DATE:
        return f"calls {found.peer.path} up to date"
    if found.bitmap is not None:
        return "names a bitmap"
    return "lists what the other disk holds better" if found.spared else None


def _write(state_file: StateFile, record: StateRecord, waits: str | None) -> None:
    """Before the guest is served; later, where nothing waits for it: a full disk of the record then keeps
    nobody from serving. StateRecordError."""
    try:
        state_file.write(record)
    except StateRecordError as error:
        if waits is not None:
            raise StateRecordError(
                f"{error}; what is there {waits}, which would not be true any more once the guest has "
                f"written, so it is not served before: make room for the record, or whatever else it lacks"
            ) from error
        log.warning("the state record is written as soon as it can be", error=str(error))
        state_file.late = True


def _since_last_time(record: StateRecord) -> str:
    return "the end of the last run" if record.clean else "a crash of the last run"


def device_shape(config: ServeConfig, disk: Disk) -> DeviceShape:
    """What the guest will see of the disk. DiskError when the block size asked for does not fit it."""
    found = disk.probe
    block = config.block_bytes or max(512, found.logical_block_bytes)
    if block < found.logical_block_bytes:
        raise DiskError(
            f"--block-size {block} is smaller than the {found.logical_block_bytes} bytes in which "
            f"{disk.path} can be accessed; leave the option out, or use --cache=writeback"
        )
    capacity = disk.bytes - disk.bytes % block
    if capacity != disk.bytes:
        log.warning("the end of the disk is no whole block and is not shown", bytes=disk.bytes - capacity)
    return DeviceShape(
        capacity_bytes=capacity,
        block_bytes=block,
        physical_block_bytes=found.physical_block_bytes,
        discard_bytes=found.discard_granularity_bytes,
        num_queues=config.num_queues,
        read_only=config.read_only,
        writeback=config.write_cache,
    )
