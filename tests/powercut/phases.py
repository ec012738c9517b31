# SPDX-License-Identifier: Apache-2.0
"""What the operator and the disks do while it is recorded: one phase after the other, the guest at work."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import anyio
import anyio.to_thread

from tests.engine_driver import DiskOp, MemoryDisk
from tests.powercut.loads import LONGEST, filled
from tests.powercut.machine import SECTORS, Running
from tests.powercut.media import SECTOR, image_bytes
from tests.powercut.recorder import (
    DoubtAsked,
    DoubtRecorded,
    Enlarged,
    Grown,
    PauseReleased,
    Switched,
    Verified,
    VerifyBegun,
)
from tests.powercut.state import sectors_of
from vhostsync.errors import SwitchError
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import SwitchResult
from vhostsync.mirror.retry import DestinationRetry
from vhostsync.mirror.verify import VerifyState

WAIT_S = 20

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


@contextmanager
def _failing(disk: MemoryDisk, chance: random.Random) -> Iterator[None]:
    """Its writes or flushes, now or soon."""
    op = chance.choice((DiskOp.WRITE, DiskOp.FLUSH, DiskOp.ZERO))
    disk.fault(op, errno.EIO, skip=chance.randint(0, 3), count=-1)
    try:
        yield
    finally:
        disk.fault(op, 0, count=0)


async def lose_destination(running: Running, chance: random.Random) -> None:
    with _failing(running.other, chance), anyio.move_on_after(1.0):
        await running.until(MirrorState.DEGRADED)


async def lose_connection(running: Running, chance: random.Random) -> None:
    """With writes under way, which the server may carry out later; or it begins anew, and has forgotten."""
    if chance.random() < 0.7:
        await _with_writes_under_way(running.other, 0.02)
    await _cut(running, chance)


async def lose_connection_amid_writes(running: Running, chance: random.Random) -> None:
    await _with_writes_under_way(running.other, 2.0)
    await _cut(running, chance)


async def _with_writes_under_way(other: MemoryDisk, within_s: float) -> None:
    other.hold(DiskOp.WRITE)
    other.hold(DiskOp.ZERO)
    with anyio.move_on_after(within_s):
        while other.held(DiskOp.WRITE) + other.held(DiskOp.ZERO) < 3:
            await anyio.sleep(0.001)


async def _cut(running: Running, chance: random.Random) -> None:
    other = running.other
    other.cut(forget_seed=chance.choice((0, chance.getrandbits(32) | 1)))
    other.hold(DiskOp.WRITE, False)
    other.hold(DiskOp.ZERO, False)
    with anyio.move_on_after(1.0):
        await running.until(MirrorState.DEGRADED)
    if running.mirror.state is not MirrorState.DEGRADED:
        await running.mirror.cancel(force=True)  # the guest has been still, so nobody has noticed


async def land_late(running: Running, chance: random.Random) -> None:
    """All that lost connections have left under way is carried out now."""
    for disk in running.disks:
        disk.land()


async def attach_again(running: Running, chance: random.Random) -> None:
    """As soon as it is fenced."""
    with anyio.fail_after(WAIT_S):
        while running.mirror.fenced:
            await anyio.sleep(0.001)
    await attach(running, chance)


async def verify_and_lose_connection(running: Running, chance: random.Random) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_verify, running)
        await anyio.sleep(chance.random() * 0.01)
        await lose_connection(running, chance)


async def grow_and_lose_connection(running: Running, chance: random.Random) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(grow, running, chance)
        await anyio.sleep(chance.random() * 0.01)
        await lose_connection(running, chance)


async def cancel(running: Running, chance: random.Random) -> None:
    await running.mirror.cancel(force=chance.random() < 0.5)


async def _switch(running: Running, *, keep: bool, accept: bool = False) -> SwitchResult:
    result = await running.mirror.switch(
        deadline_s=15, max_pause_ms=5000, keep_mirror=keep, accept_unreadable=accept
    )
    listed = [(row["offset"], row["length"]) for rows in result.accepted.values() for row in rows]
    running.recorder.note(Switched(sectors_of(listed)))
    return result


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


async def resume(running: Running, chance: random.Random) -> None:
    """`--resume-mirror`, in a process that has had no mirror yet."""
    wanted = running.mirror.wanted
    await DestinationRetry(running.mirror, running.hub, None, resume=True).resume()
    if wanted is None:
        assert running.mirror.state is MirrorState.PASSTHROUGH
        return
    assert running.mirror.destination_path == wanted.name
    await running.until(MirrorState.STEADY)


# ---- the pause -----------------------------------------------------------------------


async def stop_queues(running: Running, chance: random.Random) -> None:
    """The frontend stops its rings, as at a migration, and starts them again. No guest meanwhile."""
    running.recorder.note(PauseReleased())

    def stop_and_start() -> None:
        running.guest.stop()
        for number in range(len(running.guest.queues)):
            running.guest.start_queue(number)

    await anyio.to_thread.run_sync(stop_and_start)


async def give_up_the_pause(running: Running, chance: random.Random) -> None:
    """Whatever became of the mirror: nobody waits for one any longer."""
    with anyio.fail_after(WAIT_S):
        while (await running.engine.snapshot()).paused:
            await running.mirror.cancel(force=True)


# ---- verification ----------------------------------------------------------------------


async def rot(running: Running, chance: random.Random) -> None:
    """The destination does not hold what it was given, and does not say so."""
    for _ in range(chance.randint(1, 5)):
        count = chance.randint(1, LONGEST)
        first = chance.randrange(SECTORS - count)
        running.other.load(first * SECTOR, image_bytes(filled(first, count)))


async def verify(running: Running, chance: random.Random) -> None:
    await _verify(running)


async def _verify(running: Running) -> bool:
    """With repair; whether both disks are equal afterwards."""
    running.recorder.note(VerifyBegun())
    await running.verifier.start(repair=True, speed_bytes_per_s=0)
    with anyio.fail_after(WAIT_S):
        while (found := await running.verifier.status()).state == VerifyState.RUNNING:
            await anyio.sleep(0.001)
    clean = found.state in (VerifyState.EQUAL, VerifyState.REPAIRED)
    running.recorder.note(Verified(clean))
    return clean


async def verify_and_switch(running: Running, chance: random.Random) -> None:
    """Now the guest is to find what was repaired."""
    if await _verify(running):
        await _switch(running, keep=chance.random() < 0.5)


async def verify_and_lose(running: Running, chance: random.Random) -> None:
    with _failing(running.other, chance):
        await _verify(running)


# ---- what the source cannot give ------------------------------------------------------


async def spoil(running: Running, chance: random.Random) -> None:
    """Parts of the guest's disk cannot be read any more."""
    for _ in range(chance.randint(1, 6)):
        count = chance.randint(1, 12)
        first = chance.randrange(SECTORS - count)
        running.disks[running.current].spoil(first * SECTOR, count * SECTOR)


