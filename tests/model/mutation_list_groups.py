# SPDX-License-Identifier: Apache-2.0
"""The seeded faults of several disks that are switched, or copied, at one instant."""

from __future__ import annotations

from tests.model.mutation import mutation

GROUPS = [
    mutation(
        "an-exchange-opens-the-gate",
        "no gate opens before all disks of a group are exchanged",
        "switching.c",
        "        if (!(x->flags & VS_EXCHANGE_HOLD))\n            gate_open(e);\n",
        "        gate_open(e);\n",
        "switch_steps.py::test_two_disks_are_switched_at_one_moment",
    ),
    mutation(
        "a-group-opens-whatever-was-refused",
        "no gate opens before the step before it was taken on all disks",
        "vhostsync/cli/group.py",
        'if not await _all(members, "close", patience_s) or not await _all(members, "carry-out", patience_s)',
        'await _all(members, "close", 9)\n    await _all(members, "carry-out", 9)\n    if not members',
        "unit/test_group.py::test_where_one_step_is_refused_all_is_taken_back_and_tried_again",
    ),
    mutation(
        "what-was-exchanged-stays-so",
        "where one disk of a group cannot be exchanged, those that were go back",
        "vhostsync/mirror/group_switch.py",
        "            if self._exchanged and not await self._exchange_back():\n",
        "            if self._exchanged:\n",
        "switch_steps.py::test_where_one_cannot_be_exchanged_those_that_were_go_back",
    ),
    mutation(
        "exchanged-back-and-still-marked",
        "after a kill a disk that was exchanged back is served again, before the record says so",
        "vhostsync/mirror/group_switch.py",
        "unmarked = Mark(mark.memory, 0) if mark is not None else None",
        "unmarked = mark",
        "switch_steps.py::test_where_one_cannot_be_exchanged_those_that_were_go_back",
    ),
    mutation(
        "the-old-disk-goes-on",
        "the old disk gets nothing after the gate has opened, unless the mirror is kept",
        "vhostsync/mirror/group_switch.py",
        "            if not self._plan.keep_mirror:\n                # What",
        "            if self._plan.accept_different:\n                # What",
        "switch_steps.py::test_the_old_disk_gets_nothing_more_unless_the_mirror_is_kept",
    ),
    mutation(
        "a-snapshot-without-gates",
        "a snapshot is taken with the gates of all closed",
        "vhostsync/mirror/group_snapshot.py",
        "        self._closed = await close_gate(self._engine, int(self._max_pause_ms * 1000))\n",
        "        self._closed = True\n",
        "group_member.py::test_a_snapshot_holds_what_was_written_and_nothing_more",
    ),
    mutation(
        "a-snapshot-that-is-not-durable",
        "what a snapshot lets go is durable",
        "vhostsync/mirror/group_snapshot.py",
        "        assert self._closed\n        await self._engine.mirror_drain()\n",
        "        assert self._closed\n",
        "group_member.py::test_a_snapshot_holds_what_was_written_and_nothing_more",
    ),
    mutation(
        "a-snapshot-that-is-called-up-to-date",
        "what a snapshot has let go is outdated in the record before the guest goes on",
        "vhostsync/mirror/group_snapshot.py",
        "await self._keeper.write(outdated(self._former))",
        "await self._keeper.write(self._former)",
        "group_member.py::test_a_snapshot_holds_what_was_written_and_nothing_more",
    ),
    mutation(
        "a-coordinator-holds-the-guest",
        "a coordinator that stands still holds no guest longer than it has said",
        "vhostsync/mirror/group_member.py",
        "held = anyio.CancelScope(deadline=anyio.current_time() + max_pause_ms / 1000)",
        "held = anyio.CancelScope()",
        "group_member.py::test_the_guest_is_held_no_longer_than_the_coordinator_has_said",
    ),
    mutation(
        "a-lost-destination-waits-for-the-coordinator",
        "a destination that is lost between two steps is recorded at once",
        "vhostsync/mirror/group_member.py",
        "if steady and self._mirror.state is not MirrorState.STEADY:",
        "if not steady and self._mirror.state is not MirrorState.STEADY:",
        "group_member.py::test_a_destination_that_is_lost_meanwhile_holds_no_flush",
    ),
]
