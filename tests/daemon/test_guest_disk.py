# SPDX-License-Identifier: Apache-2.0
"""The guest has one disk, whatever it lies on by now: its size and its blocks change with a resize only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon.rig import Served, image, loop_device, refused_start
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB


def shown(served: Served) -> tuple[int, int]:
    status = served.qmp.execute("query-status")
    return status["capacity"], status["block-size"]


def refusal(work: Path, *options: str | Path) -> str:
    code, stderr = refused_start(
        "serve", "--socket-path", work / "x.sock", *options, env={"STATE_DIRECTORY": str(work / "state")}
    )
    assert code == 1, stderr
    return stderr


def test_blocks_of_4096_bytes_stay_what_they_are_on_an_image(work: Path) -> None:
    """And the way back stays open, although the image is larger."""
    other = image(work / "b.img", 24)
    with loop_device(image(work / "a.img"), 4096) as source:
        with Served(work, source) as served:
            assert shown(served) == (16 * MIB, 4096)
            served.start_mirror(other, force=True)
            served.qmp.execute("switch")
            served.stop()
        assert "would change the guest's disk, which has had blocks of 4096" in refusal(
            work, "--blk-file", other, "--block-size", "512"
        )
        with Served(work, other, "--block-size", "4096") as served:
            assert shown(served) == (16 * MIB, 4096)
            served.kill()
        with Served(work, other) as served:
            assert shown(served) == (16 * MIB, 4096)
            served.start_mirror(source)
            served.qmp.execute("switch")
            served.stop()
        with Served(work, source) as served:
            assert shown(served) == (16 * MIB, 4096)
            served.stop()


def test_a_resize_is_recorded(work: Path) -> None:
    source, other = image(work / "a.img", 24), image(work / "b.img", 24)
    with Served(work, source) as served:
        served.start_mirror(other)
        for disk in (source, other):
            with disk.open("r+b") as file:
                file.truncate(32 * MIB)
        served.qmp.execute("resize", size=28 * MIB)
        served.kill()
    with Served(work, source, "--resume-mirror", "off") as served:
        assert shown(served) == (28 * MIB, 512)
        served.qmp.execute("resize")
        served.kill()
    with Served(work, source, "--resume-mirror", "off") as served:
        assert shown(served) == (32 * MIB, 512)
        served.stop()


def test_a_destination_that_cannot_give_the_guest_its_blocks_is_refused(work: Path) -> None:
    with loop_device(image(work / "b.img"), 4096) as other, Served(work, image(work / "a.img")) as served:
        with pytest.raises(QmpError, match="logical blocks of 4096"):
            served.qmp.execute("mirror-start", destination=str(other))
        assert served.state == "passthrough"
        served.stop()


def test_a_disk_that_was_never_mirrored_is_shown_as_it_is(work: Path) -> None:
    disk = image(work / "a.img")
    for mib in (16, 20):
        with disk.open("r+b") as file:
            file.truncate(mib * MIB)
        with Served(work, disk) as served:
            assert shown(served) == (mib * MIB, 512)
            served.stop()
