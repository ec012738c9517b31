# SPDX-License-Identifier: Apache-2.0
"""Whether the names of the disks that are open still lead to them: if not, the next start finds another disk,
or none. Looked at when somebody asks for figures, or before a guest is moved, and never waited for: a file
system may hang."""

import os
import time
from typing import Final

from vhostsync.host.errands import Errands
from vhostsync.mirror.destination import Place
from vhostsync.storage import kinds

LOOK_EVERY_S: Final = 10.0
PATIENCE_S: Final = 0.2
CERTAIN_S: Final = 2.0
"""For who must not go on without: a file system that has not answered by then is taken at its word."""
KNOWN_MAX: Final = 8


class DiskNames:
    def __init__(self) -> None:
        self._errands = Errands()
        self._hangs: set[Place] = set()  # or is being looked at by whoever must not go on without
        self._looking: set[Place] = set()  # a look that has not come back; there is no second one
        self._found: dict[Place, tuple[float, bool | None]] = {}

    async def is_replaced(self, place: Place) -> bool | None:
        """None: it cannot be told, or lies at no path."""
        looked_s, found = self._found.get(place, (-LOOK_EVERY_S, None))
        if time.monotonic() - looked_s < LOOK_EVERY_S:
            return found
        if place in self._looking:
            return None
        self._looking.add(place)
        try:
            return await self._errands.answer(lambda: self._look(place), PATIENCE_S)
        except TimeoutError:
            return None

    async def why_not_found(self, place: Place | None) -> str | None:
        """Looked at now: why the next start would not find that disk by its name. None: it would, or it
        cannot be told, or there is none."""
        if place is None or place in self._hangs:
            return None
        self._hangs.add(place)
        try:
            replaced = await self._errands.answer(lambda: self._look_once(place), CERTAIN_S)
        except TimeoutError:
            return None
        if not replaced:
            return None
        return (
            f"{place.name} does not lead to the disk that is mirrored to any more (it was removed, renamed "
            f"or replaced, or its file system is not mounted), so nobody would find that later; give it its "
            f"name back, or mirror anew (mirror cancel, mirror start)"
        )

    def _look_once(self, place: Place) -> bool | None:
        """In a thread of its own. One that never comes back is the only one of that place."""
        try:
            return _is_replaced(place)
        finally:
            self._hangs.discard(place)

    def _look(self, place: Place) -> bool | None:
        """In a thread of its own; what it finds late is told when somebody asks again."""
        found = _is_replaced(place)
        if len(self._found) >= KNOWN_MAX:
            self._found.clear()
        self._found[place] = time.monotonic(), found
        self._looking.discard(place)
        return found


def _is_replaced(place: Place) -> bool | None:
    if kinds.kind_of(place.name).prefix:
        return None
    try:
        os.stat(place.name)  # noqa: PTH116 what it raises is what is asked for
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # its directory is another user's, say
        return None
    return not kinds.is_named(place.name, place.identity)
