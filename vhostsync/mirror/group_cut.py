# SPDX-License-Identifier: Apache-2.0
"""`--group-freeze`: before the first flush is confirmed without this disk's destination, the destinations of
all disks of the group are let go of, and then they are what a power cut at one instant would have left.

Who has lost its destination confirms no flush until the record is written (record_keeper.py), and writes it
after this:

    ask       whether each of the others could: all are steady, or let go of theirs as well just now
    let go    each of them leaves its destination, and confirms no flush from here on either
    go on     all have: each records the name of the cut, and then flushes go on without destinations

Why that is one instant: until all have let go, no flush is confirmed that is not on its destination. Whatever
the guest has written after a confirmed flush, and is on a destination, it has written before that one was let
go of; so the flush was confirmed before all were, and is on its own destination.

The mirrors are ended by it, as by a snapshot: what was cut stays so until somebody starts them. Where it
cannot be told that all have let go (one is not steady, does not answer, or ends, in CUT_S), nobody records a
cut, and each goes on as one whose destination was lost: flushes wait no longer than that.

Several may lose their destinations at once. Each that has, asks all others, so each knows of all, and the
smallest name is that of all.
"""

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Final, Literal, Protocol

import anyio
import structlog

from vhostsync.engine.engine import Engine
from vhostsync.engine.engine_event import Reason
from vhostsync.errors import EngineError, MirrorError, VhostsyncError

log = structlog.get_logger(__name__)

CUT_S: Final = 5.0
"""So long the flushes of who asks wait for the others."""
FOLLOW_S: Final = 2 * CUT_S
"""So long the flushes of the others wait for who asked, and for its record."""
BEGUN_S: Final = 1.0

CutStep = Literal["ask", "let-go", "go-on"]


class Other(Protocol):
    """A connection to another disk's backend (control/client.py). VhostsyncError."""

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any: ...


class Others(Protocol):
    """All other disks of the group. VhostsyncError: one of them cannot be reached."""

    def connected(self) -> AbstractAsyncContextManager[Sequence[Other]]: ...


