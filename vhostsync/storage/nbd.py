# SPDX-License-Identifier: Apache-2.0
"""Disks that an NBD server has, by libnbd: `nbd://HOST[:PORT]/EXPORT`, `nbds://…` with TLS, and
`nbd+unix:///EXPORT?socket=PATH`, `nbds+unix://…` (the NBD URI specification). Everything here blocks.

The library (c_shim/nbd) is loaded when the first such disk is opened: whoever has none needs no libnbd.

A server knows its exports by name and says nothing that tells one from another that took its place. So a disk
is its address and its name there. No lock keeps others out, and an answered write that was not flushed may be
forgotten when the server ends (docs/network.md).
"""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import structlog

from vhostsync.errors import DiskError, EngineError, VhostsyncError
from vhostsync.host.errands import bring_in_time, in_thread
from vhostsync.storage import signatures as looking
from vhostsync.storage.condition import Condition, Look
from vhostsync.storage.disk import CacheMode, Disk, Spot
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.native import close_disk
from vhostsync.storage.nbd_uri import NbdUri
from vhostsync.storage.network import Remote, network_use

log = structlog.get_logger(__name__)

CONNECT_S: Final = 5.0
NAME_S: Final = 5.0  # more, where a name server has to be asked for the host's address
READ_S: Final = 5.0
RETRY_S: Final = 0.1
BLOCK_BYTES: Final = 512  # at least, whatever the server could do
PREFERRED_BYTES_MAX: Final = 65536
LOOKED_AT_BYTES: Final = 4 << 20  # of either end, for signatures
PIECE_BYTES: Final = 1 << 20
LOST_SERVER: Final = (errno.ENOTCONN, errno.ETIMEDOUT)


@cache
def _library() -> tuple[Any, Any]:
    """(lib, ffi). DiskError where it is not to be had."""
    from vhostsync.storage.native import disk_services  # not for whoever only parses words

    try:
        library = import_module("vhostsync._nbd")
    except ImportError as error:
        lacking = "libnbd0" if "libnbd" in str(error) else "vhostsync-nbd (or libnbd-dev, and build again)"
        raise DiskError(f"disks of NBD servers need libnbd: install the package {lacking}") from error
    if library.lib.vs_nbd_begin(disk_services()) != 0:
        raise DiskError("the NBD library was built from other sources than vhostsync: build both again")
    return library.lib, library.ffi


@dataclass(frozen=True)
class Export:
    """struct vs_nbd_export."""

    bytes: int
    minimum_bytes: int
    preferred_bytes: int
    maximum_bytes: int
    read_only: bool
    can_flush: bool
    can_fua: bool
    encrypted: bool
    connections: int


@dataclass(frozen=True)
class Loss:
    """Of a connection. `held`: a guest waits for another one. `uncertain`: the server may still carry out a
    change that it has not answered."""

    why: str
    held: bool
    uncertain: bool


