# SPDX-License-Identifier: Apache-2.0
"""Which kind (disk.py) a name or an identity means.

A name is a text: a path (files and block devices: local.py), or one that begins with a prefix of another
kind. Those that need more than every host has are modules (and libraries, c_shim/disk/disk_services.h) of
their own: they stand in a table, and are imported when a disk of theirs is named. Others `register`
themselves.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostsync.errors import ConfigError
from vhostsync.storage.condition import Condition, Look
from vhostsync.storage.disk import CacheMode, Disk, Kind, OpensAsRecorded, Spot, absolute_path
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.network import Remote

_LIKE_A_URI: Final = re.compile(r"([a-z][a-z0-9+.-]*)://")
_REGISTERED: Final[list[Kind]] = []


def _nbd() -> Kind:
    from vhostsync.storage.nbd import NBD

    return NBD


def _receive() -> Kind:
    from vhostsync.storage.receive import RECEIVE

    return RECEIVE


def _rbd() -> Kind:
    from vhostsync.storage.rbd import KIND

    return KIND


@dataclass(frozen=True)
class _Further:
    """A kind that is imported when it is needed."""

    prefixes: tuple[str, ...]
    identities: frozenset[str]
    kind: Callable[[], Kind]


_FURTHER: Final = (
    _Further(("nbd://", "nbds://", "nbd+unix://", "nbds+unix://"), frozenset({"nbd"}), _nbd),
    _Further(("receive://",), frozenset({"receive"}), _receive),
    _Further(("rbd:",), frozenset({"rbd"}), _rbd),
)


def register(kind: Kind) -> None:
    """From here on there are disks of this kind."""
    _REGISTERED.append(kind)


def _local() -> Kind:
    from vhostsync.storage.local import LOCAL  # not for whoever only parses words

    return LOCAL


def kind_of(name: str) -> Kind:
    return _registered(name) or _local()


def kind_of_identity(disk: DiskIdentity) -> Kind | None:
    """None: this program has none of the kind (another one has written the record)."""
    for further in _FURTHER:
        if disk.kind in further.identities:
            return further.kind()
    return next((kind for kind in (*_REGISTERED, _local()) if disk.kind in kind.identities), None)


def _registered(name: str) -> Kind | None:
    for further in _FURTHER:
        if name.startswith(further.prefixes):
            return further.kind()
    return next((kind for kind in _REGISTERED if name.startswith(kind.prefix)), None)


def _prefixes() -> Iterator[str]:
    for further in _FURTHER:
        yield from further.prefixes
    yield from (kind.prefix for kind in _REGISTERED)


def is_absolute(name: str) -> bool:
    """It does not depend on where the process stands."""
    return name.startswith("/") or _LIKE_A_URI.match(name) is not None or _registered(name) is not None


def absolute_name(name: str, of: str) -> str:
    """ConfigError, beginning with `of`, for what names no disk."""
    if (kind := _registered(name)) is not None:
        return kind.absolute(name)
    uri = _LIKE_A_URI.match(name)
    if uri is not None:
        words = [f"{prefix}…" for prefix in _prefixes()]
        have = ", ".join(["paths of image files and block devices", *words])
        raise ConfigError(f"{of} {name!r}: there are no disks of the kind {uri[1]} here; there are {have}.")
    return absolute_path(name, of)


# ---- of any kind ------------------------------------------------------------------


def open_disk(
    name: str, *, read_only: bool, cache: CacheMode, lock_timeout_s: float, known: Iterable[DiskIdentity] = ()
) -> Disk:
    """`known`: what records have of disks."""
    kind = kind_of(name)
    if isinstance(kind, OpensAsRecorded):
        return kind.open_as_recorded(
            name, known, read_only=read_only, cache=cache, lock_timeout_s=lock_timeout_s
        )
    return kind.open(name, read_only=read_only, cache=cache, lock_timeout_s=lock_timeout_s)


def overlap(one: str, other: str) -> str | None:
    kind = kind_of(one)
    return kind.overlap(one, other) if kind is kind_of(other) else None


def look(disk: DiskIdentity) -> Look:
    kind = kind_of_identity(disk)
    if kind is None:
        return Look(Condition.FAILING, f"this program has no disks of the kind {disk.kind}")
    return kind.look(disk)


def is_named(name: str, disk: DiskIdentity) -> bool:
    return kind_of(name).is_named(name, disk)


def identify(name: str) -> DiskIdentity:
    return kind_of(name).identify(name)


def spot(name: str) -> Spot | None:
    return kind_of(name).spot(name)


def remote(name: str) -> Remote | None:
    return kind_of(name).remote(name)


def places(disk: DiskIdentity) -> list[Path]:
    kind = kind_of_identity(disk)
    return [] if kind is None else list(kind.places(disk))
