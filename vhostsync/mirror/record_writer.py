# SPDX-License-Identifier: Apache-2.0
"""The record that this process holds, and how it is changed.

Whoever changes it holds `lock`, which also covers what the change was made of and what must follow it: two
writers that each change what they have read would undo each other. A switch announces what the record will
say before the guest is held, and settles or takes back that afterwards (state_file.py)."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import structlog

from vhostsync.errors import StateRecordError, UnsettledRecordError
from vhostsync.record.record_store import Prepared, RecordStore
from vhostsync.record.state_record import StateRecord, Worth, timestamp

log = structlog.get_logger(__name__)

T = TypeVar("T")


class RecordWriter:
    """`failed` is told each error, as a sentence."""

    def __init__(
        self, store: RecordStore | None, record: StateRecord, failed: Callable[[str], None]
    ) -> None:
        self.record = record
        self.lock = anyio.Lock()
        self.write_error: str | None = None  # of the last record that was written; None: it is durable
        self.different_since = record.different_since  # ahead of the record until that could be written
        self._store = store
        self._failed = failed
        self._unsettled = anyio.Event()  # a record is to be written again
        self._announced: StateRecord | None = None  # what holds once the engine reports the exchange
        self._announcement_stands = False  # in the record, and is to be settled or taken back

    async def write(self, record: StateRecord) -> None:
        """Durable on return. StateRecordError."""
        assert self.lock.locked()
        if self._store is not None:
            try:
                with anyio.CancelScope(shield=True):
                    await self._blocking(self._store.change, record)
            except StateRecordError as error:
                self.write_error = str(error)
                raise
        self.write_error = None
        self.record = record

    async def _blocking(self, do: Callable[..., T], *arguments: Any) -> T:
        """In a thread: what changes the record. Where it is unknown what has become of that, the record that
        holds is written again (record_keeper.py)."""
        try:
            return await anyio.to_thread.run_sync(do, *arguments)
        except UnsettledRecordError:
            self._unsettled.set()
            raise

    @asynccontextmanager
    async def lock_for_good(self) -> AsyncIterator[None]:
        """The lock, and once it is held nothing is cut off."""
        async with self.lock:
            with anyio.CancelScope(shield=True):
                yield

    async def write_back(self, record: StateRecord, otherwise: str) -> bool:
        """What holds again, since something that was recorded did not take place. False: that is logged, and
        it is written later."""
        assert self.lock.locked()
        self.record = record
        try:
            await self.write(record)
        except StateRecordError as error:
            log.error(otherwise, error=str(error))
            if self._store is not None:
                self._store.late = True
                self._unsettled.set()
            return False
        return True

    # ---- a switch ------------------------------------------------------------------

    def switched(self, *, keep_mirror: bool) -> StateRecord:
        """The record for after an exchange, with what could not be written yet."""
        record = self.record.with_difference(self.different_since)
        return record.switched(keep_mirror=keep_mirror, since=timestamp())

    async def prepare_switch(self, switched: StateRecord) -> Prepared | None:
        """Announced, and the record for after the exchange all but renamed. None: there is no file. After an
        error, too, `take_back`. StateRecordError."""
        assert self.lock.locked()
        if self._store is None:
            self._announced = switched
            return None
        # Modest until the exchange: a write to this disk that fails meanwhile has not been recorded.
        modest = outdated(switched) if switched.peer is not None else switched
        announcement = await self._blocking(self._store.announce, self.record, modest)
        self._announced, self._announcement_stands = switched, True
        await self._blocking(announcement.settle)
        prepared = await self._blocking(self._store.prepare, switched)
        prepared.mark = announcement.mark
        return prepared

    async def change_to(self, prepared: Prepared) -> None:
        """While the guest is held: from here on the record names the new disk. After an error, too,
        `take_back`: it may do so. StateRecordError."""
        await self._blocking(prepared.change)

    def expect_exchange(self, record: StateRecord | None) -> None:
        """What holds once the engine reports the next one, which undoes the last; None: there is none."""
        assert self.lock.locked()
        self._announced = record

    async def take_back(self, prepared: Prepared | None) -> None:
        """The exchange did not take place, or was undone. Should this fail too, nothing that was flushed is
        at stake: the mirror is steady, and the engine confirms no flush without the destination before
        another record is durable."""
        with anyio.CancelScope(shield=True):
            if prepared is not None:
                await anyio.to_thread.run_sync(prepared.discard)
            if self._announcement_stands and await self.write_back(
                self.record, "the state record may name the destination as the current disk"
            ):
                self._announced, self._announcement_stands = None, False

    async def settle_switch(self, prepared: Prepared | None) -> None:
        """The exchange has taken place. The guest runs, and waits for none of this."""
        self._announcement_stands = False
        if prepared is None:
            return
        try:
            with anyio.CancelScope(shield=True):
                await self._blocking(prepared.settle)
        except StateRecordError as error:
            # What was announced is durable, and names the same disk.
            self._failed(str(error))
            log.error("the state record may call the mirror outdated after a power cut", error=str(error))


def outdated(record: StateRecord) -> StateRecord:
    """The destination falls behind from now on."""
    return record.with_worth(Worth.OUTDATED, timestamp())
