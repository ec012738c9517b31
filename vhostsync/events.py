# SPDX-License-Identifier: Apache-2.0
"""Events from the device to whoever listens (clients of the control socket, metrics, tests).

`EventHub.publish` is a plain function that never waits: a listener that does not read must not slow the
mirror. Each subscriber has a buffer of its own with room for a fixed number of events. When it is full, one
event is dropped, the oldest that tells no change of state (progress, for example: the next one says more),
or the oldest of all where every one does; the next event that this subscriber receives says how many were
dropped before it. Nothing is lost of what the device *is*: that is what `query-mirror` answers.

All of this lives on one event loop thread; there are no locks.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import anyio


@dataclass(frozen=True)
class Declared:
    """An event as docs/control-protocol.md shows it. One that tells a change of state is dropped only where a
    buffer holds nothing else."""

    when: str
    data: str
    tells_state: bool


EVENTS: Final[dict[str, Declared]] = {}
"""Every event that is published, by name."""


def _event(name: str, when: str, data: str, *, tells_state: bool = False) -> str:
    EVENTS[name] = Declared(when, data, tells_state)
    return name


MIRROR_STATE_CHANGE: Final = _event(
    "MIRROR_STATE_CHANGE",
    "the mirror's state has changed",
    "`state`, `former`, `reason`, `destination`, `error`",
    tells_state=True,
)
MIRROR_PROGRESS: Final = _event(
    "MIRROR_PROGRESS",
    "every second while it copies",
    "`bytes-done`, `bytes-total`, `rate` (bytes per second), `remaining-s`",
)
SWITCH_STARTED: Final = _event(
    "SWITCH_STARTED",
    "a switch has begun; the guest runs on",
    "`destination`",
    tells_state=True,
)
SWITCH_COMPLETED: Final = _event(
    "SWITCH_COMPLETED",
    "the guest is on the other disk",
    "as `switch` returns",
    tells_state=True,
)
SWITCH_FAILED: Final = _event(
    "SWITCH_FAILED",
    "the switch was given up",
    "`reason`",
    tells_state=True,
)
FRONTEND_CONNECTED: Final = _event(
    "FRONTEND_CONNECTED",
    "a frontend has connected",
    "`frontend` (number), `pid`, `uid`",
)
FRONTEND_DISCONNECTED: Final = _event(
    "FRONTEND_DISCONNECTED",
    "it is gone",
    "`frontend`, `reason` (null: it closed the connection)",
)
IO_ERROR: Final = _event(
    "IO_ERROR",
    "a request to a disk has failed",
    "`disk` (\"source\", \"destination\"), `path`, `operation`, `offset`, `length`, `error`",
)
QUEUE_BROKEN: Final = _event(
    "QUEUE_BROKEN",
    "a queue was given up because of what the guest had put there",
    "`attachment`, `queue`, `reason`",
    tells_state=True,
)
BITMAP_FAILED: Final = _event(
    "BITMAP_FAILED",
    "the dirty bitmap's file cannot be written; what differs is kept in memory alone",
    "`error`",
    tells_state=True,
)
CAPACITY_CHANGE: Final = _event(
    "CAPACITY_CHANGE",
    "the guest's disk has grown",
    "`capacity`",
    tells_state=True,
)
DESTINATION_RETRY: Final = _event(
    "DESTINATION_RETRY",
    "the mirror of the last run is resumed, or, with `--destination-retry` or over a network, that of a"
    " destination that has failed: `what` is `waiting`, `failed`, `attached`, or `fence`: until"
    " `mirror-start` with `fenced`, which `error` explains",
    "`destination`, `what`, `attempt`, `next-in-s`, `error`",
)
VERIFY_PROGRESS: Final = _event(
    "VERIFY_PROGRESS",
    "every second while it compares",
    "`state`, `bytes-done`, `bytes-total`, `bytes-differing`, `bytes-repaired`",
)
VERIFY_COMPLETED: Final = _event(
    "VERIFY_COMPLETED",
    "the verification is over",
    "the same",
    tells_state=True,
)
SHUTDOWN: Final = _event(
    "SHUTDOWN",
    "the backend begins to end",
    "`force`",
    tells_state=True,
)
SOURCE_FAILOVER: Final = _event(
    "SOURCE_FAILOVER",
    "a steady source has failed under `--on-source-error switch`, and it was dealt with",
    "`former`, `source` (where the guest is now), `switched`, `error` (of the source), `reason` "
    "(why it was not switched; null), `pause-us`",
    tells_state=True,
)
FLUSHES_PAUSED: Final = _event(
    "FLUSHES_PAUSED",
    "under `--on-destination-error pause`, flushes begin to wait or do not any more; or some were"
    " let go that the frontend could not wait for (`released`)",
    "`paused`, `released`",
    tells_state=True,
)

EVENTS_LOST: Final = _event(
    "EVENTS_LOST", "events were dropped before the next one, because this client was slow", "`count`"
)

BUFFER_EVENTS: Final = 256
"""Events that one subscriber may lag behind before it loses some."""


def tells_state(name: str) -> bool:
    return name in EVENTS and EVENTS[name].tells_state


@dataclass(frozen=True)
class Event:
    """One event. `wall_ns` is nanoseconds since the epoch; `lost` counts the events dropped for this
    subscriber since the event that it received before this one."""

    name: str
    data: Mapping[str, Any]
    wall_ns: int
    lost: int = 0


class Subscription:
    """An async iterator over the events published since it was entered; use it as a context manager, in one
    task."""

    def __init__(self, hub: "EventHub", buffer_events: int) -> None:
        if buffer_events < 1:
            raise ValueError("a subscriber's buffer needs room for one event at least")
        self._hub = hub
        self._room = buffer_events
        self._events: deque[Event] = deque()
        self._lost = 0
        self._wake = anyio.Event()
        self._closed = False

    async def __aenter__(self) -> "Subscription":
        if not self._closed:
            self._hub._subscribers.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> Event:
        """The next event, waiting for one; ends when the hub or the subscription was closed and the buffer
        is empty."""
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            await self._wake.wait()
        event = self._events.popleft()
        if not self._events and not self._closed:
            self._wake = anyio.Event()
        lost, self._lost = self._lost, 0
        return Event(event.name, event.data, event.wall_ns, lost)

    def close(self) -> None:
        """Receive no more; what is in the buffer can still be read."""
        self._hub._subscribers.discard(self)
        self._closed = True
        self._wake.set()

    def _put(self, event: Event) -> None:
        if len(self._events) == self._room:
            self._drop_one()
        self._events.append(event)
        self._wake.set()

    def _drop_one(self) -> None:
        victim = next((i for i, event in enumerate(self._events) if not tells_state(event.name)), 0)
        del self._events[victim]
        self._lost += 1


class EventHub:
    """Hands each published event to every subscriber. Created anywhere; used on the event loop's thread."""

    def __init__(self) -> None:
        self._subscribers: set[Subscription] = set()
        self._closed = False

    def publish(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Tell everybody that `name` happened. Never waits; `data` must be fit for JSON and is not changed
        afterwards."""
        event = Event(name, data if data is not None else {}, time.time_ns())
        for subscriber in self._subscribers:
            subscriber._put(event)

    def subscribe(self, buffer_events: int = BUFFER_EVENTS) -> Subscription:
        """`async with hub.subscribe() as events: async for event in events: …`. Events published before are
        not seen."""
        subscription = Subscription(self, buffer_events)
        if self._closed:
            subscription._closed = True
        return subscription

    def close(self) -> None:
        """End every subscription once its buffer is read; used at the very end of `serve`."""
        self._closed = True
        for subscriber in list(self._subscribers):
            subscriber.close()
