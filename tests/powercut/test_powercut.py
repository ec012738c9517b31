# SPDX-License-Identifier: Apache-2.0
"""Power cuts and kills at every instant of some runs. For long: VHOSTSYNC_POWERCUT_SEEDS, or
python -m tests.powercut --minutes 60."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.powercut.checker import Tally
from tests.powercut.loads import SCENES, Scene
from tests.powercut.machine import Site
from tests.powercut.runs import check_scene, site

SEEDS = int(os.environ.get("VHOSTSYNC_POWERCUT_SEEDS", "2"))


@pytest.fixture(scope="module")
def where() -> Iterator[Site]:
    with site() as it:
        yield it


@pytest.mark.timeout(60 + 30 * SEEDS)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_no_power_cut_and_no_kill_breaks_a_promise(where: Site, scene: Scene) -> None:
    tally = Tally()
    for seed in range(1, SEEDS + 1):
        check_scene(where, scene, seed, 150, tally)
    assert tally.prefixes > 500 and tally.restarts >= 150 * SEEDS and tally.resyncs > 0
