# SPDX-License-Identifier: Apache-2.0
"""The control plane's part when a steady source fails (`--on-source-error switch`).

The engine keeps back what the source has failed, takes up nothing more, and reports it
(c_shim/guest/source_failover.c). The guest waits. So the switch is made at once: no flush of either disk
comes first, for what the guest has flushed is on both; the state record is durable before the exchange, as
in every switch. Whatever goes wrong, the engine is told to give up in the end, and the guest gets the
source's error.
"""

from typing import Final, Protocol

import anyio
import anyio.to_thread
import structlog

from vhostsync import events
from vhostsync.engine.engine import Engine
from vhostsync.engine.engine_event import EngineEvent, EventKind
from vhostsync.errors import EngineError, VhostsyncError
from vhostsync.events import EventHub
from vhostsync.host import patience
from vhostsync.mirror.mirror_status import SwitchResult

log = structlog.get_logger(__name__)

FAILURES_KEPT: Final = 1


class Device(Protocol):
    """What is needed of the mirror (mirror.py)."""

    @property
    def source_path(self) -> object: ...
    async def leave_source(self, deadline_s: float) -> SwitchResult | None: ...


class SourceFailover:
    """`run` must run as long as the engine may report a failed source."""

    def __init__(self, engine: Engine, mirror: Device, hub: EventHub, deadline_s: float) -> None:
        self._engine = engine
        self._mirror = mirror
        self._hub = hub
        self._deadline_s = deadline_s
        self._send, self._receive = anyio.create_memory_object_stream[EngineEvent](FAILURES_KEPT)
        engine.on_event(self._on_event)

    def _on_event(self, event: EngineEvent) -> None:
        if event.kind is EventKind.SOURCE_FAILED:
            # The engine reports the next one only when this one is over.
            self._send.send_nowait(event)
        elif event.kind is EventKind.READ_FALLBACK:
            log.warning(
                "a read that the source failed was answered by the destination; more are counted only",
                offset=event.offset,
                length=event.length,
            )

    async def run(self) -> None:
        async with self._send, self._receive:
            async for event in self._receive:
                await self._leave_source(event)

    async def _leave_source(self, event: EngineEvent) -> None:
        former = str(self._mirror.source_path)
        error = str(EngineError.from_errno(f"{event.op} of {former} at byte {event.offset}", event.error))
        log.warning("the source has failed: switching to the destination", error=error)
        result, reason = None, None
        try:
            with patience.fail_after(self._deadline_s):
                result = await self._mirror.leave_source(self._deadline_s)
        except TimeoutError:
            reason = f"the destination was not up to date within {self._deadline_s:g} s"
        except VhostsyncError as failure:
            reason = str(failure)
        finally:
            with anyio.CancelScope(shield=True):
                await self._engine.failover_give_up()  # nothing, after an exchange
        if result is not None:
            log.warning("the guest has left its failed source", former=former, source=result.source_path)
        elif reason is not None:
            log.error("the source's error is the guest's", reason=reason)
        self._hub.publish(
            events.SOURCE_FAILOVER,
            {
                "former": former,
                "source": str(self._mirror.source_path),
                "switched": str(self._mirror.source_path) != former,
                "error": error,
                "reason": reason,
                "pause-us": result.pause_us if result is not None else None,
            },
        )
