# SPDX-License-Identifier: Apache-2.0
"""The write cache mode that a frontend is shown is the one that the engine has for it."""

from __future__ import annotations

from pathlib import Path

from tests.daemon.rig import Served, image
from tests.frontend import Feature
from tests.vhost_client import VhostUserTransport

MODE_AT = 32
FEATURES = Feature.VERSION_1 | Feature.CONFIG_WCE | Feature.FLUSH


def connected(served: Served) -> VhostUserTransport:
    transport = VhostUserTransport(served.socket)
    transport.set_features(FEATURES)
    return transport


def shown(transport: VhostUserTransport) -> int:
    return transport.client.get_config()[MODE_AT]


def test_a_frontend_that_runs_no_ring_changes_the_mode_of_itself_alone(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served, served.guest() as guest:
        onlooker = connected(served)
        onlooker.client.set_config(MODE_AT, b"\0")
        newcomer = connected(served)
        assert (shown(onlooker), shown(newcomer)) == (0, 1)
        assert served.qmp.execute("query-status")["write-cache"] is True
        assert isinstance(guest.transport, VhostUserTransport)
        assert shown(guest.transport) == 1
        for each in (onlooker, newcomer):
            each.close()


def test_the_mode_of_the_guest_outlives_its_connection(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served:
        with served.guest() as guest:
            assert isinstance(guest.transport, VhostUserTransport)
            guest.transport.client.set_config(MODE_AT, b"\0")
            newcomer = connected(served)
            assert shown(newcomer) == 0
        again = connected(served)
        assert (shown(again), shown(newcomer)) == (0, 0)
        for each in (again, newcomer):
            each.close()
