# SPDX-License-Identifier: Apache-2.0
"""A page of metrics in Prometheus' text exposition format (version 0.0.4). Pure."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final

from .statistic import Metric, MetricKind, statistics_of

Labels = Mapping[str, str]

PREFIX: Final = "vhostsync_"
INTEGER_MAX: Final = 1 << 64
LABELS_KEPT: Final = 4096
"""Texts of labels. A page of hundreds of disks has the same few over and over."""

# Of powers of two of nanoseconds; a bucket ends where the next power begins. What took less than a
# microsecond lies in the first one, what took more than two seconds in the last.
FINE_BUCKETS: Final = range(9, 31)
COARSE_BUCKETS: Final = range(12, 31, 2)


@dataclass(frozen=True)
class Family:
    """Samples of one name, which has PREFIX before it on the page. `labels` are those that it has beside the
    page's own."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()


def families_of(shown: type, *labels: str) -> tuple[Family, ...]:
    """Those that are declared of the statistics of `shown`."""
    return tuple(family for _, _, family in _declared(shown, labels))


@lru_cache
def _declared(shown: type, labels: tuple[str, ...]) -> tuple[tuple[str, Metric, Family], ...]:
    """Each with what a query calls it."""
    return tuple(
        (each.name.replace("_", "-"), metric, Family(metric.name, metric.kind, metric.help, labels))
        for each, declared in statistics_of(shown)
        if (metric := declared.metric) is not None
    )


class Page:
    """Collects samples by family, because a family's samples must stand together."""

    def __init__(self, common: Labels | None = None) -> None:
        """`common`: labels that every sample has."""
        self._families: dict[str, list[str]] = {}
        self._common = _inner(common or {})

    def family(self, family: Family) -> Callable[..., None]:
        """Begin a family; the result adds a sample with the values of its labels, or nothing where the value
        is None."""
        lines, name = self._begin(family), PREFIX + family.name

        def add(value: Any, *labels: str) -> None:
            if value is not None:
                inner = self._labels(family, labels)
                lines.append(f"{name}{{{inner}}} {_number(value)}" if inner else f"{name} {_number(value)}")

        return add

    def one(self, family: Family, value: Any) -> None:
        """A family of one sample."""
        self.family(family)(value)

    def statistics(
        self, shown: type, rows: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]], *labels: str
    ) -> None:
        """The metrics that are declared of `shown`, of each row: the values of its labels, and what a query
        shows."""
        rows = list(rows)
        for key, metric, family in _declared(shown, labels):
            add = self.family(family)
            for of, row in rows:
                if key in row:
                    add(metric.value(row[key]), *of)

    def histogram(
        self, family: Family, rows: Mapping[tuple[str, ...], "Latency"], buckets: range = FINE_BUCKETS
    ) -> None:
        """In seconds, from counts by powers of two of nanoseconds."""
        lines = self._begin(family)
        name = PREFIX + family.name
        for labels, row in rows.items():
            inner = self._labels(family, labels)
            before = inner + "," if inner else ""
            up_to = list(accumulate(row.counts))
            for power, end in _ends(buckets):
                lines.append(f'{name}_bucket{{{before}le="{end}"}} {up_to[power]}')
            total = up_to[-1]
            lines.append(f'{name}_bucket{{{before}le="+Inf"}} {total}')
            tail = "{" + inner + "}" if inner else ""
            lines.append(f"{name}_sum{tail} {_number(row.seconds)}")
            lines.append(f"{name}_count{tail} {total}")

    def take(self, other: "Page") -> None:
        """The samples of another page, too."""
        for name, lines in other._families.items():
            mine = self._families.setdefault(name, lines[:2])
            mine += lines[2:]

    @property
    def samples(self) -> int:
        return sum(len(lines) - 2 for lines in self._families.values())

    def text(self) -> str:
        """The page, without the families that have no sample."""
        return "".join("\n".join(lines) + "\n" for lines in self._families.values() if len(lines) > 2)

    def _begin(self, family: Family) -> list[str]:
        if (lines := self._families.get(family.name)) is None:
            name = PREFIX + family.name
            lines = [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
            self._families[family.name] = lines
        return lines

    def _labels(self, family: Family, values: tuple[str, ...]) -> str:
        if not family.labels and not values:
            return self._common
        own = _labels_text(family.labels, values)
        return f"{self._common},{own}" if self._common else own


class Latency:
    """Latencies of some operations, summed up."""

    def __init__(self) -> None:
        self.counts = [0] * 32
        self.seconds = 0.0

    def add(self, operation: Mapping[str, Any]) -> None:
        for power, count in enumerate(operation["latency-log2-ns"]):
            self.counts[power] += count
        mean_us = operation["latency-us"]["mean"]
        self.seconds += (mean_us or 0.0) / 1e6 * operation["operations"]


@lru_cache
def _ends(buckets: range) -> tuple[tuple[int, str], ...]:
    """Each with the end of its bucket, in seconds."""
    return tuple((power, f"{2.0 ** (power + 1) / 1e9:.9g}") for power in buckets)


@lru_cache(LABELS_KEPT)
def _labels_text(labels: tuple[str, ...], values: tuple[str, ...]) -> str:
    return _inner(dict(zip(labels, values, strict=True)))


def _inner(labels: Labels) -> str:
    return ",".join(f'{key}="{_escaped(each)}"' for key, each in labels.items())


def _escaped(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # half a surrogate can be in JSON, and not on a page
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: Any) -> str:
    """ValueError: it is none that fits on a page, so the backend that said it is not what it seems."""
    if type(value) is int and -INTEGER_MAX < value < INTEGER_MAX:  # nearly always
        return repr(value)
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
    if not isinstance(value, int | float) or abs(value) >= INTEGER_MAX:
        raise ValueError(f"{value!r:.40} is no figure")
    return repr(value)
