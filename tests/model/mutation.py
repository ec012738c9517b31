# SPDX-License-Identifier: Apache-2.0
"""One rule of the contract, broken on purpose (mutations.py)."""

from __future__ import annotations

from dataclasses import dataclass


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


def mutation(name: str, rule: str, file: str, old: str, new: str, test: str) -> Mutation:
    """A file without a folder lies in c_shim, a test without one in tests/model."""
    path = file if "/" in file else f"c_shim/{file}"
    return Mutation(name, rule, path, old, new, f"tests/{test if '/' in test else f'model/test_{test}'}")
