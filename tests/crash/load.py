# SPDX-License-Identifier: Apache-2.0
"""A load that knows what every block of the disk must hold; its backend may die at any time.

Each block carries its address and the generation (the number of the write) that put it there. A request owns
its blocks while it is in flight, so what a read must show is known exactly. Whatever the backend answers that
it was not asked, answers twice, answers without a status or with the wrong data ends the load at once.

The load hears of completions through the call descriptors alone, as a guest does.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.habits import Habits, Kept, Returning
from tests.frontend import Frontend, FrontendTimeout, Op, Request

BLOCK_BYTES = 4096
BLOCKS_PER_REQUEST = 8
PATIENCE_S = float(os.environ.get("VHOSTSYNC_CRASH_PATIENCE_S", "30"))
"""How long a connected backend may answer nothing while something is in flight: then a request is lost."""

_TAG = struct.Struct("<QQ")


def block_content(number: int, generation: int) -> bytes:
    """What block `number` holds after write `generation`; 0: it was never written, or zeroed."""
    if generation == 0:
        return bytes(BLOCK_BYTES)
    return _TAG.pack(number, generation) * (BLOCK_BYTES // _TAG.size)


@dataclass
class Figures:
    """What the load did. `replayed`: requests that were in flight when a backend was killed."""

    requests: int = 0
    bytes_verified: int = 0
    replayed: int = 0
    connections: int = 0
    by_op: dict[str, int] = field(default_factory=dict)


class Eventfd:
    """An event that a poll can wait for; any thread may set it."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        os.close(self.fd)


