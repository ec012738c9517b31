# SPDX-License-Identifier: Apache-2.0
"""The state table: what each message leads to, where it is refused, and what is answered. No socket."""

import errno
import os
from dataclasses import replace

import pytest

from tests.protocol.desk import Desk
from tests.protocol.fakes import FD, SHAPE, WANTED, RecordingChannel, region, some_fds
from tests.protocol.traces import QEMU_PROTOCOL, RAM, RINGS_REGION, TRACES, Sent
from vhostsync.errors import FrontendError
from vhostsync.vhost_user.messages import FORMATS, Message, Request
from vhostsync.vhost_user.payloads import (
    FEATURE_PROTOCOL_FEATURES,
    U64,
    ConfigAccess,
    InflightArea,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
    encode_payload,
    encode_u64,
    encode_vring_state,
)
from vhostsync.vhost_user.rules import (
    INFLIGHT_PACKED_RING_BYTES,
    INFLIGHT_RING_BYTES,
    MEM_SLOTS,
    OFFERED,
    QUEUE_ENTRIES_MAX,
    RULES,
)
from vhostsync.vhost_user.session import Session
from vhostsync.vhost_user.virtio_blk import BlkDevice, DeviceShape, Feature

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leak")]

R = Request
VIRTIO = WANTED & ~Feature.PROTOCOL_FEATURES


def test_every_rule_has_a_form_and_every_gate_is_offered() -> None:
    assert RULES.keys() == FORMATS.keys()
    assert all(rule.needs & ~OFFERED == 0 for rule in RULES.values())


