# SPDX-License-Identifier: Apache-2.0
"""A mirror that is wanted and not attached comes back by itself: at the start, what the last run had
(--resume-mirror); and a destination that has failed, or could not be resumed, with growing pauses
(--destination-retry; over a network unasked). Until it is attached again, somebody cancels the mirror, or
starts another one. What differs is copied, not everything, where that is known. Nothing is tried while only
the operator can say that what a lost connection has left under way is over (fence.py).
"""

from typing import Final

import anyio
import structlog

from vhostsync import events
from vhostsync.errors import VhostsyncError
from vhostsync.events import EventHub
from vhostsync.mirror.fence import Means, sentence
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.storage.kinds import kind_of

log = structlog.get_logger(__name__)

PAUSE_S_MAX: Final = 300.0
OVER_NETWORK_S: Final = 1.0
"""The first pause of a destination over a network, where none was asked for."""


class DestinationRetry:
    """`run` must run as long as it is used. The pause doubles with each try, over failures that follow a
    success too soon as well; reaching steady makes it the first one again. What was given up and is not over
    is waited for, however long, and then tried at once. `first_s`: what was asked for;
    None: only a destination over a network is tried again. `resume`: a mirror that an earlier run had is
    wanted in this one too."""

    def __init__(self, mirror: Mirror, hub: EventHub, first_s: float | None, *, resume: bool) -> None:
        self._mirror = mirror
        self._hub = hub
        self._first_s = first_s
        self._pause_s: float | None = None  # None: the first one is next
        self._attempts = 0
        self._resume = resume

    async def run(self) -> None:
        """Until cancelled."""
        await self.resume()
        while True:
            changed = self._mirror.changed
            if self._mirror.state is MirrorState.STEADY:
                self._pause_s, self._attempts = None, 0
            elif self._lacks_mirror() and self._first_pause_s() is not None:
                await self._try_again()
            await changed.wait()

    def _first_pause_s(self) -> float | None:
        """Before the mirror that is wanted is tried again; None: it is not."""
        wanted = self._mirror.wanted
        if self._first_s is None and wanted is not None and kind_of(wanted.name).over_network:
            return OVER_NETWORK_S
        return self._first_s

    def _lacks_mirror(self) -> bool:
        if self._mirror.state is MirrorState.PASSTHROUGH and not self._resume:
            return False
        return self._mirror.wanted is not None and self._mirror.state in (
            MirrorState.PASSTHROUGH, MirrorState.DEGRADED,
        )  # fmt: skip

    async def resume(self) -> None:
        """The mirror that an earlier run had, once; this one has had none yet."""
        if self._lacks_mirror() and (error := await self._attach()) is not None:
            again = self._first_pause_s() is not None and not self._mirror.waits_for_hand
            then = "it is tried again" if again else "mend that, then: vhostsync mirror start"
            log.error("the mirror of the last run is not resumed", error=error, then=then)

    async def _try_again(self) -> None:
        while self._lacks_mirror() and (first_s := self._first_pause_s()) is not None:
            if self._mirror.waits_for_hand:
                await self._wait_for_hand()
                continue
            pause_s = self._pause_s = first_s if self._pause_s is None else self._pause_s
            self._tell("waiting")
            with anyio.move_on_after(pause_s):
                while self._lacks_mirror():
                    await self._mirror.changed.wait()
                return
            self._pause_s = min(pause_s * 2, PAUSE_S_MAX)
            if self._mirror.fenced:
                await self._wait_for_former()
            if not self._lacks_mirror() or self._mirror.waits_for_hand:
                continue
            error = await self._attach()
            if error is not None:
                log.warning("the destination is not back yet", attempt=self._attempts, error=error)

    async def _wait_for_former(self) -> None:
        """That its requests are over; then it is tried without a pause. A start would wait for that, too, and
        keep other commands out meanwhile."""
        self._attempts += 1
        self._tell("failed", "requests that it was given are not over yet")
        while self._lacks_mirror() and self._mirror.fenced:
            await self._mirror.changed.wait()

    async def _wait_for_hand(self) -> None:
        target = self._mirror.wanted
        assert target is not None
        why = sentence(target.name, Means.HAND)
        self._tell("fence", why)
        log.warning("the destination is not attached again", reason=why)
        while self._lacks_mirror() and self._mirror.waits_for_hand:
            await self._mirror.changed.wait()

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
