# SPDX-License-Identifier: Apache-2.0
"""Which disk is what to the mirror: the source, the destination, one that was given up and may still be
written to, and the peer that the difference map speaks of. None of this awaits."""

from vhostsync.mirror.destination import Place
from vhostsync.mirror.peer import Peer


class Roles:
    def __init__(self, source: Place) -> None:
        self.source = source
        self.destination: Place | None = None
        self.fenced: Place | None = None  # requests to this former destination are not over (rule 8)
        self.peer = Peer()

    @property
    def fenced_path(self) -> str | None:
        return self.fenced.name if self.fenced is not None else None

    @property
    def destination_path(self) -> str | None:
        """Of the destination, or of the one that was given up last."""
        return self.destination.name if self.destination is not None else self.fenced_path

    def attach(self, place: Place) -> Peer:
        """Before the engine has it, for it may report its loss at once. The peer so far, should that fail."""
        former, self.peer = self.peer, Peer()
        self.peer.attached(place)
        self.destination = place
        return former

    def fence(self) -> None:
        """The destination is given up; what it has under way may still be written there."""
        if self.destination is not None:
            self.fenced, self.destination = self.destination, None
            self.peer.detached()

    def exchange(self, *, keep_mirror: bool) -> None:
        """The destination is the source now; with `keep_mirror` the old one is the destination."""
        assert self.destination is not None
        self.source, self.destination = self.destination, self.source if keep_mirror else None
        if self.destination is not None:
            self.peer.attached(self.destination)
        else:
            self.peer.forget()
