# SPDX-License-Identifier: Apache-2.0
"""`verify` on real files: a bit that rotted on the destination is found and mended while the guest writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, await_true, image, same_content
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB

ROTTEN = 9 * MIB


def rot(disk: Path, offset: int = ROTTEN) -> None:
    with disk.open("r+b", buffering=0) as file:
        file.seek(offset)
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


def test_a_switch_to_what_differs_is_refused_until_it_is_mended(work: Path) -> None:
    """Over a kill and a resync, which copies what a bit says differs, and no rotten one says so."""
    source, destination = image(work / "a.img", filled_mib=12), image(work / "b.img")
    options = ("--bitmap", work / "bits")

    def verify(**arguments: bool) -> str:
        served.qmp.execute("verify", **arguments)
        return str(served.qmp.wait_event("VERIFY_COMPLETED", 30)["state"])

    def refused() -> str:
        with pytest.raises(QmpError, match=r"a verification has found that .*b\.img differs") as refusal:
            served.qmp.execute("switch")
        assert "--accept-different" in str(refusal.value)
        return str(served.mirror()["different-since"])

    def recorded() -> str | None:
        record = served.record()
        assert record is not None
        return record.different_since

    with Served(work, source, *options) as served:
        served.start_mirror(destination)
        rot(destination)
        assert verify() == "different"
        since = refused()
        await_true(lambda: recorded() == since, "it is recorded")
        served.kill()
    with Served(work, source, *options) as served:
        served.await_resumed()
        assert served.mirror()["full-copy-reason"] is None
        assert refused() == since
        rot(destination)  # the bits of the copy may have been set still
        assert verify(repair=True) == "repaired"
        assert served.mirror()["different-since"] is None
        await_true(lambda: recorded() is None, "it is recorded")
        rot(destination)
        assert verify() == "different"
        refused()
        with destination.open("r+b") as file, source.open("rb") as good:
            file.seek(ROTTEN)
            good.seek(ROTTEN)
            file.write(good.read(512))
        assert verify() == "equal"
        assert served.mirror()["different-since"] is None
        rot(destination)
        assert verify() == "different"
        served.qmp.execute("mirror-cancel")
        served.start_mirror(destination, full=True)
        assert served.mirror()["different-since"] is None and recorded() is None
        rot(destination)
        assert verify() == "different"
        result = served.qmp.execute("switch", keep_mirror=True, accept_different=True)
        assert result["source-path"] == str(destination)
        assert served.mirror()["different-since"] is not None, "the old disk differs as well"
        served.stop()


@pytest.mark.parametrize("accept_unreadable", [False, True], ids=["at once", "step by step"])
def test_what_a_running_one_has_found_stands_in_the_way_of_a_switch(
    work: Path, accept_unreadable: bool
) -> None:
    """And is remembered over a kill, though it has not come to its end."""
    source, destination = image(work / "a.img", filled_mib=12), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(destination)
        rot(destination, 0)
        served.qmp.execute("verify", speed=MIB)
        await_true(lambda: served.qmp.execute("query-verify")["bytes-differing"] > 0, "it is found")
        with pytest.raises(QmpError, match=r"a verification has found that .*b\.img differs"):
            served.qmp.execute("switch", accept_unreadable=accept_unreadable)
        assert served.qmp.execute("query-verify")["state"] == "running"
        assert served.qmp.execute("query-status")["disk"] == str(source)
        await_true(lambda: served.mirror()["different-since"] is not None, "status shows it")

        def recorded() -> bool:
            record = served.record()
            return record is not None and record.different_since is not None

        await_true(recorded, "it is recorded")
        served.kill()
    with Served(work, source) as served:
        assert served.mirror()["different-since"] is not None or served.mirror()["full-copy-reason"]
        served.stop()


def test_a_repair_that_is_cancelled_leaves_no_hindrance_where_all_that_it_found_is_repaired(
    work: Path,
) -> None:
    source, destination = image(work / "a.img", filled_mib=12), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(destination)
        rot(destination, 0)
        served.qmp.execute("verify", repair=True, speed=MIB)
        await_true(lambda: served.qmp.execute("query-verify")["bytes-repaired"] > 0, "it is repaired")
        served.qmp.execute("verify-cancel")
        assert served.qmp.wait_event("VERIFY_COMPLETED", 30)["state"] == "cancelled"
        served.qmp.execute("switch")
        served.stop()


def test_it_needs_a_steady_mirror(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served:
        with pytest.raises(QmpError, match="needs the mirror in the steady state"):
            served.qmp.execute("verify")
        with pytest.raises(QmpError, match="no verification is under way"):
            served.qmp.execute("verify-cancel")
        assert served.qmp.execute("query-verify")["state"] == "none"
        served.stop()
