# SPDX-License-Identifier: Apache-2.0
"""This disk as a member of a group that a coordinator switches, or takes a snapshot of, step by step:

    prepare    nothing else commands the mirror; the destination is flushed; the record is ready
    close      the guest is held (the gate), and the destination has all that it has written
    carry out  the disks are exchanged, or the destination is flushed: nothing is left that can fail
    open       the guest goes on

The steps are orders of one client of the control socket, and a task of their own obeys them: they need the
mirror's turn and the record's lock from the first to the last. All is as it was when a step fails, when the
client says so or is gone, when the guest would be held for longer than the plan allows, and when the client
does not go on before that. So no coordinator, however it ends, holds a guest for longer than it has said.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, Protocol

import anyio
import anyio.abc
import structlog

from vhostsync.errors import MirrorError, VhostsyncError
from vhostsync.mirror.mirror import Mirror
from vhostsync.mirror.mirror_state import MirrorState
from vhostsync.mirror.mirror_status import Opened, SwitchPlan
from vhostsync.record.names import Member

log = structlog.get_logger(__name__)

IDLE_S: Final = 10.0
"""How long a coordinator may take from one step to the next: others wait for the mirror's turn meanwhile."""
TURN_S: Final = 1.0
"""How long another disk of the group, which holds its flushes, waits for a command of this one."""


class Step(StrEnum):
    PREPARE = "prepare"
    CLOSE = "close"
    CARRY_OUT = "carry-out"
    OPEN = "open"
    TAKE_BACK = "take-back"


_NEXT: Final[Mapping[Step | None, Step]] = MappingProxyType(
    {Step.PREPARE: Step.CLOSE, Step.CLOSE: Step.CARRY_OUT, Step.CARRY_OUT: Step.OPEN}
)


class Steps(Protocol):
    """What the steps of a switch and of a snapshot have in common (group_switch.py, group_snapshot.py).
    `result`: of `open`, also where that was the only way to end; None: all is as it was."""

    result: Opened | None

    async def prepare(self) -> None: ...
    async def close(self) -> bool: ...
    async def carry_out(self) -> None: ...
    async def open(self) -> Any: ...


