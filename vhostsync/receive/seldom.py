# SPDX-License-Identifier: Apache-2.0
"""What strangers can make a process say again and again: whoever reaches a port can fail there as often as he
likes, and the log is not to be his."""

import time
from collections.abc import Callable
from typing import Any, Final

LINES: Final = 10
PERIOD_S: Final = 60.0


class Seldom:
    """Says LINES lines a period, and of what came beyond that how much it was: when the next period's first
    line comes, or at the `end`."""

    def __init__(self, say: Callable[..., Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._began: float | None = None
        self._lines = 0
        self._event = ""

    def __call__(self, event: str, **words: Any) -> None:
        now = self._clock()
        if self._began is None or now - self._began >= PERIOD_S:
            self.end()
            self._began, self._lines = now, 0
        self._lines += 1
        if self._lines <= LINES:
            self._event = event
            self._say(event, **words)

    def end(self) -> None:
        """Nothing more comes."""
        if self._lines > LINES:
            self._say(self._event, more_than_were_shown=self._lines - LINES, within_s=PERIOD_S)
        self._lines = 0