# ---- traces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACES)
async def test_what_real_frontends_send_is_obeyed(desk: Desk, name: str) -> None:
    for sent in TRACES[name]:
        reply = await desk.say(sent.request, sent.payload, sent.fds, need_reply=sent.need_reply)
        assert (reply is not None) == sent.replied, sent
        if sent.need_reply and not sent.request.name.startswith("GET_"):
            refused = isinstance(sent.payload, ConfigAccess) and sent.payload.start != 32
            assert reply == encode_u64(int(refused)), sent
        if sent.request is R.GET_CONFIG:
            assert reply is not None
            asked = encode_payload(sent.payload)
            assert (reply[:12], len(reply)) == (asked[:12], len(asked))  # rust-vmm takes no other answer
            assert reply[12:20] == (SHAPE.capacity_bytes // 512).to_bytes(8, "little")


@pytest.mark.parametrize("name", TRACES)
async def test_every_message_may_come_twice(desk: Desk, name: str) -> None:
    """A second GET, an ENABLE of an enabled ring, a new call descriptor, a replaced memory table: nothing of
    that is unusual. What adds or removes, and the size and base of a ring that runs, are the exceptions."""
    once = {R.ADD_MEM_REG, R.REM_MEM_REG}
    for sent in TRACES[name]:
        for _ in range(1 if sent.request in once else 2):
            await desk.say(sent.request, sent.payload, sent.fds, need_reply=sent.need_reply)


async def test_qemu_s_calls_on_the_engine(desk: Desk) -> None:
    for sent in TRACES["qemu 7.2"][: len(TRACES["qemu 7.2"]) // 2]:
        await desk.say(sent.request, sent.payload, sent.fds, need_reply=sent.need_reply)
    features = 0x1_0000_0046
    at = 0x7FD5_F800_0000
    given = 2 * INFLIGHT_RING_BYTES
    assert desk.calls[:17] == [
        ("set_vring_call", 0, FD),
        ("set_vring_err", 0, FD),
        ("set_vring_call", 1, FD),
        ("set_vring_err", 1, FD),
        ("set_features", features),
        ("set_inflight", FD, given, 0, 2),
        ("set_vring_call", 0, FD),
        ("set_vring_call", 1, FD),
        ("set_features", features),
        ("add_mem_region", RAM),
        ("set_vring_num", 0, 256),
        ("set_vring_base", 0, 0),
        ("set_vring_addr", 0, at, at + 0x2000, at + 0x1000, None),
        ("set_vring_kick", 0, FD),
        ("set_vring_enable", 0, True),
        ("set_vring_enable", 1, True),
        ("set_vring_enable", 0, False),
    ]


# ---- negotiation -----------------------------------------------------------------------------------------


async def test_what_is_offered(desk: Desk) -> None:
    assert await desk.say(R.GET_FEATURES) == encode_u64(desk.blk.features)
    assert await desk.say(R.GET_PROTOCOL_FEATURES) == encode_u64(0xB22B)
    assert await desk.say(R.GET_QUEUE_NUM) == encode_u64(4)
    await desk.negotiate()
    assert await desk.say(R.GET_MAX_MEM_SLOTS) == encode_u64(MEM_SLOTS)
    assert desk.calls == []


@pytest.mark.parametrize("wire_bytes", [20, 24])
async def test_inflight_region(desk: Desk, wire_bytes: int) -> None:
    """The answer has the size that was asked, and room for 1024 descriptors a ring whatever was asked."""
    await desk.negotiate()
    asked = InflightArea(0, 0, 2, 64, wire_bytes)
    reply = await desk.say(R.GET_INFLIGHT_FD, asked)
    assert reply == encode_payload(InflightArea(2 * INFLIGHT_RING_BYTES, 0, 2, 64, wire_bytes))
    assert os.fstat(desk.shared[0].fileno()).st_size == 2 * INFLIGHT_RING_BYTES
    await desk.say(R.SET_INFLIGHT_FD, InflightArea(2 * INFLIGHT_RING_BYTES, 0, 2, 64, wire_bytes), 1)
    assert desk.calls == [("set_inflight", FD, 2 * INFLIGHT_RING_BYTES, 0, 2)]
    for queues in (0, 5):
        for request, fds in ((R.GET_INFLIGHT_FD, 0), (R.SET_INFLIGHT_FD, 1)):
            with pytest.raises(FrontendError, match=f"for {queues} rings of a device with 4"):
                await desk.say(request, InflightArea(0, 0, queues, 64, wire_bytes), fds)


async def test_inflight_region_of_packed_rings(desk: Desk) -> None:
    await desk.negotiate()
    await desk.say(R.SET_FEATURES, U64(WANTED | Feature.RING_PACKED))
    reply = await desk.say(R.GET_INFLIGHT_FD, InflightArea(0, 0, 2, 64, 24))
    assert reply == encode_payload(InflightArea(2 * INFLIGHT_PACKED_RING_BYTES, 0, 2, 64, 24))
    assert os.fstat(desk.shared[0].fileno()).st_size == 2 * INFLIGHT_PACKED_RING_BYTES


async def test_sizes_and_bases_of_packed_rings(desk: Desk) -> None:
    """Any size, and a base of two halves."""
    await desk.negotiate()
    await desk.say(R.SET_FEATURES, U64(WANTED | Feature.RING_PACKED))
    await desk.say(R.SET_VRING_NUM, VringState(0, 100))
    for num in (0, QUEUE_ENTRIES_MAX + 1):
        with pytest.raises(FrontendError, match="any number up to"):
            await desk.say(R.SET_VRING_NUM, VringState(0, num))
    await desk.say(R.SET_VRING_BASE, VringState(0, 0x8063_8063))
    assert desk.calls[-2:] == [("set_vring_num", 0, 100), ("set_vring_base", 0, 0x8063_8063)]
    desk.attachment.base = 0x0007_8008
    assert await desk.say(R.GET_VRING_BASE, VringState(0, 0)) == encode_vring_state(0, 0x0007_8008)


async def test_features_that_were_not_offered(desk: Desk) -> None:
    for bit in range(64):
        if not desk.blk.features & (1 << bit):
            with pytest.raises(FrontendError, match="not offered"):
                await desk.say(R.SET_FEATURES, U64(WANTED | 1 << bit))
        if not OFFERED & (1 << bit):
            with pytest.raises(FrontendError, match="not offered"):
                await desk.say(R.SET_PROTOCOL_FEATURES, U64(1 << bit))
    assert desk.calls == []


@pytest.mark.parametrize("request_", [request for request, rule in RULES.items() if rule.needs])
async def test_a_request_needs_its_protocol_feature(desk: Desk, request_: Request) -> None:
    await desk.negotiate(OFFERED & ~RULES[request_].needs)
    with pytest.raises(FrontendError, match=f"{request_.name} without {RULES[request_].needs.name}"):
        await desk.say(request_)


async def test_bit_30_is_not_the_engine_s(desk: Desk) -> None:
    await desk.say(R.SET_FEATURES, U64(WANTED))
    assert desk.calls == [("set_features", VIRTIO)]


async def test_rings_start_enabled_without_protocol_features(desk: Desk) -> None:
    await desk.say(R.SET_FEATURES, U64(VIRTIO))
    enabled = [("set_vring_enable", queue, True) for queue in range(4)]
    assert desk.calls == [("set_features", VIRTIO), *enabled]
    await desk.say(R.SET_FEATURES, U64(VIRTIO))
    assert desk.calls[5:] == [("set_features", VIRTIO)]


async def test_features_never_disable_rings(desk: Desk) -> None:
    await desk.negotiate()
    await desk.start(1)
    await desk.say(R.SET_FEATURES, U64(WANTED))
    assert desk.calls == [("set_features", VIRTIO)]
    assert desk.session.state.rings[1].running


async def test_other_features_while_a_ring_runs(desk: Desk) -> None:
    await desk.negotiate()
    await desk.start(1)
    with pytest.raises(FrontendError, match="while rings run"):
        await desk.say(R.SET_FEATURES, U64(WANTED | Feature.EVENT_IDX))
    await desk.say(R.SET_VRING_ENABLE, VringState(1, 0))
    await desk.say(R.SET_FEATURES, U64(WANTED | Feature.EVENT_IDX))


async def test_reset_device(desk: Desk) -> None:
    await desk.negotiate()
    await desk.say(R.ADD_MEM_REG, SingleRegion(RAM), 1)
    await desk.start(2)
    await desk.say(R.SET_CONFIG, ConfigAccess(32, 0, b"\0"))
    assert await desk.attachment.write_cache() is False
    assert await desk.say(R.RESET_DEVICE, need_reply=True) == encode_u64(0)
    assert desk.calls == [("set_write_cache", False), ("reset",)]
    assert await desk.attachment.write_cache() is True
    assert not any(ring.started or ring.enabled for ring in desk.session.state.rings)
    assert desk.session.state.features is None
    assert desk.session.state.regions == (RAM,)
    assert desk.session.state.protocol_features == OFFERED
    with pytest.raises(FrontendError, match="before its size and addresses"):
        await desk.say(R.SET_VRING_KICK, VringFile(2, True), 1)


# ---- replies ---------------------------------------------------------------------------------------------


async def test_an_acknowledgement_only_where_it_is_asked_for(desk: Desk) -> None:
    assert await desk.say(R.SET_OWNER) is None
    assert await desk.say(R.SET_OWNER, need_reply=True) == encode_u64(0)
    # The very message that turns it on (virtio_uml).
    assert await desk.say(R.SET_PROTOCOL_FEATURES, U64(QEMU_PROTOCOL), need_reply=True) == encode_u64(0)
    # One reply, not two (libblkio).
    assert await desk.say(R.GET_QUEUE_NUM, need_reply=True) == encode_u64(4)


async def test_a_call_that_the_engine_refuses(desk: Desk) -> None:
    await desk.negotiate()
    desk.attachment.refuse["add_mem_region"] = errno.ENOMEM
    assert await desk.say(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True) == encode_u64(1)
    assert "ENOMEM" in desk.refusals[0]
    assert desk.session.state.regions == ()  # as if it had not come
    with pytest.raises(FrontendError, match="ADD_MEM_REG failed"):
        await desk.say(R.ADD_MEM_REG, SingleRegion(RAM), 1)
    desk.attachment.refuse.clear()
    assert await desk.say(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True) == encode_u64(0)


async def test_a_refused_call_within_an_answer_ends_the_connection(desk: Desk) -> None:
    await desk.negotiate()
    desk.attachment.refuse["stop_vring"] = errno.EIO
    with pytest.raises(FrontendError, match="GET_VRING_BASE failed"):
        await desk.say(R.GET_VRING_BASE, VringState(0, 0), need_reply=True)


async def test_half_a_message_obeyed_ends_the_connection(desk: Desk) -> None:
    desk.attachment.refuse["set_vring_enable"] = errno.EIO
    with pytest.raises(FrontendError, match="SET_FEATURES failed"):
        await desk.say(R.SET_FEATURES, U64(VIRTIO), need_reply=True)


# ---- another session on the same connection --------------------------------------------------------------


async def test_set_owner_where_memory_is_and_no_ring_runs_begins_anew(desk: Desk) -> None:
    """QEMU's device_del and device_add leave the connection as it is."""
    await desk.negotiate()
    await desk.say(R.SET_BACKEND_REQ_FD, fds=1)
    await desk.say(R.ADD_MEM_REG, SingleRegion(RAM), 1)
    await desk.start()
    await desk.say(R.SET_CONFIG, ConfigAccess(32, 0, b"\0"))
    await desk.say(R.SET_VRING_ENABLE, VringState(0, 0))
    await desk.say(R.GET_VRING_BASE, VringState(0, 0))
    desk.calls.clear()
    await desk.say(R.SET_PROTOCOL_FEATURES, U64(QEMU_PROTOCOL))
    await desk.say(R.SET_BACKEND_REQ_FD, fds=1)
    assert await desk.say(R.SET_OWNER) is None
    assert desk.calls == [("renew",)]
    assert desk.session.state == replace(Desk().session.state, protocol_features=QEMU_PROTOCOL)
    assert desk.attachment.writeback  # the next driver finds it as at the start
    assert [channel.closed for channel in desk.channels] == [True, False]
    await desk.say(R.ADD_MEM_REG, SingleRegion(RAM), 1)
    with pytest.raises(FrontendError, match="KICK for ring 0 before"):
        await desk.say(R.SET_VRING_KICK, VringFile(0, True), 1)


async def test_a_reset_takes_the_mode_that_the_engine_says(desk: Desk) -> None:
    """Which leaves it alone while another frontend is connected."""
    await desk.negotiate()
    await desk.say(R.SET_CONFIG, ConfigAccess(32, 0, b"\0"))
    desk.attachment.writeback_after_reset = False
    await desk.say(R.RESET_DEVICE)
    assert not desk.attachment.writeback
    desk.attachment.writeback_after_reset = True
    await desk.say(R.RESET_DEVICE)
    assert desk.attachment.writeback


async def test_set_owner_at_the_start_changes_nothing(desk: Desk) -> None:
    """libblkio sends it after the features; and no other connection's end or mode is its business."""
    desk.attachment.writeback = False
    await desk.negotiate()
    before = desk.session.state
    for _ in range(2):
        assert await desk.say(R.SET_OWNER) is None
    assert (desk.calls, desk.session.state, desk.attachment.writeback) == ([], before, False)


@pytest.mark.parametrize("enabled", [0, 1])
async def test_set_owner_with_a_started_ring_changes_nothing(desk: Desk, enabled: int) -> None:
    await desk.negotiate()
    await desk.say(R.ADD_MEM_REG, SingleRegion(RAM), 1)
    await desk.start()
    await desk.say(R.SET_VRING_ENABLE, VringState(0, enabled))
    before = desk.session.state
    desk.calls.clear()
    assert await desk.say(R.SET_OWNER, need_reply=True) == encode_u64(0)
    assert (desk.calls, desk.session.state) == ([], before)


# ---- memory ----------------------------------------------------------------------------------------------


async def test_a_table_replaces_all(desk: Desk) -> None:
    await desk.negotiate()
    await desk.say(R.ADD_MEM_REG, SingleRegion(region(9)), 1)
    await desk.say(R.SET_MEM_TABLE, MemoryTable((region(0), region(9))), 2)
    assert desk.calls == [("add_mem_region", region(9)), ("set_mem_table", region(0), region(9))]
    assert desk.session.state.regions == (region(0), region(9))


async def test_regions_that_overlap(desk: Desk) -> None:
    await desk.negotiate()
    with pytest.raises(FrontendError, match="overlap"):
        await desk.say(R.SET_MEM_TABLE, MemoryTable((region(1), region(1))), 2)
    await desk.say(R.ADD_MEM_REG, SingleRegion(region(1)), 1)
    with pytest.raises(FrontendError, match="overlap"):
        await desk.say(R.ADD_MEM_REG, SingleRegion(region(1)), 1)


async def test_no_more_regions_than_slots(desk: Desk) -> None:
    await desk.negotiate()
    for number in range(MEM_SLOTS):
        await desk.say(R.ADD_MEM_REG, SingleRegion(region(number)), 1)
    with pytest.raises(FrontendError, match=f"{MEM_SLOTS} regions"):
        await desk.say(R.ADD_MEM_REG, SingleRegion(region(MEM_SLOTS)), 1)
    for number in range(MEM_SLOTS):
        await desk.say(R.REM_MEM_REG, SingleRegion(region(number)))
    await desk.say(R.ADD_MEM_REG, SingleRegion(RINGS_REGION), 1)


async def test_only_a_region_that_is_there_is_removed(desk: Desk) -> None:
    await desk.negotiate()
    await desk.say(R.ADD_MEM_REG, SingleRegion(region(3)), 1)
    for other in (region(4), RAM):
        with pytest.raises(FrontendError, match="not there"):
            await desk.say(R.REM_MEM_REG, SingleRegion(other))
    await desk.say(
        R.REM_MEM_REG, SingleRegion(region(3)), 1
    )  # a descriptor too many, which the spec forgives
    assert desk.calls[1:] == [("remove_mem_region", region(3))]
    with pytest.raises(FrontendError, match="not there"):
        await desk.say(R.REM_MEM_REG, SingleRegion(region(3)))


# ---- rings -----------------------------------------------------------------------------------------------

RING_REQUESTS: list[tuple[Request, Payload, int]] = [
    (R.SET_VRING_NUM, VringState(4, 128), 0),
    (R.SET_VRING_ADDR, VringAddress(4, 0, 0, 0, None), 0),
    (R.SET_VRING_BASE, VringState(4, 0), 0),
    (R.GET_VRING_BASE, VringState(4, 0), 0),
    (R.SET_VRING_KICK, VringFile(4, True), 1),
    (R.SET_VRING_CALL, VringFile(4, True), 1),
    (R.SET_VRING_ERR, VringFile(255, True), 1),
    (R.SET_VRING_ENABLE, VringState(0xFFFF_FFFF, 1), 0),
]


@pytest.mark.parametrize(("request_", "payload", "fds"), RING_REQUESTS)
async def test_a_ring_that_the_device_has_not(
    desk: Desk, request_: Request, payload: Payload, fds: int
) -> None:
    await desk.negotiate()
    with pytest.raises(FrontendError, match="of a device with 4"):
        await desk.say(request_, payload, fds)
    assert desk.calls == []


@pytest.mark.parametrize("num", [0, 3, 127, QUEUE_ENTRIES_MAX * 2, 0xFFFF_FFFF])
async def test_an_impossible_ring_size(desk: Desk, num: int) -> None:
    with pytest.raises(FrontendError, match="power of two"):
        await desk.say(R.SET_VRING_NUM, VringState(0, num))


@pytest.mark.parametrize("num", [1 << n for n in range(11)])
async def test_every_legal_ring_size(desk: Desk, num: int) -> None:
    await desk.say(R.SET_VRING_NUM, VringState(0, num))
    assert desk.calls == [("set_vring_num", 0, num)]


async def test_an_impossible_base(desk: Desk) -> None:
    await desk.say(R.SET_VRING_BASE, VringState(0, 0xFFFF))
    with pytest.raises(FrontendError, match="16 bits"):
        await desk.say(R.SET_VRING_BASE, VringState(0, 0x10000))


async def test_an_impossible_enable(desk: Desk) -> None:
    with pytest.raises(FrontendError, match="0 and 1"):
        await desk.say(R.SET_VRING_ENABLE, VringState(0, 2))


async def test_a_kick_without_descriptor(desk: Desk) -> None:
    await desk.lay_out()
    with pytest.raises(FrontendError, match="without a descriptor"):
        await desk.say(R.SET_VRING_KICK, VringFile(0, False))


async def test_call_and_err_may_be_taken_away(desk: Desk) -> None:
    await desk.say(R.SET_VRING_CALL, VringFile(0, False))
    await desk.say(R.SET_VRING_ERR, VringFile(0, False))
    assert desk.calls == [("set_vring_call", 0, None), ("set_vring_err", 0, None)]


async def test_a_kick_needs_size_and_addresses(desk: Desk) -> None:
    kick = (R.SET_VRING_KICK, VringFile(0, True), 1)
    with pytest.raises(FrontendError, match="before its size and addresses"):
        await desk.say(*kick)
    await desk.say(R.SET_VRING_ADDR, VringAddress(0, 0, 0, 0, None))
    with pytest.raises(FrontendError, match="before its size and addresses"):
        await desk.say(*kick)
    await desk.say(R.SET_VRING_NUM, VringState(0, 128))
    await desk.say(*kick)


async def test_a_running_ring_keeps_its_size_and_base(desk: Desk) -> None:
    await desk.negotiate()
    await desk.start()
    for request in (R.SET_VRING_NUM, R.SET_VRING_BASE):
        with pytest.raises(FrontendError, match="while it runs"):
            await desk.say(request, VringState(0, 64))
        await desk.say(request, VringState(1, 64))  # another ring's are free
    await desk.say(R.SET_VRING_ADDR, VringAddress(0, 0x1000, 0x3000, 0x2000, None))
    await desk.say(R.SET_VRING_CALL, VringFile(0, True), 1)
    await desk.say(R.SET_VRING_KICK, VringFile(0, True), 1)


@pytest.mark.parametrize(
    "quiet", [(R.SET_VRING_ENABLE, VringState(0, 0)), (R.GET_VRING_BASE, VringState(0, 0))]
)
async def test_a_ring_at_rest_may_change(desk: Desk, quiet: tuple[Request, Payload]) -> None:
    await desk.negotiate()
    await desk.start()
    await desk.say(*quiet)
    await desk.lay_out()
    await desk.say(R.SET_VRING_BASE, VringState(0, 9))
    await desk.start()


async def test_stopping_keeps_the_memory_and_answers_the_base(desk: Desk) -> None:
    await desk.negotiate()
    await desk.say(R.ADD_MEM_REG, SingleRegion(RAM), 1)
    await desk.start()
    desk.attachment.base = 0xFFFE
    assert await desk.say(R.GET_VRING_BASE, VringState(0, 99)) == encode_vring_state(0, 0xFFFE)
    assert desk.calls == [("stop_vring", 0)]
    assert desk.session.state.regions == (RAM,)
    assert desk.session.state.rings[0].enabled
    assert not desk.session.state.rings[0].started


# ---- descriptors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        Sent(R.SET_MEM_TABLE, MemoryTable((region(0), region(1))), 2),
        Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1),
        Sent(R.SET_VRING_KICK, VringFile(0, True), 1),
        Sent(R.SET_VRING_CALL, VringFile(0, True), 1),
        Sent(R.SET_VRING_ERR, VringFile(0, True), 1),
    ],
    ids=lambda sent: sent.request.name,
)
async def test_descriptors_are_handed_over(desk: Desk, sent: Sent) -> None:
    await desk.negotiate()
    await desk.lay_out()
    fds = some_fds(sent.fds)
    await desk.session.handle(Message(sent.request, sent.payload), fds, desk.attachment)
    assert not any(fd.owned for fd in fds)


def test_the_shape_s_queues_are_the_session_s() -> None:
    blk = BlkDevice(DeviceShape(capacity_bytes=0, num_queues=64))
    assert len(Session(blk, lambda fd: RecordingChannel()).state.rings) == 64
    assert FEATURE_PROTOCOL_FEATURES & blk.features
