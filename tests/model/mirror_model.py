# SPDX-License-Identifier: Apache-2.0
"""What docs/durability.md says of the mirror's states and counts, to check what the engine shows: no I/O.

`MirrorModel` follows the engine's events and snapshots and says what they allow. Which bytes a disk must hold
is `History`'s part (guest_model.py); which floors apply to the destination, and since when, is decided here:

* from the steady state on the destination holds what the guest has flushed, in the past too;
* that ends when the control plane says that the state record was written (or stops the mirror): flushes
  confirmed later need the source alone;
* from the moment the mirror is given up nothing that the guest submits may reach the former destination.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.engine_driver import Counts, DiskOp, Event, EventKind, MemoryDisk, Reason, Snapshot, State
from tests.model.guest_model import Floors, History

FAILURES = {
    Reason.DESTINATION_WRITE,
    Reason.DESTINATION_FLUSH,
    Reason.DESTINATION_TIMEOUT,
    Reason.STOP_TIMEOUT,
    Reason.DESTINATION_LOST,
}

TRANSITIONS: dict[tuple[State, State], set[Reason]] = {
    (State.PASSTHROUGH, State.SYNCING): {Reason.COMMAND},
    (State.DEGRADED, State.SYNCING): {Reason.COMMAND},
    (State.SYNCING, State.STEADY): {Reason.COPY_DONE},
    (State.SYNCING, State.DEGRADED): FAILURES,
    (State.STEADY, State.DEGRADED): FAILURES,
    (State.SYNCING, State.PASSTHROUGH): {Reason.COMMAND},
    (State.STEADY, State.PASSTHROUGH): {Reason.COMMAND, Reason.SWITCH},
    (State.DEGRADED, State.PASSTHROUGH): {Reason.COMMAND},
    (State.STEADY, State.STEADY): {Reason.SWITCH},
}

SOURCE, DESTINATION = 0, 1


@dataclass
class Former:
    """A disk that was good and was left: what it must keep, and what it must never see."""

    disk: MemoryDisk
    floors: Floors
    ceiling: int


class MirrorModel:
    """Follows one engine over its life."""

    def __init__(self, history: History, *, may_time_out: bool) -> None:
        self.history = history
        self.may_time_out = may_time_out
        self.state = State.PASSTHROUGH
        self.peer: MemoryDisk | None = None
        self.peer_is_good = False
        self.record_pending = False
        self.paused = False
        self.pauses = 0
        self.epoch = 0
        """Changes whenever the counts may start anew: attach, loss, exchange."""
        self.errors: dict[tuple[int, int], int] = {}
        """I/O errors that the engine has reported, by role and operation."""
        self.formers: list[Former] = []
        self._ceiling = 0
        self._last: tuple[int, Counts] | None = None

    # -- events ---------------------------------------------------------------

    def event(self, event: Event) -> None:
        if event.kind == EventKind.IO_ERROR:
            key = (event.disk_role, event.op)
            self.errors[key] = self.errors.get(key, 0) + 1
        elif event.kind == EventKind.STATE:
            self._transition(State(event.value), Reason(event.reason))
        elif event.kind == EventKind.DEGRADED:
            assert self.state == State.DEGRADED and self.peer_is_good, "degraded without having been steady"
            self.record_pending = True
        elif event.kind == EventKind.PAUSED:
            assert bool(event.value) != self.paused
            self.paused = bool(event.value)
            self.pauses += self.paused
        elif event.kind in (EventKind.QUEUE_BROKEN, EventKind.ATTACHMENT_LOST):
            raise AssertionError(f"unexpected event {event}")

    def _transition(self, state: State, reason: Reason) -> None:
        allowed = TRANSITIONS.get((self.state, state), set())
        assert reason in allowed, f"{self.state.name} -> {state.name} because of {reason.name}"
        if reason in (Reason.DESTINATION_TIMEOUT, Reason.STOP_TIMEOUT):
            assert self.may_time_out, "the destination was given up although nothing is slow"
        elif reason in (Reason.DESTINATION_WRITE, Reason.DESTINATION_FLUSH):
            assert self._failed(DESTINATION), "the destination was given up although it did not fail"
        if state == State.STEADY and self.state == State.SYNCING:
            self.peer_is_good = True
        if state == State.DEGRADED:
            self._ceiling = self.history.tick()
            if not self.peer_is_good:
                self.peer = None
        self.epoch += 1
        self.state = state

    def _failed(self, role: int) -> bool:
        return any(count for (failed, _), count in self.errors.items() if failed == role)

    def error_allowed(self, *ops: DiskOp) -> bool:
        """Whether a guest's request may have failed: only the source's own errors are the guest's."""
        return any(self.errors.get((SOURCE, op)) for op in ops)

    # -- commands ---------------------------------------------------------------

    def attached(self, disk: MemoryDisk) -> None:
        self.peer, self.peer_is_good = disk, False
        self.formers = [former for former in self.formers if former.disk is not disk]

    def before_leaving_peer(self) -> None:
        """The record is about to be called written, or the mirror to be stopped: the floors end here."""
        if self.peer is not None and self.peer_is_good:
            ceiling = self._ceiling if self.state == State.DEGRADED else 0
            self.formers.append(Former(self.peer, dict(self.history.flushed_floor), ceiling))
        self.peer, self.peer_is_good = None, False
        self.record_pending = False

    def after_leaving_peer(self) -> None:
        """Nothing submitted from now on may reach a disk that was left."""
        for former in self.formers:
            former.ceiling = former.ceiling or self.history.tick()

    def exchanged(self, old_source: MemoryDisk, *, keep: bool, ceiling: int) -> None:
        self.epoch += 1
        if keep:
            self.peer = old_source
        else:
            self.peer, self.peer_is_good = None, False
            self.formers.append(Former(old_source, dict(self.history.flushed_floor), ceiling))

    # -- snapshots --------------------------------------------------------------

    def check(self, snapshot: Snapshot, *, pending_writes: int, failed_writes: int) -> None:
        """The invariants of the counts; `snapshot` was taken after the last completion was seen."""
        c = snapshot.counts
        done = self.history.completed_writes
        assert done <= c.generation <= done + pending_writes + failed_writes, (done, c)
        assert c.source_flushed <= c.generation and c.request <= c.generation, c
        assert snapshot.state == self.state, (snapshot.state, self.state)
        assert c.mirrored_known == (self.state == State.STEADY), c
        assert snapshot.record_pending == self.record_pending
        assert snapshot.paused == self.paused and not (self.paused and self.state == State.STEADY)
        if c.mirrored_known:
            assert c.flushed <= c.mirrored <= c.generation, c
            assert snapshot.lag_writes == c.generation - c.mirrored, snapshot
        if self._last is not None and self._last[0] == self.epoch:
            before = self._last[1]
            for name in ("generation", "source_flushed", "mirrored", "request", "flushed"):
                assert getattr(c, name) >= getattr(before, name), f"{name} fell: {before} -> {c}"
        self._last = (self.epoch, c)

    @property
    def pause(self) -> int:
        """Which pause holds flushes now; 0: none does."""
        return self.pauses if self.paused else 0

    def check_confirmed(self, snapshot: Snapshot, requested: int, epoch: int) -> None:
        """A flush was confirmed that was submitted when `requested` writes were complete, in `epoch`."""
        c = snapshot.counts
        if epoch != self.epoch:
            return
        assert c.source_flushed >= requested, f"confirmed at {requested}, the source was flushed at {c}"
        assert c.request >= requested, c
        if self.state == State.STEADY:
            assert c.flushed >= requested, f"confirmed at {requested}, the destination was flushed at {c}"
