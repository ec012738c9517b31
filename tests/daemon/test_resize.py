# SPDX-License-Identifier: Apache-2.0
"""`resize` on real files, with a mirror and a bitmap."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.daemon.rig import BLOCK, Served, block_of, flush, image, lacking, same_content, write_block
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB

LAST = 24 * MIB // BLOCK - 1


def test_source_destination_and_bitmap_grow(work: Path) -> None:
    source, destination, bitmap = image(work / "a.img"), image(work / "b.img"), work / "bits"
    with Served(work, source, "--bitmap", bitmap) as served, served.guest() as guest:
        served.start_mirror(destination)
        os.truncate(source, 24 * MIB)
        with pytest.raises(QmpError, match=r"b\.img has 16777216 bytes, not 25165824; enlarge it first"):
            served.qmp.execute("resize")
        assert served.qmp.execute("query-status")["capacity"] == 16 * MIB
        with destination.open("r+b") as file:  # what is there already is not the source's
            file.seek(20 * MIB)
            file.write(b"rubbish")
        os.truncate(destination, 24 * MIB)
        assert served.qmp.execute("resize") == {"capacity": 24 * MIB}
        assert served.qmp.wait_event("CAPACITY_CHANGE")["capacity"] == 24 * MIB
        assert served.qmp.execute("query-status")["capacity"] == 24 * MIB
        assert served.state == "steady"
        write_block(guest, LAST, 1)
        flush(guest)
        guest.close()
        served.kill()
    # The bitmap is of the new size: what follows the kill is no full copy.
    with Served(work, source, "--bitmap", bitmap) as served:
        served.await_resumed()
        assert served.mirror()["full-copy-reason"] is None
        served.stop()
    assert same_content(source, destination)
    assert lacking(destination, {LAST: 1}) == []


def test_what_is_refused(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served:
        for size, why in (
            (None, "has 16777216 bytes already"),
            (32 * MIB, "enlarge it first"),
            (8 * MIB, "cannot shrink"),
            (16 * MIB + 1, "no whole number of blocks"),
        ):
            with pytest.raises(QmpError, match=why):
                served.qmp.execute("resize", **({} if size is None else {"size": size}))
        served.stop()


def test_after_a_switch_the_new_disk_grows(work: Path) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served, served.guest() as guest:
        served.start_mirror(other)
        served.qmp.execute("switch")
        os.truncate(other, 24 * MIB)
        assert served.qmp.execute("resize") == {"capacity": 24 * MIB}
        write_block(guest, LAST, 2)
        flush(guest)
        guest.close()
        served.stop()
    with other.open("rb") as file:
        file.seek(LAST * BLOCK)
        assert file.read(BLOCK) == block_of(LAST, 2)


def test_the_open_disk_is_measured_and_not_what_has_its_name_by_now(work: Path) -> None:
    source, destination = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served, served.guest() as guest:
        served.start_mirror(destination)
        for disk in (source, destination):
            disk.rename(disk.with_suffix(".old"))
            image(disk, 64, filled_mib=0)
        with pytest.raises(QmpError, match=r"enlarge the disk that was .*a\.img when it was opened"):
            served.qmp.execute("resize")
        os.truncate(source.with_suffix(".old"), 24 * MIB)
        with pytest.raises(QmpError, match=r"b\.img has 16777216 bytes, not 25165824"):
            served.qmp.execute("resize")
        os.truncate(destination.with_suffix(".old"), 24 * MIB)
        assert served.qmp.execute("resize") == {"capacity": 24 * MIB}
        write_block(guest, LAST, 3)
        flush(guest)
        guest.close()
        served.stop()
    for disk in (source, destination):
        assert lacking(disk.with_suffix(".old"), {LAST: 3}) == []
