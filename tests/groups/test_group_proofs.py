# SPDX-License-Identifier: Apache-2.0
"""Snapshots of two disks under a guest, each looked at; `python -m tests.groups --times 200` does it for
long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.groups import counters, ledgers
from tests.groups.pairs import DISKS
from tests.guest.assets import GuestAssets
from tests.guest.uml import uml_missing


@pytest.mark.timeout(120)
def test_a_counter_on_two_disks(work: Path) -> None:
    verdict = counters.prove(work, 4)
    assert verdict.sets == 4
    print(verdict)


@pytest.mark.skipif(uml_missing() is not None, reason=str(uml_missing()))
@pytest.mark.guest
@pytest.mark.uml
@pytest.mark.timeout(240)
def test_a_database_on_two_disks(assets: GuestAssets, work: Path) -> None:
    """Also that copies of two moments are found out, else it would prove nothing."""
    verdict = ledgers.Verdict()
    with ledgers.ledgers(assets, work) as (pair, guest):
        copies = []
        for count in range(3):
            copies.append(ledgers.taken(pair, guest, work / f"set{count}"))
            pair.mirror_again()
            guest.go_on(1)
        before = guest.confirmed()
        pair.host.ask(DISKS[0], "mirror-cancel")
        guest.go_on(2)
        pair.host.ask(DISKS[1], "mirror-cancel")
        uneven = ledgers.keep(pair, work / "uneven", before, guest.confirmed() + 1)
        guest.stop()
    ledgers.check_sets(assets, work, copies, verdict)
    assert verdict.sets == 3
    with pytest.raises(ledgers.BrokenSetError, match="half a transaction"):
        ledgers.check_sets(assets, work, [uneven], verdict)
