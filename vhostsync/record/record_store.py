# SPDX-License-Identifier: Apache-2.0
"""Where the record of one lineage lies: what the policy asks of that place, whatever it is.

A record is changed by comparison with what this store has last seen: with what it has loaded, or has written
itself since. If somebody else has changed it meanwhile, the store is *superseded*, for good: it changes
nothing any more, and says so in one sentence each time.

A change either was made, or certainly was not (StateRecordError), or its outcome is unknown
(UnsettledRecordError): then it has perhaps been made, or will be yet. Nothing is to be concluded from that,
in either direction, until a later change of the same store has succeeded: from then on the earlier one can
neither land nor hold. So `late` is set, and the record that holds is written again until it is durable.
"""

import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from vhostsync.record.state_record import StateRecord
from vhostsync.storage.identity import DiskIdentity


@dataclass(frozen=True)
class Mark:
    """To be stored in the first 8 bytes when an announced exchange takes place."""

    memory: mmap.mmap
    value: int


class Prepared(ABC):
    """A change of the record that is all but made. Settle or discard it, once, before another is prepared; it
    may be made first and settled later."""

    record: StateRecord
    mark: Mark | None = None  # of an announcement, where the store has memory that outlives the process

    @abstractmethod
    def change(self) -> None:
        """From here on it is found, and outlives this process; it need not outlive a power cut yet.
        SupersededError, StateRecordError, UnsettledRecordError."""

    @abstractmethod
    def settle(self) -> None:
        """Durable on return; makes the change first where that was not done. Errors as of `change`."""

    @abstractmethod
    def discard(self) -> None:
        """The change is not to be made. Does nothing after it was, so it may stand in a finally."""


class RecordStore(ABC):
    """Every method blocks; all are safe from any thread. One process at a time uses it, and holds on to that
    by what the store has for it (a lock, a comparison)."""

    late: bool = False  # what holds is still to be written, or to be written again
    unresolved: str | None = None  # what was loaded holds only once something is written; why ("it …")

    @property
    @abstractmethod
    def place(self) -> str:
        """What a message calls the place."""

    @abstractmethod
    def load(self) -> StateRecord | None:
        """The record, None when there is none yet. From here on changes are compared with it.
        StateRecordError when it is unreadable; DamagedRecordError."""

    @abstractmethod
    def prepare(self, record: StateRecord) -> Prepared:
        """All of a change to this record that can be done before it. What was prepared before is void."""

    @abstractmethod
    def announce(self, former: StateRecord, switched: StateRecord) -> Prepared:
        """As `prepare`, of a switch that is about to take place. Settled, it means `switched` after a power
        cut, and `former` in this boot unless it is marked."""

    def change(self, record: StateRecord) -> None:
        """Durable on return. SupersededError, StateRecordError, UnsettledRecordError."""
        self.prepare(record).settle()

    def other_record(self, disk: DiskIdentity) -> Path | None:
        """The record of another lineage that the disk belongs to by now. StateRecordError: that cannot be
        told."""
        return None

    def is_copied_mark(self, disk: DiskIdentity) -> bool:
        """Whether it bears the mark of another disk that a record knows."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Another process may use it."""
