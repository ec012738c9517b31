# SPDX-License-Identifier: Apache-2.0
"""The data plane as Python sees it: commands that are awaited, events, snapshots.

The only importer of the binding (`vhostsync._shim`, made from c_shim/shim_*.h), with engine_attachment.py,
engine_event.py and, for the disks of this host, storage/native.py. A command is handed to the engine's thread
and returns a token at once; its completion arrives through the event descriptor, which `pump` watches. So
nothing here blocks the event loop, and no Python object is ever touched by the C threads.
"""

import errno
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import anyio
import anyio.to_thread
import structlog

from vhostsync._shim import ffi, lib
from vhostsync._source_hash import expected_source_hash
from vhostsync.engine.engine_attachment import EngineAttachment
from vhostsync.engine.engine_event import EngineEvent, event_of
from vhostsync.engine.snapshot import ROLES, QueueStats, Snapshot, State, queue_stats_of, snapshot_of
from vhostsync.errors import ConfigError, EngineError
from vhostsync.host.owned_fd import OwnedFd
from vhostsync.limits import KINDS, NO_LIMITS, Limits
from vhostsync.record.bitmap import BitmapFile, Shape, Trust
from vhostsync.record.record_store import Mark
from vhostsync.storage.disk import Disk
from vhostsync.vhost_user.attachment import MemoryRegion
from vhostsync.vhost_user.ring_watch import RingsSeen

log = structlog.get_logger(__name__)

_built = ffi.string(lib.vs_source_hash()).decode()
if (_expected := expected_source_hash()) not in (None, _built):
    raise ImportError(
        "the C part of vhostsync was built from other sources than those in c_shim/; build it again "
        "(pip install --no-build-isolation -e .)"
    )

ATTACHMENTS_MAX: Final[int] = lib.VS_MAX_ATTACHMENTS
QUEUES_MAX: Final[int] = lib.VS_MAX_QUEUES

LOSSES: Final = {
    lib.VS_LOSS_MEMORY: "its memory is gone: the frontend has shrunk the file behind it",
    lib.VS_LOSS_DIRTY_LOG: "its dirty log is gone, or smaller than the memory that the guest uses",
}
"""enum vs_loss: why an attachment was lost, for people."""

# snapshot.py and limits.py do without the binding, and so with numbers of their own.
assert list(State) == [lib.VS_PASSTHROUGH, lib.VS_SYNCING, lib.VS_STEADY, lib.VS_AHEAD, lib.VS_DEGRADED]
assert lib.VS_BREACH_NO_STATUS == 6
assert [getattr(lib, f"VS_{kind.upper()}") for kind in KINDS] == list(range(lib.VS_LIMITED_KINDS))


@dataclass(frozen=True)
class EngineConfig:
    """struct vs_engine_config. `options`: its other members, most of them from ServeConfig.for_engine."""

    capacity_bytes: int
    block_bytes: int
    num_queues: int
    options: Mapping[str, int]
    serial: str = ""
    doubt: tuple[tuple[int, int], ...] = ()  # offset, length: what an earlier run has left in doubt
    spared: tuple[tuple[int, int], ...] = ()  # of these: what the peer held better
    limits: Limits = NO_LIMITS

    def to_c(self) -> Any:
        """AttributeError where an option is no member."""
        made = ffi.new("struct vs_engine_config *")
        for name, value in self.options.items():
            setattr(made, name, value)
        made.capacity_bytes = self.capacity_bytes
        made.block_bytes = self.block_bytes
        made.queues_max = self.num_queues
        made.serial = self.serial.encode("ascii")
        made.doubt_count, made.spared_count = len(self.doubt), len(self.spared)
        for c_ranges, ranges in ((made.doubt, self.doubt), (made.spared, self.spared)):
            for i, (offset, length) in enumerate(ranges):
                c_ranges[i].offset, c_ranges[i].length = offset, length
        made.limits = _c_limits(self.limits)[0]
        return made


def _c_limits(limits: Limits) -> Any:
    rates = [(rate.per_s, rate.burst, rate.length_s) for rate in limits.rates().values()]
    return ffi.new("struct vs_limits *", (rates, limits.iops_size))


def _c_shape(shape: Shape) -> Any:
    return ffi.new("struct vs_bitmap_shape *", asdict(shape))


