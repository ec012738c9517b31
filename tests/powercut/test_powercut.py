# SPDX-License-Identifier: Apache-2.0
"""Power cuts and kills at every instant of some runs. For long: VHOSTSYNC_POWERCUT_SEEDS, or
python -m tests.powercut --minutes 60."""

from __future__ import annotations

import os
from collections.abc import Iterator

import anyio
import anyio.to_thread
import pytest

from tests.powercut.checker import LossError, Tally
from tests.powercut.machine import Site
from tests.powercut.runs import check_scene, site
from tests.powercut.scenes import SCENES, Scene
from vhostsync.mirror.bad_ranges import BadRanges
from vhostsync.mirror.mirror_status import Switched
from vhostsync.mirror.record_keeper import RecordKeeper
from vhostsync.mirror.switch_steps import SwitchSteps
from vhostsync.record.record_store import Prepared
from vhostsync.record.state_record import StateRecord, Worth
from vhostsync.storage.identity import DiskIdentity

SEEDS = int(os.environ.get("VHOSTSYNC_POWERCUT_SEEDS", "2"))


@pytest.fixture(scope="module")
def where() -> Iterator[Site]:
    with site() as it:
        yield it


@pytest.mark.timeout(180 + 60 * SEEDS)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_no_power_cut_and_no_kill_breaks_a_promise(where: Site, scene: Scene) -> None:
    """On a busy machine it is a matter of luck whether an engine had to copy the difference: so long it goes
    on."""
    tally = Tally()
    for seed in range(1, 5 * SEEDS + 1):
        check_scene(where, scene, seed, 150, tally)
        if seed >= SEEDS and tally.resyncs > 0:
            break
    assert tally.prefixes > 500 and tally.restarts >= 150 * SEEDS and tally.resyncs > 0


def _one_of_the_seeds_finds_it(where: Site, scene: str) -> bool:
    (chosen,) = (each for each in SCENES if each.name == scene)
    for seed in range(1, 11):
        try:
            check_scene(where, chosen, seed, 50, Tally())
        except LossError:
            return True
    return False


def test_a_record_that_is_written_after_the_exchange_is_noticed(
    where: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest writes to the new disk while the record still names the old one."""

    async def exchange_first(steps: SwitchSteps) -> Switched:
        pause_ns = await steps._engine.exchange(keep_mirror=steps._plan.keep_mirror, accept_unreadable=False)
        await anyio.sleep(0.02)
        assert steps._prepared is not None
        await anyio.to_thread.run_sync(steps._prepared.settle)
        return Switched(pause_ns, BadRanges())

    monkeypatch.setattr(SwitchSteps, "_exchange_with_the_gate_closed", exchange_first)
    assert _one_of_the_seeds_finds_it(where, "leave")


def test_a_switch_that_is_not_announced_is_noticed(where: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record names the new disk, but for a power cut not durably."""

    async def silently(keeper: RecordKeeper, switched: StateRecord) -> Prepared | None:
        assert keeper._store is not None
        keeper._announced = switched
        return await anyio.to_thread.run_sync(keeper._store.prepare, switched)

    async def never(keeper: RecordKeeper, prepared: Prepared | None) -> None:
        pass

    monkeypatch.setattr(RecordKeeper, "prepare_switch", silently)
    monkeypatch.setattr(RecordKeeper, "settle_switch", never)
    assert _one_of_the_seeds_finds_it(where, "leave")


def test_a_destination_that_is_called_up_to_date_too_early_is_noticed(
    where: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says so before the first byte is copied."""
    with_peer = StateRecord.with_peer

    def early(record: StateRecord, peer: DiskIdentity, bitmap: str | None = None) -> StateRecord:
        return with_peer(record, peer, bitmap).with_worth(Worth.UP_TO_DATE)

    monkeypatch.setattr(StateRecord, "with_peer", early)
    assert _one_of_the_seeds_finds_it(where, "copy")


def test_a_fence_that_is_left_out_is_noticed(where: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server carries out writes of a lost connection when the next one has written there already."""
    monkeypatch.setattr(RecordKeeper, "is_unfenced", lambda keeper, name: False)
    assert _one_of_the_seeds_finds_it(where, "late")

