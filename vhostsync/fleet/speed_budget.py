# SPDX-License-Identifier: Apache-2.0
"""A bandwidth that several copies share, each an equal part of it. The sum is never more: those that run are
slowed down before another one begins, and that begins with the least part that it may ever have."""

from contextlib import suppress
from typing import Final

import anyio

from vhostsync.control.client import connect
from vhostsync.control.found_socket import Control
from vhostsync.errors import ControlError

SET_S: Final = 5.0
"""A backend that does not answer keeps the others waiting no longer."""


class SpeedBudget:
    """`bytes_per_s`: of all together; 0: there is no limit, and none is touched. `copies_max`: at once."""

    def __init__(self, bytes_per_s: int, copies_max: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._least = max(bytes_per_s // copies_max, 1) if bytes_per_s else 0
        self._copies: list[Control] = []
        self._limited: list[Control] = []  # by us; another copy that was found there has its own limit
        self._turn = anyio.Lock()

    async def join(self, control: Control) -> int:
        """The copy of this backend is about to begin, or runs already: the speed to begin it with."""
        async with self._turn:
            self._copies.append(control)
            await self._set(self._limited, self._part)
            return self._least

    async def settle(self, control: Control) -> None:
        """It has begun: from here on it has its part. May be said again, after a restart of its backend."""
        async with self._turn:
            if control not in self._limited:
                self._limited.append(control)
            await self._set([control], self._part)

    async def leave(self, control: Control) -> None:
        """It is over, or has not begun: others share what it had, and it has no limit of ours any more."""
        async with self._turn:
            self._copies.remove(control)
            if control in self._limited:
                self._limited.remove(control)
                await self._set([control], 0)
            await self._set(self._limited, self._part)

    @property
    def _part(self) -> int:
        return max(self._bytes_per_s // max(len(self._copies), 1), 1)

    async def _set(self, copies: list[Control], bytes_per_s: int) -> None:
        """A backend that is gone, or says nothing, has no copy that goes on."""
        if not self._bytes_per_s:
            return

        async def set_one(control: Control) -> None:
            with suppress(ControlError), anyio.move_on_after(SET_S):
                async with connect(control) as client:
                    await client.execute("mirror-set-speed", {"speed": bytes_per_s})

        async with anyio.create_task_group() as tasks:
            for control in copies:
                tasks.start_soon(set_one, control)
