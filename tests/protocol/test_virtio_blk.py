# SPDX-License-Identifier: Apache-2.0
"""The virtio-blk device's features and config space, field by field at the offsets of linux/virtio_blk.h."""

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sizes import GIB
from vhostsync.vhost_user import messages, payloads, rules, server, virtio_blk
from vhostsync.vhost_user.virtio_blk import (
    CONFIG_BYTES,
    SECTOR_BYTES,
    BlkDevice,
    DeviceShape,
    Feature,
    config_space,
    feature_bits,
    geometry,
    physical_block_exponent,
)

FIELDS = {
    "capacity": (0, "<Q"),
    "size_max": (8, "<I"),
    "seg_max": (12, "<I"),
    "cylinders": (16, "<H"),
    "heads": (18, "<B"),
    "sectors": (19, "<B"),
    "blk_size": (20, "<I"),
    "physical_block_exp": (24, "<B"),
    "alignment_offset": (25, "<B"),
    "min_io_size": (26, "<H"),
    "opt_io_size": (28, "<I"),
    "writeback": (32, "<B"),
    "unused0": (33, "<B"),
    "num_queues": (34, "<H"),
    "max_discard_sectors": (36, "<I"),
    "max_discard_seg": (40, "<I"),
    "discard_sector_alignment": (44, "<I"),
    "max_write_zeroes_sectors": (48, "<I"),
    "max_write_zeroes_seg": (52, "<I"),
    "write_zeroes_may_unmap": (56, "<B"),
}


def fields(shape: DeviceShape, *, writeback: bool = True) -> dict[str, int]:
    space = config_space(shape, writeback=writeback)
    assert len(space) == CONFIG_BYTES
    assert space[57:] == bytes(CONFIG_BYTES - 57)
    return {name: struct.unpack_from(form, space, at)[0] for name, (at, form) in FIELDS.items()}


def test_a_common_disk() -> None:
    assert fields(DeviceShape(GIB, num_queues=4)) == {
        "capacity": GIB // 512,
        "size_max": 65536,
        "seg_max": 126,
        "cylinders": 2080,
        "heads": 16,
        "sectors": 63,
        "blk_size": 512,
        "physical_block_exp": 0,
        "alignment_offset": 0,
        "min_io_size": 1,
        "opt_io_size": 0,
        "writeback": 1,
        "unused0": 0,
        "num_queues": 4,
        "max_discard_sectors": 524288,
        "max_discard_seg": 1,
        "discard_sector_alignment": 1,
        "max_write_zeroes_sectors": 524288,
        "max_write_zeroes_seg": 1,
        "write_zeroes_may_unmap": 1,
    }


def test_a_disk_of_4_kib_blocks() -> None:
    shape = DeviceShape(
        GIB, block_bytes=4096, physical_block_bytes=16384, discard_bytes=65536, writeback=False
    )
    got = fields(shape, writeback=False)
    assert got["blk_size"] == 4096
    assert (got["physical_block_exp"], got["min_io_size"]) == (2, 4)
    assert got["discard_sector_alignment"] == 128
    assert got["max_discard_sectors"] % 8 == 0
    assert got["writeback"] == 0


def test_512_byte_blocks_on_4_kib_ones() -> None:
    got = fields(DeviceShape(GIB, physical_block_bytes=4096, discard_bytes=4096))
    assert (got["physical_block_exp"], got["min_io_size"], got["discard_sector_alignment"]) == (3, 8, 8)


@pytest.mark.parametrize("discard_bytes", [0, 100, 1 << 40])
def test_a_discard_unit_that_makes_no_sense_is_the_block(discard_bytes: int) -> None:
    got = fields(DeviceShape(GIB, block_bytes=4096, discard_bytes=discard_bytes))
    assert got["discard_sector_alignment"] == 8


def test_a_read_only_disk_discards_nothing() -> None:
    shape = DeviceShape(GIB, read_only=True)
    assert Feature.RO in feature_bits(shape)
    assert not feature_bits(shape) & (Feature.DISCARD | Feature.WRITE_ZEROES)
    got = fields(shape)
    assert not any(got[name] for name in FIELDS if "discard" in name or "zeroes" in name)