async def fail_writes(running: Running, chance: random.Random) -> None:
    """Some of the guest's writes fail on its disk: they are in doubt, also for a next run."""
    source = running.disks[running.current]
    op = chance.choice((DiskOp.WRITE, DiskOp.WRITE, DiskOp.ZERO))
    source.fault(op, errno.EIO, skip=chance.randint(0, 3), count=chance.randint(1, 6))
    with anyio.move_on_after(0.05):
        while not (await running.engine.snapshot()).doubt:
            await anyio.sleep(0.001)
    source.fault(op, 0, count=0)
    running.recorder.note(DoubtAsked())
    doubt = sectors_of((await running.engine.snapshot()).doubt)
    with anyio.fail_after(WAIT_S):
        while not doubt <= sectors_of(running.recorded_doubt):
            await anyio.sleep(0.001)
            doubt &= sectors_of((await running.engine.snapshot()).doubt)  # the guest heals it
    running.recorder.note(DoubtRecorded())


async def leave_what_is_bad(running: Running, chance: random.Random) -> None:
    """A switch is refused where it would lose what the guest has written, unless that is accepted."""
    try:
        await _switch(running, keep=False)
    except SwitchError:
        await _switch(running, keep=False, accept=True)


# ---- growing -----------------------------------------------------------------------------


async def grow(running: Running, chance: random.Random) -> None:
    """By no whole number of regions or extents."""
    await _grow_by(running, chance.randint(1, SECTORS // 6))


async def grow_slowly(running: Running, chance: random.Random) -> None:
    """The second time the region across the old end has to wait for its copy."""
    await running.engine.mirror_speed(4096)
    try:
        await _grow_by(running, 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(grow, running, chance)
            await anyio.sleep(0.05)
            await running.engine.mirror_speed(0)
    finally:
        await running.engine.mirror_speed(0)


async def _grow_by(running: Running, sectors: int) -> None:
    capacity = min(running.sectors + sectors, SECTORS) * SECTOR
    running.recorder.note(Enlarged(capacity))
    await running.resizer.resize(capacity)
    with anyio.fail_after(WAIT_S):
        while (await running.engine.snapshot()).record_pending:  # a destination was lost on the way
            await anyio.sleep(0.001)
    running.recorder.note(Grown(capacity))
    running.sectors = capacity // SECTOR


async def grow_and_lose(running: Running, chance: random.Random) -> None:
    with _failing(running.other, chance):
        await grow(running, chance)
