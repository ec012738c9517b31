# SPDX-License-Identifier: Apache-2.0
"""What the guest and the operator do while it is recorded. Everything is drawn from a seed; how the threads
take turns is not, so a seed names a kind of run and not a run."""

from __future__ import annotations

import errno
import itertools
import random
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread

from tests.engine_driver import DiskOp
from tests.frontend import DEFAULT_FEATURES, Feature, Request, Status
from tests.powercut.machine import QUEUES, SECTORS, Running
from tests.powercut.media import SECTOR, image_bytes
from tests.powercut.recorder import SECTOR_BITS, Confirmed, GuestRequest, Submitted, tag
from vhostsync.errors import VhostsyncError
from vhostsync.mirror_state import MirrorState

IN_FLIGHT_MAX = 12
LONGEST = 64  # sectors of one request
HOT = 96  # sectors in which half of all requests lie, so that they overlap
STEPS = 40  # of the guest in one phase, at least

_serial = itertools.count(1)


def filled(first: int, count: int) -> list[int]:
    """The tags of a write that nobody else makes."""
    serial = next(_serial)
    return [tag(serial, sector) for sector in range(first, first + count)]


@dataclass
class Load:
    """The guest, in a thread of its own while a phase of the operator's goes on."""

    running: Running
    chance: random.Random
    write_through: bool = False
    _waiting: dict[Request, GuestRequest] = field(default_factory=dict)

    def run(self, over: threading.Event) -> None:
        """Until `over` is set, and some steps at least."""
        steps = 0
        while steps < STEPS or not over.is_set():
            steps += 1
            self._weather()
            if len(self._waiting) < IN_FLIGHT_MAX:
                self._submit()
            else:
                self._let_go()
                over.wait(0.0005)
            self._take()
        for disk in self.running.disks:
            disk.release_all()

    def finish(self) -> None:
        """Until nothing is in flight."""
        for disk in self.running.disks:
            disk.release_all()
        self.running.guest.wait(*self._waiting)
        self._take()

    def _weather(self) -> None:
        """Some requests are held, and let go in another order."""
        if self.chance.random() < 0.15:
            disk = self.chance.choice(self.running.disks)
            disk.hold(self.chance.choice(list(DiskOp)), self.chance.random() < 0.5)
        if self.chance.random() < 0.4:
            self._let_go()

    def _let_go(self) -> None:
        for disk in self.running.disks:
            for op in DiskOp:
                if disk.held(op):
                    disk.release(op, self.chance.randint(1, 4))

    def _place(self) -> tuple[int, int]:
        count = self.chance.choice((1, 2, 8, 8, 16, self.chance.randint(1, LONGEST)))
        room = HOT if self.chance.random() < 0.5 else SECTORS
        return self.chance.randrange(max(room - count, 1)), count

    def _submit(self) -> None:
        guest, recorder, queue = self.running.guest, self.running.recorder, self.chance.randrange(QUEUES)
        draw = self.chance.random()
        if draw < 0.16:
            note = GuestRequest(0, 0, 0)
            recorder.note(Submitted(note))
            self._waiting[guest.flush(queue=queue)] = note
            return
        first, count = self._place()
        if draw < 0.26:
            zero = guest.discard if draw < 0.2 else guest.write_zeroes
            note = GuestRequest(first, count, 0, self.write_through)
            recorder.note(Submitted(note))
            self._waiting[zero(first * SECTOR, count * SECTOR, queue=queue)] = note
            return
        tags = filled(first, count)
        note = GuestRequest(first, count, tags[0] >> SECTOR_BITS, self.write_through)
        recorder.note(Submitted(note))
        self._waiting[guest.write(first * SECTOR, image_bytes(tags), queue=queue)] = note

    def _take(self) -> None:
        self.running.guest.poll()
        for request, note in list(self._waiting.items()):
            if not request.done:
                continue
            del self._waiting[request]
            note.ok = request.status == Status.OK
            self.running.recorder.note(Confirmed(note))
            self.running.guest.recycle(request)


Phase = Callable[[Running, random.Random], Awaitable[None]]


async def idle(running: Running, chance: random.Random) -> None:
    """The guest alone."""


async def attach(running: Running, chance: random.Random) -> None:
    await running.attach()
    await running.until(MirrorState.STEADY)


async def attach_full(running: Running, chance: random.Random) -> None:
    await running.attach(full=True)
    await running.until(MirrorState.STEADY)


async def begin_copy(running: Running, chance: random.Random) -> None:
    """The phase ends while the copy may still be under way."""
    await running.mirror.set_speed(chance.choice((0, 4 << 20)))
    await running.attach()


async def lose_destination(running: Running, chance: random.Random) -> None:
    """A write or a flush of the destination fails, now or soon."""
    op = chance.choice((DiskOp.WRITE, DiskOp.FLUSH, DiskOp.ZERO))
    other = running.other
    other.fault(op, errno.EIO, skip=chance.randint(0, 3), count=-1)
    with anyio.move_on_after(1.0):
        await running.until(MirrorState.DEGRADED)
    other.fault(op, 0, count=0)


