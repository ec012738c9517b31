# SPDX-License-Identifier: Apache-2.0
"""The wire format: every request's form, and everything that is not of that form."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.fakes import REGION, region
from tests.protocol.traces import TRACES
from vhostsync.errors import FrontendError
from vhostsync.vhost_user.attachment import MemoryRegion
from vhostsync.vhost_user.messages import (
    FORMATS,
    HEADER,
    BackendRequest,
    Header,
    Message,
    Request,
    encode_reply,
    encode_request,
    parse_header,
    parse_message,
)
from vhostsync.vhost_user.payloads import (
    U64,
    ConfigAccess,
    Empty,
    InflightArea,
    LogArea,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
    encode_payload,
    overlap,
)

U64_MAX = (1 << 64) - 1
SAMPLES: dict[Request, tuple[Payload, int]] = {
    Request.GET_FEATURES: (Empty(), 0),
    Request.SET_FEATURES: (U64(U64_MAX), 0),
    Request.SET_OWNER: (Empty(), 0),
    Request.RESET_OWNER: (Empty(), 0),
    Request.SET_MEM_TABLE: (MemoryTable((region(0), region(1))), 2),
    Request.SET_LOG_BASE: (LogArea(4096, 0), 1),
    Request.SET_LOG_FD: (Empty(), 1),
    Request.SET_VRING_NUM: (VringState(3, 256), 0),
    Request.SET_VRING_ADDR: (VringAddress(1, 0x1000, 0x3000, 0x2000, 0x99), 0),
    Request.SET_VRING_BASE: (VringState(3, 9), 0),
    Request.GET_VRING_BASE: (VringState(3, 0), 0),
    Request.SET_VRING_KICK: (VringFile(2, True), 1),
    Request.SET_VRING_CALL: (VringFile(255, True), 1),
    Request.SET_VRING_ERR: (VringFile(0, True), 1),
    Request.GET_PROTOCOL_FEATURES: (Empty(), 0),
    Request.SET_PROTOCOL_FEATURES: (U64(1), 0),
    Request.GET_QUEUE_NUM: (Empty(), 0),
    Request.SET_VRING_ENABLE: (VringState(0, 1), 0),
    Request.SET_BACKEND_REQ_FD: (Empty(), 1),
    Request.GET_CONFIG: (ConfigAccess(0x100, 0, bytes(60)), 0),
    Request.SET_CONFIG: (ConfigAccess(32, 1, b"\1", padding_bytes=255), 0),
    Request.GET_INFLIGHT_FD: (InflightArea(0, 0, 4, 128, 24), 0),
    Request.SET_INFLIGHT_FD: (InflightArea(8192, 0, 4, 128, 20), 1),
    Request.RESET_DEVICE: (Empty(), 0),
    Request.GET_MAX_MEM_SLOTS: (Empty(), 0),
    Request.ADD_MEM_REG: (SingleRegion(REGION), 1),
    Request.REM_MEM_REG: (SingleRegion(REGION), 0),
}


def parse(data: bytes, fd_count: int = 0) -> Message:
    """A whole message from its bytes."""
    header = parse_header(data[: HEADER.size])
    return parse_message(header, data[HEADER.size :], fd_count)


def payload_of(request: Request, data: bytes, fd_count: int = 0) -> Payload:
    return parse(encode_request(request, data), fd_count).payload


def test_samples_cover_every_request_that_is_read() -> None:
    assert SAMPLES.keys() == FORMATS.keys()


@pytest.mark.parametrize("request_", SAMPLES, ids=lambda request: request.name)
@pytest.mark.parametrize("need_reply", [False, True])
def test_what_is_sent_is_what_is_read(request_: Request, need_reply: bool) -> None:
    payload, fds = SAMPLES[request_]
    data = encode_request(request_, encode_payload(payload), need_reply=need_reply)
    assert parse(data, fds) == Message(request_, payload, need_reply)


@pytest.mark.parametrize("name", TRACES)
def test_what_real_frontends_send_is_read(name: str) -> None:
    for sent in TRACES[name]:
        data = encode_request(sent.request, encode_payload(sent.payload), need_reply=sent.need_reply)
        assert parse(data, sent.fds) == Message(sent.request, sent.payload, sent.need_reply)


def test_the_layout_is_the_specification_s() -> None:
    message = HEADER.pack(9, 0x1, 40) + struct.pack("=IIQQQQ", 1, 1, 0x10, 0x24, 0x32, 0x40)
    assert parse(message).payload == VringAddress(queue=1, desc=0x10, used=0x24, avail=0x32, log=0x40)
    message = HEADER.pack(5, 0x1, 40) + struct.pack("=IIQQQQ", 1, 0, 0x1000, 0x2000, 0x3000, 0x4000)
    assert parse(message, 1).payload == MemoryTable((MemoryRegion(0x1000, 0x2000, 0x3000, 0x4000),))
    message = HEADER.pack(37, 0x9, 40) + struct.pack("=QQQQQ", 0, 0x1000, 0x2000, 0x3000, 0x4000)
    assert parse(message, 1).payload == SingleRegion(MemoryRegion(0x1000, 0x2000, 0x3000, 0x4000))
    message = HEADER.pack(25, 0x1, 13) + struct.pack("=III", 32, 1, 0) + b"\1"
    assert parse(message).payload == ConfigAccess(32, 0, b"\1")
    assert encode_reply(Request.GET_FEATURES, b"12345678") == HEADER.pack(1, 0x5, 8) + b"12345678"
    assert encode_request(BackendRequest.CONFIG_CHANGE_MSG) == HEADER.pack(2, 0x1, 0)


@pytest.mark.parametrize("request_", SAMPLES, ids=lambda request: request.name)
def test_every_other_size_is_refused(request_: Request) -> None:
    payload, fds = SAMPLES[request_]
    right = len(encode_payload(payload))
    form = FORMATS[request_]
    for size in [*range(300), 4096, 1 << 31, (1 << 32) - 1]:
        header = HEADER.pack(request_, 1, size)
        if form.least_bytes <= size <= form.most_bytes:
            assert parse_header(header) == Header(request_, False, size)
            if size != right and request_ not in (Request.GET_INFLIGHT_FD, Request.SET_INFLIGHT_FD):
                # Within the bounds, but not what its own content says.
                data = encode_payload(payload)[:size].ljust(size, b"\0")
                if request_ is Request.SET_MEM_TABLE and size > right and (size - right) % 32 == 0:
                    assert payload_of(request_, data, fds) == payload  # room for more, unused (virtio_uml)
                elif isinstance(payload, ConfigAccess) and size >= 12 + len(payload.data):
                    spare = size - 12 - len(payload.data)  # room for more, unused (SPDK)
                    assert payload_of(request_, data, fds) == replace(payload, padding_bytes=spare)
                else:
                    with pytest.raises(FrontendError, match=request_.name):
                        payload_of(request_, data, fds)
        else:
            with pytest.raises(FrontendError, match=f"{request_.name} with a payload of {size} bytes"):
                parse_header(header)


@pytest.mark.parametrize("request_", SAMPLES, ids=lambda request: request.name)
def test_descriptors_only_where_they_belong(request_: Request) -> None:
    payload, fds = SAMPLES[request_]
    data = encode_request(request_, encode_payload(payload))
    allowed = {0, 1} if request_ is Request.REM_MEM_REG else {fds}
    for count in range(9):
        if count in allowed:
            assert parse(data, count).payload == payload
        else:
            with pytest.raises(FrontendError, match=f"{request_.name} came with {count} descriptors"):
                parse(data, count)


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_a_ring_s_descriptor_and_its_flag_agree(request_: Request) -> None:
    without = encode_payload(VringFile(1, has_fd=False))
    assert payload_of(request_, without) == VringFile(1, has_fd=False)
    with pytest.raises(FrontendError, match="came with 1 descriptors"):
        payload_of(request_, without, 1)
    with pytest.raises(FrontendError, match="unknown flags"):
        payload_of(request_, struct.pack("=Q", 0x200), 1)


@pytest.mark.parametrize("number", [0, *(set(range(19, 64)) - {int(one) for one in FORMATS}), (1 << 32) - 1])
def test_unknown_and_unoffered_requests(number: int) -> None:
    with pytest.raises(FrontendError, match=r"unknown request|not offered"):
        parse_header(HEADER.pack(number, 1, 0))


@pytest.mark.parametrize("flags", [0x0, 0x2, 0x3, 0x5, 0xD, 0x11, 0x80000001, 0xFFFFFFFF])
def test_other_flags(flags: int) -> None:
    with pytest.raises(FrontendError):
        parse_header(HEADER.pack(Request.GET_FEATURES, flags, 0))


@pytest.mark.parametrize(
    "impossible",
    [
        MemoryRegion(0, 0, 0, 0),
        MemoryRegion(U64_MAX, 2, 0, 0),
        MemoryRegion(0, 0x1000, U64_MAX - 0xFFE, 0),
        MemoryRegion(0, 0x1000, 0, (1 << 63) - 1),
        MemoryRegion(0, U64_MAX, 0, U64_MAX),
    ],
)
def test_impossible_regions(impossible: MemoryRegion) -> None:
    with pytest.raises(FrontendError, match="impossible memory region"):
        payload_of(Request.ADD_MEM_REG, encode_payload(SingleRegion(impossible)), 1)
    with pytest.raises(FrontendError, match="impossible memory region"):
        payload_of(Request.SET_MEM_TABLE, encode_payload(MemoryTable((impossible,))), 1)


def test_a_removed_region_s_offset_is_ignored() -> None:
    sent = SingleRegion(MemoryRegion(1, 2, 3, U64_MAX))
    assert payload_of(Request.REM_MEM_REG, encode_payload(sent)) == SingleRegion(MemoryRegion(1, 2, 3, 0))


@pytest.mark.parametrize("count", [0, 9, 1 << 31])
def test_impossible_tables(count: int) -> None:
    data = struct.pack("=II", count, 0) + bytes(8 * 32)
    with pytest.raises(FrontendError, match="SET_MEM_TABLE"):
        payload_of(Request.SET_MEM_TABLE, data, min(count, 8))


def test_a_table_with_room_for_eight() -> None:
    regions = tuple(region(number) for number in range(8))
    assert payload_of(Request.SET_MEM_TABLE, encode_payload(MemoryTable(regions)), 8) == MemoryTable(regions)


@pytest.mark.parametrize(
    ("desc", "used", "avail"), [(8, 4, 2), (16, 2, 2), (16, 4, 1), (U64_MAX, U64_MAX, U64_MAX)]
)
def test_misaligned_rings(desc: int, used: int, avail: int) -> None:
    data = struct.pack("=IIQQQQ", 0, 0, desc, used, avail, 0)
    with pytest.raises(FrontendError, match="misaligned"):
        payload_of(Request.SET_VRING_ADDR, data)


def test_the_log_address_counts_only_with_its_flag() -> None:
    data = struct.pack("=IIQQQQ", 0, 0, 0, 0, 0, U64_MAX)  # virtio_uml
    assert payload_of(Request.SET_VRING_ADDR, data) == VringAddress(0, 0, 0, 0, None)
    with pytest.raises(FrontendError, match="unknown flags"):
        payload_of(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 2, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("offset", "size", "flags", "content"),
    [
        (0, 60, 0, bytes(59)),
        (0, 257, 0, bytes(256)),
        (0, U64_MAX >> 32, 0, bytes(256)),
        (0, 0, 0, b"\0"),
        (1, 256, 0, bytes(256)),
        (255, 2, 0, bytes(2)),  # the end and the old start are no neighbours
        (0x100, 256 + 1, 0, bytes(256)),
        (0x101, 256, 0, bytes(256)),
        (0x200, 1, 0, b"\0"),
        (U64_MAX >> 32, 2, 0, bytes(2)),
        (0, 1, 4, b"\0"),
    ],
)
@pytest.mark.parametrize("request_", [Request.GET_CONFIG, Request.SET_CONFIG])
def test_impossible_config_accesses(
    request_: Request, offset: int, size: int, flags: int, content: bytes
) -> None:
    with pytest.raises(FrontendError, match="config space access"):
        payload_of(request_, struct.pack("=III", offset, size, flags) + content)


@pytest.mark.parametrize("size", [21, 22, 23])
def test_impossible_inflight_descriptions(size: int) -> None:
    with pytest.raises(FrontendError, match="inflight description"):
        payload_of(Request.GET_INFLIGHT_FD, bytes(size))


def test_an_impossible_log() -> None:
    for area in (LogArea(0, 0), LogArea(U64_MAX, 1)):
        with pytest.raises(FrontendError, match="impossible dirty log"):
            payload_of(Request.SET_LOG_BASE, encode_payload(area), 1)


def test_overlap() -> None:
    assert overlap([region(2), region(0), region(1)]) is None
    low, high = MemoryRegion(0, 0x1001, 0, 0), MemoryRegion(0x1000, 0x1000, 0x10000, 0)
    assert overlap([high, low]) == (low, high)


@given(st.binary(min_size=12, max_size=12))
def test_any_header_is_read_or_refused(data: bytes) -> None:
    try:
        header = parse_header(data)
    except FrontendError:
        return
    assert header.payload_bytes <= 268  # nobody makes the backend wait for, or keep, a large payload


@given(st.sampled_from(sorted(FORMATS)), st.data(), st.integers(0, 9))
def test_any_payload_is_read_or_refused(request_: Request, data: st.DataObject, fds: int) -> None:
    form = FORMATS[request_]
    content = data.draw(st.binary(min_size=form.least_bytes, max_size=form.most_bytes))
    try:
        message = parse_message(Header(request_, False, len(content)), content, fds)
    except FrontendError:
        return
    # What was accepted reads the same again.
    again = encode_payload(message.payload)
    assert parse_message(Header(request_, False, len(again)), again, fds) == message
