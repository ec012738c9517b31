# SPDX-License-Identifier: Apache-2.0
"""The tests of the contract are tested: each of its rules, broken on purpose, is noticed by one of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.model.mutation import Mutation
from tests.model.mutation_list import MUTATIONS
from tests.model.mutations import Workshop

SEEDED = int(os.environ.get("VHOSTSYNC_MUTATIONS", "60"))
"""So many from the top of the list; `python -m tests.model.mutations` runs all, which CI has no time for."""


SEEDED_BY_FILE = sorted(MUTATIONS[:SEEDED], key=lambda mutation: mutation.file)
"""Those of a file share a build of all other files."""

ONE_WORKSHOP = pytest.mark.xdist_group("mutations")
"""The tree is copied and first built once, by one process: else by each of those that run tests."""


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        yield Workshop(Path(folder))


@ONE_WORKSHOP
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_without_a_fault_the_tests_pass(workshop: Workshop) -> None:
    assert workshop.fails_unchanged(SEEDED_BY_FILE) is None


@ONE_WORKSHOP
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", SEEDED_BY_FILE, ids=lambda mutation: mutation.name)
def test_a_seeded_fault_is_caught(workshop: Workshop, mutation: Mutation) -> None:
    assert workshop.try_out(mutation) is not None, mutation.rule


def test_the_names_are_unique_and_each_says_its_rule() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert all(mutation.rule and mutation.old != mutation.new for mutation in MUTATIONS)
