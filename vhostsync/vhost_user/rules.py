# SPDX-License-Identifier: Apache-2.0
"""The state table: which request may come in which state, and what it leads to. Pure; no I/O.

`RULES` has one row for each request that this backend serves: the protocol feature it belongs to, what must
hold of the ring it names, and a handler. A handler is a function of the state, the device and the message; it
returns a `Step`: the calls on the attachment to make, the state once all of them have succeeded, and the
answer. A request whose feature was not negotiated and one that does not fit the state raise FrontendError,
and the connection ends.

The rings of one connection, and what may happen in each of their states:

    started  enabled
    no       no       all settings may change; ENABLE comes for rings that never had any other message (QEMU)
    no       yes      the same: GET_VRING_BASE stops a ring and leaves it enabled
    yes      no       the same: cloud-hypervisor resets by ENABLE 0 alone, then sends NUM, ADDR, BASE again
    yes      yes      running: NUM, BASE and other virtio features are refused; ADDR, CALL, ERR, KICK and a
                      change of logging alone (SET_FEATURES) are fine, as is every change of the memory

SET_OWNER where the rings are stopped and memory is there begins another session on the same connection.
CALL, ERR and the dirty log come before SET_FEATURES, memory before and after ENABLE, SET_PROTOCOL_FEATURES
without a GET before it, SET_FEATURES before the protocol features. KICK needs the ring's size and addresses.

A live migration switches dirty logging on rings that run: SET_LOG_BASE brings the log (and another one when
the memory changes), SET_FEATURES switches it for what requests point to (bit 26), SET_VRING_ADDR for the used
ring. A frontend that asks for a reply to these knows by it that from then on everything is logged. A log that
cannot be used ends the connection: SET_LOG_BASE's reply cannot say so, and what is not logged is lost.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from vhostsync.host.owned_fd import OwnedFd, new_memory
from vhostsync.vhost_user.virtio_blk import WRITEBACK_OFFSET, BlkDevice, Feature

from ..errors import FrontendError
from .attachment import Attachment, MemoryRegion
from .messages import Message, ProtocolFeature, Request
from .payloads import (
    FEATURE_LOG_ALL,
    FEATURE_PROTOCOL_FEATURES,
    U64,
    ConfigAccess,
    InflightArea,
    LogArea,
    MemoryTable,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
    describe_region,
    encode_payload,
    encode_u64,
    encode_vring_state,
    overlap,
)

QUEUE_ENTRIES_MAX: Final = 1024
INFLIGHT_RING_BYTES: Final = 16448
"""A split ring's part of the inflight region, always for 1024 descriptors: frontends (QEMU 10 with SeaBIOS)
name the ring's size only afterwards. c_shim/virtio/inflight.h has the layout."""
INFLIGHT_PACKED_RING_BYTES: Final = 32832
"""The same of a packed ring (c_shim/virtio/inflight_packed.h): which it is, SET_FEATURES has said before."""
MEM_SLOTS: Final = 128
"""Memory regions of one attachment. Never less in a later version: QEMU refuses a number that shrank."""

OFFERED: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.INFLIGHT_SHMFD
)


@dataclass(frozen=True)
class Ring:
    """What the frontend has said about one ring. Sizes in descriptors."""

    num: int | None = None
    addressed: bool = False
    started: bool = False
    enabled: bool = False

    @property
    def running(self) -> bool:
        return self.started and self.enabled


@dataclass(frozen=True)
class State:
    """What the frontend has said so far, and the engine has accepted."""

    rings: tuple[Ring, ...]
    features: int | None = None  # None: SET_FEATURES was not sent yet
    protocol_features: ProtocolFeature = ProtocolFeature.NONE
    regions: tuple[MemoryRegion, ...] = ()

    @property
    def packed(self) -> bool:
        return bool((self.features or 0) & Feature.RING_PACKED)

    def with_ring(self, queue: int, ring: Ring) -> "State":
        """The same with another ring `queue`."""
        return replace(self, rings=(*self.rings[:queue], ring, *self.rings[queue + 1 :]))


