# SPDX-License-Identifier: Apache-2.0
"""A source that fails under a real `serve` (docs/durability.md, rule 5).

The bad disk is a loop device. Reads beyond the end of its backing file, which was cut off, are I/O errors of
the block layer; so are writes for which the file system behind it has no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon.rig import (
    BLOCK,
    Served,
    block_of,
    flush,
    image,
    loop_device,
    write_block,
)
from tests.frontend import Status
from tests.guest.images import MIB, fill_random
from tests.guest.qmp_client import QmpError

SIZE_MIB = 16
GOOD_MIB = 12
LAST = SIZE_MIB * MIB // BLOCK - 1


@contextmanager
def cut_off(work: Path) -> Iterator[Path]:
    """A disk whose end cannot be read."""
    backing = image(work / "backing.img", SIZE_MIB, filled_mib=SIZE_MIB)
    with loop_device(backing, 512) as device:
        with backing.open("r+b") as file:
            file.truncate(GOOD_MIB * MIB)
        yield device


def test_a_copy_around_what_cannot_be_read(work: Path) -> None:
    other = image(work / "b.img", SIZE_MIB, filled_mib=0)
    fill_random(other, 0, SIZE_MIB * MIB)
    old = other.read_bytes()
    with cut_off(work) as device, Served(work, device) as served, served.guest() as guest:
        served.qmp.execute("mirror-start", destination=str(other))
        error = served.qmp.wait_event("IO_ERROR")
        assert (error["disk"], error["operation"]) == ("source", "read")
        served.await_steady()
        bad = {"offset": GOOD_MIB * MIB, "length": (SIZE_MIB - GOOD_MIB) * MIB}
        assert served.mirror()["unreadable"] == [bad]
        read = guest.read(LAST * BLOCK, BLOCK)
        guest.wait(read)
        assert read.status == Status.IOERR
        with pytest.raises(QmpError, match=r"1 range\(s\) of the source could not be read"):
            served.qmp.execute("switch")
        with pytest.raises(QmpError, match="may differ where the source is in doubt or unreadable"):
            served.qmp.execute("switch", accept_unreadable=True, keep_mirror=True)
        write_block(guest, LAST, 7)
        flush(guest)
        bad["length"] -= BLOCK
        assert served.mirror()["unreadable"] == [bad]
        result = served.qmp.execute("switch", accept_unreadable=True)
        assert result["accepted"] == {"doubt": [], "unreadable": [bad]}
        assert served.mirror()["unreadable"] == []
        assert guest.read_now(LAST * BLOCK, BLOCK) == block_of(LAST, 7)
        assert guest.read_now(GOOD_MIB * MIB, BLOCK) == old[GOOD_MIB * MIB :][:BLOCK]
        guest.close()
        served.stop()
    with (work / "backing.img").open("rb") as file:
        good = file.read(GOOD_MIB * MIB)
    content = other.read_bytes()
    assert content[: GOOD_MIB * MIB] == good
    assert content[GOOD_MIB * MIB : -BLOCK] == old[GOOD_MIB * MIB : -BLOCK]