class Connection:
    """Of a disk that is not the engine's yet."""

    def __init__(self, uri: NbdUri, connections: int, timeout_s: float) -> None:
        """OSError, with libnbd's words, where there is none within that time."""
        lib, ffi = _library()
        found, why = ffi.new("struct vs_nbd_export *"), ffi.new("char[]", lib.VS_NBD_WHY_BYTES)
        handle = lib.vs_nbd_connect(uri.text.encode(), connections, int(timeout_s * 1000), found, why)
        if handle == ffi.NULL:
            raise ConnectionError(errno.ECONNREFUSED, _words(ffi, why), uri.text)
        self._lib, self._ffi = lib, ffi
        self.handle = ffi.gc(handle, lib.vs_nbd_release)
        self.export = Export(
            bytes=found.bytes,
            minimum_bytes=found.minimum_bytes,
            preferred_bytes=found.preferred_bytes,
            maximum_bytes=found.maximum_bytes,
            read_only=bool(found.read_only),
            can_flush=bool(found.can_flush),
            can_fua=bool(found.can_fua),
            encrypted=bool(found.encrypted),
            connections=lib.vs_nbd_connections(handle),
        )

    def read(self, offset: int, length: int) -> bytes:
        """OSError."""
        piece = self._ffi.new("char[]", length)
        result = self._lib.vs_nbd_read(self.handle, offset, length, piece, int(READ_S * 1000))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return bytes(self._ffi.buffer(piece))

    def to_disk(self) -> Any:
        """A vs_disk. OSError."""
        if (handle := self._lib.vs_nbd_disk(self.handle)) == self._ffi.NULL:
            raise OSError(self._ffi.errno, os.strerror(self._ffi.errno))
        return handle

    # Of what `to_disk` has made:

    def await_loss(self) -> Loss | None:
        """None: it was closed."""
        why = self._ffi.new("char[]", self._lib.VS_NBD_WHY_BYTES)
        state = self._lib.vs_nbd_await_loss(self.handle, why)
        if state == self._lib.VS_NBD_CLOSED:
            return None
        held = state in (self._lib.VS_NBD_HELD, self._lib.VS_NBD_UNCERTAIN)
        return Loss(_words(self._ffi, why), held, state == self._lib.VS_NBD_UNCERTAIN)

    @property
    def is_held(self) -> bool:
        return bool(self._lib.vs_nbd_is_held(self.handle))

    def replace(self, fresh: "Connection") -> bool:
        """By another one, which is the disk's from here on; False: it does not wait for one any more."""
        return bool(self._lib.vs_nbd_replace(self.handle, fresh.handle))

    def give_up(self) -> None:
        self._lib.vs_nbd_give_up(self.handle)

    def close(self) -> None:
        self._lib.vs_nbd_close(self.handle)


def _words(ffi: Any, why: Any) -> str:
    return str(ffi.string(why).decode(errors="replace"))


IsWanted = Callable[[], bool]
ConnectAgain = Callable[[float, IsWanted], Connection]


@dataclass(frozen=True)
class NbdDisk:
    """One that is connected."""

    name: str
    connection: Connection = field(repr=False)
    identity: DiskIdentity
    read_only: bool
    direct: bool = True
    # How its server is connected to again, within so many seconds, as long as that is wanted (DiskError),
    # where that is itself a fence; None: as it was the first time.
    connect_again: "ConnectAgain | None" = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        return self.identity.bytes

    @property
    def logical_block_bytes(self) -> int:
        return max(self.connection.export.minimum_bytes, BLOCK_BYTES)

    @property
    def physical_block_bytes(self) -> int:
        preferred = self.connection.export.preferred_bytes
        fits = preferred & (preferred - 1) == 0 and preferred <= PREFERRED_BYTES_MAX
        return max(preferred if fits else 0, 4096, self.logical_block_bytes)

    @property
    def discard_granularity_bytes(self) -> int:
        return self.physical_block_bytes

    @property
    def why_no_source(self) -> str | None:
        if self.connection.export.can_fua:
            return None
        return "its server cannot make a single write durable (it has no FUA)"

    def as_it_is(self) -> DiskIdentity:
        return self.identity

    def with_mark(self, mark: str | None) -> "NbdDisk":
        return self  # nothing of ours can be put beside an export

    def bear_mark(self) -> "NbdDisk":
        return self

    def image_format(self) -> str | None:
        with _copy_of_ends(self) as fd:
            return looking.image_format(fd)

    def signatures(self) -> list[str]:
        with _copy_of_ends(self) as fd:
            return looking.signatures(fd)

    def end_threads(self) -> None:
        """It has none yet."""

    def to_engine(self) -> Any:
        try:
            handle = self.connection.to_disk()
            try:
                in_thread(self._look_after, "nbd-connection")
            except OSError:
                close_disk(handle)
                raise
        except OSError as error:
            number = error.errno or errno.EIO
            raise EngineError.at_start(f"starting the threads of {self.name}", number) from error
        return handle

    def _look_after(self) -> None:
        """For as long as the engine has it."""
        while (loss := self.connection.await_loss()) is not None:
            log.warning(
                "the connection to an NBD server is lost", disk=self.name, reason=loss.why,
                guest_waits=loss.held,
            )  # fmt: skip
            if not loss.held:
                return
            try:
                connected = self._connect_again(loss)
            except VhostsyncError as error:
                log.error("the guest does not wait any longer", disk=self.name, reason=str(error))
                self.connection.give_up()
                return  # for good, though the disk's thread may still have to take note of it
            if connected:
                log.warning("connected to an NBD server again", disk=self.name)

    def _connect_again(self, loss: Loss) -> bool:
        """False: nobody waits for it any more. VhostsyncError: in vain."""
        deadline = time.monotonic() + network_use().reconnect_s
        connect = self.connect_again
        if connect is None:
            if loss.uncertain:
                network_use().make_certain(self.name)
            connect = partial(_connect_waiting, NbdUri.parse(self.name))
        while self.connection.is_held:
            fresh = connect(deadline - time.monotonic(), lambda: self.connection.is_held)
            try:
                # What begins a generation of its own knows by more than its size that it is the same disk.
                check_same(
                    self.name, self.connection.export, fresh.export, may_grow=self.connect_again is not None
                )
                if self.connection.replace(fresh):
                    return True
            finally:
                fresh.close()
        return False

    def close(self) -> None:
        self.connection.close()


