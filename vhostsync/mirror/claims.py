# SPDX-License-Identifier: Apache-2.0
"""Whose disk it is that a mirror is to go to: of this lineage, of none, or of another one."""

from collections.abc import Callable
from pathlib import Path

import anyio.to_thread

from vhostsync.errors import MirrorError
from vhostsync.record.record_store import RecordStore
from vhostsync.record.state_record import StateRecord
from vhostsync.storage.identity import DiskIdentity


class Claims:
    """By what the store knows, and the record that holds. None: there is no store."""

    def __init__(self, store: RecordStore | None, record: Callable[[], StateRecord]) -> None:
        self._store = store
        self._record = record

    async def check_unclaimed(self, disk: DiskIdentity) -> None:
        """MirrorError where another lineage has taken the disk meanwhile. StateRecordError."""
        other = await self.claimed_by(disk)
        if other is not None:
            raise MirrorError(
                f"{disk.path} belongs to another state record by now, {other}, and what is on it would be "
                f"lost; if it may be, start the mirror to it yourself: vhostsync mirror start {disk.path}"
            )

    async def claimed_by(self, disk: DiskIdentity) -> Path | None:
        """Another lineage's record that has taken the disk meanwhile. StateRecordError."""
        if self._store is None:
            return None
        return await anyio.to_thread.run_sync(self._store.other_record, disk)

    def mark_of(self, disk: DiskIdentity) -> str | None:
        """The mark that a destination is to bear: its own, which it may have lost; a new one (None) where it
        has none, or that of another disk, of which it is a copy. Blocks."""
        known = self._record().of_disk(disk)
        if known is not None:
            return known.mark or disk.mark
        if any(each.mark == disk.mark for each in self._record().disks):
            return None
        copied = self._store is not None and self._store.is_copied_mark(disk)
        return None if copied else disk.mark
