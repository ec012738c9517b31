# SPDX-License-Identifier: Apache-2.0
"""The switch: whether it may be, attempt after attempt until one has succeeded (switch_steps.py has what an
attempt is) or the deadline has passed, and what is said of it."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Final

import anyio
import structlog

from vhostsync import events
from vhostsync.engine.engine import Engine
from vhostsync.errors import EngineError, SwitchError, VhostsyncError
from vhostsync.events import EventHub
from vhostsync.host import patience
from vhostsync.mirror.bad_ranges import BadRanges
from vhostsync.mirror.disk_names import DiskNames
from vhostsync.mirror.group_switch import GroupSwitchSteps
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import Switched, SwitchPlan, SwitchResult
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.mirror.roles import Roles
from vhostsync.mirror.switch_steps import SwitchSteps, take_all

log = structlog.get_logger(__name__)

RETRY_S: Final = 0.05


class Switch:
    """Nothing else may command the mirror meanwhile (turns.py)."""

    def __init__(
        self, engine: Engine, roles: Roles, keeper: RecordKeeper, hub: EventHub, names: DiskNames
    ) -> None:
        self._names = names
        self._engine = engine
        self._roles = roles
        self._keeper = keeper
        self._hub = hub

    async def refuse_unless_possible(self, state: MirrorState, plan: SwitchPlan) -> None:
        """SwitchError when it may not begin."""
        if state is not MirrorState.STEADY:
            how = "start it and wait until it is steady (mirror start --wait)"
            if state is MirrorState.AHEAD:
                how = "the destination was too slow and catches up by itself; wait until it is steady"
            raise SwitchError(f"a switch needs the mirror in the steady state, and it is {state}; {how}")
        self._check_serves()
        if self._keeper.different_since is not None and not plan.accept_different:
            raise SwitchError(self._different(f"known since {self._keeper.different_since}"))
        bad = BadRanges.of(await self._engine.snapshot())
        bad.check_switch(accept=plan.accept_unreadable, keep_mirror=plan.keep_mirror)

    def _check_serves(self) -> None:
        destination = self._roles.destination
        if destination is not None and destination.why_no_source is not None:
            raise SwitchError(
                f"no guest can be served from {destination.name}: {destination.why_no_source}; it can be a "
                f"mirror's destination only"
            )

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
        self._check_serves()
        async with self.steps(SwitchPlan(deadline_s * 1000)) as steps:
            if not (await self._engine.snapshot()).failover_pending:
                return None
            switched = await take_all(steps)
            if switched is None:
                raise SwitchError("the destination could not be brought up to date in time")
            return self._result(switched, 1)

    async def _try_until_switched(self, plan: SwitchPlan) -> SwitchResult:
        attempts = 0
        while True:
            attempts += 1
            await self.drain(plan)
            async with self.steps(plan) as steps:
                switched = await take_all(steps)
            if switched is not None:
                if switched.accepted:
                    log.warning("accepted what the destination holds there", **switched.accepted.listed())
                return self._result(switched, attempts)
            await anyio.sleep(RETRY_S * attempts)

    async def drain(self, plan: SwitchPlan) -> None:
        """The guest running: the lag shrinks, and the destination shows that it can flush, and that it is
        found by its name. EngineError, SwitchError."""
        await self._engine.mirror_drain(both_disks=plan.keep_mirror)
        if (why := await self._names.why_not_found(self._roles.destination)) is not None:
            raise SwitchError(why)

    def _result(self, switched: Switched, attempts: int) -> SwitchResult:
        destination = self._roles.destination
        return SwitchResult(
            pause_us=switched.pause_ns // 1000,
            attempts=attempts,
            source_path=self._roles.source.name,
            destination_path=destination.name if destination is not None else None,
            accepted=switched.accepted.listed(),
        )

    @asynccontextmanager
    async def steps(self, plan: SwitchPlan) -> AsyncIterator[SwitchSteps]:
        """One attempt, with the record's lock. What it has begun is taken back, unless the disks were
        exchanged."""
        async with self._keeper.lock:
            steps = SwitchSteps(self._engine, self._keeper, plan)
            try:
                yield steps
            finally:
                await steps.take_back()

    @asynccontextmanager
    async def steps_in_group(self, plan: SwitchPlan) -> AsyncIterator[GroupSwitchSteps]:
        """The same for a coordinator of several disks. SwitchError where that was given up; with what the
        steps have opened all the same, where it could not be taken back."""
        self._hub.publish(events.SWITCH_STARTED, {"destination": str(self._roles.destination_path)})
        steps: GroupSwitchSteps | None = None
        try:
            await self.drain(replace(plan, keep_mirror=True))  # so that it can be taken back
            async with self._keeper.lock:
                steps = GroupSwitchSteps(self._engine, self._roles, self._keeper, plan)
                try:
                    yield steps
                finally:
                    await steps.leave()
        except VhostsyncError as error:
            raise self._ended_in_group(steps, self._why(error)) from error
        except anyio.get_cancelled_exc_class():
            self._ended_in_group(steps, "the coordinator is gone, or something else goes first")
            raise
        self._ended_in_group(steps, "it was not opened")

    def _ended_in_group(self, steps: GroupSwitchSteps | None, why: str) -> SwitchError:
        """Told to whoever listens. The error, where it is one."""
        if steps is None or steps.result is None:
            return self._failed(why)
        opened = steps.result
        result = SwitchResult(opened.pause_us, 1, opened.source_path, opened.destination_path, {})
        log.info("switched in a group", **asdict(result))
        self._hub.publish(events.SWITCH_COMPLETED, asdict(result))
        return SwitchError(f"the guest goes on, on {opened.source_path}: {why}")
