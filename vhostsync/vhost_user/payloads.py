# SPDX-License-Identifier: Apache-2.0
"""Payloads of vhost-user messages: what they hold, and how they are read and written.

Source: QEMU docs/interop/vhost-user.rst, "Payload". Numbers are in the machine's byte order. A reader
(`parse_…`) gets bytes of a size that `messages.FORMATS` allows and raises FrontendError for what is
impossible in itself; what depends on the state is not its business.
"""

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import FrontendError
from .attachment import MemoryRegion

MEM_TABLE_REGIONS_MAX: Final = 8
"""Regions (and descriptors) in one SET_MEM_TABLE, and so the most descriptors in any message."""
MESSAGE_FDS_MAX: Final = MEM_TABLE_REGIONS_MAX
CONFIG_BYTES_MAX: Final = 256
"""Size of the config space that any frontend asks for (QEMU: VHOST_USER_MAX_CONFIG_SIZE)."""
CONFIG_OLD_START: Final = 0x100
"""Where frontends that follow an older reading of the specification (cloud-hypervisor before 51.0) begin."""

VRING_INDEX_MASK: Final = 0xFF
VRING_NOFD_MASK: Final = 0x100
VRING_F_LOG: Final = 1

FEATURE_LOG_ALL: Final = 1 << 26
FEATURE_PROTOCOL_FEATURES: Final = 1 << 30


@dataclass(frozen=True)
class Empty:
    """No payload."""


@dataclass(frozen=True)
class U64:
    """A 64-bit number."""

    value: int


@dataclass(frozen=True)
class VringState:
    """A ring and a number about it: its size, base, or whether it is enabled."""

    queue: int
    num: int


@dataclass(frozen=True)
class VringAddress:
    """User addresses of a ring's three parts, and the guest address under which `used` is logged; None where
    the frontend's flag says that it is not (the field then holds anything: virtio_uml sends ~0)."""

    queue: int
    desc: int
    used: int
    avail: int
    log: int | None


@dataclass(frozen=True)
class VringFile:
    """A ring whose kick, call or error descriptor comes with the message, or (`has_fd` False) goes away."""

    queue: int
    has_fd: bool


@dataclass(frozen=True)
class MemoryTable:
    """All regions, each with a descriptor in the same order."""

    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True)
class SingleRegion:
    """One region to add or to remove."""

    region: MemoryRegion


@dataclass(frozen=True)
class ConfigAccess:
    """A part of the device's config space: `data` is what to write (SET_CONFIG) or a place holder of the size
    to read (GET_CONFIG). `offset` is as the frontend has it, for the answer. `flags` says what it is for (a
    guest's access or live migration: 0 and 1 of QEMU, 1 and 2 of rust-vmm). `padding_bytes` follow the data
    and mean nothing: SPDK sends room for 256 bytes whatever the size."""

    offset: int
    flags: int
    data: bytes
    padding_bytes: int = 0

    @property
    def start(self) -> int:
        """Where it begins, in bytes of the config space. Nothing of that lies beyond CONFIG_OLD_START, so who
        counts from there is understood."""
        return self.offset - CONFIG_OLD_START if self.offset >= CONFIG_OLD_START else self.offset


@dataclass(frozen=True)
class LogArea:
    """The dirty log within its descriptor; sizes in bytes."""

    log_bytes: int
    offset: int


@dataclass(frozen=True)
class InflightArea:
    """The inflight region within its descriptor. `wire_bytes` is the payload's own size: 20 is what the
    fields add up to, QEMU and rust-vmm send 24, and an answer has the size that was asked."""

    mmap_bytes: int
    mmap_offset: int
    queues: int
    queue_entries: int
    wire_bytes: int


Payload = (
    Empty
    | U64
    | VringState
    | VringAddress
    | VringFile
    | MemoryTable
    | SingleRegion
    | ConfigAccess
    | LogArea
    | InflightArea
)

_U64: Final = struct.Struct("=Q")
_VRING_STATE: Final = struct.Struct("=II")
_VRING_ADDRESS: Final = struct.Struct("=IIQQQQ")
_REGION: Final = struct.Struct("=QQQQ")
_TABLE_HEAD: Final = struct.Struct("=II")
_SINGLE_HEAD: Final = struct.Struct("=Q")
_CONFIG_HEAD: Final = struct.Struct("=III")
_CONFIG_FLAGS: Final = 3
_LOG_AREA: Final = struct.Struct("=QQ")
_INFLIGHT: Final = struct.Struct("=QQHH")
INFLIGHT_PADDED_BYTES: Final = 24