async def cancel(running: Running, chance: random.Random) -> None:
    await running.mirror.cancel(force=chance.random() < 0.5)


async def _switch(running: Running, *, keep: bool) -> None:
    await running.mirror.switch(deadline_s=15, max_pause_ms=5000, keep_mirror=keep)


async def switch(running: Running, chance: random.Random) -> None:
    await _switch(running, keep=True)


async def leave(running: Running, chance: random.Random) -> None:
    await _switch(running, keep=False)


async def switch_and_lose(running: Running, chance: random.Random) -> None:
    """The destination fails while the switch is under way."""
    other = running.other

    async def fail() -> None:
        await anyio.sleep(chance.random() * 0.02)
        other.fault(chance.choice((DiskOp.WRITE, DiskOp.FLUSH)), errno.EIO, count=-1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fail)
        await _switch(running, keep=True)
    for op in DiskOp:
        other.fault(op, 0, count=0)


async def get_ahead(running: Running, chance: random.Random) -> None:
    """The destination stands still until the guest is ahead of it; the phase ends on the way back."""
    other = running.other
    with anyio.move_on_after(2.0):
        while running.mirror.state is MirrorState.STEADY:
            other.hold(DiskOp.WRITE)
            other.hold(DiskOp.ZERO)
            await anyio.sleep(0.002)
    other.hold(DiskOp.WRITE, False)
    other.hold(DiskOp.ZERO, False)
    with anyio.move_on_after(chance.choice((0.01, 0.05, 2.0))):
        await running.until(MirrorState.STEADY)


async def fail_source(running: Running, chance: random.Random) -> None:
    """The guest's disk fails from now on, until the guest has left it (or cannot)."""
    op = chance.choice((DiskOp.WRITE, DiskOp.FLUSH, DiskOp.ZERO))
    former = running.current
    source = running.disks[former]
    source.fault(op, errno.EIO, skip=chance.randint(0, 3), count=-1)
    with anyio.move_on_after(2.0):
        while running.current == former:
            await anyio.sleep(0.001)
    source.fault(op, 0, count=0)


@dataclass(frozen=True)
class Scene:
    """A phase may find that it is impossible now (a switch after a loss): that is part of the play."""

    name: str
    phases: tuple[Phase, ...]
    features: int = DEFAULT_FEATURES
    pull_ahead: bool = False
    failover: bool = False

    @property
    def write_through(self) -> bool:
        return not self.features & (Feature.FLUSH | Feature.CONFIG_WCE)


SCENES = (
    Scene("copy", (idle, attach, idle, idle)),
    Scene("degrade", (attach, idle, lose_destination, idle, attach, idle, lose_destination, attach, idle)),
    Scene("cancel", (attach, cancel, idle, attach, idle, cancel, attach_full)),
    Scene("failback", (attach, switch, idle, switch, idle, switch, lose_destination, idle, attach, switch)),
    Scene("leave", (attach, leave, idle, attach, idle, switch, idle)),
    Scene("switch-and-lose", (attach, switch_and_lose, attach, idle, switch_and_lose, attach, idle)),
    Scene("interrupted", (begin_copy, lose_destination, begin_copy, cancel, begin_copy, idle)),
    Scene(
        "ahead",
        (attach, get_ahead, idle, get_ahead, lose_destination, attach, get_ahead, switch, get_ahead, cancel),
        pull_ahead=True,
    ),
    Scene(
        "failover",
        (attach, idle, fail_source, idle, attach, fail_source, attach, switch, fail_source, idle),
        failover=True,
    ),
    Scene(
        "write-through",
        (attach, idle, lose_destination, idle, attach, switch, idle),
        DEFAULT_FEATURES & ~(Feature.FLUSH | Feature.CONFIG_WCE),
    ),
)


async def play(running: Running, scene: Scene, chance: random.Random) -> None:
    """All phases, the guest at work in each of them."""
    load = Load(running, random.Random(chance.getrandbits(64)), scene.write_through)
    for phase in scene.phases:
        over = threading.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, load.run, over)
            try:
                await _perform(phase, running, chance)
            finally:
                over.set()
    await anyio.to_thread.run_sync(load.finish)


async def _perform(phase: Phase, running: Running, chance: random.Random) -> None:
    try:
        await phase(running, chance)
    except* VhostsyncError:
        pass  # refused, as the state is another one than the scene has in mind: a run all the same


def initial_content(chance: random.Random) -> list[int]:
    """Data with holes."""
    content: list[Any] = [0] * SECTORS
    for first in range(0, SECTORS, 64):
        if chance.random() < 0.6:
            content[first : first + 64] = filled(first, 64)
    return content
