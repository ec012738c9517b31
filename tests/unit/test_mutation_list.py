# SPDX-License-Identifier: Apache-2.0
"""The seeded faults stand where the code does: a text that has changed is noticed before they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.mutation import Mutation
from tests.model.mutation_list import MUTATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_text_is_there_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
