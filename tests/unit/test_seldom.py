# SPDX-License-Identifier: Apache-2.0
"""Lines that strangers cause: few a period, and none of them uncounted."""

from __future__ import annotations

from typing import Any

from vhostsync.receive.seldom import LINES, PERIOD_S, Seldom


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.now_s = 100.0

    def say(self, event: str, **words: Any) -> None:
        self.lines.append((event, words))


def test_so_many_lines_a_period_and_then_their_number() -> None:
    log = Log()
    seldom = Seldom(log.say, lambda: log.now_s)
    for number in range(LINES + 25):
        seldom("refused", number=number)
    assert log.lines == [("refused", {"number": number}) for number in range(LINES)]
    log.now_s += PERIOD_S
    seldom("refused", number=99)
    assert log.lines[LINES:] == [
        ("refused", {"more_than_were_shown": 25, "within_s": PERIOD_S}),
        ("refused", {"number": 99}),
    ]
    seldom.end()
    assert len(log.lines) == LINES + 2, "there was nothing that had not been shown"


def test_the_end_tells_of_the_rest() -> None:
    log = Log()
    seldom = Seldom(log.say, lambda: log.now_s)
    for _ in range(LINES + 1):
        seldom("refused")
    seldom.end()
    seldom.end()
    assert [words for _, words in log.lines[LINES:]] == [{"more_than_were_shown": 1, "within_s": PERIOD_S}]
