# SPDX-License-Identifier: Apache-2.0
"""Who may command the mirror: one command at a time, a second one is refused and not queued. But a switch
from a source that has failed goes first: the guest waits for it, and what else is under way may wait for that
very source. So whoever has the turn is interrupted, undoes what it has begun, and is told why.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from vhostsync.errors import MirrorError


class Turns:
    """Used by the tasks of one event loop."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._scope: anyio.CancelScope | None = None
        self.first: str | None = None  # who has the turn, or gets it next
        self.ended = anyio.Event()  # set when whoever has the turn now is done

    @property
    def is_free(self) -> bool:
        return self.first is None and self._name is None

    @asynccontextmanager
    async def take(self, name: str) -> AsyncIterator[None]:
        """MirrorError while another command is under way, and where this one was interrupted."""
        self.check_free(name)
        scope = anyio.CancelScope()
        self._name, self._scope = name, scope
        try:
            with scope:
                yield
        finally:
            self._name = self._scope = None
            self._wake()
        if scope.cancelled_caught:
            raise MirrorError(
                f"{name} was given up: the source has failed, and the switch from it goes first; `status` "
                f"says where the guest is"
            )

    @asynccontextmanager
    async def take_first(self, name: str) -> AsyncIterator[None]:
        """Interrupts whoever has the turn. Not to be asked for twice at once."""
        assert self.first is None
        self.first = name
        try:
            while self._scope is not None:
                self._scope.cancel()
                await self.ended.wait()
            yield
        finally:
            self.first = None
            self._wake()

    def check_free(self, name: str) -> None:
        """MirrorError while a command is under way."""
        if (other := self.first or self._name) is not None:
            raise MirrorError(f"{name} has to wait: {other} is under way; try again when it is over")

    async def free(self) -> None:
        """Nobody has the turn; another one who waits may take it first."""
        while not self.is_free:
            await self.ended.wait()

    def _wake(self) -> None:
        self.ended.set()
        self.ended = anyio.Event()
