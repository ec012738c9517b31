# SPDX-License-Identifier: Apache-2.0
"""One rule of the contract, broken on purpose (mutations.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    name: str
    rule: str
    """What docs/durability.md says, in short."""
    file: str
    """From the top of the tree."""
    old: str
    new: str
    test: str
    """pytest's name of the test."""


def _c_source(name: str) -> str:
    (path,) = (ROOT / "c_shim").rglob(name)
    return path.relative_to(ROOT).as_posix()


def mutation(name: str, rule: str, file: str, old: str, new: str, test: str) -> Mutation:
    """A file without a folder lies somewhere in c_shim, a test without one in tests/model."""
    path = file if "/" in file else _c_source(file)
    return Mutation(name, rule, path, old, new, f"tests/{test if '/' in test else f'model/test_{test}'}")
