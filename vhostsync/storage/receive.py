# SPDX-License-Identifier: Apache-2.0
"""Disks that a `vhostsync receive` on another host has: `receive://HOST:PORT[?tls-certificates=DIR]`.
Everything here blocks.

Over a TLS connection with certificates of both sides a new generation is begun, which gives port and key of
an NBD server; the data goes through that (nbd.py). Nothing of a former generation lands any more once it is
begun, whoever had it: the kind fences itself.

The disk is known by the name that its receiver has given it (`serial`). Its mark is this side's secret: it is
recorded, then told to the receiver, before the first byte is written, and shown at each later beginning. So
an open has to know what the record has of the disk (`open_as_recorded`).
"""

import errno
import json
import os
import secrets
import socket
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote, unquote, urlsplit

from vhostsync.errors import ConfigError, DiskError, EngineError
from vhostsync.host import tls
from vhostsync.host.errands import bring_in_time
from vhostsync.printable import printable
from vhostsync.storage.condition import Condition, Look
from vhostsync.storage.disk import CacheMode, Disk, Spot, absolute_path
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.nbd import NAME_S, NBD, RETRY_S, Connection, IsWanted, NbdDisk
from vhostsync.storage.network import Remote

CERTIFICATES: Final = Path("/etc/pki/vhostsync")
PORT_MAX: Final = 65535
CONNECT_S: Final = 5.0
ANSWER_S: Final = 10.0
BEGIN_S: Final = 120.0  # the receiver waits for the end of the former server, and for the start of the next
OWN_TRIES: Final = 3
ANSWER_BYTES_MAX: Final = 64 * 1024
TOKEN_BYTES: Final = 16
SIZES: Final = range(1 << 63)
KIND: Final = "receive"

_instance = secrets.token_hex(TOKEN_BYTES)
"""This process, among those of the same owner: one that another has followed is let in no more."""


def _name_anew() -> None:
    global _instance
    _instance = secrets.token_hex(TOKEN_BYTES)


os.register_at_fork(after_in_child=_name_anew)  # the backends of a node are processes as any others

_begun: Final[dict[str, int]] = {}
"""The last generation that this process has begun, by the disk's name."""

_tokens: Final[dict[str, str]] = {}
"""By the disk's name: the token that its receiver has taken from this process, or was told, should the record
have been put back since."""


