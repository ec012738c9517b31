# SPDX-License-Identifier: Apache-2.0
"""The C part of disks: of those at a path (c_shim/disk/disk_file.c), and what all others need of it."""

from dataclasses import asdict, dataclass
from typing import Any

from vhostsync._shim import ffi, lib
from vhostsync.errors import EngineError


@dataclass(frozen=True)
class DiskProbe:
    """struct vs_disk_probe."""

    bytes: int
    is_block_device: bool
    logical_block_bytes: int
    physical_block_bytes: int
    memory_align_bytes: int
    inline_io: bool
    discard_granularity_bytes: int
    may_block: bool = False


def disk_services() -> Any:
    """What a library of another kind of disks has of the core (c_shim/disk/disk_services.h)."""
    return lib.vs_disk_services()


def probe(fd: int, direct: bool) -> DiskProbe:
    """Look at an open disk. Blocks. EngineError."""
    found = ffi.new("struct vs_disk_probe *")
    rc = lib.vs_disk_probe_fd(fd, direct, found)
    if rc < 0:
        raise EngineError.from_errno("examining the disk", rc)
    return DiskProbe(
        bytes=found.bytes,
        is_block_device=bool(found.is_block_device),
        logical_block_bytes=found.logical_block_bytes,
        physical_block_bytes=found.physical_block_bytes,
        memory_align_bytes=found.memory_align_bytes,
        inline_io=bool(found.inline_io),
        may_block=bool(found.may_block),
        discard_granularity_bytes=found.discard_granularity_bytes,
    )


def file_disk(fd: int, found: DiskProbe, direct: bool, name: str) -> Any:
    """A vs_disk that owns the descriptor. EngineError."""
    handle = lib.vs_disk_file(fd, ffi.new("struct vs_disk_probe *", asdict(found)), direct)
    if handle == ffi.NULL:
        raise EngineError.at_start(f"starting the thread of {name}", ffi.errno)
    return handle


def close_disk(handle: Any) -> None:
    """Of a vs_disk that no engine has taken. Blocks."""
    lib.vs_disk_close(handle)
