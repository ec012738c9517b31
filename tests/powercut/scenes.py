# SPDX-License-Identifier: Apache-2.0
"""The scenes: which phases follow each other, and with which options."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import anyio
import anyio.to_thread

from tests.frontend import DEFAULT_FEATURES, Feature
from tests.powercut.loads import Load
from tests.powercut.machine import SIZE, Running
from tests.powercut.phases import (
    Phase,
    attach,
    attach_again,
    attach_full,
    begin_copy,
    cancel,
    fail_source,
    fail_writes,
    get_ahead,
    give_up_the_pause,
    grow,
    grow_and_lose,
    grow_and_lose_connection,
    grow_slowly,
    idle,
    land_late,
    leave,
    leave_what_is_bad,
    lose_connection,
    lose_connection_amid_writes,
    lose_destination,
    resume,
    rot,
    spoil,
    stop_queues,
    switch,
    switch_and_lose,
    verify,
    verify_and_lose,
    verify_and_lose_connection,
    verify_and_switch,
)
from vhostsync.errors import VhostsyncError
from vhostsync.record.state_record import StateRecord, Worth

WITHOUT_GUEST = (stop_queues,)
WRITE_THROUGH = DEFAULT_FEATURES & ~(Feature.FLUSH | Feature.CONFIG_WCE)

# A pause ends by a mirror, by a cancel, by a frontend that does not wait, and by a restart.
PAUSES: tuple[Phase, ...] = (
    attach, lose_destination, idle, begin_copy, lose_destination, attach, lose_destination, cancel,
    attach, lose_destination, stop_queues, idle, attach, lose_destination, give_up_the_pause,
)  # fmt: skip
AFTER_A_PAUSE: tuple[Phase, ...] = (idle, resume, lose_destination, attach, give_up_the_pause)


def _is_outdated(record: StateRecord) -> bool:
    return record.wanted is not None and record.peer_worth is Worth.OUTDATED


@dataclass(frozen=True)
class Scene:
    """A phase may find that it is impossible now (a switch after a loss): that is part of the play."""

    name: str
    phases: tuple[Phase, ...]
    features: int = DEFAULT_FEATURES
    pull_ahead: bool = False
    failover: bool = False
    pause: bool = False
    capacity_bytes: int = SIZE  # at first
    remote: bool = False  # the disks are of another machine, whose server is not ours
    afterwards: tuple[Phase, ...] = (idle, resume, attach, idle)
    """On what a power cut has left, rather on one of which the record is `telling`."""
    telling: Callable[[StateRecord], bool] = lambda record: True

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
        "connection",
        (
            attach, lose_connection, idle, attach_again, idle, begin_copy, lose_connection, attach_again,
            verify_and_lose_connection, attach_again, switch, lose_connection, idle, attach_again,
        ),
        remote=True,
        afterwards=(resume, lose_connection, attach_again, idle),
    ),
    Scene(
        "late",
        (
            attach, lose_connection_amid_writes, idle, attach_again, idle, land_late,
            lose_connection_amid_writes, idle, attach_again, idle, land_late, idle,
        ),
        remote=True,
        afterwards=(resume, lose_connection_amid_writes, attach_again, idle, land_late),
    ),
    Scene(
        "connection-ahead",
        (
            attach, get_ahead, lose_connection, attach_again, get_ahead, idle, lose_connection, idle,
            attach_again,
        ),
        pull_ahead=True,
        remote=True,
    ),
    Scene(
        "connection-grow",
        (
            attach, grow_slowly, lose_connection, attach_again, grow_and_lose_connection, attach_again,
            grow, lose_connection, grow, attach_again,
        ),
        capacity_bytes=SIZE // 3 // 512 * 512,
        remote=True,
        afterwards=(resume, grow, lose_connection, attach_again),
    ),
    Scene(
        "write-through",
        (attach, idle, lose_destination, idle, attach, switch, idle),
        WRITE_THROUGH,
    ),
    Scene("pause", PAUSES, pause=True, afterwards=AFTER_A_PAUSE, telling=_is_outdated),
    Scene(
        "pause-write-through",
        PAUSES,
        WRITE_THROUGH,
        pause=True,
        afterwards=AFTER_A_PAUSE,
        telling=_is_outdated,
    ),
    Scene(
        "verify",
        (attach, rot, verify, idle, rot, verify_and_switch, attach, rot, verify_and_lose, attach, verify),
        afterwards=(resume, rot, verify_and_switch, attach),
    ),
    Scene(
        "grow",
        (
            attach,
            grow_slowly,
            lose_destination,
            grow,
            attach,
            grow_and_lose,
            attach,
            grow_slowly,
            switch,
            idle,
        ),
        capacity_bytes=SIZE // 3 // 512 * 512,
        afterwards=(resume, grow, idle, switch),
    ),
    Scene(
        "unreadable",
        (spoil, attach, idle, spoil, lose_destination, idle, attach, leave_what_is_bad, attach, spoil, idle),
        afterwards=(spoil, resume, idle, leave_what_is_bad, attach),
    ),
    Scene(
        "doubt",
        (
            attach,
            fail_writes,
            lose_destination,
            idle,
            fail_writes,
            attach,
            idle,
            fail_writes,
            leave_what_is_bad,
        ),
        afterwards=(resume, fail_writes, lose_destination, attach, leave_what_is_bad),
        telling=lambda record: bool(record.doubt),
    ),
)


async def play(running: Running, scene: Scene, chance: random.Random) -> None:
    """All phases, the guest at work in each of them."""
    load = Load(running, random.Random(chance.getrandbits(64)), scene.write_through)
    for phase in scene.phases:
        if phase in WITHOUT_GUEST:
            await _perform(phase, running, chance)
            continue
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
