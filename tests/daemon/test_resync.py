# SPDX-License-Identifier: Apache-2.0
"""A destination that comes back gets only what differs; one that is not what it was gets everything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.daemon.rig import BLOCK, Served, await_true, block_of, flush, image, write_block

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


def test_on_a_huge_disk_nothing_else_is_even_looked_at(work: Path) -> None:
    """What a resync does depends on what was written, not on the disk's size."""
    size, region, writes = 8 << 40, 256 << 10, 40
    source, destination = work / "a.img", work / "b.img"
    for path in (source, destination):
        path.touch()
        os.truncate(path, size)
    blocks = [number * (size // writes) // BLOCK + 5 for number in range(writes)]
    with Served(work, source) as served, served.guest() as guest:
        served.start_mirror(destination)
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        served.qmp.execute("mirror-cancel")
        for block in blocks:
            write_block(guest, block, 1)
        before = served.qmp.execute("query-stats")
        mirror = attach_again(served, destination)
        after = served.qmp.execute("query-stats")
        assert mirror["copy-bytes-total"] == mirror["copy-bytes-done"] == writes * region
        reads = [stats["disks"]["source"]["operations"]["read"]["operations"] for stats in (before, after)]
        assert reads[1] - reads[0] <= writes
        passes = [stats["engine"]["syscalls"] for stats in (before, after)]
        assert passes[1] - passes[0] <= 10 * writes, "one or two for each part of a region, and for queries"
        guest.close()
        served.stop()
    with destination.open("rb") as file:
        assert all(os.pread(file.fileno(), BLOCK, each * BLOCK) == block_of(each, 1) for each in blocks)


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
