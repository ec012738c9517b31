# SPDX-License-Identifier: Apache-2.0
"""The file of a state record (a RecordStore): replaced atomically, and locked.

The new text goes to a temporary file beside it (RECORD.new, always the same, so that they do not pile up),
which is fsynced (`StateFile.prepare`); then it is renamed over the old one (`PreparedFile.change`) and the
directory is fsynced (`PreparedFile.settle` does both). After a crash at any instant the file holds the old
record or the new one, whole.

A switch waits for no disk while the guest is held. So it is *announced* before: a durable record that holds
both the former one and the one after the switch, and the boot in which it was written.
  * Whoever finds it after the machine has gone down takes the new one: the mirror was steady, so the
    destination holds all that the guest has flushed, whether it was there already or not.
  * Whoever finds it in the same boot takes the former one, unless it bears the *mark* of this announcement:
    only this process has ended. The engine stores the mark with the exchange, in memory that is shared with
    the lock's file, and what is in the page cache outlives a process. (Where there is no such memory, the new
    record is renamed over this one before the exchange; that outlives it, too.)

Two records never mix: a lock beside the record is held as long as the StateFile is open, and what was
prepared is void as soon as another record is. Whoever puts another record there all the same (a backup, say)
ends that this process changes it; one that is gone, or not whole, is written anew.

Nothing that is not of this program is removed or written to, whatever the names are: own_file.py.

What this leaves out: a second copy for a medium that loses sectors (a damaged record is refused with a
sentence, never guessed at).
"""

import fcntl
import mmap
import os
import secrets
import stat
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from vhostsync.errors import (
    DamagedRecordError,
    StateRecordError,
    SupersededError,
    UnsettledRecordError,
)
from vhostsync.host import kernel
from vhostsync.host.own_file import (
    ForeignFileError,
    could_be,
    in_words,
    open_regular,
    remove_leftover,
    seems_to_be,
)
from vhostsync.record.files import FileSystem, RealFileSystem
from vhostsync.record.record_store import Mark, Prepared, RecordStore
from vhostsync.record.state_record import (
    NewerVersionError,
    StateRecord,
    decode_checked,
    decode_record,
    encode_announcement,
    encode_record,
    is_announcement,
    named,
)
from vhostsync.storage.identity import DiskIdentity

log = structlog.get_logger(__name__)


MARK_BYTES = 4096  # the file's; a page, so that none is missing behind its end


def backend_link(record: Path) -> Path:
    """It leads to the control socket of the backend that uses the record, as long as one holds its lock."""
    return Path(f"{record}.backend")


def remove_backend_link(record: Path) -> None:
    """What a process that died has left of it. Anything else of that name is not ours: another record may be
    called so, or a link that leads to one. OSError."""
    link = backend_link(record)
    if not link.is_symlink():
        return
    with suppress(OSError):  # it leads nowhere any more
        if not stat.S_ISSOCK(link.stat().st_mode):
            return
    link.unlink()


