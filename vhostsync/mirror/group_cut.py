# SPDX-License-Identifier: Apache-2.0
"""`--group-freeze`: before the first flush is confirmed without this disk's destination, the destinations of
all disks of the group are let go of, and then they are what a power cut at one instant would have left.

Who has lost its destination confirms no flush until the record says so (record_keeper.py). Before that is
written it asks the backends of all other disks:

    ask       whether each could let go: all are steady, or have just let go as well
    let go    each leaves its destination, and confirms no flush from here on either

Each that has let go has lost its destination, so it asks all others likewise. Each loss has a name of its
own, which is the answer to "let go", and the cut is called by the names of all of them. So who records the
same cut speaks of the same losses, and has been told of each that it had happened.

Why that is one instant, if all records have the same cut: when the first of them was written, all
destinations had been let go of, and no flush was confirmed since that is not on its destination. Whatever the
guest has written after a confirmed flush, and is on a destination, it has written before that one was let go
of, so before this moment; so that flush is on its own destination.

The mirrors are ended by it, as by a snapshot: what was cut stays so until somebody starts them. Where it
cannot be told that all have let go (one is not steady, differs, does not answer, or ends, in CUT_S), the
record has no cut, and this disk goes on as one whose destination was lost.
"""

import errno
import hashlib
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Literal, Protocol

import anyio
import structlog

from vhostsync.engine.engine import Engine
from vhostsync.errors import ControlError, EngineError, MirrorError, VhostsyncError
from vhostsync.record.names import Member

log = structlog.get_logger(__name__)

CUT_S: Final = 5.0
"""So long flushes wait for the others."""
DIFFERED: Final = (
    "its destination was no copy of the guest's disk when it was lost: it lacks what could not be read or "
    "written there, or a verification has found that it differs"
)

CutStep = Literal["ask", "let-go"]


class Other(Protocol):
    """Another disk's backend, which is told for which disk it is taken. VhostsyncError."""

    async def cut(self, step: CutStep) -> Any: ...


class Others(Protocol):
    """All other disks of the group, by name. VhostsyncError: one of them cannot be reached."""

    def connected(self) -> AbstractAsyncContextManager[Mapping[str, Other]]: ...


class Loss:
    """Of this disk's destination. `differed`: that was no copy, so it can be no part of a cut."""

    def __init__(self, *, differed: bool) -> None:
        self.name = secrets.token_hex(8)
        self.differed = differed
        self.held = not differed  # no flush was confirmed since, and it may be part of a cut
        self.cut: str | None = None

    def answer(self) -> dict[str, str | None]:
        return {"loss": self.name, "cut": self.cut}


