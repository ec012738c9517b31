# SPDX-License-Identifier: Apache-2.0
"""A statistic, declared once: as a field of a dataclass (snapshot.py, mirror_status.py).

Where it comes from in the engine's structs, what query-mirror or query-stats calls it, the rows of
docs/control-protocol.md and the Prometheus metric are made from it. So a new one of the engine's is three
lines: a member of its struct (c_shim/shim_figures.h), its value (snapshot.c), and the declaration."""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import Any, Final, Literal

_KEY: Final = "statistic"
MetricKind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """A Prometheus metric, without its prefix. `of` makes its value of what the query shows; `of_null` is its
    value where that is null (None: it has none then)."""

    name: str
    kind: MetricKind
    help: str
    of: Callable[[Any], float] = lambda shown: shown  # not float: a count keeps all its digits
    of_null: float | None = None

    def value(self, shown: Any) -> float | None:
        return self.of_null if shown is None else self.of(shown)


@dataclass(frozen=True)
class Statistic:
    """What is declared of a field."""

    meaning: str  # for docs/control-protocol.md
    metric: Metric | None = None
    member: str | None = None  # of the engine's struct; None: it is none of the engine's
    of: Callable[[Any], Any] = int  # makes it of the member's value


def statistic(meaning: str, metric: Metric | None = None, *, member: str | None = None,
              of: Callable[[Any], Any] = int) -> Any:  # fmt: skip
    """A field that is a statistic."""
    return field(metadata={_KEY: Statistic(meaning, metric, member, of)})


@cache
def statistics_of(shown: type) -> tuple[tuple[Field[Any], Statistic], ...]:
    """All of a dataclass; what it inherits comes last, as it is less its own."""
    found = [each for each in fields(shown) if _KEY in each.metadata]
    own = vars(shown).get("__annotations__", {})
    found.sort(key=lambda each: each.name not in own)
    return tuple((each, each.metadata[_KEY]) for each in found)


def from_engine(shown: type, c_struct: Any) -> dict[str, Any]:
    """The values of those that the engine has, by field."""
    return {
        each.name: declared.of(getattr(c_struct, declared.member))
        for each, declared in statistics_of(shown)
        if declared.member is not None
    }


def figures_of(shown: type, of: object) -> dict[str, Any]:
    """The statistics of `shown`, from something that has them all."""
    return {each.name: getattr(of, each.name) for each, _ in statistics_of(shown)}


def milliseconds(ns: int) -> float:
    return ns / 1e6


def seconds(ns: int) -> float:
    return ns / 1e9


def of_milliseconds(ms: float) -> float:
    """Prometheus' unit of time is the second."""
    return ms / 1000