@dataclass(frozen=True)
class ReceiveUri:
    host: str
    port: int
    certificates: Path
    data_port: int  # where it is looked for by who has to know that before: the receiver tells it

    @classmethod
    def parse(cls, text: str) -> "ReceiveUri":
        """ConfigError."""
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"{text} names no receiver: {error}.") from error
        bare = not (parts.path.strip("/") or parts.fragment or parts.username or parts.password)
        if parts.scheme != KIND or not host or not port or not bare:
            raise ConfigError(f"{text} names no receiver; write receive://HOST:PORT.")
        certificates, data_port = CERTIFICATES, port + 1
        for word in filter(None, parts.query.split("&")):
            name, _, value = word.partition("=")
            if name == "tls-certificates":
                certificates = Path(absolute_path(unquote(value), f"tls-certificates in {text}"))
            elif name == "data-port" and value.isascii() and value.isdigit() and 0 < int(value) <= PORT_MAX:
                data_port = int(value)
            else:
                raise ConfigError(
                    f"{text}: {word} is not known here; there are tls-certificates=DIR and data-port=PORT."
                )
        return cls(host, port, certificates, data_port)

    @property
    def authority(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def text(self) -> str:
        words = []
        if self.certificates != CERTIFICATES:
            words.append(f"tls-certificates={quote(str(self.certificates), safe='/')}")
        if self.data_port != self.port + 1:
            words.append(f"data-port={self.data_port}")
        return f"receive://{self.authority}:{self.port}{'?' if words else ''}{'&'.join(words)}"


def _connect(uri: ReceiveUri, context: ssl.SSLContext) -> ssl.SSLSocket:
    """OSError. A name server may take its time, and whoever answers there as well."""
    plain = socket.create_connection((uri.host, uri.port), CONNECT_S)
    try:
        return context.wrap_socket(plain, server_hostname=uri.host)
    except BaseException:
        plain.close()
        raise


class RefusalError(DiskError):
    """The receiver's sentence."""


class Receiver:
    """A connection to one. Every failure is a DiskError."""

    def __init__(self, uri: ReceiveUri) -> None:
        self.uri = uri
        self._buffer = b""
        try:
            context = tls.client_context(uri.certificates)
        except ConfigError as error:
            raise DiskError(f"{uri.text} cannot be asked: {error}") from error
        try:
            self._socket = bring_in_time(
                lambda: _connect(uri, context), ssl.SSLSocket.close, CONNECT_S + NAME_S
            )
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def _failed(self, error: OSError) -> DiskError:
        return DiskError(f"the receiver {self.uri.text} cannot be asked: {tls.why(error)}")

    def ask(self, command: str, *, timeout_s: float = ANSWER_S, **arguments: Any) -> dict[str, Any]:
        """RefusalError, DiskError. What is None is not told."""
        told = {name: value for name, value in arguments.items() if value is not None}
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(json.dumps({"execute": command, "arguments": told}).encode() + b"\n")
            answer = json.loads(self._line(time.monotonic() + timeout_s))
            if isinstance(error := answer.get("error"), dict):
                raise RefusalError(f"{self.uri.text}: {printable(str(error.get('desc', '?')))}")
            found = answer["return"]
            if not isinstance(found, dict):
                raise ValueError("no object")
            return found
        except OSError as error:
            raise self._failed(error) from error
        except (ValueError, KeyError, AttributeError) as error:
            raise DiskError(f"{self.uri.text} is no receiver: it answers with what is no reply") from error

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) > ANSWER_BYTES_MAX:
                raise ValueError("a line without an end")
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._socket.recv(ANSWER_BYTES_MAX)
            if not data:
                raise ConnectionResetError(0, "it has closed the connection")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


@dataclass(frozen=True)
class ReceiveDisk:
    """One whose generation is begun, and to whose server there is a connection. `borne`: the mark that the
    receiver knows."""

    uri: ReceiveUri
    data: NbdDisk = field(repr=False)
    identity: DiskIdentity
    generation: int
    borne: str | None = field(repr=False)
    why_not_borne: str = "nobody has told it"

    @property
    def name(self) -> str:
        return self.uri.text

    @property
    def read_only(self) -> bool:
        return self.data.read_only

    @property
    def direct(self) -> bool:
        return self.data.direct

    @property
    def bytes(self) -> int:
        return self.data.bytes

    @property
    def logical_block_bytes(self) -> int:
        return self.data.logical_block_bytes

    @property
    def physical_block_bytes(self) -> int:
        return self.data.physical_block_bytes

    @property
    def discard_granularity_bytes(self) -> int:
        return self.data.discard_granularity_bytes

    @property
    def why_no_source(self) -> str | None:
        return self.data.why_no_source

    def as_it_is(self) -> DiskIdentity:
        return self.identity

    def with_mark(self, mark: str | None) -> "ReceiveDisk":
        wanted = mark or secrets.token_hex(TOKEN_BYTES)
        return replace(self, identity=replace(self.identity, mark=wanted, mark_is_set=wanted == self.borne))

    def bear_mark(self) -> "ReceiveDisk":
        """Where the receiver does not take it, `to_engine` says so: nothing is written to a disk that may be
        another owner's."""
        mark, why = self.identity.mark, ""
        if mark is None or mark == self.borne:
            return self
        for _ in range(OWN_TRIES):
            try:
                self._tell_owner(mark)
                return replace(self, borne=mark, identity=replace(self.identity, mark_is_set=True))
            except RefusalError as error:
                return replace(self, why_not_borne=str(error))
            except DiskError as error:
                why = str(error)  # perhaps it was told all the same: to tell it again does no harm
        return replace(self, why_not_borne=why)

    def _tell_owner(self, mark: str) -> None:
        _tokens[str(self.identity.serial)] = mark
        with Receiver(self.uri) as receiver:
            receiver.ask(
                "own", disk=self.identity.serial, generation=self.generation, token=mark, former=self.borne
            )

    def image_format(self) -> str | None:
        return self.data.image_format()

    def signatures(self) -> list[str]:
        return self.data.signatures()

    def end_threads(self) -> None:
        """It has none yet."""

    def to_engine(self) -> Any:
        if not self.read_only and (self.borne is None or self.borne != self.identity.mark):
            why = f"{self.name} does not know whose it is: {self.why_not_borne}"
            raise EngineError(why, errno.EACCES)
        return self.data.to_engine()

    def close(self) -> None:
        self.data.close()


