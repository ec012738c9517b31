# SPDX-License-Identifier: Apache-2.0
"""The peer: the other disk that the engine's difference map speaks of, and whether that map may be believed.

While a peer is known, the engine keeps a map of the regions on which the two disks may differ
(c_shim/mirror/difference.c). It is worth something only for that very disk, in the very state in which the
mirror has left it: a disk that is another one, or that somebody has written to since, gets a full copy.
"""

from threading import Lock
from typing import Final

import anyio
import structlog

from vhostsync.host.errands import ask_unless_cancelled
from vhostsync.mirror.destination import Place, look_again
from vhostsync.record.heartbeat import why_changed
from vhostsync.storage.disk import Disk
from vhostsync.storage.identity import DiskIdentity, Likeness
from vhostsync.storage.kinds import kind_of

log = structlog.get_logger(__name__)

NO_EARLIER_COPY: Final = "no earlier copy of it is known"


class Peer:
    """What is known of the peer. None of its methods awaits; `look` and `why_full` block. Several threads may
    look at once, for whoever waits for the end of a mirror looks, too. The first that has seen it counts:
    what a later one sees may be somebody else's change."""

    def __init__(self) -> None:
        self._one_at_a_time = Lock()  # nobody who has it waits for a disk
        self.place: Place | None = None
        self._left: DiskIdentity | None = None  # how it looked when the mirror let go of it
        self._until_ns: int | None = None  # after a crash: until when its changes were the mirror's
        self._why_changed: str | None = None  # later than that
        self._attached = False
        self.forgotten = False  # there was one, and what it holds by now may be somebody else's
        self._let_go = False  # in this run

    def attached(self, place: Place) -> None:
        """The mirror writes to it from here on."""
        self.forget()
        self.place, self._attached, self.forgotten = place, True, False

    def detached(self) -> None:
        """The mirror has let go of it; what it has under way may still change it, so `look` comes later."""
        self._attached, self._let_go = False, True

    def forget(self) -> None:
        """No peer is known any more."""
        self.forgotten = self.forgotten or self.place is not None
        self.place, self._left, self._attached, self._let_go = None, None, False, False
        self._until_ns = self._why_changed = None

    def known(self, identity: DiskIdentity, left: DiskIdentity | None, until_ns: int | None = None) -> None:
        """From an earlier process: the peer; how it was left if that is known (a clean end); if it is not,
        until when its changes were that process's own."""
        self.forget()
        self.place, self._left, self._until_ns = Place.of_identity(identity), left, until_ns
        self.forgotten = False

    @property
    def left(self) -> DiskIdentity | None:
        """How it looked when the mirror of this run let go of it, if somebody has seen it."""
        return self._left if self._let_go else None

    @property
    def may_be_changed(self) -> bool:
        """By somebody else: that was seen, or nobody has seen how it looked when the mirror let go of it."""
        unseen = self._let_go and self._left is None and self._changes_show
        return self.forgotten or unseen or self._why_changed is not None

    @property
    def _changes_show(self) -> bool:
        return self.place is not None and self.place.identity.changes_show

    def give_up(self, place: Place | None) -> bool:
        """It could not be looked at in time: what is seen later may be somebody else's change. False: its
        changes never show, or it was seen."""
        with self._one_at_a_time:
            unseen = self.place is place and self._left is None and not self._attached and self._changes_show
            if unseen and place is not None:
                log.warning("the disk that was let go of cannot be looked at", path=place.name)
                self.forget()
        return unseen or self.forgotten

    def look(self) -> None:
        """The last request to it is over: note how it looks."""
        place = self.place
        if place is not None and not self._attached and self._left is None:
            left = look_again(place)
            with self._one_at_a_time:
                if self.place is place and self._left is None:
                    self._seen(place, left)

    def _seen(self, place: Place, left: DiskIdentity | None) -> None:
        if left is None:
            if not kind_of(place.name).over_network:  # its server is away; it shows no less when that is back
                self.forget()
            return
        if self._until_ns is not None and left.changes_show:
            self._why_changed = why_changed(left.path, left.ctime_ns, self._until_ns)
        self._left = left

    def why_full(self, disk: Disk) -> str | None:
        """Why everything has to be copied to `disk`; None: what differs is enough."""
        if self.place is not None and disk.identity.likeness(self.place.identity) is not Likeness.SAME:
            return f"the differences are known for {self.place.name} only"
        self.look()  # not at another one, which may be lost in a way that keeps whoever looks at it
        if self.place is None:
            return NO_EARLIER_COPY
        if self._left is None:
            return None  # the mirror has not let go of it
        if self._why_changed is not None:
            return self._why_changed
        changed = disk.as_it_is().changed_since(self._left)
        return None if changed is None else f"{changed} since the mirror let go of it"


async def look_in_time(peer: Peer, timeout_s: float) -> bool:
    """At the one that was let go of. False: its file system hangs, and everything is copied the next time."""
    place = peer.place
    with anyio.move_on_after(timeout_s) as looking:
        await ask_unless_cancelled(peer.look)
    if looking.cancelled_caught:
        peer.give_up(place)
    return not looking.cancelled_caught