U64_BYTES: Final = _U64.size
VRING_STATE_BYTES: Final = _VRING_STATE.size
VRING_ADDRESS_BYTES: Final = _VRING_ADDRESS.size
SINGLE_REGION_BYTES: Final = _SINGLE_HEAD.size + _REGION.size
TABLE_LEAST_BYTES: Final = _TABLE_HEAD.size + _REGION.size
TABLE_MOST_BYTES: Final = _TABLE_HEAD.size + MEM_TABLE_REGIONS_MAX * _REGION.size
CONFIG_LEAST_BYTES: Final = _CONFIG_HEAD.size + 1
CONFIG_MOST_BYTES: Final = _CONFIG_HEAD.size + CONFIG_BYTES_MAX
LOG_AREA_BYTES: Final = _LOG_AREA.size
INFLIGHT_BYTES: Final = _INFLIGHT.size

_ADDRESS_END: Final = 1 << 64
_FILE_END: Final = (1 << 63) - 1
_RING_ALIGNMENT: Final = {"desc": 16, "avail": 2, "used": 4}  # virtio 1.1, 2.6 "Split Virtqueues"


def parse_empty(data: bytes) -> Empty:
    return Empty()


def parse_u64(data: bytes) -> U64:
    return U64(_U64.unpack(data)[0])


def parse_vring_state(data: bytes) -> VringState:
    return VringState(*_VRING_STATE.unpack(data))


def parse_vring_address(data: bytes) -> VringAddress:
    queue, flags, desc, used, avail, log = _VRING_ADDRESS.unpack(data)
    if flags & ~VRING_F_LOG:
        raise FrontendError(f"ring {queue} has unknown flags {flags:#x} beside its addresses")
    for name, address in (("desc", desc), ("used", used), ("avail", avail)):
        if address % _RING_ALIGNMENT[name]:
            raise FrontendError(f"the {name} part of ring {queue} is misaligned at {address:#x}")
    return VringAddress(queue, desc, used, avail, log if flags & VRING_F_LOG else None)


def parse_vring_file(data: bytes) -> VringFile:
    (value,) = _U64.unpack(data)
    if value & ~(VRING_INDEX_MASK | VRING_NOFD_MASK):
        raise FrontendError(f"a ring's descriptor came with unknown flags ({value:#x})")
    return VringFile(value & VRING_INDEX_MASK, not value & VRING_NOFD_MASK)


def _region(data: bytes) -> MemoryRegion:
    region = MemoryRegion(*_REGION.unpack(data))
    if (
        region.bytes == 0
        or region.guest_addr + region.bytes > _ADDRESS_END
        or region.user_addr + region.bytes > _ADDRESS_END
        or region.mmap_offset + region.bytes > _FILE_END
    ):
        raise FrontendError(f"an impossible memory region: {describe_region(region)}")
    return region


def parse_memory_table(data: bytes) -> MemoryTable:
    count, _padding = _TABLE_HEAD.unpack_from(data)
    if not 1 <= count <= MEM_TABLE_REGIONS_MAX:
        raise FrontendError(f"a memory table of {count} regions (1 to {MEM_TABLE_REGIONS_MAX} are possible)")
    used_bytes = _TABLE_HEAD.size + count * _REGION.size
    # Real frontends send those in use (QEMU), room for two (virtio_uml), or all eight as specified.
    if (len(data) - used_bytes) % _REGION.size or not used_bytes <= len(data) <= TABLE_MOST_BYTES:
        raise FrontendError(f"a memory table of {count} regions in {len(data)} bytes (expected {used_bytes})")
    parts = (data[at : at + _REGION.size] for at in range(_TABLE_HEAD.size, used_bytes, _REGION.size))
    return MemoryTable(tuple(_region(part) for part in parts))


def parse_added_region(data: bytes) -> SingleRegion:
    return SingleRegion(_region(data[_SINGLE_HEAD.size :]))


def parse_removed_region(data: bytes) -> SingleRegion:
    guest_addr, size, user_addr, _ = _REGION.unpack_from(data, _SINGLE_HEAD.size)
    return SingleRegion(MemoryRegion(guest_addr, size, user_addr, 0))  # "The mmap offset is ignored."