def test_the_features_are_those_that_qemu_passes_on() -> None:
    passed_on = {1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 24, 26, 28, 29, 30, 32, 33, 34, 35, 40}
    offered = int(feature_bits(DeviceShape(GIB)))
    assert {bit for bit in range(64) if offered >> bit & 1} <= passed_on
    assert offered == BlkDevice(DeviceShape(GIB)).features
    assert not offered & Feature.RO


def test_the_mode_of_the_write_cache() -> None:
    device = BlkDevice(DeviceShape(GIB))
    assert device.read_config(32, 1, writeback=True) == b"\1"
    assert device.read_config(32, 1, writeback=False) == b"\0"
    without = device.read_config(0, 60, writeback=False)
    assert without[:32] == config_space(device.shape, writeback=True)[:32]
    assert device.read_config(30, 3, writeback=True) == b"\0\0\1"


@given(st.integers(0, 1 << 55))
def test_the_geometry_never_exceeds_the_disk(sectors: int) -> None:
    cylinders, heads, track = geometry(sectors)
    assert cylinders <= 65535
    assert heads <= 255
    assert track <= 63
    assert cylinders * heads * track <= sectors
    if 63 * 16 <= sectors <= 63 * 255 * 65535:
        assert sectors - cylinders * heads * track < heads * track


@given(st.sampled_from([512, 1024, 2048, 4096]), st.integers(0, 1 << 33))
def test_any_physical_block(block_bytes: int, physical: int) -> None:
    exponent = physical_block_exponent(block_bytes, physical)
    assert 0 <= exponent <= 15
    assert exponent == 0 or physical >= block_bytes << exponent


@pytest.mark.parametrize(
    "wrong",
    [
        {"capacity_bytes": 513},
        {"capacity_bytes": -512},
        {"capacity_bytes": 512, "block_bytes": 4096},
        {"capacity_bytes": 0, "block_bytes": 256},
        {"capacity_bytes": 0, "block_bytes": 1536},
        {"capacity_bytes": 0, "num_queues": 0},
        {"capacity_bytes": 0, "num_queues": 65},
    ],
)
def test_impossible_shapes(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"queues|blocks|block of"):
        DeviceShape(**wrong)  # type: ignore[arg-type]


def test_the_limits_are_the_engine_s() -> None:
    header = (Path(__file__).parents[2] / "c_shim" / "shim_api.h").read_text()
    limits = {name: int(value) for name, value in re.findall(r"\b(VS_\w+) = (\d+)", header)}
    assert limits["VS_MAX_QUEUES"] == virtio_blk.QUEUES_MAX
    assert limits["VS_MAX_QUEUE_SIZE"] == rules.QUEUE_ENTRIES_MAX
    assert limits["VS_MAX_ATTACHMENTS"] == server.ATTACHMENTS_MAX
    assert limits["VS_MAX_MEM_SLOTS"] == rules.MEM_SLOTS
    assert limits["VS_INFLIGHT_RING_BYTES"] == rules.INFLIGHT_RING_BYTES
    assert limits["VS_INFLIGHT_PACKED_RING_BYTES"] == rules.INFLIGHT_PACKED_RING_BYTES
    assert limits["VS_MEM_TABLE_REGIONS"] == payloads.MEM_TABLE_REGIONS_MAX
    assert limits["VS_SEGMENT_MAX"] == virtio_blk.SEGMENTS_MAX
    assert limits["VS_SEGMENT_BYTES_MAX"] == virtio_blk.SEGMENT_BYTES_MAX
    assert limits["VS_ZERO_SECTORS_MAX"] == virtio_blk.ZERO_SECTORS_MAX
    # The largest request fits into what the engine takes as one.
    assert limits["VS_REQUEST_BYTES_MAX"] >= virtio_blk.SEGMENTS_MAX * virtio_blk.SEGMENT_BYTES_MAX
    assert payloads.CONFIG_BYTES_MAX == CONFIG_BYTES
    assert SECTOR_BYTES == 512
    assert messages.Request.SET_CONFIG in rules.RULES
