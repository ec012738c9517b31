# SPDX-License-Identifier: Apache-2.0
"""The tests of the contract are tested: each of its rules, broken on purpose, is noticed by one of them."""

from __future__ import annotations

import os

import pytest

from tests.model.mutation_list import MUTATIONS
from tests.model.mutations import run

SEEDED = int(os.environ.get("VHOSTSYNC_MUTATIONS", "60"))
"""So many from the top of the list; `python -m tests.model.mutations` runs all, which CI has no time for."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_seeded_fault_is_caught() -> None:
    assert run(MUTATIONS[:SEEDED], workers=min(4, os.cpu_count() or 1)) == []


def test_the_names_are_unique_and_each_says_its_rule() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert all(mutation.rule and mutation.old != mutation.new for mutation in MUTATIONS)
