# SPDX-License-Identifier: Apache-2.0
"""What the data plane tells unasked: changes of state, errors, losses."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from vhostsync._shim import lib
from vhostsync.engine.snapshot import DISK_OPS, ROLES, State


class Reason(IntEnum):
    """enum vs_reason: why the mirror changed its state."""

    COMMAND = lib.VS_REASON_COMMAND
    COPY_DONE = lib.VS_REASON_COPY_DONE
    DESTINATION_WRITE = lib.VS_REASON_DESTINATION_WRITE
    DESTINATION_FLUSH = lib.VS_REASON_DESTINATION_FLUSH
    DESTINATION_TIMEOUT = lib.VS_REASON_DESTINATION_TIMEOUT
    STOP_TIMEOUT = lib.VS_REASON_STOP_TIMEOUT
    SWITCH = lib.VS_REASON_SWITCH
    CONGESTION = lib.VS_REASON_CONGESTION
    CATCH_UP = lib.VS_REASON_CATCH_UP
    DESTINATION_LOST = lib.VS_REASON_DESTINATION_LOST
    GROUP = lib.VS_REASON_GROUP


@dataclass(frozen=True)
class MirrorMove:
    """struct vs_mirror_move: the states by their numbers, and what else the move does."""

    former: State
    state: State
    captures: bool
    counts: bool
    record: bool


def mirror_moves() -> tuple[MirrorMove, ...]:
    """Every move that the engine makes."""
    moves: list[MirrorMove] = []
    while move := lib.vs_mirror_move_at(len(moves)):
        former, state = State(getattr(move, "from")), State(move.to)
        moves.append(MirrorMove(former, state, bool(move.captures), bool(move.counts), bool(move.record)))
    return tuple(moves)


class EventKind(IntEnum):
    """enum vs_event_kind, but for the completions, which `pump` deals with."""

    STATE = lib.VS_EV_STATE
    DEGRADED = lib.VS_EV_DEGRADED
    QUEUE_BROKEN = lib.VS_EV_QUEUE_BROKEN
    ATTACHMENT_LOST = lib.VS_EV_ATTACHMENT_LOST
    IO_ERROR = lib.VS_EV_IO_ERROR
    BITMAP_FAILED = lib.VS_EV_BITMAP_FAILED
    FENCE_CLEAR = lib.VS_EV_FENCE_CLEAR
    AHEAD_DRAINED = lib.VS_EV_AHEAD_DRAINED
    VERIFIED = lib.VS_EV_VERIFIED
    READ_FALLBACK = lib.VS_EV_READ_FALLBACK
    SOURCE_FAILED = lib.VS_EV_SOURCE_FAILED
    PAUSED = lib.VS_EV_PAUSED
    PAUSE_RELEASED = lib.VS_EV_PAUSE_RELEASED
    SOURCE_CLOSED = lib.VS_EV_SOURCE_CLOSED


@dataclass(frozen=True)
class EngineEvent:
    """struct vs_event, of any kind but a completion. `error` is a positive errno or 0."""

    kind: EventKind
    error: int
    value: int
    offset: int
    length: int
    attachment: int
    queue: int
    reason: int
    role: str
    op: str
    differed: bool


def event_of(c_event: Any) -> EngineEvent:
    return EngineEvent(
        kind=EventKind(c_event.kind),
        error=-c_event.result,
        value=c_event.value,
        offset=c_event.offset,
        length=c_event.length,
        attachment=c_event.attachment,
        queue=c_event.queue,
        reason=c_event.reason,
        role=ROLES[c_event.disk_role],
        op=DISK_OPS[c_event.op],
        differed=bool(c_event.differed),
    )