Call = Callable[[Attachment], Awaitable[int | None]]


@dataclass(frozen=True)
class Step:
    """What one message leads to.

    `calls` are made in order; then `state` holds, and `answer` makes the payload of the request's own reply
    from the last call's result (None: the request has none, an acknowledgement is due if asked for); `share`
    makes a descriptor to send along. `channel` is a descriptor to send the backend's own requests on from
    then on. `refusal` says why a message in good order is not obeyed: no call is made, the acknowledgement,
    if asked for, is negative, and the connection goes on.
    """

    state: State
    calls: tuple[Call, ...] = ()
    answer: Callable[[int | None], bytes] | None = None
    channel: OwnedFd | None = None
    share: Callable[[], OwnedFd] | None = None
    refusal: str | None = None


class RingMust(Enum):
    """What must hold of the ring that a message names."""

    EXIST = "exist"
    REST = "rest"  # not be running
    HAVE_LAYOUT = "have layout"  # size and addresses are known


Handler = Callable[[State, BlkDevice, Message, Sequence[OwnedFd]], Step]


@dataclass(frozen=True)
class Rule:
    """One row of the state table."""

    handler: Handler
    needs: ProtocolFeature = ProtocolFeature.NONE
    ring: RingMust = RingMust.EXIST


def plan(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    """What `message` with `fds` leads to in this state; changes nothing. FrontendError where it must not
    come."""
    rule = RULES[message.request]  # every request that `messages` can read has one
    name = message.request.name
    if rule.needs & ~state.protocol_features:
        raise FrontendError(f"{name} without {rule.needs.name} negotiated")
    if isinstance(message.payload, VringState | VringAddress | VringFile):
        _check_ring(state, name, message.payload.queue, rule.ring)
    return rule.handler(state, device, message, fds)


def _check_ring(state: State, name: str, queue: int, must: RingMust) -> None:
    if queue >= len(state.rings):
        raise FrontendError(f"{name} for ring {queue} of a device with {len(state.rings)}")
    ring = state.rings[queue]
    if must is RingMust.REST and ring.running:
        raise FrontendError(f"{name} for ring {queue} while it runs")
    if must is RingMust.HAVE_LAYOUT and (ring.num is None or not ring.addressed):
        raise FrontendError(f"{name} for ring {queue} before its size and addresses")


# ---- negotiation -----------------------------------------------------------------------------------------


def _get_features(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    features = device.features
    return Step(state, answer=lambda _: encode_u64(features))


def _set_features(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, U64)
    features = message.payload.value
    if features & ~device.features:
        raise FrontendError(
            f"SET_FEATURES with features that were not offered: {features & ~device.features:#x}"
        )
    negotiable = ~(FEATURE_LOG_ALL | FEATURE_PROTOCOL_FEATURES)
    if any(ring.running for ring in state.rings) and ((features ^ (state.features or 0)) & negotiable):
        raise FrontendError("SET_FEATURES with other virtio features while rings run")
    virtio_features = features & ~FEATURE_PROTOCOL_FEATURES
    calls: list[Call] = [lambda attachment: attachment.set_features(virtio_features)]
    rings = state.rings
    if not features & FEATURE_PROTOCOL_FEATURES:
        # "upon receiving a SET_FEATURES message … without VHOST_USER_F_PROTOCOL_FEATURES set, the back-end
        # must enable all rings immediately." With it, rings stay as they are: QEMU toggles logging on
        # running rings this way.
        calls += [_enable_call(queue, True) for queue, ring in enumerate(rings) if not ring.enabled]
        rings = tuple(replace(ring, enabled=True) for ring in rings)
    return Step(replace(state, features=features, rings=rings), calls=tuple(calls))


def _get_protocol_features(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    return Step(state, answer=lambda _: encode_u64(OFFERED))


def _set_protocol_features(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, U64)
    value = message.payload.value
    foreign = value & ~int(OFFERED)  # the complement of an IntFlag has its named bits only
    if foreign:
        raise FrontendError(f"SET_PROTOCOL_FEATURES with features that were not offered: {foreign:#x}")
    return Step(replace(state, protocol_features=ProtocolFeature(value)))


def _set_owner(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    """ "This can be used on the back-end as a 'session start' flag."

    Another session may start on an old connection: QEMU keeps its chardev open between device_del, which
    stops the rings and leaves all else as it is, and device_add. The new device knows nothing of the old one,
    sends the memory again, and belongs to another driver. The protocol features and the channel came before
    this message and stay. Where a ring is started it changes nothing, and no frontend is known to send it.
    """
    if not state.regions or any(ring.started for ring in state.rings):
        return Step(state)
    after = State(rings=(Ring(),) * len(state.rings), protocol_features=state.protocol_features)

    return Step(after, calls=(lambda attachment: attachment.renew(),))


def _nothing(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    """RESET_OWNER is deprecated; "back-ends either ignore this message, or …"."""
    return Step(state)


def _reset_device(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    # Rings, features and the write cache mode go back to the start; memory stays, since QEMU does not send it
    # again. So do the protocol features: they belong to the connection, not to the device.
    after = replace(state, rings=(Ring(),) * len(state.rings), features=None)

    return Step(after, calls=(lambda attachment: attachment.reset(),))


def _get_queue_num(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    queues = device.shape.num_queues
    return Step(state, answer=lambda _: encode_u64(queues))


def _set_backend_req_fd(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    (fd,) = fds
    return Step(state, channel=fd)


# ---- memory ----------------------------------------------------------------------------------------------


def _check_regions(regions: Sequence[MemoryRegion]) -> None:
    pair = overlap(regions)
    if pair is not None:
        raise FrontendError(f"memory regions overlap: {describe_region(pair[0])}; {describe_region(pair[1])}")


def _set_mem_table(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, MemoryTable)
    regions = message.payload.regions
    _check_regions(regions)
    table = tuple(zip(regions, fds, strict=True))
    return Step(replace(state, regions=regions), calls=(lambda attachment: attachment.set_mem_table(table),))


def _get_max_mem_slots(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    return Step(state, answer=lambda _: encode_u64(MEM_SLOTS))


def _add_mem_reg(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, SingleRegion)
    (fd,) = fds
    region = message.payload.region
    regions = (*state.regions, region)
    if len(regions) > MEM_SLOTS:
        raise FrontendError(f"ADD_MEM_REG beyond the {MEM_SLOTS} regions that there is room for")
    _check_regions(regions)
    return Step(
        replace(state, regions=regions),
        calls=(lambda attachment: attachment.add_mem_region(region, fd),),
    )


def _rem_mem_reg(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, SingleRegion)
    wanted = message.payload.region
    # "identified by its guest address, user address and size. The mmap offset is ignored."
    found = [region for region in state.regions if replace(region, mmap_offset=wanted.mmap_offset) == wanted]
    if not found:
        raise FrontendError(f"REM_MEM_REG for a region that is not there: {describe_region(wanted)}")
    (gone,) = found  # regions do not overlap
    return Step(
        replace(state, regions=tuple(region for region in state.regions if region != gone)),
        calls=(lambda attachment: attachment.remove_mem_region(gone),),
    )


# ---- rings -----------------------------------------------------------------------------------------------


def _set_vring_num(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, VringState)
    queue, num = message.payload.queue, message.payload.num
    if not 1 <= num <= QUEUE_ENTRIES_MAX or (num & (num - 1) and not state.packed):
        possible = "any number" if state.packed else "a power of two"
        raise FrontendError(
            f"SET_VRING_NUM {num} for ring {queue} ({possible} up to {QUEUE_ENTRIES_MAX} is possible)"
        )
    after = state.with_ring(queue, replace(state.rings[queue], num=num))
    return Step(after, calls=(lambda attachment: attachment.set_vring_num(queue, num),))


def _set_vring_addr(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, VringAddress)
    address = message.payload
    ring = replace(state.rings[address.queue], addressed=True)
    return Step(
        state.with_ring(address.queue, ring),
        calls=(
            lambda attachment: attachment.set_vring_addr(
                address.queue, address.desc, address.used, address.avail, address.log
            ),
        ),
    )


def _set_vring_base(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, VringState)
    queue, base = message.payload.queue, message.payload.num
    # A packed ring's has two halves: where to look for what is available, and where to put what is used. Each
    # is an index with the wrap counter above it; frontends that know of 16 bits leave the second half out.
    if base > 0xFFFF and not state.packed:
        raise FrontendError(f"SET_VRING_BASE {base:#x} for ring {queue} (a split ring's has 16 bits)")
    return Step(state, calls=(lambda attachment: attachment.set_vring_base(queue, base),))


def _get_vring_base(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, VringState)
    queue = message.payload.queue
    after = state.with_ring(queue, replace(state.rings[queue], started=False))
    return Step(
        after,
        calls=(lambda attachment: attachment.stop_vring(queue),),
        answer=lambda base: encode_vring_state(queue, base or 0),
    )


def _set_vring_kick(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, VringFile)
    queue = message.payload.queue
    if not message.payload.has_fd:
        raise FrontendError(f"SET_VRING_KICK for ring {queue} without a descriptor (rings are not polled)")
    (fd,) = fds
    after = state.with_ring(queue, replace(state.rings[queue], started=True))
    return Step(after, calls=(lambda attachment: attachment.set_vring_kick(queue, fd),))


def _set_vring_call(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, VringFile)
    queue, fd = message.payload.queue, fds[0] if fds else None
    return Step(state, calls=(lambda attachment: attachment.set_vring_call(queue, fd),))


def _set_vring_err(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, VringFile)
    queue, fd = message.payload.queue, fds[0] if fds else None
    return Step(state, calls=(lambda attachment: attachment.set_vring_err(queue, fd),))


def _enable_call(queue: int, enabled: bool) -> Call:
    return lambda attachment: attachment.set_vring_enable(queue, enabled)


def _set_vring_enable(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, VringState)
    queue, num = message.payload.queue, message.payload.num
    if num > 1:
        raise FrontendError(f"SET_VRING_ENABLE {num} for ring {queue} (0 and 1 are possible)")
    enabled = num == 1
    after = state.with_ring(queue, replace(state.rings[queue], enabled=enabled))
    return Step(after, calls=(_enable_call(queue, enabled),))


def _get_inflight(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, InflightArea)
    asked = message.payload
    if not 1 <= asked.queues <= len(state.rings):
        raise FrontendError(f"GET_INFLIGHT_FD for {asked.queues} rings of a device with {len(state.rings)}")
    ring_bytes = INFLIGHT_PACKED_RING_BYTES if state.packed else INFLIGHT_RING_BYTES
    area = replace(asked, mmap_bytes=asked.queues * ring_bytes, mmap_offset=0)
    return Step(
        state,
        answer=lambda _: encode_payload(area),
        share=lambda: new_memory("vhostsync-inflight", area.mmap_bytes),
    )


def _set_inflight(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, InflightArea)
    area = message.payload
    (fd,) = fds
    if not 1 <= area.queues <= len(state.rings):
        raise FrontendError(f"SET_INFLIGHT_FD for {area.queues} rings of a device with {len(state.rings)}")

    return Step(
        state,
        calls=(
            lambda attachment: attachment.set_inflight(fd, area.mmap_bytes, area.mmap_offset, area.queues),
        ),
    )


# ---- the dirty log ---------------------------------------------------------------------------------------


def _set_log_base(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, LogArea)
    area = message.payload
    (fd,) = fds
    # With LOG_SHMFD it always has a reply, whatever NEED_REPLY says; QEMU waits for it.
    return Step(
        state,
        calls=(lambda attachment: attachment.set_log_base(fd, area.log_bytes, area.offset),),
        answer=lambda _: encode_u64(0),
    )


def _set_log_fd(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    (fd,) = fds
    return Step(state, calls=(lambda attachment: attachment.set_log_fd(fd),))


# ---- config space ----------------------------------------------------------------------------------------


def _get_config(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    assert isinstance(message.payload, ConfigAccess)
    access = message.payload

    def answer(writeback: int | None) -> bytes:
        content = device.read_config(access.start, len(access.data), writeback=bool(writeback))
        return encode_payload(replace(access, data=content))

    # Not a mode that another frontend has set: only the engine knows which of them the guest runs on.
    return Step(state, calls=(lambda attachment: attachment.write_cache(),), answer=answer)


def _set_config(state: State, device: BlkDevice, message: Message, fds: Sequence[OwnedFd]) -> Step:
    # A guest can make its frontend send any of these (cloud-hypervisor passes every write on), so one that
    # may not be obeyed is refused and does not end the connection.
    assert isinstance(message.payload, ConfigAccess)
    access = message.payload
    if access.start != WRITEBACK_OFFSET or len(access.data) != 1:
        where = f"{len(access.data)} bytes at {access.offset}"
        return Step(state, refusal=f"{where} (only the write cache mode can be written)")
    if not (state.features or 0) & Feature.CONFIG_WCE:
        return Step(state, refusal="the write cache mode without CONFIG_WCE negotiated")
    if access.data[0] > 1:
        return Step(state, refusal=f"write cache mode {access.data[0]} (0 and 1 are possible)")
    writeback = access.data[0] == 1
    return Step(state, calls=(lambda attachment: attachment.set_write_cache(writeback),))


RULES: Final[dict[Request, Rule]] = {
    Request.GET_FEATURES: Rule(_get_features),
    Request.SET_FEATURES: Rule(_set_features),
    Request.GET_PROTOCOL_FEATURES: Rule(_get_protocol_features),
    Request.SET_PROTOCOL_FEATURES: Rule(_set_protocol_features),
    Request.SET_OWNER: Rule(_set_owner),
    Request.RESET_OWNER: Rule(_nothing),
    Request.RESET_DEVICE: Rule(_reset_device, ProtocolFeature.RESET_DEVICE),
    Request.GET_QUEUE_NUM: Rule(_get_queue_num),  # MQ need only be "set in queried protocol features"
    Request.SET_BACKEND_REQ_FD: Rule(_set_backend_req_fd, ProtocolFeature.BACKEND_REQ),
    Request.SET_MEM_TABLE: Rule(_set_mem_table),
    Request.GET_MAX_MEM_SLOTS: Rule(_get_max_mem_slots, ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Rule(_add_mem_reg, ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.REM_MEM_REG: Rule(_rem_mem_reg, ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.SET_VRING_NUM: Rule(_set_vring_num, ring=RingMust.REST),
    Request.SET_VRING_ADDR: Rule(_set_vring_addr),
    Request.SET_VRING_BASE: Rule(_set_vring_base, ring=RingMust.REST),
    Request.GET_VRING_BASE: Rule(_get_vring_base),
    Request.SET_VRING_KICK: Rule(_set_vring_kick, ring=RingMust.HAVE_LAYOUT),
    Request.SET_VRING_CALL: Rule(_set_vring_call),
    Request.SET_VRING_ERR: Rule(_set_vring_err),
    Request.SET_VRING_ENABLE: Rule(_set_vring_enable),
    Request.GET_INFLIGHT_FD: Rule(_get_inflight, ProtocolFeature.INFLIGHT_SHMFD),
    Request.SET_INFLIGHT_FD: Rule(_set_inflight, ProtocolFeature.INFLIGHT_SHMFD),
    Request.SET_LOG_BASE: Rule(_set_log_base, ProtocolFeature.LOG_SHMFD),
    Request.SET_LOG_FD: Rule(_set_log_fd),
    Request.GET_CONFIG: Rule(_get_config, ProtocolFeature.CONFIG),
    Request.SET_CONFIG: Rule(_set_config, ProtocolFeature.CONFIG),
}
