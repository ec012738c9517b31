# SPDX-License-Identifier: Apache-2.0
"""What is to be reached: a figure of each round, usually a ratio between two contenders, and its bound."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.sample import Round

# Of one round: usually one figure; every single event of it where the target is about events.
Figure = Callable[[Round], float | Sequence[float] | None]


def percentile_99(values: Sequence[float]) -> float:
    """The greatest, of less than a hundred."""
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]


@dataclass(frozen=True)
class Target:
    label: str
    figure: Figure
    bound: float | None  # None: there is no target, it is to be seen
    at_most: bool = False
    over_rounds: Callable[[Sequence[float]], float] = statistics.median

    def met(self, value: float) -> bool | None:
        if self.bound is None:
            return None
        return value <= self.bound if self.at_most else value >= self.bound

    def values(self, rounds: Sequence[Round]) -> list[float]:
        found: list[float] = []
        for samples in rounds:
            figure = self.figure(samples)
            if figure is not None:
                found.extend(figure if isinstance(figure, Sequence) else [figure])
        return found

    def __str__(self) -> str:
        if self.bound is None:
            return self.label
        return f"{self.label} {'≤' if self.at_most else '≥'} {self.bound:g}"


def value(contender: str, name: str) -> Figure:
    def figure(samples: Round) -> float | None:
        return samples[contender].figures.get(name) if contender in samples else None

    return figure


def every(contender: str, name: str) -> Figure:
    """Every event, so that a percentile is one of events and not of medians."""

    def figure(samples: Round) -> Sequence[float] | None:
        return list(samples[contender].detail[name]) if contender in samples else None

    return figure


def ratio(ours: str, *others: str, name: str = "per_s") -> Callable[[Round], float | None]:
    """Ours over the greatest of the others that were measured."""

    def figure(samples: Round) -> float | None:
        known = [samples[other].figures[name] for other in others if other in samples]
        return samples[ours].figures[name] / max(known) if known and ours in samples else None

    return figure


def of_limit(samples: Round) -> float | None:
    """Every byte goes to the one disk twice: L = 1 / (1 / raw + 1 / raw)."""
    one_disk = ratio("ours mirrored", "raw")(samples)
    return None if one_disk is None else 2 * one_disk
