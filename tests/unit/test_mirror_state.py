# SPDX-License-Identifier: Apache-2.0
"""The table of the mirror's moves, which the engine asserts and Python reads (durability.md, section 3)."""

from __future__ import annotations

from vhostsync.engine.engine_event import mirror_moves
from vhostsync.engine.snapshot import State
from vhostsync.mirror.mirror_state import TRANSITIONS, MirrorState


def test_the_moves_are_those_of_the_contract() -> None:
    assert {
        MirrorState.PASSTHROUGH: {MirrorState.SYNCING},
        MirrorState.SYNCING: {
            MirrorState.STEADY,
            MirrorState.AHEAD,
            MirrorState.DEGRADED,
            MirrorState.PASSTHROUGH,
        },
        MirrorState.STEADY: {
            MirrorState.STEADY,
            MirrorState.AHEAD,
            MirrorState.DEGRADED,
            MirrorState.PASSTHROUGH,
        },
        MirrorState.AHEAD: {MirrorState.SYNCING, MirrorState.DEGRADED, MirrorState.PASSTHROUGH},
        MirrorState.DEGRADED: {MirrorState.SYNCING, MirrorState.PASSTHROUGH},
    } == TRANSITIONS


def test_writes_are_captured_while_the_destination_is_to_get_them() -> None:
    assert all(move.captures == (move.state in {State.SYNCING, State.STEADY}) for move in mirror_moves())


def test_the_counts_are_known_in_steady_alone() -> None:
    assert all(move.counts == (move.state == State.STEADY) for move in mirror_moves())


def test_the_record_is_awaited_when_steady_ends_without_having_been_asked_to() -> None:
    awaited = {(move.former, move.state) for move in mirror_moves() if move.record}
    assert awaited == {(State.STEADY, State.AHEAD), (State.STEADY, State.DEGRADED)}
