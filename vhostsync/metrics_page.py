# SPDX-License-Identifier: Apache-2.0
"""A page of metrics in Prometheus' text exposition format (version 0.0.4). Pure."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from .statistic import MetricKind, statistics_of

Labels = Mapping[str, str]


class Page:
    """Collects samples by family, because a family's samples must stand together."""

    def __init__(self, common: Labels | None = None) -> None:
        """`common`: labels that every sample has."""
        self._families: dict[str, list[str]] = {}
        self._common = dict(common or {})

    def family(self, name: str, kind: MetricKind, text: str) -> Callable[[Any, Labels], None]:
        """Begin a family; the result adds a sample, or nothing where the value is None."""
        lines = self._families.setdefault(
            name, [f"# HELP vhostsync_{name} {text}", f"# TYPE vhostsync_{name} {kind}"]
        )

        def add(value: Any, labels: Labels) -> None:
            if value is not None:
                inner = _inner({**self._common, **labels})
                lines.append(f"vhostsync_{name}{'{' + inner + '}' if inner else ''} {_number(value)}")

        return add

    def one(self, name: str, kind: MetricKind, text: str, value: Any) -> None:
        """A family of one sample."""
        self.family(name, kind, text)(value, {})

    def statistics(self, shown: type, *rows: tuple[Labels, Mapping[str, Any]]) -> None:
        """The metrics that are declared of `shown`, of each row: its labels, and what a query shows."""
        for each, declared in statistics_of(shown):
            if (metric := declared.metric) is None:
                continue
            add = self.family(metric.name, metric.kind, metric.help)
            for labels, row in rows:
                if (key := each.name.replace("_", "-")) in row:
                    add(metric.value(row[key]), labels)

    def histogram(self, name: str, text: str, rows: Mapping[tuple[tuple[str, str], ...], "Latency"]) -> None:
        """A histogram in seconds from counts by powers of two of nanoseconds."""
        self.family(name, "histogram", text)
        lines = self._families[name]
        for labels, row in rows.items():
            inner = _inner({**self._common, **dict(labels)})
            before = inner + "," if inner else ""
            total = 0
            for power, count in enumerate(row.counts[:-1]):
                total += count
                lines.append(
                    f'vhostsync_{name}_bucket{{{before}le="{2.0 ** (power + 1) / 1e9:.9g}"}} {total}'
                )
            total += row.counts[-1]
            lines.append(f'vhostsync_{name}_bucket{{{before}le="+Inf"}} {total}')
            tail = "{" + inner + "}" if inner else ""
            lines.append(f"vhostsync_{name}_sum{tail} {_number(row.seconds)}")
            lines.append(f"vhostsync_{name}_count{tail} {total}")

    def text(self) -> str:
        """The page, without the families that have no sample."""
        return "".join("\n".join(lines) + "\n" for lines in self._families.values() if len(lines) > 2)


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


def _inner(labels: Labels) -> str:
    return ",".join(f'{key}="{_escaped(each)}"' for key, each in labels.items())


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
    return repr(value)
