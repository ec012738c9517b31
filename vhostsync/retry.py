# SPDX-License-Identifier: Apache-2.0
"""A destination that has failed is tried again (--destination-retry): with growing pauses, until it is
attached again, somebody cancels the mirror, or starts another one. What differs is copied, not everything.
"""

from dataclasses import replace
from typing import Final

import anyio
import structlog

from vhostsync import events
from vhostsync.errors import VhostsyncError
from vhostsync.events import EventHub
from vhostsync.mirror import Mirror
from vhostsync.mirror_state import MirrorState

log = structlog.get_logger(__name__)

PAUSE_S_MAX: Final = 300.0


class DestinationRetry:
    """`run` must run as long as it is used. The pause doubles with each try, over failures that follow a
    success too soon as well; reaching steady makes it `first_s` again."""

    def __init__(self, mirror: Mirror, hub: EventHub, first_s: float) -> None:
        self._mirror = mirror
        self._hub = hub
        self._first_s = first_s
        self._pause_s = first_s
        self._attempts = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            changed = self._mirror.changed
            if self._mirror.state is MirrorState.STEADY:
                self._pause_s, self._attempts = self._first_s, 0
            elif self._mirror.state is MirrorState.DEGRADED:
                await self._try_again()
            await changed.wait()

    async def _try_again(self) -> None:
        while self._mirror.state is MirrorState.DEGRADED:
            self._tell("waiting")
            with anyio.move_on_after(self._pause_s):
                await self._mirror.left(MirrorState.DEGRADED)
                return
            self._pause_s = min(self._pause_s * 2, PAUSE_S_MAX)
            self._attempts += 1
            target = self._mirror.last_target
            if target is None:
                return
            if self._mirror.fenced:  # a start would wait for that, and keep other commands out meanwhile
                self._tell("failed", "requests that it was given are not over yet")
                continue
            try:
                await self._mirror.start(replace(target, create=False, full=False))
            except VhostsyncError as error:
                log.warning("the destination is not back yet", attempt=self._attempts, error=str(error))
                self._tell("failed", str(error))
            else:
                self._tell("attached")

    def _tell(self, what: str, error: str | None = None) -> None:
        target = self._mirror.last_target
        data = {
            "destination": None if target is None else str(target.path),
            "what": what,
            "attempt": self._attempts,
            "next-in-s": self._pause_s if what == "waiting" else None,
            "error": error,
        }
        self._hub.publish(events.DESTINATION_RETRY, data)
