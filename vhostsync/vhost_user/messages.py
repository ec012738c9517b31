# SPDX-License-Identifier: Apache-2.0
"""The vhost-user wire format: headers, and which requests with which payloads a frontend may send at all.

Source: QEMU docs/interop/vhost-user.rst, "Message Specification" and "Front-end message types". Numbers are
in the machine's byte order. Nothing here knows a state or a socket: `parse_header` looks at 12 bytes,
`parse_message` at a payload and at how many descriptors came with it. Whatever is unknown, short, oversized
or impossible raises FrontendError with a sentence that says what it was.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from ..errors import FrontendError
from . import payloads
from .payloads import MemoryTable, Payload, VringFile

HEADER: Final = struct.Struct("=III")
VERSION: Final = 1
VERSION_MASK: Final = 0x3
FLAG_REPLY: Final = 0x4
FLAG_NEED_REPLY: Final = 0x8
FLAGS_KNOWN: Final = VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY


class Request(IntEnum):
    """Requests of a frontend. Those without an entry in `FORMATS` belong to features never offered here."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """Requests of the backend, on the channel that SET_BACKEND_REQ_FD gave."""

    CONFIG_CHANGE_MSG = 2


class ProtocolFeature(IntFlag):
    """Protocol feature bits (values, not bit numbers)."""

    NONE = 0
    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15


@dataclass(frozen=True)
class Format:
    """How a request's payload looks: its least and greatest size in bytes, how to read it, and how many
    descriptors may come with it."""

    least_bytes: int
    most_bytes: int
    parse: Callable[[bytes], Payload]
    least_fds: int = 0
    most_fds: int = 0


def _fixed(size: int, parse: Callable[[bytes], Payload], least_fds: int = 0, most_fds: int = 0) -> Format:
    return Format(size, size, parse, least_fds, most_fds)


_NOTHING: Final = _fixed(0, payloads.parse_empty)
_NUMBER: Final = _fixed(payloads.U64_BYTES, payloads.parse_u64)
_RING_NUMBER: Final = _fixed(payloads.VRING_STATE_BYTES, payloads.parse_vring_state)
_RING_ADDRESS: Final = _fixed(payloads.VRING_ADDRESS_BYTES, payloads.parse_vring_address)
_RING_FILE: Final = _fixed(payloads.U64_BYTES, payloads.parse_vring_file, 0, 1)  # exactly: see parse_message
_TABLE: Final = Format(
    payloads.TABLE_LEAST_BYTES,
    payloads.TABLE_MOST_BYTES,
    payloads.parse_memory_table,
    1,
    payloads.MEM_TABLE_REGIONS_MAX,
)
_ADDED: Final = _fixed(payloads.SINGLE_REGION_BYTES, payloads.parse_added_region, 1, 1)
# "The back-end MAY accept messages with one file descriptor … MUST close it without using it otherwise."
_REMOVED: Final = _fixed(payloads.SINGLE_REGION_BYTES, payloads.parse_removed_region, 0, 1)
_CONFIG: Final = Format(payloads.CONFIG_LEAST_BYTES, payloads.CONFIG_MOST_BYTES, payloads.parse_config_access)
_INFLIGHT_SIZES: Final = (payloads.INFLIGHT_BYTES, payloads.INFLIGHT_PADDED_BYTES)

FORMATS: Final[dict[Request, Format]] = {
    Request.GET_FEATURES: _NOTHING,
    Request.SET_FEATURES: _NUMBER,
    Request.SET_OWNER: _NOTHING,
    Request.RESET_OWNER: _NOTHING,
    Request.SET_MEM_TABLE: _TABLE,
    Request.SET_LOG_BASE: _fixed(payloads.LOG_AREA_BYTES, payloads.parse_log_area, 1, 1),
    Request.SET_LOG_FD: _fixed(0, payloads.parse_empty, 1, 1),
    Request.SET_VRING_NUM: _RING_NUMBER,
    Request.SET_VRING_ADDR: _RING_ADDRESS,
    Request.SET_VRING_BASE: _RING_NUMBER,
    Request.GET_VRING_BASE: _RING_NUMBER,
    Request.SET_VRING_KICK: _RING_FILE,
    Request.SET_VRING_CALL: _RING_FILE,
    Request.SET_VRING_ERR: _RING_FILE,
    Request.GET_PROTOCOL_FEATURES: _NOTHING,
    Request.SET_PROTOCOL_FEATURES: _NUMBER,
    Request.GET_QUEUE_NUM: _NOTHING,
    Request.SET_VRING_ENABLE: _RING_NUMBER,
    Request.SET_BACKEND_REQ_FD: _fixed(0, payloads.parse_empty, 1, 1),
    Request.GET_CONFIG: _CONFIG,
    Request.SET_CONFIG: _CONFIG,
    Request.GET_INFLIGHT_FD: Format(*_INFLIGHT_SIZES, payloads.parse_inflight),
    Request.SET_INFLIGHT_FD: Format(*_INFLIGHT_SIZES, payloads.parse_inflight, 1, 1),
    Request.RESET_DEVICE: _NOTHING,
    Request.GET_MAX_MEM_SLOTS: _NOTHING,
    Request.ADD_MEM_REG: _ADDED,
    Request.REM_MEM_REG: _REMOVED,
}


@dataclass(frozen=True)
class Header:
    """A request's header that was found to be in order."""

    request: Request
    need_reply: bool
    payload_bytes: int