class StateFile(RecordStore):
    """The record's file. `before_write` is called with each record before it is prepared (state_index makes
    both disks find it); `other_record` tells which other one has taken a disk since."""

    def __init__(
        self, path: Path, *, files: FileSystem | None = None,
        before_write: Callable[[StateRecord], None] | None = None,
        other_record: Callable[[DiskIdentity], Path | None] | None = None,
        is_copied_mark: Callable[[DiskIdentity], bool] | None = None,
    ) -> None:
        self.path = path
        # The texts that may be there: what was last seen, and what could not be put there since for certain.
        self._own: set[bytes] | None = None  # None: nothing was loaded or written, and anything may be there
        self._superseded = False
        self._files: FileSystem = files if files is not None else RealFileSystem()
        self._before_write = before_write
        self._other_record = other_record
        self._is_copied_mark = is_copied_mark
        self._mutex = threading.Lock()
        self._serial = 0  # of the last record that was prepared
        self._lock_fd: int | None = None
        self._mark_memory: mmap.mmap | None = None
        self._told: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def lock(self, timeout_s: float) -> None:
        """Nobody else uses this record from here to `close`; waits `timeout_s` for a process that is ending.
        What a process that died has left of a temporary file is removed."""
        fd = self._open_lock()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    raise StateRecordError(
                        f"{named(self.path)} is in use by another process; end that one, or name another "
                        f"--state-file"
                    ) from error
                time.sleep(0.02)
            else:
                if not self._is_the_lock(fd):  # removed with its record while it was waited for
                    os.close(fd)
                    fd = self._open_lock()
                    continue
                self._lock_fd = fd
                self._clear_temporary()
                self._map_mark(fd)
                return

    def _open_lock(self) -> int:
        path = self._lock_path
        try:
            fd = open_regular(path, os.O_RDWR | os.O_CREAT)
            try:
                # Before it is locked: a process that has it for a lock of its own is not to be disturbed.
                content = os.pread(fd, MARK_BYTES + 1, 0)
                rest = content[8:] if len(content) == MARK_BYTES else content
                if rest.strip(b"\0") or len(content) > MARK_BYTES:
                    raise ForeignFileError(seems_to_be(fd))
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise StateRecordError(
                f"the lock of the state record, {path}, cannot be used: {error.strerror}; {_elsewhere(error)}"
            ) from error
        return fd

    def _is_the_lock(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self._lock_path.lstat())
        except FileNotFoundError:
            return False

    @property
    def _lock_path(self) -> Path:
        return Path(f"{self.path}.lock")

    @property
    def _temporary(self) -> Path:
        return Path(f"{self.path}.new")

    def _clear_temporary(self) -> None:
        """Now, and not when the record is needed, it is to be known that the name is free."""
        try:
            remove_leftover(self._temporary, "state-")
        except ForeignFileError as error:
            self.close()
            raise StateRecordError(
                f"{self._temporary}, through which the state record is written, cannot be used: "
                f"{error.strerror}; {_elsewhere(error)}"
            ) from error
        except OSError as error:
            log.warning("a temporary state record stays", path=str(self._temporary), error=error.strerror)

    def _map_mark(self, fd: int) -> None:
        """What is marked stays: the announcement may be there still. Without memory for it, a switch takes a
        little longer."""
        try:
            if os.fstat(fd).st_size < MARK_BYTES:
                os.pwrite(fd, bytes(MARK_BYTES), 0)
                os.fsync(fd)  # no block is missing when it is written again
            self._mark_memory = mmap.mmap(fd, MARK_BYTES)
        except OSError as error:
            log.warning("the record's lock cannot bear marks", path=str(self.path), reason=error.strerror)

    def _marked(self) -> int:
        try:
            with self._lock_path.open("rb") as file:
                return int(struct.unpack("=Q", file.read(8))[0])
        except (OSError, struct.error):
            return 0  # no lock: no process that could have exchanged anything

    def tell_backend(self, control: Path | None) -> None:
        """Where this process listens, which holds the lock: a link beside the record. Nothing but who asks
        about this host's disks depends on it."""
        link = backend_link(self.path)
        try:
            remove_backend_link(self.path)
            if control is not None:
                link.symlink_to(control)
            self._told = control
        except OSError as error:
            log.warning("`vhostsync list` may not find this backend", link=str(link), error=error.strerror)

    def close(self) -> None:
        if self._told is not None:
            link, told, self._told = backend_link(self.path), self._told, None
            with suppress(OSError):
                if link.readlink() == told:
                    link.unlink()
        if self._mark_memory is not None:
            self._mark_memory.close()
            self._mark_memory = None
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    @property
    def place(self) -> str:
        return str(self.path)

    def load(self) -> StateRecord | None:
        try:
            boot_id = kernel.this_boot()
            text = self._files.read(self.path)
        except FileNotFoundError:
            self._own = set()
            return None
        except OSError as error:
            raise StateRecordError(f"{named(self.path)} cannot be read: {error.strerror}") from error
        self._own = {text}
        try:
            self.unresolved = "speaks of a switch" if is_announcement(text) else None
            return decode_record(text, boot_id, self._marked())
        except NewerVersionError as error:
            raise StateRecordError(f"{named(self.path)} cannot be read: {error}") from error
        except ValueError as error:
            if not could_be("state-record", text, len(text)):
                # Perhaps not ours, so nothing may be put in its place: --state-file names it by a slip.
                raise StateRecordError(
                    f"{self.path} is no state record: it is {in_words(text, len(text))}; name another "
                    f"--state-file or, if it has been one, move it away"
                ) from error
            raise DamagedRecordError(
                f"{named(self.path)} is damaged ({error}), so it cannot be told which disk is the current "
                f"one; restore the record from a backup, or find that out and begin a new record with "
                f"that disk and --promote"
            ) from error

    def other_record(self, disk: DiskIdentity) -> Path | None:
        return self._other_record(disk) if self._other_record is not None else None

    def is_copied_mark(self, disk: DiskIdentity) -> bool:
        return self._is_copied_mark is not None and self._is_copied_mark(disk)

    def prepare(self, record: StateRecord) -> Prepared:
        """Everything but the rename and its fsync."""
        return self._prepare(record, encode_record(record))

    def _prepare(self, record: StateRecord, text: bytes) -> "PreparedFile":
        with self._mutex:
            self._serial += 1
            self._check_not_superseded()
            try:
                if self._before_write is not None:
                    self._before_write(record)
                self._files.write_durable(self._temporary, text)
            except OSError as error:
                raise StateRecordError(f"{named(self.path)} cannot be written: {error.strerror}") from error
            return PreparedFile(self, record, text, self._serial)

    def announce(self, former: StateRecord, switched: StateRecord) -> Prepared:
        try:
            boot_id = kernel.this_boot()
        except OSError as error:
            raise StateRecordError(f"it cannot be told which boot this is: {error.strerror}") from error
        value = secrets.randbits(64) | 1
        prepared = self._prepare(switched, encode_announcement(former, switched, boot_id, value))
        if self._mark_memory is not None:
            self._mark_memory[8] = 0  # the page is there and may be written when the engine does
            prepared.mark = Mark(self._mark_memory, value)
        return prepared

    def _check_not_superseded(self) -> None:
        """SupersededError: for good."""
        self._superseded = self._superseded or self._is_of_somebody_else()
        if self._superseded:
            raise SupersededError(
                f"{named(self.path)} was changed by somebody else while this process was using it, so this "
                f"process does not change it any more; find out which disk is the current one (vhostsync "
                f"record {self.path}), and end this backend"
            )

    def _is_of_somebody_else(self) -> bool:
        """Whether there is another record, a whole one, than was last seen here."""
        if self._own is None:
            return False
        try:
            text = self._files.read(self.path)
            if text in self._own:
                return False
            decode_checked("state-record", text)
        except NewerVersionError:
            return True
        except (OSError, ValueError):
            return False
        return True

    def _rename(self, serial: int, text: bytes) -> None:
        with self._mutex:
            if serial != self._serial:
                raise StateRecordError("a later state record was written meanwhile; this one is void")
            try:
                self._check_not_superseded()
                self._own = {*(self._own or ()), text}
                self._files.rename(self._temporary, self.path)
            except SupersededError:
                self._forget()
                raise
            except OSError as error:
                self._forget()
                raise StateRecordError(f"{named(self.path)} cannot be replaced: {error.strerror}") from error
            self._own = {text}

    def _discard(self, serial: int) -> None:
        with self._mutex:
            if serial == self._serial:
                self._forget()

    def _settle(self) -> None:
        try:
            self._files.sync_directory(self.path.parent)
        except OSError as error:
            self.late = True
            raise UnsettledRecordError(
                f"{named(self.path)} was replaced, but whether that would outlive a power cut is "
                f"unknown: {error.strerror}"
            ) from error
        self.late = False

    def _forget(self) -> None:
        try:
            self._files.unlink(self._temporary)
        except OSError:
            log.debug("a temporary state record could not be removed", path=str(self._temporary))


def _elsewhere(error: OSError) -> str:
    """What to do."""
    foreign = isinstance(error, ForeignFileError)
    return "move it away, or name another --state-file" if foreign else "name another --state-file"


class PreparedFile(Prepared):
    """A record that is written and durable under a temporary name.

    A `settle` that raises has either not changed the record (nothing happened), or, when the directory could
    not be synced, left the new one in place without a guarantee."""

    def __init__(self, file: StateFile, record: StateRecord, text: bytes, serial: int) -> None:
        self.record = record
        self._file = file
        self._text = text
        self._serial = serial
        self._used = False
        self._changed = False

    def change(self) -> None:
        assert not self._used, "changed or discarded twice"
        self._used = True
        self._file._rename(self._serial, self._text)
        self._changed = True

    def settle(self) -> None:
        if not self._changed:
            self.change()
        self._file._settle()

    def discard(self) -> None:
        if not self._used:
            self._used = True
            self._file._discard(self._serial)
