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

MIRROR_STATE_CHANGE: Final = "MIRROR_STATE_CHANGE"
MIRROR_PROGRESS: Final = "MIRROR_PROGRESS"
SWITCH_STARTED: Final = "SWITCH_STARTED"
SWITCH_COMPLETED: Final = "SWITCH_COMPLETED"
SWITCH_FAILED: Final = "SWITCH_FAILED"
FRONTEND_CONNECTED: Final = "FRONTEND_CONNECTED"
FRONTEND_DISCONNECTED: Final = "FRONTEND_DISCONNECTED"
IO_ERROR: Final = "IO_ERROR"
QUEUE_BROKEN: Final = "QUEUE_BROKEN"
BITMAP_FAILED: Final = "BITMAP_FAILED"
CAPACITY_CHANGE: Final = "CAPACITY_CHANGE"
DESTINATION_RETRY: Final = "DESTINATION_RETRY"
VERIFY_PROGRESS: Final = "VERIFY_PROGRESS"
VERIFY_COMPLETED: Final = "VERIFY_COMPLETED"
SHUTDOWN: Final = "SHUTDOWN"
SOURCE_FAILOVER: Final = "SOURCE_FAILOVER"
FLUSHES_PAUSED: Final = "FLUSHES_PAUSED"

STATE_EVENTS: Final = frozenset(
    {MIRROR_STATE_CHANGE, SWITCH_STARTED, SWITCH_COMPLETED, SWITCH_FAILED, QUEUE_BROKEN, BITMAP_FAILED}
    | {CAPACITY_CHANGE, VERIFY_COMPLETED, SHUTDOWN, SOURCE_FAILOVER, FLUSHES_PAUSED}
)
"""Events that are dropped only where a buffer holds nothing else."""

BUFFER_EVENTS: Final = 256
"""Events that one subscriber may lag behind before it loses some."""


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
        victim = next((i for i, event in enumerate(self._events) if event.name not in STATE_EVENTS), 0)
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