def bitmap_file_bytes(shape: Shape) -> int:
    """How large the file of a dirty bitmap is. ConfigError."""
    size: int = lib.vs_bitmap_file_bytes(_c_shape(shape))
    if size == 0:
        raise ConfigError(
            f"A bitmap with regions of {shape.region_bytes} bytes and {shape.extents} extents of "
            f"{shape.extent_bytes} bytes does not suit a disk of {shape.capacity_bytes} bytes: at most "
            f"{lib.VS_BITMAP_REGIONS_MAX:,} regions, extents no smaller than a region, and room for 1 GiB in "
            f"the extents; change --dirty-region-size, --al-extents or --al-extent-size."
        )
    return size


def _engine_bitmap(file: BitmapFile) -> Any:
    """A vs_bitmap on a descriptor of its own. EngineError."""
    out = ffi.new("vs_bitmap **")
    fd = os.dup(file.fd)
    rc = lib.vs_bitmap_open(fd, _c_shape(file.header.shape), int(file.trust), out)
    if rc < 0:
        os.close(fd)
        raise EngineError.from_errno(f"opening the bitmap {file.path}", rc)
    bad, added = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    lib.vs_bitmap_found(out[0], bad, added)
    if file.trust is not Trust.FRESH:
        log.info(
            "the dirty bitmap goes on", path=str(file.path), damaged_blocks=bad[0],
            after_host_crash=file.trust is Trust.AFTER_HOST_CRASH, regions_by_activity_log=added[0],
        )  # fmt: skip
    file.opened_by_engine()
    return out[0]


class _Waiter:
    """Somebody who awaits a command."""

    def __init__(self, kind: int, doing: str) -> None:
        self.kind = kind
        self.done = anyio.Event()
        self.result = 0
        self.value = 0
        self._doing = doing

    def outcome(self) -> int:
        """Once it is done. EngineError, beginning with what it was about."""
        if self.result < 0:
            raise EngineError.from_errno(self._doing, self.result)
        return self.value