@dataclass(frozen=True)
class Message:
    """One whole request."""

    request: Request
    payload: Payload
    need_reply: bool = False


def parse_header(data: bytes) -> Header:
    """The header in these 12 bytes. FrontendError for anything but a request that can be read here."""
    number, flags, payload_bytes = HEADER.unpack(data)
    if flags & VERSION_MASK != VERSION:
        raise FrontendError(f"a message of protocol version {flags & VERSION_MASK} (only {VERSION} exists)")
    if flags & ~FLAGS_KNOWN:
        raise FrontendError(f"a message with unknown flags {flags:#x}")
    try:
        request = Request(number)
    except ValueError:
        raise FrontendError(f"unknown request {number}") from None
    if flags & FLAG_REPLY:
        raise FrontendError(f"{request.name} came marked as a reply, which nobody asked for")
    form = FORMATS.get(request)
    if form is None:
        raise FrontendError(f"{request.name} ({number}) belongs to a feature that was not offered")
    if not form.least_bytes <= payload_bytes <= form.most_bytes:
        expected = _range(form.least_bytes, form.most_bytes)
        raise FrontendError(f"{request.name} with a payload of {payload_bytes} bytes (expected {expected})")
    return Header(request, bool(flags & FLAG_NEED_REPLY), payload_bytes)


def parse_message(header: Header, data: bytes, fd_count: int) -> Message:
    """The message of this header, payload and number of descriptors. FrontendError where they do not fit."""
    assert len(data) == header.payload_bytes
    form = FORMATS[header.request]
    name = header.request.name
    try:
        payload = form.parse(data)
    except FrontendError as error:
        raise FrontendError(f"{name}: {error}") from error
    least, most = form.least_fds, form.most_fds
    if isinstance(payload, MemoryTable):
        least = most = len(payload.regions)
    elif isinstance(payload, VringFile):
        least = most = int(payload.has_fd)
    if not least <= fd_count <= most:
        raise FrontendError(f"{name} came with {fd_count} descriptors (expected {_range(least, most)})")
    return Message(header.request, payload, header.need_reply)


def _range(least: int, most: int) -> str:
    return f"{least}" if least == most else f"{least} to {most}"


def encode_reply(request: Request, payload: bytes) -> bytes:
    """A whole reply to `request`."""
    return HEADER.pack(request, VERSION | FLAG_REPLY, len(payload)) + payload


def encode_request(
    request: Request | BackendRequest, payload: bytes = b"", *, need_reply: bool = False
) -> bytes:
    """A whole request: the backend's own, and for frontends in tests."""
    flags = VERSION | (FLAG_NEED_REPLY if need_reply else 0)
    return HEADER.pack(request, flags, len(payload)) + payload
