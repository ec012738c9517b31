# SPDX-License-Identifier: Apache-2.0
"""At which disks requests may be under way that nobody waits for any more (fence.py): what the record lists
of them (`StateRecord.unfenced`), less what is known better. The record is told before the first request goes
to such a disk; that all were answered is known when the engine has closed it, and the record follows.
"""

from collections.abc import Sequence

from vhostsync.engine.engine_event import EngineEvent, EventKind
from vhostsync.mirror.destination import Place
from vhostsync.mirror.roles import Roles
from vhostsync.record.state_record import StateRecord
from vhostsync.storage.identity import DiskIdentity, same
from vhostsync.storage.kinds import kind_of, overlap

CLOSED = (EventKind.FENCE_CLEAR, EventKind.SOURCE_CLOSED)


class UnderWay:
    """None of this awaits. To be told of the engine's events before the roles change."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        self._answered: list[DiskIdentity] = []  # all that went there; the record is still to be told
        self._left_sources: list[Place | None] = []  # by a switch, and not closed yet

    def note_closed(self, event: EngineEvent) -> None:
        """One of CLOSED: the engine has closed a disk."""
        place = self._roles.fenced if event.kind is EventKind.FENCE_CLEAR else self._take_left_source()
        unanswered = bool(event.value)
        if place is not None and not unanswered:
            self._answered.append(place.identity)

    def note_left(self, source: Place) -> None:
        """A switch has left it, and the engine closes it."""
        self._left_sources.append(source)

    def _take_left_source(self) -> Place | None:
        """None: there are several, and it is not told which of them was closed."""
        if len(self._left_sources) > 1:
            self._left_sources = [None] * len(self._left_sources)
        return self._left_sources.pop(0)

    def is_unfenced(self, record: StateRecord, name: str) -> bool:
        """Requests of a lost connection may still be carried out at the disk that is called so."""
        return any(
            disk.path == name and not any(same(disk, each) for each in self._answered)
            for disk in record.unfenced
        )

    def unfenced_as(self, record: StateRecord, identity: DiskIdentity) -> list[DiskIdentity]:
        """The same of a disk, however it is called: what it was then. Blocks."""
        known = [disk for disk in record.unfenced if is_one_disk(disk, identity)]
        return [disk for disk in known if self.is_unfenced(record, disk.path)]

    def with_requests(
        self, record: StateRecord, place: Place, fenced: Sequence[DiskIdentity] = ()
    ) -> StateRecord:
        """To be written before the first request goes there. `fenced`: of `unfenced_as`."""
        for disk in fenced:
            record = record.with_fenced(disk)
        self._answered = [each for each in self._answered if not same(each, place.identity)]
        return record if kind_of(place.name).fences_itself else record.with_unfenced(place.identity)

    def without_answered(self, record: StateRecord) -> StateRecord:
        for disk in self._answered:
            record = record.with_fenced(disk)
        return record

    def note_written(self, record: StateRecord) -> None:
        """It is durable: what it does not list needs not be remembered here."""
        listed = record.unfenced
        self._answered = [each for each in self._answered if any(same(each, disk) for disk in listed)]

    def after_the_end(self, record: StateRecord, unanswered: frozenset[str]) -> StateRecord:
        """The engine has closed both disks; `unanswered`: the roles of those that may still carry something
        out."""
        destination = self._roles.destination or self._roles.fenced
        for role, place in (("source", self._roles.source), ("destination", destination)):
            if place is not None and role not in unanswered:
                record = record.with_fenced(place.identity)
        return self.without_answered(record)


def is_one_disk(one: DiskIdentity, other: DiskIdentity) -> bool:
    """Also where its kind knows disks by their names alone, and this one has two. May ask a name server.
    Blocks."""
    if same(one, other):
        return True
    return one.kind == other.kind and overlap(one.path, other.path) is not None
