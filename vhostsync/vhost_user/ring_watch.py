# SPDX-License-Identifier: Apache-2.0
"""Says why a frontend's rings do not run although it has started them, or run and bring nothing.

Both leave a guest hanging without a word: by design the second frontend waits until the first has stopped its
rings, and a frontend whose memory is not shared sends none, or other memory than the guest's. So a frontend
that has started its rings is looked at after some seconds, then ever more rarely until a request has come.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import anyio
import structlog

from ..errors import EngineError
from .attachment import Attachment

FIRST_LOOK_S: Final = 3.0
LONGEST_PAUSE_S: Final = 60.0

_SHARE: Final = (
    "the guest's memory is not shared; start QEMU with -object memory-backend-memfd,id=mem,size=…,share=on "
    "-machine memory-backend=mem (cloud-hypervisor: --memory shared=on)"
)
NO_MEMORY: Final = f"its rings lie in no memory that it has sent: {_SHARE}"
EMPTY_RINGS: Final = f"it says that there are requests, and its rings are empty as seen from here: {_SHARE}"

log = structlog.get_logger()


@dataclass(frozen=True)
class RingsSeen:
    """What the data plane sees of the rings: whose they are, whether any runs (or was found broken, which is
    told of elsewhere), and, by ring, how often it was rung and how many requests it has brought."""

    active: Attachment | None
    running: bool
    kicks: Sequence[int]
    requests: Sequence[int]


Look = Callable[[], Awaitable[RingsSeen]]


def trouble(before: RingsSeen, seen: RingsSeen, mine: Attachment, other: int | None) -> str | None:
    """Why the guest behind the attachment `mine` gets nothing, if that is known. `other` is the frontend that
    runs the rings in its place; `before` is from before they were started."""
    if seen.active is None:
        return None
    if seen.active is not mine:
        return f"it waits until frontend {other} has stopped its rings: two machines cannot use one disk"
    if not seen.running:
        return NO_MEMORY
    # A frontend rings once itself when it starts a ring (QEMU), so one kick says nothing.
    rung = any(now - then > 1 for now, then in zip(seen.kicks, before.kicks, strict=True))
    return EMPTY_RINGS if rung and not has_brought(before, seen) else None


def has_brought(before: RingsSeen, seen: RingsSeen) -> bool:
    """Whether any request has come since."""
    return sum(seen.requests) > sum(before.requests)


async def watch_rings(
    frontend: int,
    mine: Attachment,
    before: RingsSeen,
    look: Look,
    number_of: Callable[[Attachment | None], int | None],
) -> None:
    """Logs what is wrong with the rings that this frontend has started, each thing once, and when it is over.
    Returns when a request has come; to be cancelled when the rings are stopped."""
    said: str | None = None
    pause_s = FIRST_LOOK_S
    while True:
        await anyio.sleep(pause_s)
        try:
            seen = await look()
        except EngineError:
            return  # the end of all
        reason = trouble(before, seen, mine, number_of(seen.active))
        if reason is not None and reason != said:
            log.warning("frontend does not get on", frontend=frontend, reason=reason)
        elif reason is None and said is not None:
            log.info("frontend gets on", frontend=frontend)
        said = reason
        if seen.active is mine and reason is None and has_brought(before, seen):
            return
        if seen.active is not mine:
            before = seen  # what another one's rings brought says nothing about these
        pause_s = FIRST_LOOK_S if reason is not None else min(2 * pause_s, LONGEST_PAUSE_S)
