# SPDX-License-Identifier: Apache-2.0
"""How a disk that a state record knows is found today: there, missing, another one, failing."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Condition(StrEnum):
    THERE = "there"
    UNSURE = "unsure"  # at its path is a disk of which nobody can tell whether it is the one
    OTHER = "other"  # at its path is certainly another one
    MISSING = "missing"
    FAILING = "failing"  # it is there and does not answer, or not in time


IN_WORDS: Final = {
    Condition.THERE: "there",
    Condition.UNSURE: "perhaps there: the disk at that path cannot be told from a copy of it",
    Condition.OTHER: "not there: at that path is another disk",
    Condition.MISSING: "not there",
    Condition.FAILING: "does not answer",
}


@dataclass(frozen=True)
class Look:
    """What was found at the path of a disk. `reason`: of a failure. `users`: who has it, in words."""

    condition: Condition
    reason: str | None = None
    users: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        return self.condition in (Condition.THERE, Condition.UNSURE)

    def in_words(self) -> str:
        text = IN_WORDS[self.condition] + (f" ({self.reason})" if self.reason else "")
        return f"{text}, in use: {'; '.join(self.users)}" if self.users else text
