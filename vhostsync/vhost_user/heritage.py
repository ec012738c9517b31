# SPDX-License-Identifier: Apache-2.0
"""A frontend on its way from one backend process to the next: its connection, between two messages, and what
it has said there. Its rings are stopped, and nothing of it is in flight."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio

from vhostsync.vhost_user.foreign_fd import close_foreign
from vhostsync.vhost_user.told import Saying


@dataclass
class Heritage:
    """Owns the connection and, but for those of `said` that were taken, the descriptors. `taken`: the
    successor has obeyed all that was said, so the rings run again, or it cannot."""

    connection: socket.socket
    said: Sequence[Saying]
    forget: Callable[[], None] = lambda: None
    taken: anyio.Event = field(default_factory=anyio.Event)

    def close(self) -> None:
        """Of the descriptors; the connection is whose it has become."""
        for _, fds in self.said:
            close_foreign(fds)
        self.forget()
        self.taken.set()