def parse_config_access(data: bytes) -> ConfigAccess:
    offset, size, flags = _CONFIG_HEAD.unpack_from(data)
    content = data[_CONFIG_HEAD.size :]
    if not 1 <= size <= len(content):
        raise FrontendError(f"a config space access of {size} bytes carries {len(content)}")
    if flags & ~_CONFIG_FLAGS:
        raise FrontendError(f"a config space access with unknown flags {flags:#x}")
    access = ConfigAccess(offset, flags, content[:size], len(content) - size)
    if access.start + size > CONFIG_BYTES_MAX:
        raise FrontendError(f"a config space access of {size} bytes at {offset:#x} (of {CONFIG_BYTES_MAX})")
    return access


def parse_log_area(data: bytes) -> LogArea:
    area = LogArea(*_LOG_AREA.unpack(data))
    if area.log_bytes == 0 or area.offset + area.log_bytes > _FILE_END:
        raise FrontendError(f"an impossible dirty log: {area.log_bytes} bytes at {area.offset:#x}")
    return area


def parse_inflight(data: bytes) -> InflightArea:
    if len(data) not in (_INFLIGHT.size, INFLIGHT_PADDED_BYTES):
        raise FrontendError(f"an inflight description of {len(data)} bytes")
    mmap_bytes, mmap_offset, queues, queue_entries = _INFLIGHT.unpack_from(data)
    return InflightArea(mmap_bytes, mmap_offset, queues, queue_entries, len(data))


def describe_region(region: MemoryRegion) -> str:
    """For error messages."""
    return (
        f"{region.bytes:#x} bytes at guest address {region.guest_addr:#x}, "
        f"user address {region.user_addr:#x}, offset {region.mmap_offset:#x}"
    )


def encode_u64(value: int) -> bytes:
    """Payload of a reply that is a number."""
    return _U64.pack(value)


def encode_vring_state(queue: int, num: int) -> bytes:
    """Payload about a ring."""
    return _VRING_STATE.pack(queue, num)


def encode_config(offset: int, flags: int, content: bytes, padding_bytes: int = 0) -> bytes:
    """Payload with a part of the config space, as long as the request's ("payload size MUST match")."""
    return _CONFIG_HEAD.pack(offset, len(content), flags) + content + bytes(padding_bytes)


def _encode_region(region: MemoryRegion) -> bytes:
    return _REGION.pack(region.guest_addr, region.bytes, region.user_addr, region.mmap_offset)


def encode_payload(payload: Payload) -> bytes:
    """The bytes that `parse_message` reads as `payload` (what a frontend sends)."""
    match payload:
        case Empty():
            return b""
        case U64(value):
            return _U64.pack(value)
        case VringState(queue, num):
            return _VRING_STATE.pack(queue, num)
        case VringAddress(queue, desc, used, avail, log):
            flags = 0 if log is None else VRING_F_LOG
            return _VRING_ADDRESS.pack(queue, flags, desc, used, avail, log or 0)
        case VringFile(queue, has_fd):
            return _U64.pack(queue | (0 if has_fd else VRING_NOFD_MASK))
        case MemoryTable(regions):
            return _TABLE_HEAD.pack(len(regions), 0) + b"".join(map(_encode_region, regions))
        case SingleRegion(region):
            return _SINGLE_HEAD.pack(0) + _encode_region(region)
        case ConfigAccess(offset, flags, data, padding_bytes):
            return encode_config(offset, flags, data, padding_bytes)
        case LogArea(log_bytes, offset):
            return _LOG_AREA.pack(log_bytes, offset)
        case InflightArea(mmap_bytes, mmap_offset, queues, queue_entries, wire_bytes):
            return _INFLIGHT.pack(mmap_bytes, mmap_offset, queues, queue_entries).ljust(wire_bytes, b"\0")


def overlap(regions: Sequence[MemoryRegion]) -> tuple[MemoryRegion, MemoryRegion] | None:
    """Two of these regions that share a guest address, or None."""
    ordered = sorted(regions, key=lambda region: region.guest_addr)
    for low, high in itertools.pairwise(ordered):
        if low.guest_addr + low.bytes > high.guest_addr:
            return low, high
    return None
