# SPDX-License-Identifier: Apache-2.0
"""Verification: are the two disks equal, as `steady` promises? The engine compares
(c_shim/mirror/verifier.c); this file starts it, tells of its progress and its end, and remembers the last
result."""

import errno
from collections.abc import Awaitable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import anyio
import structlog

from vhostsync import events
from vhostsync.engine.engine import Engine
from vhostsync.engine.engine_event import EngineEvent, EventKind
from vhostsync.errors import EngineError, MirrorError
from vhostsync.events import EventHub

log = structlog.get_logger(__name__)

UNDER_WAY: Final = "a verification is under way; wait for its end, or end it with verify-cancel"
PROGRESS_S: Final = 1.0


class VerifyState(StrEnum):
    NONE = "none"  # not since the start of the backend
    RUNNING = "running"
    EQUAL = "equal"
    DIFFERENT = "different"
    REPAIRED = "repaired"
    CANCELLED = "cancelled"
    ABORTED = "aborted"  # the mirror did not stay steady


@dataclass(frozen=True)
class VerifyStatus:
    """What `query-verify` shows; bytes. `differing` lists the ranges where the destination was different
    (neighbours are merged where there were too many)."""

    state: str
    bytes_total: int
    bytes_done: int
    bytes_skipped: int
    bytes_differing: int
    bytes_repaired: int
    differing: list[dict[str, int]]


class Listener(Protocol):
    """Who has to know what was found (mirror.py)."""

    def note_verified(self, *, different: bool | None) -> Awaitable[None]: ...


class Verifier:
    """One verification at a time. `report` must run as long as it is used."""

    def __init__(self, engine: Engine, listener: Listener, hub: EventHub) -> None:
        self._engine = engine
        self._listener = listener
        self._hub = hub
        self._state = VerifyState.NONE
        self._repair = False
        self._changed = anyio.Event()
        self._over: int | None = None  # the errno with which it ended, until it was told
        engine.on_event(self._on_event)

    def _on_event(self, event: EngineEvent) -> None:
        if event.kind is EventKind.VERIFIED:
            self._over = event.error
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def start(self, *, repair: bool, speed_bytes_per_s: int) -> None:
        """Begin to compare; with `repair`, what differs is copied again. MirrorError: not steady, or one is
        under way."""
        if self._state is VerifyState.RUNNING:
            raise MirrorError(UNDER_WAY)
        try:
            await self._engine.verify(repair=repair, speed_bytes_per_s=speed_bytes_per_s)
        except EngineError as error:
            if error.errno == errno.EBUSY:  # the last one is over here, and has a question at a disk
                raise MirrorError(UNDER_WAY) from error
            if error.errno != errno.ENOTCONN:
                raise
            raise MirrorError(
                "a verification needs the mirror in the steady state; start it and wait until it is steady"
            ) from error
        self._repair = repair
        self._state = VerifyState.RUNNING
        log.info("verifying", repair=repair)
        self._wake()

    async def cancel(self) -> None:
        """End the one that runs. MirrorError when there is none."""
        try:
            await self._engine.verify_stop()
        except EngineError as error:
            if error.errno != errno.ENOENT:
                raise
            raise MirrorError("no verification is under way") from error

    async def status(self) -> VerifyStatus:
        now = await self._engine.snapshot()
        return VerifyStatus(
            state=str(self._state),
            bytes_total=self._engine.config.capacity_bytes if self._state is not VerifyState.NONE else 0,
            bytes_done=now.verify.bytes_done,
            bytes_skipped=now.verify.bytes_skipped,
            bytes_differing=now.verify.bytes_differing,
            bytes_repaired=now.verify.bytes_repaired,
            differing=[{"offset": offset, "length": length} for offset, length in now.verify.differing],
        )

    async def report(self) -> None:
        """Publish progress, and the end, until cancelled."""
        while True:
            changed = self._changed
            if self._over is not None:
                await self._report_end()
            elif self._state is VerifyState.RUNNING:
                found = await self.status()
                if found.bytes_differing and not self._repair:  # the engine trusts it no more already
                    await self._listener.note_verified(different=True)
                self._hub.publish(events.VERIFY_PROGRESS, _event_data(found))
                with anyio.move_on_after(PROGRESS_S):
                    await changed.wait()
                continue
            await changed.wait()

    async def _report_end(self) -> None:
        error_number, self._over = self._over, None
        found = await self.status()
        if error_number == errno.ECANCELED:
            self._state = VerifyState.CANCELLED
        elif error_number:
            self._state = VerifyState.ABORTED
        elif not found.bytes_differing:
            self._state = VerifyState.EQUAL
        else:  # what was repaired is counted when it was read back
            mended = found.bytes_repaired == found.bytes_differing
            self._state = VerifyState.REPAIRED if self._repair and mended else VerifyState.DIFFERENT
        if self._state in (VerifyState.EQUAL, VerifyState.REPAIRED):  # of the whole disk
            await self._listener.note_verified(different=False)
        elif found.bytes_differing > found.bytes_repaired:  # also where it has not come to the end
            await self._listener.note_verified(different=True)
        else:  # what was found was repaired; of the rest of the disk nothing is known
            await self._listener.note_verified(different=None)
        found = await self.status()
        say = log.error if found.bytes_differing else log.info
        say(
            "verified", result=found.state, bytes_done=found.bytes_done, bytes_skipped=found.bytes_skipped,
            bytes_differing=found.bytes_differing, differing=found.differing,
        )  # fmt: skip
        if found.bytes_differing > found.bytes_repaired:
            log.error(
                "the destination differs: no switch, failover or read goes there",
                until="verify --repair, a verify that finds it equal, or mirror start --full",
            )
        self._hub.publish(events.VERIFY_COMPLETED, _event_data(found))
        self._wake()


def _event_data(status: VerifyStatus) -> dict[str, int | str]:
    return {
        "state": status.state,
        "bytes-done": status.bytes_done,
        "bytes-total": status.bytes_total,
        "bytes-differing": status.bytes_differing,
        "bytes-repaired": status.bytes_repaired,
    }
