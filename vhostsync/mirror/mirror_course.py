# SPDX-License-Identifier: Apache-2.0
"""The course that the mirror takes, as the engine reports it: its state and why, the last error, how far the
copy is. Told to the log, as events, and to whoever asks for the status."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

import anyio
import structlog

from vhostsync import events
from vhostsync.engine.engine import Engine
from vhostsync.engine.engine_event import EngineEvent, EventKind, Reason
from vhostsync.engine.snapshot import MirrorFigures, Snapshot, State
from vhostsync.errors import EngineError
from vhostsync.events import EventHub
from vhostsync.mirror.bad_ranges import rows
from vhostsync.mirror.group_cut import CUT_S
from vhostsync.mirror.mirror_state import REASONS, TRANSITIONS, MirrorState
from vhostsync.mirror.mirror_status import CopyRate, MirrorStatus
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.mirror.roles import Roles
from vhostsync.record.state_record import Worth
from vhostsync.statistic import figures_of
from vhostsync.storage.network import meaning_of_error

log = structlog.get_logger(__name__)

PROGRESS_S: Final = 1.0


class Course:
    """To be made after the keeper, which hears of each event first: when the disks were exchanged, the roles
    are the new ones."""

    def __init__(
        self, engine: Engine, roles: Roles, keeper: RecordKeeper, hub: EventHub,
        waits_for: Callable[[], str | None],
    ) -> None:
        self.state = MirrorState.PASSTHROUGH
        self.changed = anyio.Event()  # set at the next event of the engine
        self.last_error: str | None = None
        self.full_copy_reason: str | None = None
        self.speed_bytes_per_s = 0
        self.resuming = False  # the mirror that begins was not commanded in this run
        self._engine = engine
        self._roles = roles
        self._keeper = keeper
        self._hub = hub
        self._waits_for = waits_for
        self._rate = CopyRate()
        self._reason: str | None = None
        engine.on_event(self._on_event)

    def _on_event(self, event: EngineEvent) -> None:
        if event.kind is EventKind.STATE:
            self._enter(MirrorState(State(event.value).name.lower()), Reason(event.reason), event.error)
        elif event.kind is EventKind.IO_ERROR:
            self._note_io_error(event)
        elif event.kind is EventKind.FENCE_CLEAR:
            former, self._roles.fenced = self._roles.fenced, None
            if former is not None:
                log.info("the former destination is closed", path=former.name, unanswered=bool(event.value))
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def _note_io_error(self, event: EngineEvent) -> None:
        roles = self._roles
        place = roles.source if event.role == "source" else roles.destination or roles.fenced
        path = place.name if place is not None else roles.destination_path
        name = EngineError.from_errno(f"{event.op} of {path} at byte {event.offset}", event.error)
        meaning = meaning_of_error(place.identity.kind, event.error) if place is not None else None
        self.last_error = f"{name}; {meaning}" if meaning is not None else str(name)
        data = {
            "disk": event.role,
            "path": path,
            "operation": event.op,
            "offset": event.offset,
            "length": event.length,
            "error": self.last_error,
        }
        log.error("I/O error", **data)
        self._hub.publish(events.IO_ERROR, data)

    def _enter(self, state: MirrorState, reason: Reason, error: int) -> None:
        former = self.state
        if state not in TRANSITIONS[former]:
            log.critical("a move between states that must not be", former=former, state=state)
        self.state = state
        resumed = self.resuming and reason is Reason.COMMAND and state is MirrorState.SYNCING
        self._reason = "resumed" if resumed else REASONS[reason]
        if error:
            self.last_error = str(EngineError.from_errno(REASONS[reason], error))
        if state is MirrorState.DEGRADED:
            self._roles.fence()
        destination = self._roles.destination_path
        say = log.warning if state in (MirrorState.DEGRADED, MirrorState.AHEAD) else log.info
        failure = self.last_error if error else None
        say("mirror", state=str(state), former=str(former), reason=self._reason, error=failure)
        self._hub.publish(
            events.MIRROR_STATE_CHANGE,
            {
                "state": str(state),
                "former": str(former),
                "reason": self._reason,
                "destination": destination,
                "error": failure,
            },
        )

    async def report_progress(self) -> None:
        """Until cancelled."""
        while True:
            while self.state is not MirrorState.SYNCING:
                await self.changed.wait()
            self._rate.clear()
            while self.state is MirrorState.SYNCING:
                status = await self.status()
                self._hub.publish(
                    events.MIRROR_PROGRESS,
                    {
                        "bytes-done": status.copy_bytes_done,
                        "bytes-total": status.copy_bytes_total,
                        "rate": round(status.copy_rate_bytes_per_s),
                        "remaining-s": status.copy_remaining_s,
                    },
                )
                changed = self.changed
                with anyio.move_on_after(PROGRESS_S):
                    await changed.wait()

    async def wait_unfenced(self) -> None:
        """Until all requests to the former destination are over (rule 8)."""
        while self._roles.fenced_path is not None:
            await self.changed.wait()

    def why_unrecorded(self) -> str:
        """The former destination is lost, and the record does not say so yet: why, and what to do."""
        what = "the state record does not say yet that the former destination is outdated"
        if self._keeper.group.asks:
            return (
                f"{what}, because the other disks of the group have not answered yet whether theirs were let "
                f"go of with it; that takes {CUT_S:g} s at most: start the mirror again then"
            )
        if self._keeper.flushes_fail:
            return f"{what}, because it cannot be written (see last-error); mend that first"
        return f"{what}, and the disk that the record is kept on does not answer; see to that disk first"

    async def status(self) -> MirrorStatus:
        now = await self._engine.snapshot()
        if now.state is State.SYNCING:
            self._rate.add(anyio.current_time(), now.copy_bytes_done)
        return self._status(now)

    def _status(self, now: Snapshot) -> MirrorStatus:
        rate = self._rate.bytes_per_s() if now.state is State.SYNCING else 0.0
        left = now.copy_bytes_total - now.copy_bytes_done
        if now.state is not State.SYNCING:
            remaining_s = None
        else:
            remaining_s = math.ceil(left / rate * 10) / 10 if rate else None
        peer, destination = self._keeper.record.peer, self._roles.destination
        return MirrorStatus(
            **figures_of(MirrorFigures, now),
            state=str(self.state),
            worth=self._worth(),
            source=self._roles.source.name,
            destination=(destination.name if destination else peer.path) if peer is not None else None,
            counts=asdict(now.counts),
            bitmap=str(self._keeper.bitmap.path) if self._keeper.bitmap is not None else None,
            bitmap_failed=self._keeper.bitmap_failed,
            full_copy_reason=self.full_copy_reason,
            copy_rate_bytes_per_s=rate,
            copy_remaining_s=remaining_s,
            speed_bytes_per_s=self.speed_bytes_per_s,
            wanted=self._keeper.record.wanted is not None,
            last_error=self.last_error,
            reason=self._reason,
            doubt=rows(now.doubt),
            outdated_since=self._keeper.record.outdated_since,
            different_since=self._keeper.different_since,
            unreadable=rows(now.unreadable),
            record_error=self._keeper.write_error,
            flushes_fail=self._keeper.flushes_fail,
            fence=self._waits_for(),
        )

    def _worth(self) -> str | None:
        if self.state is MirrorState.STEADY:
            return Worth.UP_TO_DATE.value
        if self.state is MirrorState.SYNCING:
            return Worth.INCONSISTENT.value
        worth = self._keeper.record.peer_worth
        return worth.value if worth is not None else None