class Engine:
    """One engine. `pump` must run as long as anybody awaits anything of it."""

    def __init__(self, handle: Any, config: EngineConfig) -> None:
        self._handle = handle
        self.config = config
        self._waiters: dict[int, _Waiter] = {}
        self._listeners: list[Callable[[EngineEvent], None]] = []
        self._attachments: dict[int, EngineAttachment] = {}
        self.requests_left = False  # by `leave_requests`: not all that was taken up is answered
        self.unanswered: frozenset[str] = frozenset(ROLES)
        """After `close`: which disks ("source", "destination") may still carry out what they were sent."""

    @classmethod
    async def create(
        cls, config: EngineConfig, source: Disk, bitmap: BitmapFile | None = None, *, peer_known: bool = False
    ) -> "Engine":
        """Start the data plane on `source`, whose descriptor it then owns. `peer_known`: the bitmap tells
        what differs from a peer. EngineError."""
        return await anyio.to_thread.run_sync(cls.create_blocking, config, source, bitmap, peer_known)

    @classmethod
    def create_blocking(
        cls, config: EngineConfig, source: Disk, bitmap: BitmapFile | None, peer_known: bool
    ) -> "Engine":
        """`create`, before there is an event loop."""
        c_config = config.to_c()
        c_config.peer_tracked = peer_known
        c_config.bitmap = ffi.NULL if bitmap is None else _engine_bitmap(bitmap)
        disk = source.to_engine()
        out, step = ffi.new("vs_engine **"), ffi.new("const char **")
        rc = lib.vs_engine_create(c_config, disk, out, step)
        if rc < 0:
            lib.vs_disk_close(disk)
            if bitmap is not None:
                lib.vs_bitmap_close(c_config.bitmap)
            failed_in = ffi.string(step[0]).decode()
            raise EngineError.at_start(f"starting the data plane failed in {failed_in}", rc)
        return cls(out[0], config)

    def check_rings_restricted(self) -> None:
        """OSError where the kernel takes any operation in its rings, not only those that the engine has."""
        rc = lib.vs_engine_rings_restricted(self._handle)
        if rc < 0:
            raise OSError(-rc, os.strerror(-rc))

    def on_event(self, listener: Callable[[EngineEvent], None]) -> None:
        """Call `listener`, on the event loop, with every event. It must not block."""
        self._listeners.append(listener)

    async def pump(self) -> None:
        """Deliver completions and events until cancelled."""
        event = ffi.new("struct vs_event *")
        event_fd = lib.vs_engine_event_fd(self._handle)
        while True:
            await anyio.wait_readable(event_fd)
            while lib.vs_engine_next_event(self._handle, event):
                if event.kind == lib.VS_EV_DONE:
                    self._complete(event.token, event.result, event.value)
                else:
                    self._tell(event)

    def _complete(self, token: int, result: int, value: int) -> None:
        waiter = self._waiters.pop(token)
        waiter.result, waiter.value = result, value
        waiter.done.set()

    def _tell(self, c_event: Any) -> None:
        event = event_of(c_event)
        for listener in self._listeners:
            listener(event)

    async def close(self, *, process_ends: bool = False) -> None:
        """End the data plane: what its disks have under way is waited for, but not for ever. `process_ends`:
        nobody waits until the kernel has taken everything back."""
        handle, self._handle = self._handle, None
        end = lib.vs_engine_stop if process_ends else lib.vs_engine_destroy
        roles = await anyio.to_thread.run_sync(end, handle)
        self.unanswered = frozenset(role for number, role in enumerate(ROLES) if roles & (1 << number))

    # ---- commands ------------------------------------------------------------

    async def command(
        self,
        kind: int,
        doing: str,
        *,
        fds: Sequence[OwnedFd] = (),
        regions: Sequence[tuple[MemoryRegion, int]] = (),
        **fields: Any,
    ) -> int:
        """Submit a command and await it; returns the completion's value. EngineError, beginning with `doing`.
        `fds` are those named by the fields and regions: the engine owns them once it has the command."""
        waiter = self._submit(kind, doing, fds, regions, **fields)
        await waiter.done.wait()
        return waiter.outcome()

    def _submit(
        self,
        kind: int,
        doing: str,
        fds: Sequence[OwnedFd] = (),
        regions: Sequence[tuple[MemoryRegion, int]] = (),
        **fields: Any,
    ) -> "_Waiter":
        c_command = ffi.new("struct vs_command *", {"kind": kind, "fd": -1, **fields})
        if regions:
            c_command.memory.count = len(regions)
        for each, (region, fd) in zip(c_command.memory.region, regions, strict=False):
            each.guest_addr = region.guest_addr
            each.bytes = region.bytes
            each.user_addr = region.user_addr
            each.mmap_offset = region.mmap_offset
            each.fd = fd
        token = lib.vs_engine_submit(self._handle, c_command)
        if token == 0:
            raise EngineError.from_errno(f"{doing}: too many commands at once", errno.EAGAIN)
        for fd_owner in fds:
            fd_owner.take()
        waiter = self._waiters[token] = _Waiter(kind, doing)
        return waiter

    async def mirror_start(self, destination: Disk, *, resync: bool, spare_doubt: bool) -> None:
        """Attach `destination` and copy everything to it, or (`resync`) what differs from the peer that is
        tracked; not what is spared (`spare_doubt`: it is the last one, as the mirror has left it). The engine
        owns its descriptor on success."""
        flags = lib.VS_START_RESYNC * resync | lib.VS_START_SPARE_DOUBT * spare_doubt
        disk = destination.to_engine()
        try:
            await self.command(
                lib.VS_CMD_MIRROR_START,
                f"attaching {destination.name}",
                start={"disk": disk, "flags": flags},
            )
        except EngineError:
            await anyio.to_thread.run_sync(lib.vs_disk_close, disk)
            raise

    async def mirror_stop(self) -> None:
        await self.command(
            lib.VS_CMD_MIRROR_STOP, "letting go of the destination", value=lib.VS_REASON_COMMAND
        )

    async def mirror_leave(self) -> None:
        """As if a steady destination were lost: flushes wait until the record is written. EngineError
        (ENOTCONN): it is not steady."""
        await self.command(lib.VS_CMD_MIRROR_LEAVE, "leaving the destination with those of the group")

    async def catch_up(self) -> None:
        """From ahead back to syncing: copy what differs. The record calls the destination inconsistent."""
        await self.command(lib.VS_CMD_CATCH_UP, "catching up with the destination")

    async def mirror_speed(self, bytes_per_s: int) -> None:
        """Limit the bulk copy; 0: no limit."""
        await self.command(lib.VS_CMD_MIRROR_SPEED, "limiting the copy", value=bytes_per_s)

    async def limit(self, limits: Limits) -> None:
        """What the guest may do from now on. EngineError before anything is awaited."""
        await self.command(lib.VS_CMD_LIMIT, "limiting the guest", limits=_c_limits(limits)[0])

    async def mirror_drain(self, *, both_disks: bool = False) -> None:
        """Returns when the destination (both disks) holds durably all that the guest had written when this
        began."""
        await self.command(lib.VS_CMD_MIRROR_DRAIN, "flushing the destination", value=int(both_disks))

    async def disk_bytes(self, role: str) -> int:
        """What the open disk ("source", "destination") has now, whatever has its name by now. EngineError;
        ENOTCONN: there is none."""
        return await self.command(lib.VS_CMD_DISK_SIZE, f"measuring the {role}", value=ROLES.index(role))

    async def grow(self, capacity_bytes: int, source_bytes: int, destination_bytes: int) -> None:
        """Returns when the guest may use the new capacity, and the destination (0 bytes: none) has it, too.
        EngineError, or cancelled: nothing has changed for the guest."""
        growing = self._submit(
            lib.VS_CMD_GROW,
            "making the disk larger",
            grow={
                "capacity_bytes": capacity_bytes,
                "source_bytes": source_bytes,
                "destination_bytes": destination_bytes,
            },
        )
        try:
            await growing.done.wait()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self.command(lib.VS_CMD_GROW_STOP, "ending the growth of the disk")
                await growing.done.wait()
            if growing.result < 0:
                raise
        growing.outcome()
        self.config = replace(self.config, capacity_bytes=capacity_bytes)

    async def verify(self, *, repair: bool, speed_bytes_per_s: int) -> None:
        """Begin to compare both disks; EventKind.VERIFIED tells of the end. EngineError ENOTCONN: not
        steady; EBUSY: one is under way."""
        wanted = {"repair": repair, "speed_bytes_per_s": speed_bytes_per_s}
        await self.command(lib.VS_CMD_VERIFY, "comparing the disks", verify=wanted)

    async def peer_differs(self, differs: bool) -> None:
        """Whether a verification has found so: then nothing is answered by the destination, or left to it."""
        await self.command(lib.VS_CMD_PEER_DIFFERS, "noting what was verified", value=int(differs))

    async def verify_stop(self) -> None:
        """EngineError ENOENT: none is under way."""
        await self.command(lib.VS_CMD_VERIFY_STOP, "ending the comparison of the disks")

    async def bitmap_void(self) -> None:
        """The state record names no bitmap any more: go on without."""
        await self.command(lib.VS_CMD_BITMAP_VOID, "going on without a bitmap")

    async def record_written(self, error_number: int) -> None:
        """The state record says (0), or could not be made to say, that the destination is outdated."""
        await self.command(lib.VS_CMD_RECORD_WRITTEN, "confirming the state record", value=error_number)

    async def gate(self, allowed_us: int) -> None:
        """Take up no requests until `exchange` or `ungate`; returns when the destination holds everything.
        EngineError ETIMEDOUT: it took longer than allowed; EAGAIN: what was unreadable was written since the
        last drain. The gate is open again."""
        await self.command(lib.VS_CMD_GATE, "holding the guest's requests", value=allowed_us)

    async def ungate(self) -> int:
        """Returns the guest's pause in nanoseconds; 0: it was not held."""
        return await self.command(lib.VS_CMD_UNGATE, "letting the guest's requests go on")

    async def exchange_and_hold(self, mark: Mark | None, *, accept_different: bool = False) -> None:
        """As `exchange`, with the mirror kept and the mark stored, but the gate stays closed: another one
        undoes it, before `ungate`. Not to be cancelled: the mark's memory is lent meanwhile."""
        flags = lib.VS_EXCHANGE_KEEP | lib.VS_EXCHANGE_HOLD | lib.VS_EXCHANGE_DIFFERENT * accept_different
        what: dict[str, Any] = {"flags": flags}
        with ExitStack() as lent:
            if mark is not None:
                memory = ffi.from_buffer("uint64_t *", mark.memory, require_writable=True)
                what |= {"mark": lent.enter_context(memory), "mark_value": mark.value}
            await self.command(lib.VS_CMD_EXCHANGE, "exchanging the disks", exchange=what)

    async def exchange(
        self, *, keep_mirror: bool, accept_unreadable: bool = False, accept_different: bool = False
    ) -> int:
        """Change the disks' roles and open the gate; returns the guest's pause in nanoseconds. EngineError:
        the gate stays closed. EBADE: a verification has found meanwhile that the disks differ."""
        flags = lib.VS_EXCHANGE_KEEP * keep_mirror | lib.VS_EXCHANGE_ACCEPT * accept_unreadable
        flags |= lib.VS_EXCHANGE_DIFFERENT * accept_different
        return await self.command(lib.VS_CMD_EXCHANGE, "exchanging the disks", exchange={"flags": flags})

    async def gate_and_exchange(
        self, allowed_us: int, mark: Mark | None, *, keep_mirror: bool, accept_different: bool = False
    ) -> int:
        """Both, with nothing of ours between them, for the guest waits; the mark is stored with the exchange.
        EngineError of the one that failed: as there. Cancelled: the gate is open."""
        flags = lib.VS_EXCHANGE_KEEP * keep_mirror | lib.VS_EXCHANGE_DIFFERENT * accept_different
        if mark is None:
            return await self._gate_and_exchange(allowed_us, {"flags": flags})
        # Given back whatever happens: an exception would keep it, and the memory could not be closed.
        with ffi.from_buffer("uint64_t *", mark.memory, require_writable=True) as memory:
            exchange = {"flags": flags, "mark": memory, "mark_value": mark.value}
            return await self._gate_and_exchange(allowed_us, exchange)

    async def _gate_and_exchange(self, allowed_us: int, what: dict[str, Any]) -> int:
        gate = self._submit(lib.VS_CMD_GATE, "holding the guest's requests", value=allowed_us)
        exchange = self._submit(lib.VS_CMD_EXCHANGE, "exchanging the disks", exchange=what)
        try:
            await gate.done.wait()
        except anyio.get_cancelled_exc_class():
            # No longer than the gate may take; what has been exchanged by then stays so, and is said.
            with anyio.CancelScope(shield=True):
                await self.ungate()
                await exchange.done.wait()
            if exchange.result < 0:
                raise
        with anyio.CancelScope(shield=True):  # at once; and the mark's memory is lent meanwhile
            await exchange.done.wait()
        gate.outcome()
        return exchange.outcome()

    async def failover_give_up(self) -> None:
        """What the source has failed, and was kept back for a switch, is answered with its error."""
        await self.command(lib.VS_CMD_FAILOVER_GIVE_UP, "giving up the switch from a failed source")

    async def attach(self) -> EngineAttachment:
        """A new attachment for a frontend."""
        index = next((i for i in range(ATTACHMENTS_MAX) if i not in self._attachments), None)
        if index is None:
            raise EngineError.from_errno("attaching a frontend: too many are attached", errno.EBUSY)
        command = functools.partial(self.command, attachment=index)
        attachment = EngineAttachment(index, self.config.num_queues, command, self.detach)
        self._attachments[index] = attachment
        try:
            with anyio.CancelScope(shield=True):
                await self.command(lib.VS_CMD_ATTACH, "attaching a frontend", attachment=index)
        except EngineError:
            del self._attachments[index]
            raise
        return attachment

    async def detach(self, attachment: EngineAttachment) -> None:
        """Ends an attachment; returns when its last request is over."""
        if attachment.attached:
            await self.command(lib.VS_CMD_DETACH, "detaching a frontend", attachment=attachment.index)
        del self._attachments[attachment.index]

    def leave_requests(self) -> None:
        """Before the end: whoever waits for the last request of a frontend waits no longer (EngineError
        ETIMEDOUT). Until `close` what the disk answers is still answered, after it nothing is."""
        for waiter in self._waiters.values():
            if waiter.kind == lib.VS_CMD_DETACH:
                self.requests_left = True
                waiter.result = -errno.ETIMEDOUT
                waiter.done.set()

    def attachment(self, index: int) -> EngineAttachment | None:
        """The one that an event names, if it is still there."""
        return self._attachments.get(index)

    # ---- what it shows ---------------------------------------------------------

    async def snapshot(self) -> Snapshot:
        await self.command(lib.VS_CMD_SNAPSHOT, "looking at the data plane")
        c_snapshot = ffi.new("struct vs_snapshot *")
        lib.vs_engine_snapshot(self._handle, c_snapshot)
        return snapshot_of(c_snapshot, ATTACHMENTS_MAX)

    async def snapshot_with_queues(self) -> tuple[Snapshot, list[QueueStats]]:
        """And of each queue that the device has."""
        snapshot = await self.snapshot()
        c_stats = ffi.new("struct vs_queue_stats *")
        queues = []
        for queue in range(self.config.num_queues):
            lib.vs_engine_queue_stats(self._handle, queue, c_stats)
            queues.append(queue_stats_of(c_stats))
        return snapshot, queues

    async def rings(self) -> RingsSeen:
        """What becomes of the rings that frontends have started."""
        snapshot, queues = await self.snapshot_with_queues()
        active = snapshot.active_attachment
        return RingsSeen(
            None if active is None else self.attachment(active),
            any(queue.running or queue.broken is not None for queue in queues),
            [queue.kicks for queue in queues],
            [
                queue.in_flight + queue.malformed + sum(op.operations for op in queue.operations.values())
                for queue in queues
            ],
        )