class Cut:
    """One that this disk takes part in. `name`: of the cut, once all have let go; None: there is none."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.ends = AsyncExitStack()  # of the conversations with the others

    async def give_up(self) -> None:
        self.name = None
        await self.ends.aclose()


class _Followed:
    """Somebody else's cut. It is one as soon as one of those who have asked for it says so, and none once all
    of them are gone."""

    def __init__(self, name: str) -> None:
        self.first = name
        self.name: str | None = None
        self.settled = anyio.Event()
        self._asking = 0

    def settle(self, name: str | None) -> None:
        if not self.settled.is_set():
            self.name = name
            self.settled.set()

    def asked(self) -> None:
        self._asking += 1

    def left(self) -> None:
        self._asking -= 1
        if self._asking == 0:
            self.settle(None)


class GroupCut:
    """This disk's part. Nobody asks before `join`."""

    def __init__(
        self, engine: Engine, recorded: Callable[[], str | None], steady: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._recorded = recorded
        self._steady = steady
        self._others: Others | None = None
        self._lost = 0  # destinations that were, and are not recorded yet
        self._own: str | None = None  # the name that this disk has for its cut
        self._own_begun = anyio.Event()
        self._followed: _Followed | None = None
        self._ended: frozenset[str] = frozenset()  # all names of the last cut, which is in the record

    def join(self, others: Others) -> None:
        self._others = others

    @property
    def joined(self) -> bool:
        return self._others is not None

    def note_lost(self) -> None:
        """The engine has lost the destination, and holds flushes until `recording` is over."""
        self._lost += 1

    @asynccontextmanager
    async def recording(self, reason: int) -> AsyncIterator[Cut]:
        """The loss is recorded inside, with the cut that there is by then. At the end the others are told, if
        it was not given up."""
        cut = Cut()
        others: Sequence[Other] = ()
        async with cut.ends:
            try:
                if self._followed is not None and reason == Reason.GROUP:
                    cut.name = await self._follow(self._followed)
                elif self._others is not None:
                    others = await self._cut_all(self._others, cut)
                yield cut
            finally:
                self._lost -= 1
                self._own = self._followed = None
                self._own_begun = anyio.Event()
            if cut.name is not None:
                await self._tell(others, cut.name)

    async def _cut_all(self, others: Others, cut: Cut) -> Sequence[Other]:
        """With `cut.name`, if all have let go."""
        self._own = own = secrets.token_hex(8)
        self._own_begun.set()
        reason = f"not all have answered within {CUT_S:g} s"
        with anyio.move_on_after(CUT_S):
            try:
                there = await cut.ends.enter_async_context(others.connected())
                await _all(there, "ask", own)
                answers = await _all(there, "let-go", own)
                self._ended = frozenset((own, *(str(answer["cut"]) for answer in answers)))
                cut.name = min(self._ended)
                log.info("all destinations of the group were let go of at one instant", cut=cut.name)
                return there
            except VhostsyncError as error:
                reason = str(error)
        log.warning("the destinations of the group are no consistent set", reason=reason)
        await cut.give_up()
        return ()

    async def _tell(self, others: Sequence[Other], name: str) -> None:
        with anyio.move_on_after(CUT_S):
            try:
                await _all(others, "go-on", name)
            except VhostsyncError as error:
                log.warning("a disk of the group may not have recorded the cut", reason=str(error))

    async def _follow(self, followed: _Followed) -> str | None:
        with anyio.move_on_after(FOLLOW_S):
            await followed.settled.wait()
        followed.settle(None)
        self._ended = frozenset(() if followed.name is None else (followed.name, followed.first))
        if followed.name is None:
            log.warning("the destinations of the group are no consistent set", reason="nobody says they are")
        return followed.name

    # ---- what another disk asks of this one ------------------------------------------------

    def check(self, name: str) -> None:
        """MirrorError where this disk's destination can be no part of a cut of this name."""
        if self._others is None:
            raise MirrorError("this backend is not started with --group-freeze")
        if not (self._steady() or self._lost or self._has_ended(name)):
            raise MirrorError("its mirror is not steady")

    def _has_ended(self, name: str) -> bool:
        """Who asks has answered this disk already, or another one that this disk has followed."""
        return name in self._ended and self._recorded() in self._ended

    async def let_go(self, name: str, tasks: anyio.abc.TaskGroup) -> str:
        """No flush is confirmed from here on that is not on the destination, until `go_on`, or who asked is
        gone (`tasks` are its). The name of the cut as this disk has it. MirrorError."""
        self.check(name)
        if self._lost and self._followed is None and self._own is None:
            with anyio.move_on_after(BEGUN_S):
                await self._own_begun.wait()
        if self._own is not None:
            return self._own
        if self._followed is None:
            if not self._steady() and self._has_ended(name):
                return str(self._recorded())
            if (own := await self._leave(name)) is not None:
                return own
        followed = self._followed
        assert followed is not None
        followed.asked()
        tasks.start_soon(self._attend, followed)
        return followed.first

    async def _leave(self, name: str) -> str | None:
        """The name of this disk's own cut, if its destination was lost at this very moment. MirrorError."""
        self._followed = followed = _Followed(name)
        try:
            await self._engine.mirror_leave()
        except EngineError as error:
            followed.settle(None)
            if self._followed is followed:
                self._followed = None
            with anyio.move_on_after(BEGUN_S):
                await self._own_begun.wait()
            if self._own is None:
                raise MirrorError("its mirror is not steady") from error
            return self._own
        return None

    async def _attend(self, followed: _Followed) -> None:
        try:
            await followed.settled.wait()
        finally:
            followed.left()

    def go_on(self, name: str) -> None:
        """All have let go."""
        if self._followed is not None:
            self._followed.settle(name)


async def _all(others: Sequence[Other], step: CutStep, name: str) -> list[Any]:
    """What each has answered, all asked at once. VhostsyncError: the first that says no."""
    answers: list[Any] = [None] * len(others)
    failures: list[VhostsyncError] = []

    async def ask(at: int) -> None:
        try:
            answers[at] = await others[at].execute("group-cut", {"step": step, "cut": name})
        except VhostsyncError as error:
            failures.append(error)

    async with anyio.create_task_group() as tasks:
        for at in range(len(others)):
            tasks.start_soon(ask, at)
    if failures:
        raise failures[0]
    return answers
