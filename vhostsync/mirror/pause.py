# SPDX-License-Identifier: Apache-2.0
"""`--on-destination-error pause`: tells what the engine does about a steady destination that was lost.

The engine holds the guest's flushes by itself (c_shim/mirror/guest_flush.c), until a mirror is steady again
or mirror-cancel gives up the promise; and lets those go that a frontend cannot wait for
(c_shim/guest/frontend_patience.c).
"""

import structlog

from vhostsync import events
from vhostsync.engine.engine import Engine
from vhostsync.engine.engine_event import EngineEvent, EventKind
from vhostsync.events import EventHub
from vhostsync.mirror.mirror import Mirror
from vhostsync.record.state_record import StateRecord

log = structlog.get_logger(__name__)


class DestinationPause:
    """Says so in the log and to whoever listens, as long as the engine lives."""

    def __init__(self, engine: Engine, mirror: Mirror, hub: EventHub) -> None:
        self._mirror = mirror
        self._hub = hub
        self._paused = False
        engine.on_event(self._on_event)

    def _on_event(self, event: EngineEvent) -> None:
        released = 0
        if event.kind is EventKind.PAUSED:
            self._paused = bool(event.value)
            if self._paused:
                log.warning(
                    "the destination is lost and the guest's flushes wait: start a mirror (mirror-start), or "
                    "let the guest go on without one (mirror-cancel)",
                    destination=str(self._mirror.destination_path),
                )
            else:
                log.info("the guest's flushes do not wait any more")
        elif event.kind is EventKind.PAUSE_RELEASED:
            released = event.value
            log.error(
                "flushes that waited for a mirror go on without one: the frontend stops a queue, removes "
                "memory or leaves, and has waited for stop_timeout",
                requests=released,
            )
        else:
            return
        self._hub.publish(events.FLUSHES_PAUSED, {"paused": self._paused, "released": released})


def warn_of_a_lost_pause(record: StateRecord | None) -> None:
    """A pause ends with the process; whoever relies on it has to know."""
    if record is not None and record.peer is not None:
        log.warning(
            "until a mirror is steady, flushes go on with one disk: a pause does not outlive the backend",
            last_destination=record.peer.path,
            worth=str(record.peer_worth),
        )
