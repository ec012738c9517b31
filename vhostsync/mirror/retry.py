# SPDX-License-Identifier: Apache-2.0
"""A mirror that is wanted and not attached comes back by itself: at the start, what the last run had
(--resume-mirror); and a destination that has failed, or could not be resumed, with growing pauses
(--destination-retry). Until it is attached again, somebody cancels the mirror, or starts another one. What
differs is copied, not everything, where that is known.
"""

from typing import Final

import anyio
import structlog

from vhostsync import events
from vhostsync.errors import VhostsyncError
from vhostsync.events import EventHub
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState

log = structlog.get_logger(__name__)

PAUSE_S_MAX: Final = 300.0


class DestinationRetry:
    """`run` must run as long as it is used. The pause doubles with each try, over failures that follow a
    success too soon as well; reaching steady makes it `first_s` again. `first_s` None: there are no pauses,
    because nothing is tried again. `resume`: a mirror that an earlier run had is wanted in this one too."""

    def __init__(self, mirror: Mirror, hub: EventHub, first_s: float | None, *, resume: bool) -> None:
        self._mirror = mirror
        self._hub = hub
        self._first_s = first_s
        self._pause_s = first_s if first_s is not None else 0.0
        self._attempts = 0
        self._resume = resume

    async def run(self) -> None:
        """Until cancelled."""
        if self._lacks_mirror():  # which an earlier run had, for this one has had none yet
            await self._resume_mirror()
        while self._first_s is not None:
            changed = self._mirror.changed
            if self._mirror.state is MirrorState.STEADY:
                self._pause_s, self._attempts = self._first_s, 0
            elif self._lacks_mirror():
                await self._try_again()
            await changed.wait()

    def _lacks_mirror(self) -> bool:
        if self._mirror.state is MirrorState.PASSTHROUGH and not self._resume:
            return False
        return self._mirror.wanted is not None and self._mirror.state in (
            MirrorState.PASSTHROUGH, MirrorState.DEGRADED,
        )  # fmt: skip

    async def _resume_mirror(self) -> None:
        error = await self._attach()
        if error is not None:
            then = "mend that, then: vhostsync mirror start" if self._first_s is None else "it is tried again"
            log.error("the mirror of the last run is not resumed", error=error, then=then)

    async def _try_again(self) -> None:
        while self._lacks_mirror():
            self._tell("waiting")
            with anyio.move_on_after(self._pause_s):
                while self._lacks_mirror():
                    await self._mirror.changed.wait()
                return
            self._pause_s = min(self._pause_s * 2, PAUSE_S_MAX)
            if self._mirror.fenced:  # a start would wait for that, and keep other commands out meanwhile
                self._attempts += 1
                self._tell("failed", "requests that it was given are not over yet")
                continue
            error = await self._attach()
            if error is not None:
                log.warning("the destination is not back yet", attempt=self._attempts, error=error)

    async def _attach(self) -> str | None:
        """Why not, or None."""
        self._attempts += 1
        try:
            await self._mirror.resume()
        except VhostsyncError as error:
            self._tell("failed", str(error))
            return str(error)
        except Exception as error:
            # Nobody has asked for this just now, and the guest is not to lose its disk over it.
            log.exception("a mirror could not be attached, for a reason that nobody foresaw")
            self._tell("failed", repr(error))
            return repr(error)
        if self._mirror.wanted is not None:  # else somebody has cancelled it while this waited its turn
            self._tell("attached")
        return None

    def _tell(self, what: str, error: str | None = None) -> None:
        target = self._mirror.wanted
        data = {
            "destination": None if target is None else target.name,
            "what": what,
            "attempt": self._attempts,
            "next-in-s": self._pause_s if what == "waiting" else None,
            "error": error,
        }
        self._hub.publish(events.DESTINATION_RETRY, data)
