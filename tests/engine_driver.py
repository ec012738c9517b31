# SPDX-License-Identifier: Apache-2.0
"""The C engine driven directly through its boundary (c_shim/shim_api.h), for tests: no daemon, no socket.

`MemoryDisk` is the test disk of c_shim/testing/test_disk.c, `EngineDriver` an engine with its events,
`EngineTransport` the way of a tests/frontend.py `Frontend` to it. All waiting is poll on the engine's event
descriptor.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from types import TracebackType
from typing import Any

from tests.guest_ring import TIMEOUT_S, Region, RingAddresses
from tests.testing_library import ffi, lib
from vhostsync.engine.snapshot import ranges_of
from vhostsync.vhost_user.rules import INFLIGHT_RING_BYTES

NO_LOG = (1 << 64) - 1


class State(IntEnum):
    PASSTHROUGH = 0
    SYNCING = 1
    STEADY = 2
    AHEAD = 3
    DEGRADED = 4


class DiskOp(IntEnum):
    READ = 0
    WRITE = 1
    FLUSH = 2
    ZERO = 3


class Errand(IntEnum):
    """What a disk is asked beside its operations."""

    EXTENTS = 4
    SIZE = 5
    CLOSE = 6


class EventKind(IntEnum):
    DONE = 1
    STATE = 2
    DEGRADED = 3
    QUEUE_BROKEN = 4
    ATTACHMENT_LOST = 5
    IO_ERROR = 6
    FENCE_CLEAR = 7
    BITMAP_FAILED = 8
    VERIFIED = 9
    AHEAD_DRAINED = 10
    READ_FALLBACK = 11
    SOURCE_FAILED = 12
    PAUSED = 13
    PAUSE_RELEASED = 14
    SOURCE_CLOSED = 15


class Reason(IntEnum):
    COMMAND = 0
    COPY_DONE = 1
    DESTINATION_WRITE = 2
    DESTINATION_FLUSH = 3
    DESTINATION_TIMEOUT = 4
    STOP_TIMEOUT = 5
    SWITCH = 6
    CONGESTION = 7
    CATCH_UP = 8
    DESTINATION_LOST = 9
    GROUP = 10


class Cut(IntEnum):
    """What `MemoryDisk.read` shows: no power cut; one that keeps any subset of the unflushed; none."""

    NONE = 0
    SUBSET = 1
    EVERYTHING = 2


class EngineTimeoutError(AssertionError):
    """The engine did not do in time what the test waits for."""


class CommandError(AssertionError):
    """A command was answered with an errno that the test did not expect."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(f"{command}: {errno.errorcode.get(code, str(code))}")
        self.errno = code


@dataclass(frozen=True)
class Event:
    """A vs_event; `result` is 0 or a negative errno."""

    kind: int
    result: int
    token: int
    value: int
    offset: int
    length: int
    attachment: int
    queue: int
    reason: int
    disk_role: int
    op: int
    differed: int


@dataclass(frozen=True)
class Counts:
    """The five counts; M and F mean nothing unless `mirrored_known`."""

    generation: int
    source_flushed: int
    mirrored: int
    request: int
    flushed: int
    source_flush_known: bool
    mirrored_known: bool


@dataclass(frozen=True)
class Snapshot:
    state: State
    gated: bool
    record_pending: bool
    fenced: int
    write_cache: bool
    counts: Counts
    lag_bytes: int
    lag_writes: int
    log_bytes_used: int
    copy_bytes_total: int
    copy_bytes_done: int
    copy_bytes_sparse: int
    differing_bytes: int | None
    wakeups: int
    polls: int
    requests_waiting: int
    doubt: tuple[tuple[int, int], ...]
    spared: tuple[tuple[int, int], ...]
    unreadable: tuple[tuple[int, int], ...]
    reads_from_destination: int
    source_failovers: int
    failover_pending: bool
    paused: bool
    pause_held: int
    pause_released: int
    disk_in_flight: tuple[int, int]


