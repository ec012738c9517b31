# SPDX-License-Identifier: Apache-2.0
"""The rules of share/prometheus/vhostsync-alerts.yml, read by their lines (each value stands on one)."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULES = ROOT / "share/prometheus/vhostsync-alerts.yml"


@dataclass(frozen=True)
class Alert:
    name: str
    expression: str
    severity: str
    summary: str
    description: str


def alerts() -> list[Alert]:
    blocks = re.split(r"^ +- alert: ", RULES.read_text(), flags=re.MULTILINE)[1:]
    return [
        Alert(
            block.split("\n", 1)[0], _value(block, "expr"), re.findall(r"severity: (\w+)", block)[0],
            _value(block, "summary"), _value(block, "description"),
        )
        for block in blocks
    ]  # fmt: skip


def _value(block: str, key: str) -> str:
    (value,) = re.findall(rf"^ +{key}: (.*)$", block, re.MULTILINE)
    return str(value).strip('"')
