# SPDX-License-Identifier: Apache-2.0
"""The virtio-blk device as a frontend sees it: feature bits and config space.

Source: virtio 1.2, 5.2 "Block Device" (struct virtio_blk_config), and linux/virtio_blk.h for the offsets. No
I/O and no requests here; those are the data plane's. Whatever a frontend may read beyond the fields that are
offered reads as zero.
"""

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from vhostsync.record.state_record import GuestDisk

SECTOR_BYTES: Final = 512
CONFIG_BYTES: Final = 256  # the most that a frontend asks for
WRITEBACK_OFFSET: Final = 32

# The engine's limits are in c_shim/shim_api.h (enum vs_limit); tests/protocol/test_virtio_blk.py compares.
SEGMENTS_MAX: Final = 126
SEGMENT_BYTES_MAX: Final = 65536
ZERO_SECTORS_MAX: Final = 524288  # in one DISCARD or WRITE_ZEROES
QUEUES_MAX: Final = 64

_CYLINDERS_MAX: Final = 65535
_EXPONENT_MAX: Final = 15  # min_io_size is a 16-bit number of logical blocks
# capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, physical_block_exp, alignment_offset,
# min_io_size, opt_io_size, writeback, unused, num_queues, max_discard_sectors, max_discard_seg,
# discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIB")


class Feature(IntFlag):
    """Feature bits (values, not bit numbers): virtio 1.2, 5.2.3 and 6, and the two of vhost-user."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34


_ALWAYS: Final = (
    Feature.VERSION_1
    | Feature.PROTOCOL_FEATURES
    | Feature.LOG_ALL
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.RING_PACKED
    | Feature.SIZE_MAX
    | Feature.SEG_MAX
    | Feature.GEOMETRY
    | Feature.BLK_SIZE
    | Feature.TOPOLOGY
    | Feature.FLUSH
    | Feature.CONFIG_WCE
    | Feature.MQ
)


@dataclass(frozen=True)
class DeviceShape:
    """What the guest sees of the disk, fixed for the life of the device.

    `block_bytes` is the guest's logical block, `physical_block_bytes` what the disk would rather be written
    in, `discard_bytes` the unit in which it gives room back (0: not known). `writeback` is the write cache
    mode at the start and after a device reset.
    """

    capacity_bytes: int
    block_bytes: int = 512
    physical_block_bytes: int = 512
    discard_bytes: int = 0
    num_queues: int = 1
    read_only: bool = False
    writeback: bool = True
    packed_rings: bool = True  # offered

    def __post_init__(self) -> None:
        if self.block_bytes < SECTOR_BYTES or not _is_power_of_two(self.block_bytes):
            raise ValueError(f"a logical block of {self.block_bytes} bytes")
        if self.capacity_bytes < 0 or self.capacity_bytes % self.block_bytes:
            raise ValueError(f"{self.capacity_bytes} bytes are no number of {self.block_bytes}-byte blocks")
        if not 1 <= self.num_queues <= QUEUES_MAX:
            raise ValueError(f"{self.num_queues} queues (1 to {QUEUES_MAX} are possible)")

    @property
    def guest(self) -> GuestDisk:
        """What the state record keeps of it."""
        return GuestDisk(
            self.capacity_bytes, self.block_bytes, self.physical_block_bytes, self.discard_bytes
        )


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors a track whose product is as near to `sectors` (of 512 bytes) as the
    16-bit cylinders allow and never above it. For firmware and old tools only."""
    track = min(63, sectors)
    if sectors < 63 * 16:
        heads = 1
    elif sectors <= 63 * 16 * 16383:  # as ATA disks of up to 8.4 GB say it
        heads = 16
    else:
        heads = 255
    cylinders = min(_CYLINDERS_MAX, sectors // (heads * track)) if track else 0
    return cylinders, heads if track else 0, track


def physical_block_exponent(block_bytes: int, physical_block_bytes: int) -> int:
    """log2 of the logical blocks in a physical one; 0 where the physical size says nothing sensible."""
    if not _is_power_of_two(physical_block_bytes) or physical_block_bytes <= block_bytes:
        return 0
    return min(_EXPONENT_MAX, (physical_block_bytes // block_bytes).bit_length() - 1)


def feature_bits(shape: DeviceShape) -> Feature:
    """What the device offers. A read-only one has nothing to discard."""
    offered = _ALWAYS if shape.packed_rings else _ALWAYS & ~Feature.RING_PACKED
    if shape.read_only:
        return offered | Feature.RO
    return offered | Feature.DISCARD | Feature.WRITE_ZEROES


def config_space(shape: DeviceShape, *, writeback: bool) -> bytes:
    """All CONFIG_BYTES bytes of it. Fields of features that are not offered are zero."""
    exponent = physical_block_exponent(shape.block_bytes, shape.physical_block_bytes)
    block_sectors = shape.block_bytes // SECTOR_BYTES
    zero_sectors = 0 if shape.read_only else ZERO_SECTORS_MAX // block_sectors * block_sectors
    zero_segments = 0 if shape.read_only else 1
    discard_bytes = shape.block_bytes
    if shape.discard_bytes % shape.block_bytes == 0 and shape.discard_bytes // SECTOR_BYTES <= zero_sectors:
        discard_bytes = max(discard_bytes, shape.discard_bytes)
    fields = _CONFIG.pack(
        shape.capacity_bytes // SECTOR_BYTES,
        SEGMENT_BYTES_MAX,
        SEGMENTS_MAX,
        *geometry(shape.capacity_bytes // SECTOR_BYTES),
        shape.block_bytes,
        exponent,
        0,  # the first logical block is aligned
        1 << exponent,
        0,  # no optimal size known
        int(writeback),
        shape.num_queues,
        zero_sectors,
        zero_segments,
        discard_bytes // SECTOR_BYTES if zero_segments else 0,
        zero_sectors,
        zero_segments,
        zero_segments,  # WRITE_ZEROES may unmap
    )
    return fields.ljust(CONFIG_BYTES, b"\0")


class BlkDevice:
    """The device that all attachments share. The write cache mode is each attachment's own, in the engine: it
    outlives a connection (QEMU reconnects without telling the backend again), and goes back to the shape's
    with a device reset, if no other frontend is connected."""

    def __init__(self, shape: DeviceShape) -> None:
        self.shape = shape
        self.features = int(feature_bits(shape))

    def read_config(self, offset: int, size: int, *, writeback: bool) -> bytes:
        """`size` bytes of the config space at `offset`, both within CONFIG_BYTES."""
        assert offset >= 0 and size >= 0 and offset + size <= CONFIG_BYTES
        return config_space(self.shape, writeback=writeback)[offset : offset + size]
