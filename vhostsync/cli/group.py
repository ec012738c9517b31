# SPDX-License-Identifier: Apache-2.0
"""The coordinator of several disks: their guest is moved to all destinations, or all destinations are let go
as copies of one instant; all or none.

Each step is taken on all backends before the next one (group_commands.py):

    prepare     one backend after the other, always in the same order: of two coordinators one is refused
    close       every gate: nobody writes
    carry out   all that can fail; undone on all where it fails on one
    open        the guest goes on

Each backend opens its gate by itself, and takes back what it has done, when its connection ends or the pause
is used up. So whether to open is decided here while there is time left of that: afterwards only a backend,
or this process, that ends in that very moment can leave some disks with what was done and others without.
It keeps no state: the backends and their records have it.
"""

import secrets
import shlex
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import anyio

from vhostsync.control.client import ControlClient, connect
from vhostsync.control.found_socket import Control
from vhostsync.errors import ControlError, UnreachableError

Action = Literal["switch", "snapshot"]

RETRY_S: Final = 0.05
LAST_CALL: Final = 0.75
"""Of the pause: later than that nothing is opened."""
OPEN_S: Final = 60.0
"""An answer takes as long as the record's disk, and the former destination's last request."""
LATE_S: Final = 5.0
"""So long after the pause, or the deadline, a backend has answered, or has been stopped itself."""


@dataclass(frozen=True)
class Plan:
    """`max_pause_s`: of one attempt."""

    action: Action
    max_pause_s: float
    deadline_s: float
    keep_mirror: bool = False


class GroupError(ControlError):
    """All is as it was, unless the sentence says otherwise."""


class LateError(GroupError):
    """The deadline has passed."""


class SilentError(ControlError):
    """It has not answered a step. Its connection is of no use any more: what it takes at last, it takes back
    when that is closed."""


@dataclass
class Member:
    """One backend."""

    control: Control
    client: ControlClient
    result: Any = None
    error: ControlError | None = None

    async def step(self, name: str, arguments: dict[str, Any] | None = None) -> None:
        self.result, self.error = None, SilentError("it does not answer")
        try:
            self.result, self.error = await self.client.execute(f"group-{name}", arguments), None
        except ControlError as error:
            self.error = error


@dataclass(frozen=True)
class Done:
    """`pause_us`: from the closing of the first gate to the opening of the last."""

    pause_us: int
    attempts: int
    members: list[Member] = field(default_factory=list)


async def coordinate(controls: Sequence[Control], plan: Plan) -> Done:
    """GroupError, UnreachableError."""
    until_s = time.monotonic() + plan.deadline_s
    in_order = _each_once(controls)
    async with AsyncExitStack() as stack:
        members = [Member(each, await stack.enter_async_context(connect(each))) for each in in_order]
        attempts = 0
        while True:
            attempts += 1
            await _prepare(members, plan, until_s)
            if await _attempt(members, plan):
                return Done(_pause_us(members), attempts, members)
            why = _complaints(members) or "the pause that is allowed was nearly used up"
            await _take_back(members, plan)
            wait_s = RETRY_S * attempts
            if time.monotonic() + wait_s >= until_s:
                raise _late(plan, why)
            await anyio.sleep(wait_s)


def _each_once(controls: Sequence[Control]) -> list[Control]:
    """Always in the same order."""
    places = {Path(each).resolve(): each for each in controls}
    return [places[place] for place in sorted(places)]


def _late(plan: Plan, why: str) -> LateError:
    return LateError(
        f"It was not done within {plan.deadline_s:g} s, and all is as it was; the last try: {why}"
    )


async def _prepare(members: list[Member], plan: Plan, until_s: float) -> None:
    arguments: dict[str, Any] = {"action": plan.action, "max-pause-ms": round(plan.max_pause_s * 1000)}
    if plan.action == "switch":
        arguments["keep-mirror"] = plan.keep_mirror
    else:
        arguments["cut"] = secrets.token_hex(8)
    for count, member in enumerate(members):
        with anyio.move_on_after(max(until_s - time.monotonic(), 0) + LATE_S):
            await member.step("prepare", arguments)
        if member.error is not None:
            why, in_time = _complaints(members), not isinstance(member.error, SilentError)
            await _take_back(members[:count], plan)
            raise GroupError(f"All is as it was: {why}") if in_time else _late(plan, why)


async def _attempt(members: list[Member], plan: Plan) -> bool:
    """False: it was not to be, and not all is taken back yet."""
    began_s = time.monotonic()
    patience_s = plan.max_pause_s + LATE_S
    if not await _all(members, "close", patience_s) or not await _all(members, "carry-out", patience_s):
        return False
    if time.monotonic() - began_s > LAST_CALL * plan.max_pause_s:
        return False
    with anyio.CancelScope(shield=True):
        if await _all(members, "open", OPEN_S):
            return True
    raise GroupError(_split(members, plan))


async def _all(members: Sequence[Member], step: str, patience_s: float) -> bool:
    """On all at once; whether it was done on all."""
    with anyio.move_on_after(patience_s):
        async with anyio.create_task_group() as tasks:
            for member in members:
                tasks.start_soon(member.step, step)
    return all(member.error is None for member in members)


async def _take_back(members: Sequence[Member], plan: Plan) -> None:
    """Those that have done so by themselves say no. GroupError: one does not answer, or could not take it
    back; or it is gone, and its restart serves what its record names."""
    silent = [member for member in members if isinstance(member.error, SilentError)]
    with anyio.CancelScope(shield=True):
        await _all([member for member in members if member not in silent], "take-back", OPEN_S)
    if any(member.result for member in members):
        raise GroupError(_split(members, plan))
    for member in members:
        if isinstance(member.error, UnreachableError):
            raise GroupError(f"All is as it was, but a backend has ended meanwhile: {member.error}")
        if isinstance(member.error, SilentError):
            raise GroupError(
                f"All is as it was, or will be once {member.control} goes on: it does not answer"
            )


def _pause_us(members: Sequence[Member]) -> int:
    opened_us: list[int] = [member.result["opened-ns"] // 1000 for member in members]
    pauses_us: list[int] = [member.result["pause-us"] for member in members]
    closed_us = [opened - pause for opened, pause in zip(opened_us, pauses_us, strict=True)]
    return max(opened_us) - min(closed_us)


def _complaints(members: Sequence[Member]) -> str:
    return "; ".join(f"{member.control}: {member.error}" for member in members if member.error is not None)


def _split(members: Sequence[Member], plan: Plan) -> str:
    """What is left to do."""
    done = [str(member.control) for member in members if member.result]
    left = [member for member in members if not member.result]
    for member in left:
        member.error = member.error or ControlError("it is as it was")
    again = shlex.join(word for member in left for word in ("--control", str(member.control)))
    rest = f"do the rest: vhostsync switch {again}"
    if plan.action == "snapshot":
        rest = "where it was done, mirror again (mirror start), and take another one of all"
    return (
        f"The {plan.action} is done on {', '.join(done) or 'none of them'}, and not on all: "
        f"{_complaints(left)}; see `vhostsync status` of each, and {rest}"
    )
