# SPDX-License-Identifier: Apache-2.0
"""The file of the dirty bitmap takes nothing any more (SIGBUS): until the state record has called it void, a
restart would believe the bits that it has (rule 4)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine_driver import EventKind
from tests.model import rig as rigs
from tests.model.rig import BLOCK, Rig
from tests.sizes import MIB
from vhostsync._shim import ffi, lib

SIZE, ROOM = 4 * MIB, 8 * MIB
PAGE = 4096
REGION = 65536
BLOCKS_A_REGION = REGION // BLOCK
EXTENTS, EXTENT = 1024, 4 * MIB


@dataclass
class Bits:
    """A bitmap's file, whose bits (its last page) can be taken away from under the mapping."""

    path: Path
    room_bytes: int = SIZE  # for the bits of a disk of this size

    def open(self) -> Any:
        """A fresh vs_bitmap."""
        shape = ffi.new("struct vs_bitmap_shape *", (SIZE, EXTENT, REGION, EXTENTS))
        room = ffi.new("struct vs_bitmap_shape *", (self.room_bytes, EXTENT, REGION, EXTENTS))
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, lib.vs_bitmap_file_bytes(room))
        out = ffi.new("vs_bitmap **")
        assert lib.vs_bitmap_open(fd, shape, lib.VS_BITMAP_FRESH, out) == 0
        return out[0]

    def lose(self) -> None:
        os.truncate(self.path, self.path.stat().st_size - PAGE)

    def lengthen(self) -> None:
        os.truncate(self.path, self.path.stat().st_size + PAGE)


@contextmanager
def rig(bits: Bits, **options: Any) -> Iterator[Rig]:
    with rigs.rig(
        size_bytes=SIZE, disk_bytes=ROOM, mirrored=True, checkpoint_us=10_000, bitmap=bits.open(), **options
    ) as r:
        r.driver.until(lambda: r.snapshot().differing_bytes == 0, "all is settled", timeout_s=20)
        yield r


@pytest.fixture
def bits(tmp_path: Path) -> Bits:
    return Bits(tmp_path / "bits")


def test_a_write_whose_bit_goes_nowhere_waits_for_the_record(bits: Bits) -> None:
    """Though its extent is active: what it changes would differ from the peer, and no bit would say so."""
    with rig(bits) as r:
        r.write_now(0, 1)
        r.driver.until(lambda: r.snapshot().differing_bytes == 0, "all is settled", timeout_s=20)
        bits.lose()
        before = r.seen(r.source, BLOCKS_A_REGION)
        first, second = r.write(BLOCKS_A_REGION, 2), r.write(2 * BLOCKS_A_REGION, 3, queue=1)
        r.driver.take_event(EventKind.BITMAP_FAILED)
        third = r.write(0, 4)
        assert r.unconfirmed(first, second, third)
        assert r.seen(r.source, BLOCKS_A_REGION) == before
        r.driver.call(lib.VS_CMD_BITMAP_VOID)
        r.guest.wait(first, second, third)
        assert first.ok and second.ok and third.ok
        r.flush_now()
        r.assert_same_content()


def test_a_disk_does_not_grow_by_what_no_bit_is_kept_of(bits: Bits) -> None:
    """The file's head would say the new size, and a kill before the record is written have it believed."""
    with rig(bits) as r:
        bits.lose()
        held = r.write(BLOCKS_A_REGION, 2)
        r.driver.take_event(EventKind.BITMAP_FAILED)
        bits.lengthen()
        token = r.driver.submit(lib.VS_CMD_GROW, grow=(2 * SIZE, ROOM, ROOM))
        assert r.unconfirmed(held) and r.driver.done(token) is None
        r.driver.call(lib.VS_CMD_BITMAP_VOID)
        assert r.driver.wait(token).result == 0
        r.guest.wait(held)
        assert held.ok
