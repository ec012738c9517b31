# SPDX-License-Identifier: Apache-2.0
"""The states of a mirror, the moves between them, and why they happen (docs/durability.md, section 3)."""

from enum import StrEnum
from typing import Final

from vhostsync.engine.engine_event import Reason, mirror_moves


class MirrorState(StrEnum):
    PASSTHROUGH = "passthrough"
    SYNCING = "syncing"
    STEADY = "steady"
    AHEAD = "ahead"
    DEGRADED = "degraded"


# Every move there is: the table of c_shim/mirror/mirror_state.c, which asserts it too.
TRANSITIONS: Final = {
    former: {MirrorState[move.state.name] for move in mirror_moves() if move.former.name == former.name}
    for former in MirrorState
}

REASONS: Final = {
    Reason.COMMAND: "commanded",
    Reason.COPY_DONE: "everything is copied and flushed",
    Reason.DESTINATION_WRITE: "a write to the destination failed",
    Reason.DESTINATION_FLUSH: "a flush of the destination failed",
    Reason.DESTINATION_TIMEOUT: "the destination did not answer within destination_timeout",
    Reason.STOP_TIMEOUT: "a ring could not be stopped within stop_timeout because of the destination",
    Reason.SWITCH: "switched",
    Reason.CONGESTION: "the destination is too slow, and the guest runs on",
    Reason.CATCH_UP: "catching up with what was written meanwhile",
    Reason.DESTINATION_LOST: "the connection to the destination is lost",
    Reason.GROUP: "the destinations of the group are let go of together",
}
