# SPDX-License-Identifier: Apache-2.0
"""The states of a mirror, the moves between them, and why they happen (docs/durability.md, section 3)."""

from enum import StrEnum
from typing import Final

from vhostsync.engine_event import Reason


class MirrorState(StrEnum):
    PASSTHROUGH = "passthrough"
    SYNCING = "syncing"
    STEADY = "steady"
    AHEAD = "ahead"
    DEGRADED = "degraded"


# Every move there is. The engine reports them; one that is not in here is a defect, and is logged as such.
TRANSITIONS: Final = {
    MirrorState.PASSTHROUGH: {MirrorState.SYNCING},
    MirrorState.SYNCING: {
        MirrorState.STEADY, MirrorState.AHEAD, MirrorState.DEGRADED, MirrorState.PASSTHROUGH,
    },
    MirrorState.STEADY: {
        MirrorState.STEADY, MirrorState.AHEAD, MirrorState.DEGRADED, MirrorState.PASSTHROUGH,
    },
    MirrorState.DEGRADED: {MirrorState.SYNCING, MirrorState.PASSTHROUGH},
    MirrorState.AHEAD: {MirrorState.SYNCING, MirrorState.DEGRADED, MirrorState.PASSTHROUGH},
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
}