class _Order:
    """A step that the client waits for."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.result: Any = {}
        self.error: VhostsyncError | None = None
        self._obeyed = anyio.Event()

    def obeyed(self, result: Any = None, error: VhostsyncError | None = None) -> None:
        self.result, self.error = result, error
        self._obeyed.set()

    async def outcome(self) -> Any:
        await self._obeyed.wait()
        if self.error is not None:
            raise self.error
        return self.result


class GroupMember:
    """What one client has begun. `tasks` are the client's: when they are cancelled, all is taken back.
    `is_there`: it can still be answered."""

    def __init__(
        self, mirror: Mirror, tasks: anyio.abc.TaskGroup, is_there: Callable[[], bool] = lambda: True
    ) -> None:
        self._mirror = mirror
        self._tasks = tasks
        self._is_there = is_there
        self._order: _Order | None = None
        self._came = anyio.Event()
        self._done: Step | None = None  # the last step, of an attempt that is under way
        self._gave_up: str | None = None  # why the last attempt ended before the client had ended it
        self._kept: Opened | None = None  # what was done then all the same, for it could not be taken back

    async def prepare_switch(self, *, max_pause_ms: float, keep_mirror: bool) -> None:
        """The first step of a switch. Errors as of `_begin`."""
        plan = SwitchPlan(max_pause_ms, keep_mirror)
        await self._begin(self._mirror.switch_in_steps(plan), max_pause_ms)

    async def prepare_snapshot(self, *, max_pause_ms: float, cut: str | None = None) -> None:
        """The same of a snapshot. `cut`: what all copies of this instant are called."""
        await self._begin(self._mirror.snapshot_in_steps(max_pause_ms, cut), max_pause_ms)

    async def _begin(self, attempt: AbstractAsyncContextManager[Steps], max_pause_ms: float) -> None:
        """MirrorError, EngineError, StateRecordError: nothing has changed."""
        if self._done is not None or self._order is not None:
            raise MirrorError("this connection has begun something already; end that first (group-take-back)")
        self._gave_up = self._kept = None
        self._order = order = _Order(Step.PREPARE)
        self._tasks.start_soon(self._run, attempt, max_pause_ms)
        await order.outcome()

    async def take(self, name: str) -> Any:
        """The next step, of those of enum Step. VhostsyncError: all is as it was, and the attempt is over.
        What could not be taken back is returned, as by `open`."""
        step = Step(name)
        if self._kept is not None and step in (Step.OPEN, Step.TAKE_BACK):
            return self._kept
        if self._gave_up is not None:
            raise MirrorError(f"all was taken back before: {self._gave_up}")
        if self._done is None or step not in (_NEXT.get(self._done), Step.TAKE_BACK):
            done = f"{self._done} is done" if self._done is not None else "nothing was prepared"
            raise MirrorError(f"{step} cannot be the next step: {done} on this connection")
        self._order = order = _Order(step)
        self._came.set()
        return await order.outcome()

    async def cut(self, step: str, group: str | None, record: str | None) -> Mapping[str, Any]:
        """Another disk of the group has lost its destination (group_cut.py). `group`, `record`: for which
        disk it takes this one. MirrorError."""
        meant = None if group is None or record is None else Member(group, record)
        self._mirror.group_cut.check_meant(meant)
        await self._let_command_end()
        if step == "ask":
            await self._mirror.group_cut.check()
            return {}
        if not self._is_there():
            raise MirrorError("who has asked for it is gone")
        return await self._mirror.group_cut.let_go()

    async def _let_command_end(self) -> None:
        """A command that is under way goes before a group that would let go, but for the one by which this
        disk lets go itself. MirrorError: it takes longer than TURN_S."""
        mirror = self._mirror
        with anyio.move_on_after(TURN_S):
            while mirror.state is MirrorState.STEADY and not mirror.turns.is_free:
                await _either(mirror.turns.ended, mirror.changed)
        if mirror.state is MirrorState.STEADY:
            mirror.turns.check_free("letting go with the group")

    async def _run(self, attempt: AbstractAsyncContextManager[Steps], max_pause_ms: float) -> None:
        """Never raises but when cancelled. The last step is answered when all else is over."""
        steps, failure = None, None
        try:
            async with attempt as steps:
                await self._obey(steps, max_pause_ms)
        except VhostsyncError as error:
            failure = error
        done = steps.result if steps is not None else None
        self._done = None
        order, self._order = self._order, None
        if order is None:
            self._gave_up, self._kept = str(failure), done
            disk = self._mirror.source_path
            log.warning("a step of a group did not come", guest_on=disk, reason=self._gave_up)
        elif order.step in (Step.OPEN, Step.TAKE_BACK) and done is not None:
            order.obeyed(done, failure if order.step is Step.OPEN else None)
        else:
            order.obeyed({}, failure if order.step is not Step.TAKE_BACK else None)

    async def _obey(self, steps: Steps, max_pause_ms: float) -> None:
        await steps.prepare()
        self._answer(Step.PREPARE)
        await self._next()
        held = anyio.CancelScope(deadline=anyio.current_time() + max_pause_ms / 1000)
        with held:
            if not await steps.close():
                raise MirrorError(f"what was under way was not over within {max_pause_ms:g} ms")
            self._answer(Step.CLOSE)
            await self._next()
            await steps.carry_out()
            self._answer(Step.CARRY_OUT)
            await self._next(steady=False)
            await steps.open()
            return
        raise MirrorError(f"the guest would have been held for longer than {max_pause_ms:g} ms")

    def _answer(self, step: Step) -> None:
        order, self._order = self._order, None
        self._done, self._came = step, anyio.Event()
        assert order is not None
        order.obeyed({})

    async def _next(self, *, steady: bool = True) -> None:
        """Until the client has ordered the next step. MirrorError: it does not, or has taken all back; or
        (while the mirror has to be `steady`) the destination is lost, and its record waits for our lock."""
        with anyio.move_on_after(IDLE_S):
            while self._order is None:
                if steady and self._mirror.state is not MirrorState.STEADY:
                    raise MirrorError("the mirror did not stay steady meanwhile (`status` says why)")
                await _either(self._came, self._mirror.changed)
        if self._order is None:
            raise MirrorError(f"the coordinator did not go on within {IDLE_S:g} s")
        if self._order.step is Step.TAKE_BACK:
            raise MirrorError("the coordinator has taken it back")


async def _either(one: anyio.Event, other: anyio.Event) -> None:
    async def wait_for(event: anyio.Event) -> None:
        await event.wait()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_for, one)
        tasks.start_soon(wait_for, other)