class Receive:
    """The kind."""

    prefix = "receive://"
    identities = frozenset({KIND})
    over_network = True
    fences_itself = True

    def keep_files(self) -> None:
        """There are none."""

    def absolute(self, name: str) -> str:
        return ReceiveUri.parse(name).text

    def open(self, name: str, *, read_only: bool, cache: CacheMode, lock_timeout_s: float) -> ReceiveDisk:
        return self.open_as_recorded(
            name, (), read_only=read_only, cache=cache, lock_timeout_s=lock_timeout_s
        )

    def open_as_recorded(
        self, name: str, known: Iterable[DiskIdentity], *, read_only: bool, cache: CacheMode,
        lock_timeout_s: float,
    ) -> ReceiveDisk:
        uri = ReceiveUri.parse(name)
        with Receiver(uri) as receiver:
            disk = receiver.ask("query").get("disk")
            begun = _begin_generation(receiver, disk, _tokens_of(disk, known), BEGIN_S)
        token, borne = begun.token, begun.token is not None
        data = _connected(uri, begun, read_only, lock_timeout_s)
        data = replace(data, name=uri.text, connect_again=partial(_connect_again, uri, begun.disk))
        identity = DiskIdentity(
            uri.text, KIND, 0, 0, begun.bytes, serial=begun.disk, mark=token, mark_is_set=borne
        )
        return ReceiveDisk(uri, data, identity, begun.number, token)

    def create(self, name: str, size_bytes: int) -> object:
        with Receiver(ReceiveUri.parse(name)) as receiver:
            return receiver.ask("create", bytes=size_bytes).get("disk")

    def remove(self, name: str, made: object) -> None:
        with suppress(DiskError), Receiver(ReceiveUri.parse(name)) as receiver:
            receiver.ask("remove", disk=made)

    def is_made(self, disk: Disk, made: object) -> bool:
        return disk.identity.serial == made

    def overlap(self, one: str, other: str) -> str | None:
        first, second = ReceiveUri.parse(one), ReceiveUri.parse(other)
        if (first.host, first.port) == (second.host, second.port):
            return "one receiver"
        with suppress(OSError):
            if self.identify(one).serial == self.identify(other).serial:
                return "one disk of a receiver"
        return None

    def is_named(self, name: str, disk: DiskIdentity) -> bool:
        try:
            return self.identify(name).serial == disk.serial
        except OSError:
            return False

    def identify(self, name: str) -> DiskIdentity:
        uri, shown = self._shown(name)
        if shown.get("disk") is None:
            raise FileNotFoundError(2, "the receiver has no image there yet", uri.text)
        disk = str(shown["disk"])
        try:
            size = _size(shown.get("bytes") or 0)
        except ValueError as error:
            raise OSError(errno.EPROTO, f"the receiver tells a size: {error}", uri.text) from error
        mark = _tokens.get(disk)
        return DiskIdentity(
            uri.text, KIND, 0, 0, size, serial=disk, mark=mark, mark_is_set=mark is not None
        )

    def look(self, disk: DiskIdentity) -> Look:
        try:
            _, shown = self._shown(disk.path)
        except OSError as error:
            return Look(Condition.FAILING, error.strerror)
        if shown.get("disk") is None or shown.get("bytes") is None:
            return Look(Condition.MISSING)
        if shown["disk"] != disk.serial:
            return Look(Condition.OTHER)
        if shown.get("why-not") is not None:
            return Look(Condition.FAILING, printable(str(shown["why-not"])))
        return Look(Condition.THERE, users=("its owner is attached",) if shown.get("attached") else ())

    def _shown(self, name: str) -> tuple[ReceiveUri, dict[str, Any]]:
        """OSError."""
        uri = ReceiveUri.parse(name)
        try:
            with Receiver(uri) as receiver:
                return uri, receiver.ask("query")
        except DiskError as error:
            raise ConnectionError(0, str(error), uri.text) from error

    def spot(self, name: str) -> Spot | None:
        return None

    def remote(self, name: str) -> Remote | None:
        uri = ReceiveUri.parse(name)
        return Remote((uri.port, uri.data_port), (uri.certificates,))

    def places(self, disk: DiskIdentity) -> Iterable[Path]:
        return ()


