# SPDX-License-Identifier: Apache-2.0
"""What the guest of a device may do, and how that is changed while it runs.

A change holds until the process ends. The options of `serve` say what holds from a start on; a limit that was
kept elsewhere, too, would hold where nobody looks for it."""

from collections.abc import Mapping

import structlog

from vhostsync.engine.engine import Engine
from vhostsync.errors import EngineError
from vhostsync.limits import Limits

log = structlog.get_logger(__name__)


class DeviceLimits:
    def __init__(self, engine: Engine, at_start: Limits) -> None:
        self._engine = engine
        self.now = at_start

    async def change(self, given: Mapping[str, int | None]) -> None:
        """See Limits.changed. ConfigError, EngineError: nothing has changed."""
        before, self.now = self.now, self.now.changed(given)
        # Two changes at once: the second goes on from what the first will have set, and the engine has both
        # in that order. It refuses one before anything is awaited, or never.
        try:
            await self._engine.limit(self.now)
        except EngineError:
            self.now = before
            raise
        log.info("the guest's limits are changed, until this process ends", limits=self.now.words())
