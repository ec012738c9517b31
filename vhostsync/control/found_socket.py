# SPDX-License-Identifier: Apache-2.0
"""A control socket that was found, and not named by the operator: in the place of a disk's name, or by the
link beside its record.

Whoever may write there, the disk's own backend above all, could lead a command to another disk's backend. So
a link in the place of a socket is not followed, and where a process holds the lock of the disk's record,
nobody but that process is spoken to. A backend takes that lock and makes its control socket itself, however
it was started (by a node, a service manager, as a successor), and the kernel tells that process of both."""

import os
import socket
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from ..errors import UnreachableError
from ..host.errands import ask_unless_cancelled
from ..host.flocks import lock_holders
from ..host.peer import peer_process
from . import sockets

AGAIN_S: Final = (0.1, 0.2, 0.3)
"""After so long each it is tried again to reach a backend that seems to be between two processes."""
PLACE_S: Final = 1.0
"""How long a place may take where there is another one."""


@dataclass(frozen=True)
class FoundSocket(os.PathLike[str]):
    """`lock`: of the record, which one of `holders` held when the socket was found; None: nobody did, or no
    record is known. `others`: where they may listen, too, where it is not at `path`."""

    path: Path
    lock: Path | None = None
    holders: frozenset[int] = field(default=frozenset(), compare=False)
    others: tuple[Path, ...] = ()

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def claimed_too(self, other: "FoundSocket") -> "FoundSocket":
        """The same, where another record has it, too (two state directories may have a disk of one name): who
        holds the lock of either is spoken to."""
        places = dict.fromkeys((*self.places, *other.places))
        _, *others = places
        return replace(
            self, lock=self.lock or other.lock, holders=self.holders | other.holders, others=tuple(others)
        )

    @property
    def places(self) -> tuple[Path, ...]:
        return (self.path, *self.others)

    async def connected(self) -> tuple[socket.socket, "FoundSocket"]:
        """At the first of its places where one of the right processes listens, and which that is. OSError
        with the place as its filename, UnreachableError: of all places the one that says most."""
        failures: list[OSError | UnreachableError] = []
        for place in self.places:
            there = replace(self, path=place, others=())
            try:
                with anyio.fail_after(PLACE_S if place != self.places[-1] else None):
                    return await there._connected_there(), there
            except (OSError, UnreachableError) as error:
                if isinstance(error, OSError):
                    error.filename = str(place)
                failures.append(error)
        raise min(failures, key=_says_little)

    async def _connected_there(self) -> socket.socket:
        connection = await sockets.connect(self.path, follow=False)
        try:
            await self.check_peer(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    async def check_peer(self, connection: socket.socket) -> None:
        """UnreachableError where it is not that process. Another one than at first may hold the lock by now:
        backends are restarted. Nobody is waited for who was cancelled: the lock's disk may hang."""
        process = peer_process(connection)
        if self.lock is None or process in self.holders:
            return
        if process not in await ask_unless_cancelled(partial(lock_holders, self.lock)):
            raise UnreachableError(
                f"Process {process}, which listens at {self.path}, does not hold {self.lock}: it is not that "
                f"disk's backend, and was told nothing. Find out who has put that socket there; what "
                f"--control names is believed."
            )


def _says_little(failure: OSError | UnreachableError) -> int:
    if isinstance(failure, FileNotFoundError):
        return 3
    if isinstance(failure, ConnectionRefusedError):
        return 2
    return int(isinstance(failure, TimeoutError))


Control = Path | FoundSocket
"""What the operator has named is believed."""


async def connect_to(control: Control) -> tuple[socket.socket, Control]:
    """And where that leads. OSError, UnreachableError."""
    if isinstance(control, Path):
        return await sockets.connect(control), control
    return await control.connected()