class MemoryDisk:
    """A test disk, kept alive by a reference of the test's own until `drop`."""

    def __init__(self, size_bytes: int, block_bytes: int = 512) -> None:
        self.bytes = size_bytes
        self.block_bytes = block_bytes
        self.handle: Any = lib.vs_test_disk(size_bytes, block_bytes)
        self._handed_over = False
        self._dropped = False

    def hand_over(self) -> Any:
        """The handle for one use by an engine, which closes it; this object stays valid."""
        lib.vs_test_disk_keep(self.handle)
        return self.handle

    def drop(self) -> None:
        """Only when no engine has the disk."""
        if not self._dropped:
            self._dropped = True
            lib.vs_test_disk_drop(self.handle)

    def make_buffered(self) -> None:
        """As a file behind the page cache: before an engine has it."""
        lib.vs_test_disk_buffered(self.handle)

    def make_remote(self) -> None:
        """It can be cut off: before an engine has it."""
        lib.vs_test_disk_remote(self.handle)

    def cut(self, forget_seed: int = 0) -> None:
        """The connection is lost; `forget_seed` not 0: and with it some of what was not flushed."""
        lib.vs_test_disk_cut(self.handle, forget_seed)

    def connect(self) -> None:
        """Before the next engine, or the same one once more, has it."""
        lib.vs_test_disk_connect(self.handle)

    def land(self, count: int = 1 << 30, *, carried_out: bool = True) -> int:
        """What was under way when the connection was lost is over, so many of it; how many."""
        return int(lib.vs_test_disk_land(self.handle, count, int(carried_out)))

    def hold(self, op: DiskOp | Errand, on: bool = True) -> None:
        lib.vs_test_disk_hold(self.handle, op, int(on))

    def release(self, op: DiskOp | Errand, count: int = 1 << 30) -> int:
        return int(lib.vs_test_disk_release(self.handle, op, count))

    def held(self, op: DiskOp | Errand) -> int:
        return int(lib.vs_test_disk_held(self.handle, op))

    def release_all(self) -> None:
        """Ends all holding and all faults and lets everything go."""
        everything = (*DiskOp, *Errand)
        for op in everything:
            self.hold(op, False)
            self.fault(op, 0, count=0)
        while sum(self.release(op) for op in everything):
            pass

    def fault(self, op: DiskOp | Errand, error: int, *, skip: int = 0, count: int = 1) -> None:
        """The next `count` requests after `skip` fail with `error`, or are short if it is 0; -1: for ever."""
        lib.vs_test_disk_fault(self.handle, op, error, skip, count)

    def spoil(self, offset: int, length: int) -> None:
        """Blocks that cannot be read until they are written again."""
        lib.vs_test_disk_spoil(self.handle, offset, length)

    def read(self, offset: int, length: int, cut: Cut = Cut.NONE, seed: int = 0) -> bytes:
        out = ffi.new("char[]", length)
        if lib.vs_test_disk_read(self.handle, offset, length, cut, seed, out) != 0:
            raise ValueError(f"{offset}+{length} is not on the disk")
        return bytes(ffi.buffer(out, length))

    def load(self, offset: int, content: bytes) -> None:
        if lib.vs_test_disk_load(self.handle, offset, len(content), content) != 0:
            raise ValueError(f"{offset}+{len(content)} is not on the disk")

    def count(self, op: DiskOp) -> int:
        return int(lib.vs_test_disk_count(self.handle, op))


@dataclass(frozen=True)
class EngineOptions:
    """vs_engine_config, with defaults for small and quick tests."""

    capacity_bytes: int
    log_bytes: int = 16 << 20
    destination_timeout_us: int = 30_000_000
    stop_timeout_us: int = 10_000_000
    max_lag_us: int = 60_000_000
    checkpoint_us: int = 60_000_000
    block_bytes: int = 512
    queues_max: int = 4
    read_only: bool = False
    dirty_region_bytes: int = 65536
    copy_depth: int = 4
    writeback: bool = True
    serial: bytes = b"model"
    read_fallback: bool = False
    switch_on_source_error: bool = False
    pause_on_destination_error: bool = False
    poll_us: int = 0
    threads: int = 1
    pull_ahead: bool = False
    congestion_fill_bytes: int = 0
    ahead_backoff_us: int = 0