class VerifiedLoad:
    """`run` keeps `depth` requests in flight on each queue, comes back after each kill, and ends when
    `finished` says so and everything is answered. `news` wakes it (a backend listens, or it is time to end);
    `connecting` is called when a backend is there, `recovered` once all that a dead backend left behind is
    answered and new requests were, too."""

    def __init__(
        self,
        frontend: Frontend,
        socket: Path,
        habits: Habits,
        *,
        blocks: int,
        rng: random.Random,
        depth: int = 24,
    ) -> None:
        self.frontend = frontend
        self.socket = socket
        self.habits = habits
        self.rng = rng
        self.depth = depth
        self.kept = Kept()
        self.figures = Figures()
        self.news = Eventfd()
        self.generation = 0
        self.content = [0] * blocks
        self._busy = [False] * blocks
        self._becomes: dict[Request, int | None] = {}
        self._connection: Returning | None = None
        self._left_behind: set[Request] = set()
        self._since_connected = 0
        self._told = False
        self._connecting: Callable[[], None] = lambda: None

    def close(self) -> None:
        self.disconnect()
        self.kept.close()
        self.news.close()

    # -- connection ---------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def disconnect(self) -> None:
        """The frontend goes away."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> bool:
        """Tries once; whether it came about."""
        connection = None
        try:
            connection = Returning(self.socket)
            self._connecting()
            connection.connect(self.frontend, self.habits, self.kept)
        except TimeoutError:
            raise  # a backend that does not answer is no dead one
        except OSError:
            if connection is not None:
                connection.close()
            return False
        self._connection = connection
        self.figures.connections += 1
        self._left_behind = set(self._becomes)
        self.figures.replayed += len(self._left_behind)
        self._since_connected = 0
        self._told = False
        return True

    # -- requests -----------------------------------------------------------

    def _claim(self) -> tuple[int, int] | None:
        """First block and number of blocks of a free place."""
        count = self.rng.randint(1, BLOCKS_PER_REQUEST)
        first = self.rng.randrange(len(self.content) - count)
        if any(self._busy[first : first + count]):
            return None
        self._busy[first : first + count] = [True] * count
        return first, count

    def _submit(self, queue: int) -> None:
        frontend, choice = self.frontend, self.rng.random()
        if choice < 0.05:
            self._becomes[frontend.flush(queue=queue)] = None
            return
        place = self._claim()
        if place is None:
            return
        first, count = place
        offset, length = first * BLOCK_BYTES, count * BLOCK_BYTES
        if choice < 0.65:
            self.generation += 1
            data = b"".join(block_content(number, self.generation) for number in range(first, first + count))
            request = frontend.write(offset, data, queue=queue, segments=self.rng.randint(1, 3))
            self._becomes[request] = self.generation
        elif choice < 0.70:
            self._becomes[frontend.write_zeroes(offset, length, queue=queue)] = 0
        else:
            self._becomes[frontend.read(offset, length, queue=queue)] = None

    def _fill(self) -> None:
        for number, queue in enumerate(self.frontend.queues):
            for _ in range(self.depth - len(queue.in_flight)):
                self._submit(number)

    def _take(self, request: Request) -> None:
        where = f"{Op(request.op).name} of {request.length} bytes at {request.offset}"
        assert request in self._becomes, f"answered twice: {where}"
        assert request.ok, f"{where} ended with status {request.status:#x}"
        becomes = self._becomes.pop(request)
        self._left_behind.discard(request)
        self._since_connected += 1
        self.figures.requests += 1
        name = Op(request.op).name
        self.figures.by_op[name] = self.figures.by_op.get(name, 0) + 1
        if request.op != Op.FLUSH:
            first, count = request.offset // BLOCK_BYTES, request.length // BLOCK_BYTES
            if request.op == Op.READ:
                self._verify(first, request.data, where)
            if becomes is not None:
                self.content[first : first + count] = [becomes] * count
            self._busy[first : first + count] = [False] * count
        self.frontend.recycle(request)

    def _verify(self, first: int, data: bytes, where: str) -> None:
        for position in range(len(data) // BLOCK_BYTES):
            number = first + position
            found = data[position * BLOCK_BYTES : (position + 1) * BLOCK_BYTES]
            wanted = self.content[number]
            assert found == block_content(number, wanted), (
                f"{where}: block {number} must hold generation {wanted}, but begins "
                f"with (address, generation) {_TAG.unpack_from(found)}"
            )
        self.figures.bytes_verified += len(data)

    def _reap(self) -> None:
        """Until nothing more is there and the next completion will be told."""
        while True:
            for request in self.frontend.poll():
                self._take(request)
            for number, queue in enumerate(self.frontend.queues):
                assert not queue.raw_done, f"queue {number}: answered, but not asked: heads {queue.raw_done}"
            armed = [queue.ring.arm() for queue in self.frontend.queues]
            if all(armed):
                return

    # -- the loop -----------------------------------------------------------

    def run(
        self,
        *,
        finished: Callable[[], bool],
        connecting: Callable[[], None],
        recovered: Callable[[], None],
    ) -> None:
        self._connecting = connecting
        last_answer = time.monotonic()
        self._reap()
        while True:
            ending = finished()
            if not self.connected and self._connect():
                last_answer = time.monotonic()
            if not ending:
                self._fill()
            elif self.connected and not self._becomes:
                break
            before = self.figures.requests
            self._wait()
            # A backend that is long in coming up is for whoever starts it to complain of.
            if self.figures.requests != before or not (self.connected or ending):
                last_answer = time.monotonic()
            elif self._becomes and time.monotonic() - last_answer > PATIENCE_S:
                raise FrontendTimeout(self._standstill())
            if not (self._told or self._left_behind) and self._since_connected >= 2 * self.depth:
                self._told = True
                recovered()
        for number, queue in enumerate(self.frontend.queues):
            assert queue.ring.all_used(), f"queue {number}: used is not available"

    def _wait(self) -> None:
        """For a completion, the end of the connection, or news."""
        calls = [queue.call for queue in self.frontend.queues]
        poller = select.poll()
        poller.register(self.news.fd, select.POLLIN)
        timeout_s = 1.0
        if self._connection is not None:
            for fd in (*calls, self._connection.client.socket.fileno()):
                poller.register(fd, select.POLLIN)
        elif self.habits.retry_s is not None:
            timeout_s = self.habits.retry_s
        ready = {fd for fd, _ in poller.poll(timeout_s * 1000)}
        if self.news.fd in ready:
            self.news.clear()
        told = [fd for fd in calls if fd in ready]
        for fd in told:
            os.eventfd_read(fd)
        if told:
            self._reap()
        elif ready and self._connection is not None and self._connection.lost():
            self.disconnect()

    def _describe(self, request: Request) -> str:
        left = ", left behind by a killed backend" if request in self._left_behind else ""
        return f"{Op(request.op).name} on queue {request.queue} at {request.offset}{left}"

    def _standstill(self) -> str:
        """What a test needs to know when nothing moves any more."""
        lines = ["connected, but not answered:" if self._connection else "no backend comes up; not answered:"]
        for number, queue in enumerate(self.frontend.queues):
            ring = queue.ring
            marked = self.kept.marked(number)
            lines.append(
                f"queue {number}: available {ring.next_avail}, used {ring.used_index()}, "
                f"seen {ring.last_used}, in flight {sorted(queue.in_flight)}, marked {marked}"
            )
        lines += [self._describe(request) for request in self._becomes]
        return "\n".join(lines)

    # -- afterwards ---------------------------------------------------------

    def verify_image(self, image: Path) -> None:
        """The whole disk, where the backend has put it."""
        with image.open("rb") as file:
            for number in range(len(self.content)):
                self._verify(number, file.read(BLOCK_BYTES), image.name)
