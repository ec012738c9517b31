# SPDX-License-Identifier: Apache-2.0
"""The switch: prepare, announce, close the gate, rename the record, exchange the disks; or all as it was.

The record names the new disk before the first request goes there (state_file.py says how, without a wait for
the record's disk). From the closed gate to the open one the guest is held, and nothing may be cut off.
"""

import errno
from dataclasses import asdict
from typing import Final

import anyio
import structlog

from vhostsync import events, patience
from vhostsync.bad_ranges import BadRanges
from vhostsync.engine import Engine
from vhostsync.errors import EngineError, SwitchError, VhostsyncError
from vhostsync.events import EventHub
from vhostsync.mirror_state import MirrorState
from vhostsync.mirror_status import Switched, SwitchPlan, SwitchResult
from vhostsync.record_keeper import RecordKeeper
from vhostsync.record_store import Mark, Prepared
from vhostsync.roles import Roles

log = structlog.get_logger(__name__)

RETRY_S: Final = 0.05
GATE_NOT_CLOSED: Final = (errno.ETIMEDOUT, errno.EAGAIN)  # it took too long, or another drain is needed


class Switch:
    """Nothing else may command the mirror meanwhile (turns.py)."""

    def __init__(self, engine: Engine, roles: Roles, keeper: RecordKeeper, hub: EventHub) -> None:
        self._engine = engine
        self._roles = roles
        self._keeper = keeper
        self._hub = hub

    async def check(self, state: MirrorState, plan: SwitchPlan) -> None:
        """SwitchError when it may not begin."""
        if state is not MirrorState.STEADY:
            how = "start it and wait until it is steady (mirror start --wait)"
            if state is MirrorState.AHEAD:
                how = "the destination was too slow and catches up by itself; wait until it is steady"
            raise SwitchError(f"a switch needs the mirror in the steady state, and it is {state}; {how}")
        if self._keeper.different_since is not None and not plan.accept_different:
            raise SwitchError(self._different(f"known since {self._keeper.different_since}"))
        bad = BadRanges.of(await self._engine.snapshot())
        bad.check_switch(accept=plan.accept_unreadable, keep_mirror=plan.keep_mirror)

    async def run(self, plan: SwitchPlan, deadline_s: float) -> SwitchResult:
        """SwitchError: the guest is still on the source."""
        self._hub.publish(events.SWITCH_STARTED, {"destination": str(self._roles.destination_path)})
        try:
            with patience.fail_after(deadline_s):
                result = await self._try_until_switched(plan)
        except TimeoutError as error:
            raise self._failed(
                f"the switch did not succeed within {deadline_s:g} s: no pause of at most "
                f"{plan.max_pause_ms:g} ms was enough to bring the destination up to date; allow a longer "
                f"pause or deadline"
            ) from error
        except VhostsyncError as error:
            raise self._failed(self._why(error)) from error
        except anyio.get_cancelled_exc_class():
            self._failed("the source has failed, and the switch from it goes first; or the backend ends")
            raise
        log.info("switched", **asdict(result))
        self._hub.publish(events.SWITCH_COMPLETED, asdict(result))
        return result

    def _different(self, when: str) -> str:
        return (
            f"a verification has found that {self._roles.destination_path} differs from the guest's disk "
            f"({when}); mend it (verify --repair), verify that it is equal by now, or copy everything anew "
            f"(mirror cancel, mirror start --full); or move the guest there all the same (switch "
            f"--accept-different)"
        )

    def _why(self, error: VhostsyncError) -> str:
        if isinstance(error, EngineError) and error.errno == errno.ENOTCONN:
            return "the mirror did not stay steady meanwhile (`status` says why); try again when it is steady"
        if isinstance(error, EngineError) and error.errno == errno.EBADE:
            return self._different("just now: query-verify says where")
        return str(error)

    def _failed(self, reason: str) -> SwitchError:
        log.warning("switch failed", reason=reason)
        self._hub.publish(events.SWITCH_FAILED, {"reason": reason})
        return SwitchError(f"the guest is still on {self._roles.source.name}: {reason}")

    async def leave_source(self, deadline_s: float) -> SwitchResult | None:
        """The engine keeps back what the source has failed: switch, without a flush of either disk. None:
        another switch has done so meanwhile. VhostsyncError."""
        async with self._keeper.lock:
            if not (await self._engine.snapshot()).failover_pending:
                return None
            switched = await self._try(SwitchPlan(deadline_s * 1000))
            if switched is None:
                raise SwitchError("the destination could not be brought up to date in time")
            return self._result(switched, 1)

    async def _try_until_switched(self, plan: SwitchPlan) -> SwitchResult:
        attempts = 0
        while True:
            attempts += 1
            # Prepare, the guest running: the lag shrinks, and the destination shows that it can flush.
            await self._engine.mirror_drain(both_disks=plan.keep_mirror)
            async with self._keeper.lock:
                switched = await self._try(plan)
            if switched is not None:
                if switched.accepted:
                    log.warning("accepted what the destination holds there", **switched.accepted.listed())
                return self._result(switched, attempts)
            await anyio.sleep(RETRY_S * attempts)

    def _result(self, switched: Switched, attempts: int) -> SwitchResult:
        destination = self._roles.destination
        return SwitchResult(
            pause_us=switched.pause_ns // 1000,
            attempts=attempts,
            source_path=self._roles.source.name,
            destination_path=destination.name if destination is not None else None,
            accepted=switched.accepted.listed(),
        )

    async def _try(self, plan: SwitchPlan) -> Switched | None:
        """Under the record's lock. The record is as it was unless this returns what it did. None: the gate
        could not be closed in time."""
        prepared: Prepared | None = None
        switched: Switched | None = None
        try:
            prepared = await self._keeper.prepare_switch(
                self._keeper.switched(keep_mirror=plan.keep_mirror)
            )
            if plan.accept_unreadable or (prepared is not None and prepared.mark is None):
                switched = await self._step_by_step(prepared, plan)
            else:
                switched = await self._at_once(prepared.mark if prepared is not None else None, plan)
        finally:
            if switched is None:
                await self._keeper.take_back(prepared)
        if switched is not None:
            await self._keeper.settle_switch(prepared)
        return switched

    async def _at_once(self, mark: Mark | None, plan: SwitchPlan) -> Switched | None:
        """While the guest is held, nothing is done here, and no disk waited for."""
        try:
            pause_ns = await self._engine.gate_and_exchange(
                int(plan.max_pause_ms * 1000), mark, keep_mirror=plan.keep_mirror,
                accept_different=plan.accept_different,
            )  # fmt: skip
            return Switched(pause_ns, BadRanges())
        except EngineError as error:
            with anyio.CancelScope(shield=True):
                await self._engine.ungate()
            if error.errno not in GATE_NOT_CLOSED:
                raise
            return None

    async def _step_by_step(self, prepared: Prepared | None, plan: SwitchPlan) -> Switched | None:
        """Where it has to be known what is accepted, or the record has no memory for a mark."""
        if not await self._close_gate(plan.max_pause_ms):
            return None
        # From here to the end nothing may be cut off: the guest is held.
        with anyio.CancelScope(shield=True):
            return await self._exchange(prepared, plan)
        raise AssertionError("nobody cancels that scope")

    async def _close_gate(self, max_pause_ms: float) -> bool:
        """False: it could not be closed in time, and is open again. So it is when this raises or is
        cancelled (the deadline of the switch): a gate that nobody opens would hold the guest for ever."""
        try:
            await self._engine.gate(int(max_pause_ms * 1000))
        except EngineError as error:
            if error.errno not in GATE_NOT_CLOSED:
                raise
            return False
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._engine.ungate()
            raise
        return True

    async def _exchange(self, prepared: Prepared | None, plan: SwitchPlan) -> Switched:
        """With the gate closed: the record, then the disks."""
        accepted = BadRanges()
        try:
            if plan.accept_unreadable:
                accepted = BadRanges.of(await self._engine.snapshot())
            if prepared is not None:
                await self._keeper.change_to(prepared)
            pause_ns = await self._engine.exchange(
                keep_mirror=plan.keep_mirror, accept_unreadable=plan.accept_unreadable,
                accept_different=plan.accept_different,
            )  # fmt: skip
            return Switched(pause_ns, accepted)
        except VhostsyncError:
            # First the record: what the guest writes from here on goes to the disk that it is to name again.
            await self._keeper.take_back(prepared)
            await self._engine.ungate()
            raise
