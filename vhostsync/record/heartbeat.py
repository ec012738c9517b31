# SPDX-License-Identifier: Apache-2.0
"""Whether somebody has changed an image file since a run that did not end in order (docs/durability.md).

Such a run could not note how it left the files. But while it ran, the engine has kept, at the end of the
bitmap's first block, until when their changes are its own (c_shim/bitmap/heartbeat.c). What has a later
ctime was changed by somebody else. Where the whole machine went down, that moment may not have reached the
disk; then all that is older than this boot is taken for the run's own: nobody else could write while the
machine was down. A moment further ahead than the engine ever says it shows that the clock has been set back
since: then times say nothing, and the file counts as changed. Blocks.
"""

import os
import struct
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

WORDS: Final = struct.Struct("<QQ")  # struct heartbeat_until
HEARTBEAT_BYTES: Final = WORDS.size
HEARTBEAT_AT: Final = 4096 - HEARTBEAT_BYTES
# How far ahead the engine says it at most (AHEAD_NS in heartbeat.c).
AHEAD_NS: Final = 500_000_000
# The kernel goes on with the requests of a dead process for tens of milliseconds, and they give times, too.
LANDING_NS: Final = 500_000_000


@dataclass(frozen=True)
class Heartbeat:
    """Until when the changes of the current disk and of its peer are a run's own; 0: not known."""

    current_ns: int
    peer_ns: int

    @classmethod
    def read(cls, fd: int) -> "Heartbeat":
        found = os.pread(fd, HEARTBEAT_BYTES, HEARTBEAT_AT)
        return cls(*WORDS.unpack(found)) if len(found) == HEARTBEAT_BYTES else cls(0, 0)

    def write(self, fd: int) -> None:
        os.pwrite(fd, WORDS.pack(self.current_ns, self.peer_ns), HEARTBEAT_AT)

    def not_before(self, moment_ns: int) -> "Heartbeat":
        return Heartbeat(max(self.current_ns, moment_ns), max(self.peer_ns, moment_ns))


def this_boot_began_ns() -> int:
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def why_changed(path: str, ctime_ns: int | None, until_ns: int) -> str | None:
    """Why its content may differ from what the last run has left. None: nothing speaks for it; nothing can
    where `ctime_ns` is None, for changes of a block device do not show."""
    if ctime_ns is None:
        return None
    if until_ns > time.time_ns() + AHEAD_NS:
        return (
            f"whether somebody else has written to {path} cannot be told: the writes of the last run, which "
            f"did not end in order, went on until {_when(until_ns)}, so the clock has been set back since"
        )
    if ctime_ns <= until_ns + LANDING_NS:
        return None
    until = _when(until_ns) if until_ns else "a moment that is not known"
    return (
        f"somebody else has written to {path} at {_when(ctime_ns)}: the writes of the last run, which did "
        f"not end in order, were over by {until}"
    )


def _when(moment_ns: int) -> str:
    return datetime.fromtimestamp(moment_ns / 1e9, UTC).isoformat(timespec="milliseconds")