class GroupCut:
    """This disk's part. It takes part in nothing before `join`. `why_no_copy`: of a destination that is
    steady; `recorded`: the cut that is in the record."""

    def __init__(
        self,
        engine: Engine,
        steady: Callable[[], bool],
        why_no_copy: Callable[[], Awaitable[str | None]],
        recorded: Callable[[], str | None],
        failed: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._steady = steady
        self._why_no_copy = why_no_copy
        self._recorded = recorded
        self._failed = failed
        self._own: Member | None = None
        self._others: Others | None = None
        self._loss: Loss | None = None  # the last one of this run
        self._undecided: deque[Loss] = deque()  # in the order in which they are recorded
        self.asks = False  # the other disks; a loss is recorded once they have answered

    def join(self, own: Member, others: Others) -> None:
        self._own, self._others = own, others

    def part(self) -> None:
        """This backend ends: nobody could ask it any more, so no cut would have all."""
        self._others = None

    @property
    def joined(self) -> bool:
        return self._others is not None

    # ---- a destination of this disk is lost ------------------------------------------------

    def note_lost(self, *, differed: bool) -> None:
        """The engine holds flushes from here on, until the record is written."""
        self._loss = Loss(differed=differed)
        self._undecided.append(self._loss)

    async def decide(self) -> Loss:
        """The loss that is to be recorded next, with the name of the cut that it is part of; without one,
        there is none."""
        loss = self._undecided.popleft()
        if self._others is not None:
            self.asks = True
            loss.cut = await self._cut(loss, self._others)
            self.asks = False
        loss.held = loss.cut is not None
        return loss

    async def _cut(self, loss: Loss, others: Others) -> str | None:
        why = f"not all disks of the group have answered within {CUT_S:g} s"
        with anyio.move_on_after(CUT_S):
            try:
                if loss.differed:
                    raise MirrorError(DIFFERED)
                async with others.connected() as there:
                    await _all(there, "ask")
                    cut = _name_of(loss, await _all(there, "let-go"))
                log.info("all destinations of the group were let go of at one instant", cut=cut)
                return cut
            except VhostsyncError as error:
                why = str(error)
            except Exception as error:
                # The guest waits for the record that comes after this.
                log.exception("a group could not be asked, for a reason that nobody foresaw")
                why = repr(error)
        log.warning("the destinations of the group are no consistent set", reason=why)
        self._failed(f"the destinations of the group are no consistent set: {why}")
        return None

    # ---- what another disk asks of this one ------------------------------------------------

    def check_meant(self, meant: Member | None) -> None:
        """MirrorError where whoever asks takes this disk for another one: two state directories may have one
        runtime directory, and there is one place in it for each name. None: it does not say."""
        self._check_joined()
        if meant is None:
            raise MirrorError(
                "the backend that asks does not say which disk it means, as older versions do; bring all "
                "backends of the group to one version (vhostsync upgrade)"
            )
        if meant != self._own:
            raise MirrorError(
                f"its backend serves {self._own}, and not {meant}; give each state directory a runtime "
                f"directory of its own (VHOSTSYNC_RUNTIME_DIRECTORY), or start the backend again where the "
                f"disk was given its name anew"
            )

    async def check(self) -> None:
        """MirrorError where this disk's destination can be no part of a cut now."""
        self._check_joined()
        if not self._steady():
            self._part()
        elif (why := await self._why_no_copy()) is not None:
            raise MirrorError(why)

    async def let_go(self) -> dict[str, str | None]:
        """No flush is confirmed from here on that is not on the destination, until this loss is recorded,
        which is answered. MirrorError, EngineError."""
        self._check_joined()
        if self._steady():
            await self.leave()
        return self._part().answer()

    async def leave(self) -> None:
        """As if the destination, which is steady, were lost. EngineError: nothing was changed."""
        try:
            await self._engine.mirror_leave()
        except EngineError as error:
            if error.errno != errno.ENOTCONN:  # else it is lost at this very moment
                raise

    def _check_joined(self) -> None:
        if self._others is None:
            raise MirrorError("its backend is not started with --group-freeze, or ends")

    def _part(self) -> Loss:
        """The last loss, if it may be part of a cut. MirrorError."""
        loss = self._loss
        if loss is not None and (loss.held or (loss.cut is not None and loss.cut == self._recorded())):
            return loss
        raise MirrorError(DIFFERED if loss is not None and loss.differed else "its mirror is not steady")


def _name_of(own: Loss, answers: Iterable[Any]) -> str:
    """That of the cut. ControlError where others have recorded another one: they go on since."""
    losses, recorded = {own.name}, set()
    for answer in answers:
        if not isinstance(answer, Mapping) or not isinstance(answer.get("loss"), str):
            raise ControlError(f"a disk of the group has answered {answer!r}, which names no loss")
        losses.add(answer["loss"])
        recorded.add(answer.get("cut"))
    cut = hashlib.sha256(",".join(sorted(losses)).encode()).hexdigest()[:16]
    if recorded - {None, cut}:
        raise ControlError("some disks of the group have let go at another instant")
    return cut


async def _all(others: Mapping[str, Other], step: CutStep) -> list[Any]:
    """What each has answered, all asked at once. ControlError: the first that says no."""
    answers: list[Any] = []
    failures: list[ControlError] = []

    async def ask(name: str, other: Other) -> None:
        try:
            answers.append(await other.cut(step))
        except VhostsyncError as error:
            failures.append(ControlError(f"{name}: {error}"))

    async with anyio.create_task_group() as tasks:
        for each in others.items():
            tasks.start_soon(ask, *each)
    if failures:
        raise failures[0]
    return answers
