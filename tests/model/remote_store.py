# SPDX-License-Identifier: Apache-2.0
"""A record that lies elsewhere, behind a network: a second RecordStore beside the file.

The server changes the record only if its revision is the one that the change was made for (compare-and-swap,
as etcd has it). What is sent to it may be refused a connection, may be lost, may be done without an answer,
and may arrive much later. Each attempt carries a number of its own, so that whoever finds it in place knows
that it was his."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

from vhostsync.errors import StateRecordError, SupersededError, UnsettledRecordError
from vhostsync.record.record_store import Prepared, RecordStore
from vhostsync.record.state_record import StateRecord

_numbers = itertools.count(1)


class Outcome(Enum):
    """What becomes of one attempt."""

    ANSWERED = auto()
    UNREACHABLE = auto()  # it was certainly not made
    LOST = auto()  # no answer, and it never arrives
    UNDER_WAY = auto()  # no answer, and it may arrive later
    DONE = auto()  # it was made, and the answer was lost


@dataclass(frozen=True)
class Value:
    """`former`: of an announcement, what holds after a kill."""

    record: StateRecord
    former: StateRecord | None
    number: int

    def after_a_kill(self) -> StateRecord:
        return self.former if self.former is not None else self.record


class Server:
    def __init__(self) -> None:
        self.revision = 0
        self.value: Value | None = None
        self.coming: deque[Outcome] = deque()  # of the next attempts; then all are answered
        self.under_way: list[tuple[int, Value]] = []
        self._mutex = threading.Lock()

    def possible(self) -> list[Value]:
        """What is there, and what could be in its place the next moment."""
        with self._mutex:
            late = [value for revision, value in self.under_way if revision == self.revision]
            return [*late, self.value] if self.value is not None else late

    def attempt(self, revision: int, value: Value) -> bool:
        """Whether it was made. ConnectionError, TimeoutError."""
        with self._mutex:
            outcome = self.coming.popleft() if self.coming else Outcome.ANSWERED
            if outcome is Outcome.UNREACHABLE:
                raise ConnectionRefusedError
            if outcome is Outcome.UNDER_WAY:
                self.under_way.append((revision, value))
            made = outcome in (Outcome.ANSWERED, Outcome.DONE) and self._swap(revision, value)
            if outcome is not Outcome.ANSWERED:
                raise TimeoutError
            return made

    def land(self, index: int) -> None:
        with self._mutex:
            self._swap(*self.under_way.pop(index))

    def put(self, record: StateRecord) -> None:
        """Somebody else's change."""
        with self._mutex:
            self._swap(self.revision, Value(record, None, next(_numbers)))

    def _swap(self, revision: int, value: Value) -> bool:
        if revision != self.revision:
            return False
        self.revision, self.value = revision + 1, value
        return True


class RemoteStore(RecordStore):
    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen = 0
        self._own: set[int] = set()  # attempts of which it is not known that they can land no more
        self._superseded = False
        self._prepared: PreparedValue | None = None

    @property
    def place(self) -> str:
        return "remote://test"

    def load(self) -> StateRecord | None:
        self._seen, value = self._server.revision, self._server.value
        if value is None:
            return None
        self.unresolved = "may still be changed by what an earlier run has sent"
        return value.after_a_kill()

    def prepare(self, record: StateRecord) -> Prepared:
        return self._prepare(Value(record, None, next(_numbers)))

    def announce(self, former: StateRecord, switched: StateRecord) -> Prepared:
        return self._prepare(Value(switched, former, next(_numbers)))

    def _prepare(self, value: Value) -> Prepared:
        self._prepared = PreparedValue(self, value)
        return self._prepared

    def _swap(self, prepared: PreparedValue) -> None:
        assert prepared is self._prepared, "another one was prepared since"
        value = prepared.value
        if self._superseded:
            raise SupersededError("the state record was changed by somebody else; end this backend")
        self._own.add(value.number)
        try:
            while not self._server.attempt(self._seen, value):
                there = self._server.value
                if there is None or there.number not in self._own:
                    self._superseded = True
                    raise SupersededError("the state record was changed by somebody else; end this backend")
                self._seen += 1  # an attempt of ours has landed late
        except ConnectionError as error:
            raise StateRecordError("the state record cannot be reached") from error
        except TimeoutError as error:
            self.late = True
            raise UnsettledRecordError("whether the state record was changed is unknown") from error
        self._seen += 1
        self._own = {value.number}
        self.late = False

    def close(self) -> None:
        pass


class PreparedValue(Prepared):
    def __init__(self, store: RemoteStore, value: Value) -> None:
        self.record = value.record
        self.value = value
        self._store = store
        self._used = False

    def change(self) -> None:
        assert not self._used, "changed or discarded twice"
        self._used = True
        self._store._swap(self)

    def settle(self) -> None:
        if not self._used:
            self.change()

    def discard(self) -> None:
        self._used = True