class EngineDriver:
    """An engine on a test disk. A context manager; `close` lets everything go that a disk still holds."""

    def __init__(
        self,
        options: EngineOptions,
        source: MemoryDisk,
        *,
        timeout_s: float = TIMEOUT_S,
        bitmap: Any = ffi.NULL,
        peer_tracked: bool = False,
        doubt: Sequence[tuple[int, int]] = (),
        spared: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`bitmap`: a vs_bitmap, the engine's from here on."""
        self.options = options
        self.timeout_s = timeout_s
        self.disks = [source]
        config = ffi.new("struct vs_engine_config *")
        for name, value in vars(options).items():
            setattr(config, name, value if isinstance(value, bytes) else int(value))
        config.bitmap, config.peer_tracked = bitmap, int(peer_tracked)
        config.doubt_count, config.spared_count = len(doubt), len(spared)
        for ranges, of in ((config.doubt, doubt), (config.spared, spared)):
            for i, (offset, length) in enumerate(of):
                ranges[i].offset, ranges[i].length = offset, length
        out, step = ffi.new("vs_engine **"), ffi.new("const char **")
        code = lib.vs_engine_create(config, source.hand_over(), out, step)
        if code != 0:
            raise CommandError(f"vs_engine_create ({ffi.string(step[0]).decode()})", -code)
        self.engine: Any = out[0]
        self.event_fd = int(lib.vs_engine_event_fd(self.engine))
        self.events: list[Event] = []
        """Everything but DONE, oldest first; tests take from it."""
        self.kicks: dict[tuple[int, int], int] = {}
        """The kick descriptors of running rings, by attachment and queue: readable until the engine looks."""
        self._done: dict[int, Event] = {}

    def __enter__(self) -> EngineDriver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Destroys the engine; the disks stay readable until they are dropped."""
        if self.engine is None:
            return
        for disk in self.disks:
            disk.release_all()
        engine, self.engine = self.engine, None
        lib.vs_engine_destroy(engine)

    # -- commands and events ------------------------------------------------

    def submit(self, kind: int, **fields: Any) -> int:
        """The token of a command under way. `disk` is a MemoryDisk, `regions` a sequence of Region."""
        command = ffi.new("struct vs_command *")
        command.kind = kind
        command.fd = -1
        disk: MemoryDisk | None = fields.pop("disk", None)
        if disk is not None:
            command.start.disk = disk.hand_over()
            command.start.flags = fields.pop("flags", 0)
            if disk not in self.disks:
                self.disks.append(disk)
        regions: Sequence[Region] = fields.pop("regions", ())
        if regions:
            command.memory.count = len(regions)
        for number, region in enumerate(regions):
            slot = command.memory.region[number]
            slot.guest_addr, slot.bytes = region.guest_addr, region.bytes
            slot.user_addr, slot.mmap_offset = region.user_addr, region.mmap_offset
            slot.fd = os.dup(region.fd) if region.fd >= 0 else -1
        for name, value in fields.items():
            setattr(command, name, value)
        token = int(lib.vs_engine_submit(self.engine, command))
        if token == 0:
            raise CommandError("vs_engine_submit", errno.EAGAIN)
        return token

    def pump(self, timeout_s: float = 0.0) -> bool:
        """Takes in events, waiting for the first; whether there was one."""
        if timeout_s > 0:
            poller = select.poll()
            poller.register(self.event_fd, select.POLLIN)
            poller.poll(timeout_s * 1000)
        raw = ffi.new("struct vs_event *")
        seen = False
        while lib.vs_engine_next_event(self.engine, raw):
            seen = True
            event = Event(**{name: int(getattr(raw, name)) for name in Event.__dataclass_fields__})
            if event.kind == EventKind.DONE:
                self._done[event.token] = event
            else:
                self.events.append(event)
        return seen

    def done(self, token: int) -> Event | None:
        """The answer to a command if it is there."""
        self.pump()
        return self._done.pop(token, None)

    def wait(self, token: int, *, timeout_s: float | None = None) -> Event:
        """The answer to a command. EngineTimeoutError."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while token not in self._done:
            left = deadline - time.monotonic()
            if not self.pump(max(left, 0)) and left <= 0:
                raise EngineTimeoutError("a command was not answered in time")
        return self._done.pop(token)

    def call(self, kind: int, *, expect: int = 0, timeout_s: float | None = None, **fields: Any) -> Event:
        """Submits, waits, and checks the result (an errno, 0: success)."""
        event = self.wait(self.submit(kind, **fields), timeout_s=timeout_s)
        if -event.result != expect:
            raise CommandError(f"command {kind}", -event.result)
        return event

    def take_event(self, kind: EventKind, *, timeout_s: float | None = None) -> Event:
        """The oldest event of this kind, waited for; it is taken off the list."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while True:
            for event in self.events:
                if event.kind == kind:
                    self.events.remove(event)
                    return event
            left = deadline - time.monotonic()
            if not self.pump(max(left, 0)) and left <= 0:
                raise EngineTimeoutError(f"no {kind.name} event in time")

    # -- looking at it ------------------------------------------------------

    def snapshot(self) -> Snapshot:
        self.call(lib.VS_CMD_SNAPSHOT)
        raw = ffi.new("struct vs_snapshot *")
        lib.vs_engine_snapshot(self.engine, raw)
        c = raw.counts
        return Snapshot(
            state=State(raw.mirror_state),
            gated=bool(raw.gated),
            record_pending=bool(raw.record_pending),
            fenced=int(raw.fenced),
            write_cache=bool(raw.write_cache),
            counts=Counts(
                int(c.source_generation),
                int(c.source_flushed),
                int(c.writes_mirrored),
                int(c.flush_request),
                int(c.writes_flushed),
                bool(c.source_flush_known),
                bool(c.mirrored_known),
            ),
            lag_bytes=int(raw.lag_bytes),
            lag_writes=int(raw.lag_writes),
            log_bytes_used=int(raw.log_bytes_used),
            copy_bytes_total=int(raw.copy_bytes_total),
            copy_bytes_done=int(raw.copy_bytes_done),
            copy_bytes_sparse=int(raw.copy_bytes_sparse),
            differing_bytes=int(raw.differing_bytes) if raw.tracked else None,
            wakeups=int(raw.wakeups),
            polls=int(raw.polls),
            requests_waiting=int(raw.requests_waiting),
            doubt=ranges_of(raw.doubt, raw.doubt_count),
            spared=ranges_of(raw.spared, raw.spared_count),
            unreadable=ranges_of(raw.unreadable, raw.unreadable_count),
            reads_from_destination=int(raw.reads_from_destination),
            source_failovers=int(raw.source_failovers),
            failover_pending=bool(raw.failover_pending),
            paused=bool(raw.paused),
            pause_held=int(raw.pause_held),
            pause_released=int(raw.pause_released),
            disk_in_flight=(int(raw.disk[0].in_flight), int(raw.disk[1].in_flight)),
        )

    def lag_ns(self) -> int:
        """How long the oldest write that is not mirrored has been on the source."""
        self.call(lib.VS_CMD_SNAPSHOT)
        raw = ffi.new("struct vs_snapshot *")
        lib.vs_engine_snapshot(self.engine, raw)
        return int(raw.lag_ns)

    def engine_throttled_ns(self) -> int:
        """For how long writes have waited for room in the log so far."""
        self.call(lib.VS_CMD_SNAPSHOT)
        raw = ffi.new("struct vs_snapshot *")
        lib.vs_engine_snapshot(self.engine, raw)
        return int(raw.throttled_ns)

    def settle_quickly(self) -> None:
        """A few passes of the engine's loop: what has completed is dealt with, what follows is submitted."""
        for _ in range(3):
            self.call(lib.VS_CMD_SNAPSHOT)

    def until(self, condition: Callable[[], bool], what: str, *, timeout_s: float | None = None) -> None:
        """Waits for something that has no event of its own: looks again after each trip to the engine."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while not condition():
            if time.monotonic() > deadline:
                raise EngineTimeoutError(f"not in time: {what}")
            self.snapshot()

    def await_held(self, disk: MemoryDisk, op: DiskOp | Errand, count: int = 1) -> None:
        """Until `disk` holds at least `count` requests of this kind."""
        self.until(lambda: disk.held(op) >= count, f"{count} held {op.name}")

    def await_state(self, state: State, *, timeout_s: float | None = None) -> None:
        self.until(lambda: self.snapshot().state == state, f"state {state.name}", timeout_s=timeout_s)

    def settle(self) -> Snapshot:
        """Until the engine has nothing more to do by itself: every kick is taken, and nothing changed over
        several round trips."""
        self.until(self._no_kicks_left, "kicks are taken")
        last, same = self._fingerprint(), 0
        wakeups = last[0].wakeups
        deadline = time.monotonic() + 3 * self.timeout_s
        while same < 3:
            if time.monotonic() > deadline:
                raise EngineTimeoutError(f"the engine does not come to rest: {last}")
            now = self._fingerprint()
            if now[1:] != last[1:]:
                same = 0
            elif now[0].wakeups != wakeups:  # it has slept meanwhile: it was not all one pass of its loop
                same += 1
            last, wakeups = now, now[0].wakeups
        return last[0]

    def _no_kicks_left(self) -> bool:
        poller = select.poll()
        for fd in self.kicks.values():
            poller.register(fd, select.POLLIN)
        return not poller.poll(0)

    def _fingerprint(self) -> tuple[Snapshot, Snapshot, tuple[int, ...]]:
        snapshot = self.snapshot()
        ops = tuple(disk.count(op) for disk in self.disks for op in DiskOp)
        return snapshot, replace(snapshot, wakeups=0), ops

    # -- the mirror -----------------------------------------------------------

    def mirror(
        self, destination: MemoryDisk, *, resync: bool = False, spare_doubt: bool = False
    ) -> None:
        """Attaches a destination and waits for the steady state."""
        assert self.start_mirror(destination, resync=resync, spare_doubt=spare_doubt) == 0
        self.await_state(State.STEADY)

    def start_mirror(
        self, destination: MemoryDisk, *, resync: bool = False, spare_doubt: bool = False
    ) -> int:
        """Attaches a destination; 0, or the errno of the refusal. `resync`: one that was steady once."""
        flags = lib.VS_START_RESYNC * resync | lib.VS_START_SPARE_DOUBT * (resync or spare_doubt)
        event = self.wait(self.submit(lib.VS_CMD_MIRROR_START, disk=destination, flags=flags))
        if event.result != 0:
            lib.vs_test_disk_drop(destination.handle)  # a refused disk stays the caller's
        return -event.result


class EngineTransport:
    """A frontend's way straight into an engine: one attachment."""

    def __init__(self, driver: EngineDriver, attachment: int = 0) -> None:
        self.driver = driver
        self.attachment = attachment
        driver.call(lib.VS_CMD_ATTACH, attachment=attachment)

    def _call(self, kind: int, **fields: Any) -> Event:
        return self.driver.call(kind, attachment=self.attachment, **fields)

    def set_features(self, features: int) -> None:
        self._call(lib.VS_CMD_SET_FEATURES, value=features)

    def set_memory(self, regions: Sequence[Region]) -> None:
        self._call(lib.VS_CMD_SET_MEM_TABLE, regions=regions)

    def start_ring(
        self, queue: int, size: int, addresses: RingAddresses, base: int, kick: int, call: int, err: int
    ) -> None:
        self._call(lib.VS_CMD_VRING_NUM, queue=queue, value=size)
        self._call(
            lib.VS_CMD_VRING_ADDR,
            queue=queue,
            ring=(addresses.desc, addresses.used, addresses.avail, NO_LOG),
        )
        self._call(lib.VS_CMD_VRING_BASE, queue=queue, value=base)
        self._call(lib.VS_CMD_VRING_CALL, queue=queue, fd=os.dup(call))
        self._call(lib.VS_CMD_VRING_ERR, queue=queue, fd=os.dup(err))
        self._call(lib.VS_CMD_VRING_KICK, queue=queue, fd=os.dup(kick))
        self.driver.kicks[self.attachment, queue] = kick

    def enable_ring(self, queue: int, enabled: bool) -> None:
        self._call(lib.VS_CMD_VRING_ENABLE, queue=queue, value=int(enabled))

    def stop_ring(self, queue: int) -> int:
        self.driver.kicks.pop((self.attachment, queue), None)
        return self._call(lib.VS_CMD_VRING_STOP, queue=queue).value

    def set_write_cache(self, writeback: bool) -> None:
        self._call(lib.VS_CMD_SET_WRITE_CACHE, value=int(writeback))

    def set_inflight(self, size: int = INFLIGHT_RING_BYTES) -> None:
        """A new and empty record for one ring."""
        fd = os.memfd_create("inflight")
        os.truncate(fd, size)
        self._call(lib.VS_CMD_SET_INFLIGHT, fd=fd, area=(size, 0, 1))

    def reset(self) -> None:
        self._call(lib.VS_CMD_RESET)

    def close(self) -> None:
        """Detaches; the engine may be gone already."""
        self.driver.kicks = {key: fd for key, fd in self.driver.kicks.items() if key[0] != self.attachment}
        if self.driver.engine is not None:
            self._call(lib.VS_CMD_DETACH)
