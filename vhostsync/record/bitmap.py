# SPDX-License-Identifier: Apache-2.0
"""The dirty bitmap's file: whose it is, and whether it may be believed (docs/durability.md, rule 4).

The engine keeps the bits (c_shim/bitmap/bitmap_file.c) and the activity log; this file keeps the first
block, which says what they belong to. A bitmap is believed only if the state record names its token, which
changes with every run and every new peer, and if both disks are those that it was made for. So one that was
left out of a run, copied back from yesterday or made for other disks leads to a full copy.

Whatever is no bitmap is refused, and stays as it is (own_file.py): --bitmap may name a disk by a slip. The
file has QEMU's image locks as long as it is used, so that it is nobody's disk meanwhile.
"""

import os
import secrets
import time
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import structlog

from vhostsync.errors import BitmapError
from vhostsync.host import kernel
from vhostsync.host.own_file import ForeignFileError, beginning, open_regular, seems_to_be
from vhostsync.record.heartbeat import HEARTBEAT_BYTES, Heartbeat, this_boot_began_ns, why_changed
from vhostsync.record.state_record import WRONG_FIELDS, StateRecord, decode_checked, encode_checked
from vhostsync.storage.identity import DiskIdentity, decode_identity, same
from vhostsync.storage.image_locks import WRITER_SHARES, WRITER_USES, try_lock
from vhostsync.typed_fields import typed

log = structlog.get_logger(__name__)

HEADER_BYTES: Final = 4096
TEXT_BYTES: Final = HEADER_BYTES - HEARTBEAT_BYTES  # the rest is the engine's
KIND: Final = "dirty-bitmap"

Pair = tuple[DiskIdentity, DiskIdentity]


class Trust(IntEnum):
    """enum vs_bitmap_open: how the engine is to read the bits."""

    FRESH = 0
    SAME_BOOT = 1
    AFTER_HOST_CRASH = 2


@dataclass(frozen=True)
class Shape:
    """struct vs_bitmap_shape; bytes. At most extents * extent_bytes are copied again after a host crash."""

    capacity_bytes: int
    region_bytes: int
    extent_bytes: int
    extents: int