class _copy_of_ends:  # noqa: N801 used as a function
    """A file in memory, as long as the disk, with what it has at its beginning and its end: for those who
    know disks by a descriptor. OSError."""

    def __init__(self, disk: NbdDisk) -> None:
        self._disk = disk
        self._fd = -1

    def __enter__(self) -> int:
        size, block = self._disk.bytes, self._disk.logical_block_bytes
        self._fd = os.memfd_create("nbd-ends", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, size)
            whole = size - size % block
            tail = max(LOOKED_AT_BYTES, (whole - LOOKED_AT_BYTES) // block * block)
            self._copy(0, min(LOOKED_AT_BYTES, whole))
            self._copy(tail, whole)
        except BaseException:
            os.close(self._fd)
            raise
        return self._fd

    def _copy(self, at: int, end: int) -> None:
        most = min(PIECE_BYTES, self._disk.connection.export.maximum_bytes)
        while at < end:
            piece = self._disk.connection.read(at, min(most, end - at))
            os.pwrite(self._fd, piece, at)
            at += len(piece)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class Nbd:
    """The kind."""

    prefix = "nbd://"
    identities = frozenset({"nbd"})
    over_network = True
    fences_itself = False

    def keep_files(self) -> None:
        """There are none."""

    def absolute(self, name: str) -> str:
        return NbdUri.parse(name).text

    def open(self, name: str, *, read_only: bool, cache: CacheMode, lock_timeout_s: float) -> NbdDisk:
        uri = NbdUri.parse(name)
        if not (uri.is_encrypted or uri.is_on_this_host or network_use().allow_plaintext):
            raise DiskError(
                f"{name} would send the disk's data over the network for all to read and to change: use "
                f"nbds:// (TLS), or, if the network is trusted, start vhostsync with --allow-plaintext"
            )
        connection = _connect_waiting(uri, lock_timeout_s)
        try:
            _check_export(name, connection.export, read_only=read_only)
            identity = _identity(uri, connection.export.bytes)
        except BaseException:
            connection.close()
            raise
        return NbdDisk(name, connection, identity, read_only)

    def create(self, name: str, size_bytes: int) -> object:
        raise DiskError(
            f"{name} cannot be made from here (NBD has no command for that): make the export on its server, "
            f"of {size_bytes} bytes or more, and leave out --create"
        )

    def remove(self, name: str, made: object) -> None:
        raise AssertionError("create() makes none")

    def is_made(self, disk: Disk, made: object) -> bool:
        return False

    def overlap(self, one: str, other: str) -> str | None:
        first, second = NbdUri.parse(one), NbdUri.parse(other)
        if first.place == second.place:
            return "one export of one server"
        alike = (first.port, first.export) == (second.port, second.export)
        if first.host and second.host and alike and _addresses(first) & _addresses(second):
            return "one export of one server, by two names of its host"
        return None

    def is_named(self, name: str, disk: DiskIdentity) -> bool:
        return NbdUri.parse(name).place == disk.serial

    def identify(self, name: str) -> DiskIdentity:
        uri = NbdUri.parse(name)
        connection = _connect(uri, 1)
        connection.close()
        return _identity(uri, connection.export.bytes)

    def look(self, disk: DiskIdentity) -> Look:
        try:
            self.identify(disk.path)
        except OSError as error:
            return Look(Condition.FAILING, error.strerror)
        except DiskError as error:
            return Look(Condition.FAILING, str(error))
        return Look(Condition.THERE)

    def spot(self, name: str) -> Spot | None:
        return None

    def remote(self, name: str) -> Remote | None:
        uri = NbdUri.parse(name)
        files = tuple(path for word, path in uri.files.items() if word != "socket")
        return Remote((uri.port,) if uri.host else (), files)

    def places(self, disk: DiskIdentity) -> Iterable[Path]:
        return ()


NBD: Final = Nbd()


def _addresses(uri: NbdUri) -> set[str]:
    """None where nobody knows the host."""
    try:
        found = socket.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {str(address[0]) for *_, address in found}


def _identity(uri: NbdUri, size_bytes: int) -> DiskIdentity:
    return DiskIdentity(uri.text, "nbd", 0, 0, size_bytes, serial=uri.place)


def _connect(uri: NbdUri, connections: int) -> Connection:
    """OSError. libnbd asks a name server without a bound of time: that has to be over in time, too."""
    try:
        return bring_in_time(
            lambda: Connection(uri, connections, CONNECT_S), Connection.close, CONNECT_S + NAME_S
        )
    except TimeoutError as error:
        if error.errno is not None:
            raise
        why = f"no address of {uri.host} was found within {NAME_S:g} s" if uri.host else "it hangs"
        raise ConnectionError(errno.ETIMEDOUT, why, uri.text) from error


def _connect_waiting(uri: NbdUri, timeout_s: float, is_wanted: IsWanted = lambda: True) -> Connection:
    """A server may let nobody in until a former connection is over. DiskError."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _connect(uri, network_use().connections)
        except OSError as error:
            if time.monotonic() >= deadline or not is_wanted():
                why = _in_words(uri, str(error.strerror))
                raise DiskError(f"{uri.text} cannot be reached: {why}") from error
            time.sleep(RETRY_S)


def _in_words(uri: NbdUri, said: str) -> str:
    """libnbd says that a certificate is refused, and not why."""
    if "certificate verification" not in said:
        return said
    return (
        "the certificate of its server is refused: it has expired or is not valid yet, it is not for "
        f"{uri.host or 'this name'}, or ca-cert.pem of this side has not signed it ({said})"
    )


def check_same(name: str, former: Export, now: Export, *, may_grow: bool = False) -> None:
    """DiskError where a guest cannot go on there."""
    _check_export(name, now, read_only=former.read_only)
    if now.bytes < former.bytes or (now.bytes > former.bytes and not may_grow):
        raise DiskError(f"{name} had {former.bytes} bytes and has {now.bytes} since its server is back")
    less_at_once = now.maximum_bytes < former.maximum_bytes
    if not now.can_fua or less_at_once or now.minimum_bytes > max(former.minimum_bytes, BLOCK_BYTES):
        raise DiskError(f"the server of {name} is back and can do less than before")


def _check_export(name: str, export: Export, *, read_only: bool) -> None:
    """DiskError where it is no disk for us."""
    if export.read_only and not read_only:
        raise DiskError(f"the server shows {name} read-only; have it let this host write, or name another")
    if not export.can_flush and not read_only:
        raise DiskError(
            f"the server of {name} has no FLUSH, so nobody would know what is durable there; use one that "
            f"has it"
        )
    if export.bytes == 0:
        raise DiskError(f"{name} is empty (0 bytes): there is nothing to serve")
    block = max(export.minimum_bytes, BLOCK_BYTES)
    if block & (block - 1):
        raise DiskError(f"the server of {name} wants blocks of {block} bytes, which is no power of two")
    if export.bytes < block:
        raise DiskError(f"{name} has {export.bytes} bytes, less than one block of {block}")