RECEIVE: Final = Receive()


def _tokens_of(disk: object, known: Iterable[DiskIdentity]) -> list[str | None]:
    """What may be shown, the likeliest first: what the receiver was told by this process, what was recorded,
    or, where there is neither, nothing."""
    recorded = [each.mark for each in known if each.kind == KIND and each.serial == disk and each.mark]
    told = [_tokens[str(disk)]] if str(disk) in _tokens else []
    return list(dict.fromkeys([*told, *recorded])) or [None]


@dataclass(frozen=True)
class Generation:
    """What its receiver tells of it. `token`: what it has taken; None: it has no owner yet."""

    disk: str
    number: int
    bytes: int
    place: str  # of the server, as in an NBD URI
    key: str = field(repr=False)
    token: str | None = field(repr=False)


def _begin_generation(
    receiver: Receiver, disk: object, tokens: list[str | None], timeout_s: float
) -> Generation:
    """From here on nothing of the former one lands. DiskError."""
    while True:
        token = tokens.pop(0)
        try:
            told = receiver.ask(
                "begin", timeout_s=timeout_s, disk=disk, token=token, instance=_instance,
                generation=_begun.get(str(disk)),
            )  # fmt: skip
            break
        except RefusalError:
            if not tokens:
                raise
    begun = _told(receiver.uri, told, token)
    _begun[begun.disk] = max(begun.number, _begun.get(begun.disk, 0))
    if token is not None:
        _tokens[begun.disk] = token
    return begun


def _size(told: Any) -> int:
    """It goes into the state record, which a start refuses with what can be no size. ValueError."""
    if type(told) is not int or told not in SIZES:
        raise ValueError("no disk has such a size")
    return told


def _told(uri: ReceiveUri, told: dict[str, Any], token: str | None) -> Generation:
    try:
        user, key, port, export = (told[each] for each in ("user", "key", "port", "export"))
        disk, number, size = str(told["disk"]), int(told["generation"]), _size(told["bytes"])
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise DiskError(f"{uri.text} is no receiver: it begins a generation with what is none") from error
    place = f"{user}@{uri.authority}:{port}/{export}"
    return Generation(disk, number, size, place, f"{user}:{key}\n", token)


def _connected(uri: ReceiveUri, begun: Generation, read_only: bool, timeout_s: float) -> NbdDisk:
    """To the server of a generation; the key is in memory alone. DiskError."""
    fd = os.memfd_create("receive-key", os.MFD_CLOEXEC)
    try:
        os.write(fd, begun.key.encode())
        name = f"nbds://{begun.place}?tls-psk-file=/proc/self/fd/{fd}"
        return NBD.open(name, read_only=read_only, cache="none", lock_timeout_s=timeout_s)
    except (DiskError, ConfigError) as error:
        raise DiskError(
            f"{uri.text} has begun a generation, and its data cannot be reached: {error}; two ports have "
            f"to be open, that of the receiver and that of the data"
        ) from error
    finally:
        os.close(fd)


def _connect_again(uri: ReceiveUri, disk: str, timeout_s: float, is_wanted: IsWanted) -> Connection:
    """For a guest whose own disk it is: to a generation that is begun for that. DiskError."""
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = max(deadline - time.monotonic(), ANSWER_S)
        try:
            with Receiver(uri) as receiver:
                begun = _begin_generation(receiver, disk, _tokens_of(disk, ()), min(left_s, BEGIN_S))
            return _connected(uri, begun, read_only=False, timeout_s=1.0).connection
        except DiskError:
            if time.monotonic() >= deadline or not is_wanted():
                raise
            time.sleep(RETRY_S)
