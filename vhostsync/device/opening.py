# SPDX-License-Identifier: Apache-2.0
"""The device before its engine runs: its disk, opened and locked; what the state record says of it; its
bitmap; what the guest will see. What has to be durable before the guest is served is written here. Blocks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from vhostsync.config import ServeConfig
from vhostsync.engine.engine import bitmap_file_bytes
from vhostsync.errors import DamagedRecordError, DiskError, FenceError, StateRecordError, SupersededError
from vhostsync.mirror.fence import Fence, Means
from vhostsync.option_values import Answer
from vhostsync.record import record_report
from vhostsync.record.bitmap import BitmapFile, Shape, Trust
from vhostsync.record.record_store import RecordStore
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_index import open_state_file
from vhostsync.record.state_record import GuestDisk, StateRecord, Worth, timestamp
from vhostsync.record.who_may_serve import check_start
from vhostsync.storage.disk import Disk
from vhostsync.storage.identity import DiskIdentity, Likeness, same
from vhostsync.storage.kinds import kind_of, open_disk
from vhostsync.vhost_user.virtio_blk import DeviceShape

log = structlog.get_logger(__name__)

# A killed predecessor's I/O goes on for tens of milliseconds in the kernel, and its lock with it.
SOURCE_LOCK_S = 5.0


@dataclass(frozen=True)
class Opened:
    """The device before its engine runs."""

    disk: Disk
    shape: DeviceShape
    store: RecordStore | None
    record: StateRecord | None
    bitmap: BitmapFile | None = None
    peer_left: DiskIdentity | None = None  # how the peer looked at the last clean end
    spared: tuple[tuple[int, int], ...] = ()  # what the peer held better when the last run ended
    peer_until_ns: int | None = None  # after a crash: until when the peer's changes are the last run's own
    fence: Fence = Fence()  # noqa: RUF009 frozen
    peer_equal: bool = False  # the predecessor has handed both disks over, and they hold the same

    @property
    def peer_known(self) -> bool:
        """The bitmap tells where the peer differs; without one it differs nowhere."""
        record = self.record
        if self.bitmap is None:
            return self.peer_equal
        return record is not None and record.bitmap == self.bitmap.token

    def close(self) -> None:
        self.disk.close()
        self.fence.close()
        if self.bitmap is not None:
            self.bitmap.close(clean=True)
        if self.store is not None:
            self.store.close()


def open_device(
    config: ServeConfig, state_directory: Path | None, become_user: Callable[[], None],
    *, handed_over_equal: bool = False,
) -> Opened:
    """Open and lock the disk as whoever started this; the rest, which is opened again later, after
    `become_user`. Follow the state record. `handed_over_equal`: a predecessor says that both disks hold the
    same. Blocks. DiskError, StateRecordError."""
    disk = _open_source(config, state_directory)
    store, bitmap, fence = None, None, Fence()
    try:
        become_user()
        fence = Fence.of(config)
        if config.no_state_file:
            check_raw(config, disk)
            return Opened(disk, device_shape(config, disk), None, None, fence=fence)
        store = open_state_file(
            config.state_file, disk.identity, lock_timeout_s=SOURCE_LOCK_S, directory=state_directory,
            answer=config.answer, of_name=config.record_of_name,
        )  # fmt: skip
        store.tell_backend(config.control_socket)
        found, record = check_record(store, disk, config.answer)
        equal = handed_over_equal and _left_equal(found, record, disk)
        disk = _fenced_off(config, disk, found, fence)
        known = found.disks if found is not None else ()
        if all(each.likeness(disk.identity) is Likeness.OTHER for each in known):
            check_raw(config, disk)
        shape = device_shape(config, disk, record)
        if config.bitmap is not None and not config.read_only:
            bitmap = _open_bitmap(config, disk, shape, found, record)
        equal = equal and bitmap is None  # what one has marked is copied, as after any restart
        spared = record.spared if record is not None else ()
        disk, record = begin_record(disk, store, found, record, bitmap, shape.guest, config.answer)
        left = found.peer if found is not None and found.clean else None
        until_ns = bitmap.peer_until_ns if bitmap is not None else None
        return Opened(disk, shape, store, record, bitmap, left, spared, until_ns, fence, equal)
    except BaseException:
        fence.close()
        if bitmap is not None:
            bitmap.close(clean=False)
        disk.close()
        if store is not None:
            store.close()
        raise


def _left_equal(found: StateRecord | None, record: StateRecord | None, disk: Disk) -> bool:
    """Nothing speaks against what the predecessor says of both disks. How the peer looks is asked when it is
    attached (peer.py)."""
    if found is None or record is None:
        return False
    spoilt = found.doubt or found.spared or found.different_since is not None
    up_to_date = found.clean and found.peer_worth is Worth.UP_TO_DATE and record.peer is not None
    # The operator's answer may have made another disk of it.
    same_disk = found.epoch == record.epoch
    return up_to_date and same_disk and not spoilt and _changed_since_the_end(found, disk) is None


def _open_source(config: ServeConfig, state_directory: Path | None) -> Disk:
    try:
        disk = open_disk(
            config.disk,
            read_only=config.read_only,
            cache=config.cache,
            lock_timeout_s=SOURCE_LOCK_S,
            known=_recorded_disks(config, state_directory),
        )
        if disk.why_no_source is not None and not config.read_only:
            disk.close()
            raise DiskError(f"no guest can be served from {disk.name}: {disk.why_no_source}")
        return disk
    except DiskError as error:
        # The worst day: a record may know where the guest's data is.
        known = [config.state_file] if config.state_file is not None else []
        if state_directory is not None:
            known += record_report.records_in(state_directory)
        good = record_report.good_copy(config.disk, known)
        if good is None:
            raise
        raise DiskError(f"{error}; {good}") from error


def _recorded_disks(config: ServeConfig, state_directory: Path | None) -> Iterator[DiskIdentity]:
    """All that records within reach have of disks. Looked for only where somebody asks."""
    places = [config.state_file] if config.state_file is not None else []
    if state_directory is not None:
        places += record_report.records_in(state_directory)
    for place in places:
        try:
            record = StateFile(place).load()
        except StateRecordError as error:
            log.warning("a state record is left out", record=str(place), reason=str(error))
            continue
        if record is not None:
            yield from record.disks


def _fenced_off(config: ServeConfig, disk: Disk, found: StateRecord | None, fence: Fence) -> Disk:
    """The disk, opened once more where that is needed: nothing is written to it while a lost connection of
    the last run may have something under way there. DiskError."""
    known = found is not None and any(same(each, disk.identity) for each in found.unfenced)
    if not known or disk.read_only or kind_of(disk.name).fences_itself or config.fenced:
        return disk
    match fence.means:
        case Means.LIMIT:
            return disk
        case Means.HAND:
            raise DiskError(
                f"requests of the last run may still be carried out at {disk.name}, and nothing says when "
                f"they are over; end that server's process, then start with --fenced, or use "
                f"--fence-command or --fence limit"
            )
        case Means.COMMAND:
            disk.close()
            try:
                fence.make_certain_blocking(disk.name)
            except FenceError as error:
                raise DiskError(str(error)) from error
            return _opened_again(config, disk)


def _opened_again(config: ServeConfig, former: Disk) -> Disk:
    disk = open_disk(
        former.name, read_only=config.read_only, cache=config.cache, lock_timeout_s=SOURCE_LOCK_S
    )
    if not same(disk.identity, former.identity):
        disk.close()
        raise DiskError(f"{former.name} is another disk since --fence-command has run; start once more")
    return disk


def check_raw(config: ServeConfig, disk: Disk) -> None:
    """DiskError when a disk that no record knows is an image of another format: the guest would see the
    container, and perhaps write into it. One that is known is raw: its guest may write such a header."""
    if config.disk_format == "raw":
        return
    try:
        found = disk.image_format()
    except OSError as error:
        # Bad sectors are no reason to keep its guest from the rest: the way to save that is a mirror.
        log.warning(
            "the disk is taken for a raw one, unseen: where it would show another format, it cannot be read",
            path=disk.name, error=error.strerror,
        )  # fmt: skip
        return
    if found is not None:
        raise DiskError(
            f"{disk.name} is a {found} image, and only raw disks can be served; convert it (qemu-img convert "
            f"-O raw), or attach it to a block device with qemu-nbd and serve that, or, if it is a raw disk "
            f"on which the guest keeps such an image, use --format raw"
        )


def check_record(
    store: RecordStore, disk: Disk, answer: Answer | None = None
) -> tuple[StateRecord | None, StateRecord | None]:
    """What was found, and with what this run may begin. StateRecordError."""
    try:
        found = store.load()
    except DamagedRecordError as error:
        if answer is not Answer.PROMOTE:
            raise
        log.warning("promoted: a new record is begun", path=disk.name, former=str(error))
        return None, None
    if found is None:
        return None, None
    if answer is Answer.NEW_DISK:
        raise StateRecordError(
            f"--new-disk begins a record of its own, and there is one already, {store.place}; leave the "
            f"option out to see what that says of {disk.name}, or name another --state-file"
        )
    record = check_start(found, disk.identity, store.place, answer)
    if found.clean and record.bitmap is not None and (why := _changed_since_the_end(found, disk)):
        log.warning("somebody changed the disk: its peer needs a full copy", path=disk.name, why=why)
        record = record.with_bitmap(None)
    return found, _without_lost_peer(store, record)


def _changed_since_the_end(found: StateRecord, disk: Disk) -> str | None:
    """How the current disk was changed since the last run has ended in order."""
    now = disk.as_it_is()
    # The operator may have said that it is the same one, although it does not show.
    left = replace(now, bytes=found.current.bytes, ctime_ns=found.current.ctime_ns)
    return now.changed_since(left)


def _without_lost_peer(store: RecordStore, record: StateRecord) -> StateRecord:
    """A peer that another lineage has taken meanwhile is not ours to write to, or to speak of."""
    if record.peer is None:
        return record
    try:
        other = store.other_record(record.peer)
        if other is None:
            return record
        log.warning(
            "the last destination belongs to another state record by now: no mirror is resumed to it",
            path=record.peer.path, record=str(other),
        )  # fmt: skip
    except StateRecordError as error:
        log.warning("no mirror is resumed to the last destination", path=record.peer.path, reason=str(error))
    return record.without_peer()


def begin_record(
    disk: Disk, store: RecordStore, found: StateRecord | None, record: StateRecord | None,
    bitmap: BitmapFile | None, guest: GuestDisk | None, answer: Answer | None = None,
) -> tuple[Disk, StateRecord | None]:
    """What has to be durable before the guest is served. The record knows a mark before the disk bears it."""
    marked, record = _recognisable(disk, store, found, record, answer)
    record = follow_record(store, found, record, marked, bitmap, guest)
    return _bearing_its_mark(store, marked, record, disk)


def _recognisable(
    disk: Disk, store: RecordStore, found: StateRecord | None, record: StateRecord | None,
    answer: Answer | None,
) -> tuple[Disk, StateRecord | None]:
    """As they are once the disk bears its mark. A disk that is not the recorded one, or a copy of one that
    is, gets a mark that no other has."""
    if disk.read_only:
        return disk, record
    mark = disk.identity.mark
    if record is None or found is None:
        if answer is Answer.NEW_DISK or store.is_copied_mark(disk.identity):
            mark = None
    elif (known := found.of_disk(disk.identity)) is not None:
        mark = known.mark or mark
    else:
        mark = None if answer is Answer.PROMOTE else record.current.mark
    disk = disk.with_mark(mark)
    if record is not None:
        record = replace(record, current=disk.identity)
    return disk, record


def _bearing_its_mark(
    store: RecordStore, disk: Disk, record: StateRecord | None, unmarked: Disk
) -> tuple[Disk, StateRecord | None]:
    """The disk bears its mark from here on, which the record knows by now. Where that could not be written
    yet, or the mark not be set, the disk stays as it was, and the record has it so."""
    if disk.read_only or record is None:
        return disk, record
    told, disk = disk.identity, unmarked if store.late else disk.bear_mark()
    if disk.identity == told:
        return disk, record
    record = replace(record, current=disk.identity)
    if not store.late:
        _write(store, record, None)
    return disk, record


def _open_bitmap(
    config: ServeConfig, disk: Disk, shape: DeviceShape, found: StateRecord | None, record: StateRecord | None
) -> BitmapFile:
    assert config.bitmap is not None
    capacity = shape.capacity_bytes
    region_bytes = config.region_bytes(capacity)
    bits = Shape(capacity, region_bytes, max(config.al_extent_bytes, region_bytes), config.al_extents)
    return BitmapFile.open(
        config.bitmap, bits, bitmap_file_bytes(bits), record, lock_timeout_s=SOURCE_LOCK_S,
        known=found.current if found else None, ctime_ns=disk.as_it_is().ctime_ns,
    )  # fmt: skip


def follow_record(
    store: RecordStore, found: StateRecord | None, record: StateRecord | None, disk: Disk,
    bitmap: BitmapFile | None, guest: GuestDisk | None = None,
) -> StateRecord | None:
    """Writes what has to be known durably before the guest is served. `guest`: what that is told."""
    if disk.read_only:
        return record
    if record is None:
        return _first_record(store, disk, guest)
    assert found is not None
    if guest is not None:
        record = record.with_guest(guest)
    # A bitmap that sees not every write of this run is worth nothing after it.
    trusted = bitmap is not None and bitmap.trust is not Trust.FRESH
    token = bitmap.token if bitmap is not None and trusted else None
    record = replace(record, clean=False, bitmap=token, spared=())
    if record.peer_worth is Worth.UP_TO_DATE:
        # From here on the guest's flushes are confirmed without the peer.
        record = record.with_worth(Worth.OUTDATED, timestamp())
    record = _with_requests_under_way(record, disk)
    if record != found or store.unresolved:
        _write(store, record, _what_waits_for_it(store, found, record))
    return record


def _first_record(store: RecordStore, disk: Disk, guest: GuestDisk | None) -> StateRecord:
    """From here on the disk is known, and known to be raw, whatever its guest writes to it."""
    record = _with_requests_under_way(StateRecord.first(disk.identity, guest), disk)
    _write(store, record, "does not know what is under way at that disk" if record.unfenced else None)
    return record


def _with_requests_under_way(record: StateRecord, disk: Disk) -> StateRecord:
    return record if kind_of(disk.name).fences_itself else record.with_unfenced(disk.identity)


def _what_waits_for_it(store: RecordStore, found: StateRecord, record: StateRecord) -> str | None:
    """What the record that was found would say wrongly once the guest has written; None: nothing. That the
    last run has ended in order, it says of nothing but these."""
    if store.unresolved is not None:
        return store.unresolved
    if record.epoch != found.epoch:
        return f"calls {found.current.path} the current disk"
    if len(record.unfenced) > len(found.unfenced):
        return f"says that nothing is under way at {record.current.path}"
    if found.peer is not None and found.peer_worth is Worth.UP_TO_DATE:
        return f"calls {found.peer.path} up to date"
    if found.bitmap is not None:
        return "names a bitmap"
    return "lists what the other disk holds better" if found.spared else None


def _write(store: RecordStore, record: StateRecord, waits: str | None) -> None:
    """Before the guest is served; later, where nothing waits for it: a full disk of the record then keeps
    nobody from serving. StateRecordError."""
    try:
        store.change(record)
    except SupersededError:
        raise
    except StateRecordError as error:
        if waits is not None:
            raise StateRecordError(
                f"{error}; what is there {waits}, which would not be true any more once the guest has "
                f"written, so it is not served before: make room for the record, or whatever else it lacks"
            ) from error
        log.warning("the state record is written as soon as it can be", error=str(error))
        store.late = True


def device_shape(config: ServeConfig, disk: Disk, record: StateRecord | None = None) -> DeviceShape:
    """What the guest will see of the disk: what it has been told, whatever disk it is on by now; of a disk
    that never had another beside it, what the disk is. DiskError when the disk cannot give it, or another
    block size is asked for."""
    told = record.guest if record is not None and record.at_stake else None
    guest = _as_told(config, disk, told) if told is not None else _as_the_disk(config, disk)
    return DeviceShape(
        capacity_bytes=guest.capacity_bytes,
        block_bytes=guest.block_bytes,
        physical_block_bytes=guest.physical_block_bytes,
        discard_bytes=guest.discard_bytes,
        num_queues=config.num_queues,
        read_only=config.read_only,
        writeback=config.write_cache,
        packed_rings=config.packed_rings,
    )


def _as_told(config: ServeConfig, disk: Disk, told: GuestDisk) -> GuestDisk:
    if config.block_bytes not in (None, told.block_bytes):
        raise DiskError(
            f"--block-size {config.block_bytes} would change the guest's disk, which has had blocks of "
            f"{told.block_bytes} bytes; leave the option out"
        )
    if told.block_bytes < disk.logical_block_bytes:
        raise DiskError(
            f"{disk.name} can be accessed in {disk.logical_block_bytes} bytes only, and the guest's "
            f"disk has had blocks of {told.block_bytes}; serve it from a disk with smaller blocks, or an "
            f"image file with --cache=writeback"
        )
    if disk.bytes < told.capacity_bytes:
        raise DiskError(
            f"{disk.name} has {disk.bytes} bytes, and the guest's disk has had {told.capacity_bytes} "
            f"({told.capacity_bytes - disk.bytes} more); enlarge it, or restore what was cut off"
        )
    if disk.bytes - told.capacity_bytes >= told.block_bytes:
        log.info(
            "the disk is larger than what the guest was told: `vhostsync resize` shows it the rest",
            path=disk.name, bytes=disk.bytes, capacity_bytes=told.capacity_bytes,
        )  # fmt: skip
    return told


def _as_the_disk(config: ServeConfig, disk: Disk) -> GuestDisk:
    block = config.block_bytes or max(512, disk.logical_block_bytes)
    if block < disk.logical_block_bytes:
        raise DiskError(
            f"--block-size {block} is smaller than the {disk.logical_block_bytes} bytes in which "
            f"{disk.name} can be accessed; leave the option out, or use --cache=writeback"
        )
    capacity = disk.bytes - disk.bytes % block
    if capacity != disk.bytes:
        log.warning("the end of the disk is no whole block and is not shown", bytes=disk.bytes - capacity)
    return GuestDisk(capacity, block, disk.physical_block_bytes, disk.discard_granularity_bytes)
