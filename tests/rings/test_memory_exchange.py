# SPDX-License-Identifier: Apache-2.0
"""A frontend exchanges the region that holds the rings (REM_MEM_REG, ADD_MEM_REG), requests in flight:
what was taken up is answered where the guest sees it, before the memory is unmapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.engine_driver import DiskOp
from tests.frontend import DEFAULT_FEATURES, Feature
from tests.guest_ring import Region
from tests.model.rig import BLOCK, Rig, pattern, rig
from tests.sizes import MIB
from vhostsync._shim import lib

EACH_LAYOUT = pytest.mark.parametrize(
    "features", [DEFAULT_FEATURES, DEFAULT_FEATURES | Feature.RING_PACKED], ids=["split", "packed"]
)


def without_descriptors(regions: Sequence[Region]) -> list[Region]:
    return [replace(region, fd=-1) for region in regions]


def hold_a_write(r: Rig, number: int) -> None:
    r.source.hold(DiskOp.WRITE)
    r.guest.write(number * BLOCK, pattern(number))
    r.driver.await_held(r.source, DiskOp.WRITE)


def used_index(r: Rig) -> int:
    return r.guest.queues[0].ring.used_index()


@EACH_LAYOUT
def test_a_write_in_flight_is_answered_before_the_rings_are_unmapped(features: int) -> None:
    with rig(queues=1, features=features) as r:
        r.write_now(0, 1)
        hold_a_write(r, 1)
        removal = r.driver.submit(
            lib.VS_CMD_REMOVE_MEM_REGION, attachment=0, regions=without_descriptors(r.guest.memory.regions)
        )
        r.driver.snapshot()
        assert r.driver.done(removal) is None
        r.source.hold(DiskOp.WRITE, False)
        r.source.release(DiskOp.WRITE)
        assert r.driver.wait(removal).result == 0
        assert used_index(r) == 2  # shown before the frontend hears that the memory is unmapped
        r.driver.call(lib.VS_CMD_ADD_MEM_REGION, attachment=0, regions=r.guest.memory.regions)
        r.write_now(2, 2)
        assert r.seen(r.source, 1) == pattern(1)
        assert used_index(r) == 3


@EACH_LAYOUT
def test_memory_that_comes_back_meanwhile_takes_over(features: int) -> None:
    """Both rings' memory is the same file: whichever mapping is written, the guest sees it, once."""
    with rig(queues=1, features=features) as r:
        hold_a_write(r, 1)
        removal = r.driver.submit(
            lib.VS_CMD_REMOVE_MEM_REGION, attachment=0, regions=without_descriptors(r.guest.memory.regions)
        )
        r.driver.call(lib.VS_CMD_ADD_MEM_REGION, attachment=0, regions=r.guest.memory.regions)
        r.source.hold(DiskOp.WRITE, False)
        r.source.release(DiskOp.WRITE)
        assert r.driver.wait(removal).result == 0
        r.write_now(2, 2)
        assert used_index(r) == 2


@EACH_LAYOUT
def test_a_table_exchanged_twice_keeps_the_ring_for_its_answers(features: int) -> None:
    """The write holds the first table, the ring lies in the second, and the third one lacks it."""
    with rig(queues=1, features=features) as r:
        hold_a_write(r, 1)
        r.driver.call(lib.VS_CMD_SET_MEM_TABLE, attachment=0, regions=r.guest.memory.regions)
        elsewhere = replace(r.guest.memory.regions[0], guest_addr=1 << 40, user_addr=1 << 40, bytes=MIB)
        r.driver.call(lib.VS_CMD_SET_MEM_TABLE, attachment=0, regions=[elsewhere])
        r.source.hold(DiskOp.WRITE, False)
        r.source.release(DiskOp.WRITE)
        r.driver.snapshot()
        r.driver.snapshot()
        assert used_index(r) == 1
        r.driver.call(lib.VS_CMD_SET_MEM_TABLE, attachment=0, regions=r.guest.memory.regions)
        r.write_now(2, 2)
        assert used_index(r) == 2
