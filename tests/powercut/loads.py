# SPDX-License-Identifier: Apache-2.0
"""What the guest does while it is recorded. Everything is drawn from a seed; how the threads take turns is
not, so a seed names a kind of run and not a run."""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import dataclass, field
from typing import Any

from tests.engine_driver import DiskOp
from tests.frontend import Request, Status
from tests.powercut.machine import QUEUES, SECTORS, Running
from tests.powercut.media import SECTOR, image_bytes
from tests.powercut.recorder import SECTOR_BITS, Confirmed, GuestRequest, Submitted, tag

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
        if self.chance.random() < 0.1:
            self.chance.choice(self.running.disks).land(1)

    def _let_go(self) -> None:
        for disk in self.running.disks:
            for op in DiskOp:
                if disk.held(op):
                    disk.release(op, self.chance.randint(1, 4))

    def _place(self) -> tuple[int, int]:
        count = self.chance.choice((1, 2, 8, 8, 16, self.chance.randint(1, LONGEST)))
        if self.chance.random() < 0.1:  # a disk that grows ends amid a region
            return self.running.sectors - min(count, 8), min(count, 8)
        room = HOT if self.chance.random() < 0.5 else self.running.sectors
        return self.chance.randrange(max(room - count + 1, 1)), count

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


def initial_content(chance: random.Random) -> list[int]:
    """Data with holes."""
    content: list[Any] = [0] * SECTORS
    for first in range(0, SECTORS, 64):
        if chance.random() < 0.6:
            content[first : first + 64] = filled(first, 64)
    return content


def rubbish(first: int) -> list[int]:
    """An empty disk, but from the sector `first` on."""
    return [0] * first + filled(first, SECTORS - first)
