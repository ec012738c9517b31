# SPDX-License-Identifier: Apache-2.0
"""A destination that comes back gets only what differs; one that is not what it was gets everything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.daemon.rig import BLOCK, Served, await_true, flush, image, write_block

REGION = 64 << 10


def attach_again(served: Served, path: Path, **more: Any) -> dict[str, object]:
    served.qmp.execute("mirror-start", destination=str(path), **more)
    await_true(lambda: served.mirror()["state"] == "steady", "steady")
    found: dict[str, object] = served.mirror()
    return found


def test_only_what_was_written_meanwhile_is_copied(work: Path) -> None:
    source, destination = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served, served.guest() as guest:
        served.start_mirror(destination)
        assert served.mirror()["full-copy-reason"] == "no earlier copy of it is known"
        write_block(guest, 0, 1)
        flush(guest)
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        served.qmp.execute("mirror-cancel")
        write_block(guest, 100, 2)
        write_block(guest, 200, 3)
        mirror = attach_again(served, destination)
        assert mirror["full-copy-reason"] is None
        assert mirror["copy-bytes-total"] == 2 * REGION
        guest.close()
        served.stop()
    assert source.read_bytes() == destination.read_bytes()


def test_a_disk_that_somebody_wrote_to_gets_everything(work: Path) -> None:
    source, destination = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(destination)
        served.qmp.execute("mirror-cancel")
        fd = os.open(destination, os.O_WRONLY)
        os.pwrite(fd, b"x" * BLOCK, 3 << 20)
        os.close(fd)
        mirror = attach_again(served, destination)
        assert "changed since" in str(mirror["full-copy-reason"])
        served.stop()
    assert source.read_bytes() == destination.read_bytes()


def test_everything_if_asked_for(work: Path) -> None:
    source, destination = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(destination)
        served.qmp.execute("mirror-cancel")
        mirror = attach_again(served, destination, full=True)
        assert mirror["full-copy-reason"] == "it was asked for"
        assert mirror["copy-bytes-total"] == source.stat().st_size
        served.stop()


def test_another_disk_gets_everything(work: Path) -> None:
    source, destination = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(destination)
        served.qmp.execute("mirror-cancel")
        mirror = attach_again(served, image(work / "c.img"))
        assert str(mirror["full-copy-reason"]).startswith("the differences are known for")
        served.stop()
