# SPDX-License-Identifier: Apache-2.0
"""One attempt at a switch, in four steps: prepare, close, exchange, settle; or all as it was.

Whoever switches one disk takes them one after the other (`take_all`). A coordinator of several disks takes
each step on all of them before the next one, and has steps of its own for the exchange (group_switch.py).

The record names the new disk before the first request goes there (state_file.py says how, without a wait for
the record's disk). From the closed gate to the open one the guest is held, and nothing may be cut off.
"""

import errno
from typing import Final

import anyio

from vhostsync.engine.engine import Engine
from vhostsync.errors import EngineError
from vhostsync.mirror.bad_ranges import BadRanges
from vhostsync.mirror.mirror_status import Switched, SwitchPlan
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.record.record_store import Prepared

GATE_NOT_CLOSED: Final = (errno.ETIMEDOUT, errno.EAGAIN)  # it took too long, or another drain is needed


async def close_gate(engine: Engine, allowed_us: int) -> bool:
    """False: it could not be closed in the pause that is allowed, and is open (so it is when this raises or
    is cancelled). EngineError."""
    try:
        await engine.gate(allowed_us)
    except EngineError as error:
        if error.errno not in GATE_NOT_CLOSED:
            raise
        return False
    except BaseException:
        # A gate that nobody opens would hold the guest for ever.
        with anyio.CancelScope(shield=True):
            await engine.ungate()
        raise
    return True


class SwitchSteps:
    """To be used with the turn of the mirror and the lock of the record, from before `prepare` to after the
    last step that is taken. After an error, too, `take_back`."""

    def __init__(self, engine: Engine, keeper: RecordKeeper, plan: SwitchPlan) -> None:
        self._engine = engine
        self._keeper = keeper
        self._plan = plan
        self._prepared: Prepared | None = None  # None: there is no store
        self._closed = False
        self._renamed = False  # there is no mark, and what is announced was made to hold (perhaps)
        self._switched: Switched | None = None

    async def prepare(self) -> None:
        """Promises: the switch is announced, durably. After a power cut from here on the new disk is the
        current one, which holds all that was flushed; after a kill the old one. The guest notices nothing.
        Undone by `take_back`: the former record is written again. StateRecordError."""
        self._prepared = await self._keeper.prepare_switch(
            self._keeper.switched(keep_mirror=self._plan.keep_mirror)
        )

    async def close(self, *, and_exchange: bool = False) -> bool:
        """Promises: no request of the guest is taken up, all that were have been answered, and the
        destination holds what they have written. False: that could not be reached in the pause that is
        allowed, and the guest goes on (so it does when this raises or is cancelled). Undone by `take_back`.
        EngineError.

        `and_exchange`: this is the guest's only disk, and where nothing has to be done while it is held, the
        engine exchanges the disks at once; `exchange` finds it done."""
        with_a_mark = self._prepared is None or self._prepared.mark is not None
        if and_exchange and with_a_mark and not self._plan.accept_unreadable:
            return await self._close_and_exchange()
        self._closed = await close_gate(self._engine, self._pause_us)
        return self._closed

    async def _close_and_exchange(self) -> bool:
        """While the guest is held, nothing is done here, and no disk waited for."""
        mark = self._prepared.mark if self._prepared is not None else None
        try:
            pause_ns = await self._engine.gate_and_exchange(
                self._pause_us, mark, keep_mirror=self._plan.keep_mirror,
                accept_different=self._plan.accept_different,
            )  # fmt: skip
        except EngineError as error:
            with anyio.CancelScope(shield=True):
                await self._engine.ungate()
            if error.errno not in GATE_NOT_CLOSED:
                raise
            return False
        self._switched = Switched(pause_ns, BadRanges())
        return True

    async def exchange(self) -> Switched:
        """Promises: the record, then the disks: the guest goes on, on the new one, and a restart serves that
        and refuses the old one. Not cut off. Not undone but by another switch. An error has undone nothing:
        the guest is still held, until `take_back`. StateRecordError, EngineError."""
        if self._switched is None:
            assert self._closed
            with anyio.CancelScope(shield=True):
                self._switched = await self._exchange_with_the_gate_closed()
            self._closed = False
        assert self._switched is not None
        return self._switched

    async def _exchange_with_the_gate_closed(self) -> Switched:
        """Where it has to be known what is accepted, the record has no memory for a mark, or other disks are
        exchanged as well."""
        plan, accepted = self._plan, BadRanges()
        if plan.accept_unreadable:
            accepted = BadRanges.of(await self._engine.snapshot())
        if self._prepared is not None:
            self._renamed = True
            await self._keeper.change_to(self._prepared)
        pause_ns = await self._engine.exchange(
            keep_mirror=plan.keep_mirror, accept_unreadable=plan.accept_unreadable,
            accept_different=plan.accept_different,
        )  # fmt: skip
        return Switched(pause_ns, accepted)

    async def settle(self) -> None:
        """Promises: the record needs neither the announcement nor the mark any more. The guest runs, and
        waits for none of this; what fails is logged, for what was announced names the same disk. Not
        undone."""
        assert self._switched is not None
        await self._keeper.settle_switch(self._prepared)

    async def take_back(self) -> None:
        """Undoes what was done, as each step says; nothing after the exchange, so it may stand in a finally.
        The guest goes on first, for the record's disk may hang: what is announced and not marked means the
        former disk in this boot. Where the record was renamed instead, it is put back first: what the guest
        writes from here on goes to the disk that it is to name again."""
        if self._switched is not None:
            return
        with anyio.CancelScope(shield=True):
            try:
                if not self._renamed:
                    await self._open_gate()
            finally:
                try:
                    await self._keeper.take_back(self._prepared)
                finally:
                    await self._open_gate()

    async def _open_gate(self) -> None:
        if self._closed:
            self._closed = False
            await self._engine.ungate()

    @property
    def _pause_us(self) -> int:
        return int(self._plan.max_pause_ms * 1000)


async def take_all(steps: SwitchSteps) -> Switched | None:
    """Of one disk. None: the gate could not be closed in time."""
    await steps.prepare()
    if not await steps.close(and_exchange=True):
        return None
    switched = await steps.exchange()
    await steps.settle()
    return switched
