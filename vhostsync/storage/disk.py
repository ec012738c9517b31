# SPDX-License-Identifier: Apache-2.0
"""The protocols of a disk and of a kind of disk: what the rest of the program may ask of them. A disk is what
its kind says it is: nobody outside storage/ opens its path, looks at its descriptor or asks whether it is a
file."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

from vhostsync.errors import ConfigError
from vhostsync.storage.condition import Look
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.network import Remote

CacheMode = Literal["none", "writeback"]


class Disk(Protocol):
    """An open disk that nobody else has. `to_engine` gives it away; else `close` ends it. Whatever asks it
    something blocks."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> DiskIdentity: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def direct(self) -> bool:
        """Writes go past the page cache of this host."""
        ...

    @property
    def bytes(self) -> int: ...
    @property
    def logical_block_bytes(self) -> int: ...
    @property
    def physical_block_bytes(self) -> int: ...
    @property
    def discard_granularity_bytes(self) -> int: ...

    @property
    def why_no_source(self) -> str | None:
        """Why no guest can be served from it, as a phrase ("its server has no …"); None: one can."""
        ...

    def as_it_is(self) -> DiskIdentity:
        """How it looks now, with what tells a later change by somebody else, where that shows."""
        ...

    def with_mark(self, mark: str | None) -> Self:
        """The same, as it is once it bears this mark of ours, or a new one (None), where its kind bears any.
        Its identity is recorded before `bear_mark`."""
        ...

    def bear_mark(self) -> Self:
        """The same, which bears the mark of its identity from here on; as it is, where it cannot."""
        ...

    def image_format(self) -> str | None:
        """The format of the image that it is, unless it is a raw disk. OSError."""
        ...

    def signatures(self) -> list[str]:
        """What it seems to hold, in words. OSError."""
        ...

    def end_threads(self) -> None:
        """Before the process is confined, which binds but one thread and those that it starts: whatever
        threads the disk has end. Until `to_engine` begins them again it need not be locked."""
        ...

    def to_engine(self) -> Any:
        """A vs_disk (c_shim/shim_api.h), which is the caller's. EngineError."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class OpensAsRecorded(Protocol):
    """A kind whose disks let in only who shows what was recorded of them."""

    def open_as_recorded(
        self, name: str, known: Iterable[DiskIdentity], *, read_only: bool, cache: CacheMode,
        lock_timeout_s: float,
    ) -> Disk:
        """As `Kind.open`. `known`: what records have of disks, perhaps of this one."""
        ...


@dataclass(frozen=True)
class Spot:
    """Where on this host a disk lies, without links, and what has to be within reach of who opens it."""

    real: Path
    allow: Path


class Kind(Protocol):
    """One kind of disk. Everything but `absolute` blocks."""

    @property
    def prefix(self) -> str:
        """What its names begin with: `rbd:`; of paths nothing."""
        ...

    @property
    def identities(self) -> frozenset[str]:
        """The kinds of its identities (DiskIdentity.kind)."""
        ...

    @property
    def over_network(self) -> bool:
        """The connection to its disks may be lost, and come back: then they are attached again unasked."""
        ...

    @property
    def fences_itself(self) -> bool:
        """Once `open` has returned, nothing is carried out any more that a former connection or owner had
        under way there (the fence: docs/durability.md, rule 8). Else the operator says how that is made
        certain (mirror/fence.py)."""
        ...

    def keep_files(self) -> None:
        """Files that tell how its disks are reached are read now, while they can be: later the process may be
        another user, and open few files."""
        ...

    def absolute(self, name: str) -> str:
        """The name as it is written everywhere, wherever the process stands. ConfigError: one clear sentence
        that says what is wrong with it."""
        ...

    def open(self, name: str, *, read_only: bool, cache: CacheMode, lock_timeout_s: float) -> Disk:
        """Open and lock it. Waits up to `lock_timeout_s` seconds for whoever has it, and, where the kind
        `fences_itself`, for what a former owner may still have under way there. DiskError says what is
        wrong and what to do."""
        ...

    def create(self, name: str, size_bytes: int) -> object:
        """A new, empty one, durable; what is returned tells `remove` which. DiskError: nothing was made."""
        ...

    def remove(self, name: str, made: object) -> None:
        """One that `create` has made and nobody needs; what somebody else has taken stays."""
        ...

    def is_made(self, disk: Disk, made: object) -> bool:
        """Whether what was opened is what was made."""
        ...

    def overlap(self, one: str, other: str) -> str | None:
        """Where both names lead to the same bytes, a phrase that says how. OSError."""
        ...

    def is_named(self, name: str, disk: DiskIdentity) -> bool:
        """Whether the name still is that disk's."""
        ...

    def look(self, disk: DiskIdentity) -> Look:
        """Whether it is there and answers, without opening it for anything."""
        ...

    def identify(self, name: str) -> DiskIdentity:
        """What is there now, as `Disk.as_it_is` has it, while somebody may use it. OSError."""
        ...

    def spot(self, name: str) -> Spot | None:
        """None: it lies not on this host."""
        ...

    def remote(self, name: str) -> Remote | None:
        """None: it lies on this host."""
        ...

    def places(self, disk: DiskIdentity) -> Iterable[Path]:
        """What of this host's files has to be within reach for it."""
        ...


def absolute_path(name: str, of: str) -> str:
    if "\0" in name:
        raise ConfigError(f"The path {name!r} has a zero byte in it.")
    path = Path(name)
    if path == Path():  # also what an empty word makes
        raise ConfigError(f"{of} is empty or the current directory; write a path.")
    try:
        return str(path.absolute())
    except OSError as error:
        raise ConfigError(
            f"{path} begins at the current directory, which cannot be told ({error.strerror}); "
            f"write the whole path."
        ) from error
