# SPDX-License-Identifier: Apache-2.0
"""`verify` on real files: a bit that rotted on the destination is found and mended while the guest writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, image, same_content
from tests.guest.images import MIB
from tests.guest.qmp_client import QmpError

ROTTEN = 9 * MIB


def rot(disk: Path) -> None:
    with disk.open("r+b", buffering=0) as file:
        file.seek(ROTTEN)
        file.write(b"rot")


def test_found_repaired_and_equal_again(work: Path) -> None:
    source, destination = image(work / "a.img", filled_mib=12), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(destination)
        with Load(served, blocks=1024) as load:
            load.go_on()
            served.qmp.execute("verify")
            assert served.qmp.wait_event("VERIFY_COMPLETED", 30)["state"] == "equal"
            rot(destination)
            served.qmp.execute("verify")
            assert served.qmp.wait_event("VERIFY_COMPLETED", 30)["state"] == "different"
            found = served.qmp.execute("query-verify")
            assert found["differing"] == [{"offset": ROTTEN, "length": 512}]
            assert found["bytes-done"] == found["bytes-total"]
            served.qmp.execute("verify", repair=True)
            assert served.qmp.wait_event("VERIFY_COMPLETED", 30)["state"] == "repaired"
            load.go_on()
            load.stop()
        assert served.state == "steady"
        served.stop()
    assert same_content(source, destination)


def test_it_needs_a_steady_mirror(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served:
        with pytest.raises(QmpError, match="needs the mirror in the steady state"):
            served.qmp.execute("verify")
        with pytest.raises(QmpError, match="no verification is under way"):
            served.qmp.execute("verify-cancel")
        assert served.qmp.execute("query-verify")["state"] == "none"
        served.stop()