@dataclass(frozen=True)
class Header:
    """The first block. `former` is the last run's token, until the state record names this one's."""

    shape: Shape
    token: str
    former: str | None
    boot_id: str
    clean: bool
    disks: Pair | None

    def encode(self) -> bytes:
        text = encode_checked(KIND, asdict(self))
        if len(text) > TEXT_BYTES:
            raise BitmapError("the names of the two disks are too long for the bitmap's first block")
        return text.ljust(TEXT_BYTES, b"\0")

    @classmethod
    def decode(cls, block: bytes) -> "Header":
        """ValueError with a phrase when the block is none."""
        body: dict[str, Any] = decode_checked(KIND, block[:TEXT_BYTES].rstrip(b"\0"))
        try:
            disks = body["disks"]
            if disks is not None:
                one, other = disks
                disks = (decode_identity(one), decode_identity(other))
            header = cls(
                typed(Shape, body["shape"]), typed(str, body["token"]), typed(str | None, body["former"]),
                typed(str, body["boot_id"]), typed(bool, body["clean"]), disks,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(WRONG_FIELDS) from error
        return header


class BitmapFile:
    """The open and locked file. Every method blocks."""

    def __init__(
        self, path: Path, fd: int, header: Header, trust: Trust, changed: str | None = None,
        peer_until_ns: int | None = None,
    ) -> None:  # fmt: skip
        """`changed`: why it is not believed, where somebody has changed the current disk since a crash.
        `peer_until_ns`: after a crash, until when changes of the peer are the last run's own."""
        self.path = path
        self.changed = changed
        self.peer_until_ns = peer_until_ns
        self.fd = fd
        self.header = header
        self.trust = trust
        self._log_pending = trust is Trust.AFTER_HOST_CRASH

    @property
    def token(self) -> str:
        """What the state record calls it."""
        return self.header.token

    @classmethod
    def open(
        cls, path: Path, shape: Shape, file_bytes: int, record: StateRecord | None,
        boot_id: str | None = None, lock_timeout_s: float = 0.0, *, known: DiskIdentity | None = None,
        ctime_ns: int | None = None,
    ) -> "BitmapFile":
        """Open it, or make it anew where it is of no use; the reason is logged. Waits `lock_timeout_s` for a
        process that is ending. `known`: the current disk as the record had it before this start looked at
        it. `ctime_ns`: of that disk, locked, and not touched by this start yet; None: changes do not show.
        BitmapError."""
        boot_id = kernel.this_boot() if boot_id is None else boot_id
        fd = _open_locked(path, lock_timeout_s)
        try:
            found = _read_header(fd)
            now = (record.current, record.peer) if record is not None and record.peer is not None else None
            pair = now if now is None or known is None else (known, now[1])
            why = _why_not(found, shape, file_bytes, fd, record, pair)
            crashed = isinstance(found, Header) and found.boot_id != boot_id and not found.clean
            last, changed, peer_until_ns = _last_beat(fd, after_host_crash=crashed), None, None
            in_order = isinstance(found, Header) and found.clean and record is not None and record.clean
            if why is None and record is not None and not in_order:
                peer_until_ns = last.peer_ns
                why = changed = why_changed(record.current.path, ctime_ns, last.current_ns)
            if why is None:
                assert isinstance(found, Header)
                trust = Trust.AFTER_HOST_CRASH if crashed else Trust.SAME_BOOT
                assert record is not None
                header = replace(
                    found, token=secrets.token_hex(16), former=record.bitmap, boot_id=boot_id, clean=False,
                    disks=now,
                )  # fmt: skip
                if crashed:
                    # Until the engine has made its bits durable, they are those of the old boot.
                    header = replace(header, boot_id=found.boot_id)
                if not in_order:
                    _warn_after_crash(path, record)
            else:
                trust = Trust.FRESH
                log.info("the dirty bitmap begins anew", path=str(path), reason=why)
                header = Header(shape, secrets.token_hex(16), None, boot_id, False, None)
                os.ftruncate(fd, 0)
            file = cls(path, fd, header, trust, changed, peer_until_ns)
            file._write_header(header)  # and the room after it: cut off between, it is known for a bitmap
            # The current disk is ours as it is now. Its peer is judged later, by the former moment.
            Heartbeat(time.time_ns(), last.peer_ns).write(fd)
            if why is not None:
                os.posix_fallocate(fd, 0, file_bytes)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise BitmapError(f"the bitmap {path} cannot be prepared: {error.strerror}") from error
            raise
        return file

    def opened_by_engine(self) -> None:
        """Its bits are durable, and are read as of this boot from here on."""
        self._write_header(replace(self.header, boot_id=kernel.this_boot()))
        self._log_pending = False

    def new_peer(self, disks: Pair) -> None:
        """All differs (the engine has said so in the bits): make that durable, under a token of its own. The
        state record may name it after this."""
        os.fdatasync(self.fd)
        self._write_header(replace(self.header, token=secrets.token_hex(16), former=None, disks=disks))

    def lengthen(self, file_bytes: int) -> None:
        """Room for a larger disk. BitmapError. The header still says the old size: until `note_capacity`, a
        crash leaves a bitmap that is not believed."""
        try:
            os.posix_fallocate(self.fd, 0, file_bytes)
        except OSError as error:
            raise BitmapError(f"the bitmap {self.path} cannot grow: {error.strerror}") from error

    def note_capacity(self, capacity_bytes: int) -> None:
        """The engine has marked the new range. That becomes durable first: a power cut that leaves the header
        without it would have it believed. Errors are logged: then the next start copies everything."""
        shape = replace(self.header.shape, capacity_bytes=capacity_bytes)
        try:
            os.fdatasync(self.fd)
            self._write_header(replace(self.header, shape=shape))
        except OSError as error:
            log.error("the bitmap still says the old size", path=str(self.path), error=error.strerror)

    def close(self, *, clean: bool) -> None:
        """`clean`: the engine is gone, and all that it has marked is in the file. After a host crash that is
        not so before an engine has opened it: what the activity log names has no bits yet."""
        try:
            if clean and not self._log_pending:
                os.fdatasync(self.fd)
                self._write_header(replace(self.header, clean=True))
        except OSError as error:
            log.error("the bitmap could not note the clean end", path=str(self.path), error=error.strerror)
        finally:
            os.close(self.fd)

    def _write_header(self, header: Header) -> None:
        view = memoryview(header.encode())
        at = 0
        while at < len(view):
            at += os.pwrite(self.fd, view[at:], at)
        os.fdatasync(self.fd)
        self.header = header


def _open_locked(path: Path, timeout_s: float) -> int:
    try:
        fd = open_regular(Path(os.path.realpath(path)), os.O_RDWR | os.O_CREAT)
        try:
            _lock(fd, path, timeout_s)
            if not _is_ours(fd):
                raise ForeignFileError(seems_to_be(fd))
        except BaseException:
            os.close(fd)
            raise
    except ForeignFileError as error:
        raise BitmapError(
            f"{path} is no dirty bitmap: {error.strerror}; name another --bitmap, or remove that file if "
            f"nobody needs it"
        ) from error
    except OSError as error:
        raise BitmapError(f"the bitmap {path} cannot be opened: {error.strerror}") from error
    return fd


def _lock(fd: int, path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not try_lock(fd, uses=WRITER_USES, shares=WRITER_SHARES):
        if time.monotonic() >= deadline:
            raise BitmapError(
                f"the bitmap {path} is in use, as a bitmap or as a disk (QEMU's image lock); name another "
                f"--bitmap"
            )
        time.sleep(0.02)


def _is_ours(fd: int) -> bool:
    """A bitmap's file, or one in which nothing is lost: empty, or one that was just being made."""
    block = os.pread(fd, HEADER_BYTES + 1, 0)
    return block.startswith(beginning(KIND)) or (len(block) <= HEADER_BYTES and not block.strip(b"\0"))


def _read_header(fd: int) -> Header | str:
    """The header, or why there is none."""
    block = os.pread(fd, HEADER_BYTES, 0)
    if not block.strip(b"\0"):
        return "the file is new"
    try:
        return Header.decode(block)
    except ValueError as error:
        return f"its first block is of no use: {error}"


def _last_beat(fd: int, *, after_host_crash: bool) -> Heartbeat:
    last = Heartbeat.read(fd)
    return last.not_before(this_boot_began_ns()) if after_host_crash else last


def _warn_after_crash(path: Path, record: StateRecord) -> None:
    """What somebody else writes to a block device cannot be seen."""
    assert record.peer is not None
    blind = [disk.path for disk in (record.current, record.peer) if not disk.changes_show]
    if blind:
        log.warning(
            "the last run did not end in order: the dirty bitmap is believed, though it cannot know what "
            "somebody else has written to a block device since; if anybody has, cancel the mirror and start "
            "it with --full",
            path=str(path), disks=blind,
        )  # fmt: skip


def _why_not(
    found: Header | str, shape: Shape, file_bytes: int, fd: int, record: StateRecord | None,
    known: Pair | None,
) -> str | None:
    """Why the bits say nothing of these disks; None: they do."""
    if isinstance(found, str):
        return found
    if found.shape != shape:
        return "it was made for another size of disk, region or extent"
    if os.fstat(fd).st_size < file_bytes:
        return "the file was cut short"
    if record is None or known is None or record.bitmap is None:
        return "the state record names no bitmap"
    if record.bitmap not in (found.token, found.former):
        return "the state record names another bitmap, or another run of this one"
    if found.disks is None or not _same_pair(found.disks, known):
        return "it was made for other disks"
    return None


def _same_pair(one: Pair, other: Pair) -> bool:
    return (same(one[0], other[0]) and same(one[1], other[1])) or (
        same(one[0], other[1]) and same(one[1], other[0])
    )
