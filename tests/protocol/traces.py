# SPDX-License-Identifier: Apache-2.0
"""What real frontends send, in their order.

QEMU 7.2's were recorded from qemu-system-x86_64 with SeaBIOS (boot, stop, cont, guest reset). The others
follow the order and the oddities seen of QEMU 10, cloud-hypervisor, libblkio and Linux's virtio_uml.
"""

from dataclasses import dataclass

from vhostsync.vhost_user.attachment import MemoryRegion
from vhostsync.vhost_user.messages import ProtocolFeature, Request
from vhostsync.vhost_user.payloads import (
    U64,
    ConfigAccess,
    Empty,
    LogArea,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostsync.virtio_blk import Feature

R = Request
P = ProtocolFeature
RAM = MemoryRegion(guest_addr=0, bytes=128 << 20, user_addr=0x7FD5_F000_0000, mmap_offset=0)
RINGS_REGION = MemoryRegion(0x7F11_0000_0000, 0x3B10, 0x7F11_0000_0000, 0)  # no multiple of a page


@dataclass(frozen=True)
class Sent:
    """One message, the descriptors with it, and whether the frontend waits for a reply to it."""

    request: Request
    payload: Payload = Empty()  # noqa: RUF009 -- frozen
    fds: int = 0
    need_reply: bool = False

    @property
    def replied(self) -> bool:
        return self.need_reply or self.request is R.SET_LOG_BASE or self.request.name.startswith("GET_")


def ring_files(queue: int) -> tuple[Sent, Sent]:
    return Sent(R.SET_VRING_CALL, VringFile(queue, True), 1), Sent(R.SET_VRING_ERR, VringFile(queue, True), 1)


def layout(queue: int, num: int, base: int = 0, log: int | None = None) -> tuple[Sent, Sent, Sent]:
    at = 0x7FD5_F800_0000 + queue * 0x10000
    return (
        Sent(R.SET_VRING_NUM, VringState(queue, num)),
        Sent(R.SET_VRING_BASE, VringState(queue, base)),
        Sent(R.SET_VRING_ADDR, VringAddress(queue, at, at + 0x2000, at + 0x1000, log)),
    )


def kick(queue: int) -> Sent:
    return Sent(R.SET_VRING_KICK, VringFile(queue, True), 1)


def call(queue: int) -> Sent:
    return Sent(R.SET_VRING_CALL, VringFile(queue, True), 1)


def enable(queue: int, on: int, *, need_reply: bool = False) -> Sent:
    return Sent(R.SET_VRING_ENABLE, VringState(queue, on), need_reply=need_reply)


def stop(queue: int) -> Sent:
    return Sent(R.GET_VRING_BASE, VringState(queue, 0))


def config(size: int, offset: int = 0, *, need_reply: bool = False) -> Sent:
    return Sent(R.GET_CONFIG, ConfigAccess(offset, 0, bytes(size)), need_reply=need_reply)


SEABIOS = (
    Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.BLK_SIZE | Feature.SEG_MAX | Feature.SIZE_MAX
)
LINUX = SEABIOS | Feature.FLUSH | Feature.CONFIG_WCE | Feature.MQ | Feature.DISCARD | Feature.WRITE_ZEROES
QEMU_PROTOCOL = (
    P.MQ | P.LOG_SHMFD | P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS
)

# ---- QEMU 7.2, recorded: two queues, SeaBIOS uses one -----------------------------------------------------

QEMU_REALIZE = (
    Sent(R.GET_FEATURES),
    Sent(R.GET_PROTOCOL_FEATURES),
    Sent(R.SET_PROTOCOL_FEATURES, U64(QEMU_PROTOCOL)),
    Sent(R.GET_QUEUE_NUM),
    Sent(R.GET_MAX_MEM_SLOTS),
    Sent(R.SET_BACKEND_REQ_FD, fds=1, need_reply=True),
    Sent(R.SET_OWNER),
    Sent(R.GET_FEATURES),
    *ring_files(0),
    *ring_files(1),
    config(60),
)
QEMU_FEATURES = (
    Sent(R.SET_FEATURES, U64(SEABIOS)),
    call(0),
    call(1),
    Sent(R.SET_FEATURES, U64(SEABIOS)),
)
QEMU_RING_0 = (*layout(0, 256), kick(0), enable(0, 1), enable(1, 1))
QEMU_STOP = (enable(0, 0), enable(1, 0), stop(0))
QEMU_7_2 = (
    *QEMU_REALIZE,
    *QEMU_FEATURES,
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    *QEMU_RING_0,
    *QEMU_STOP,  # stop
    *QEMU_FEATURES,  # cont: the memory is not sent again
    *QEMU_RING_0,
    *QEMU_STOP,  # the guest resets
    *QEMU_FEATURES,
    *QEMU_RING_0,
    *QEMU_STOP,  # quit
)

# A live migration: the dirty log comes, and logging is switched on and off on running rings.
QEMU_7_2_LOGGING = (
    *QEMU_REALIZE,
    *QEMU_FEATURES,
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    *QEMU_RING_0,
    Sent(R.SET_LOG_BASE, LogArea(0x8000, 0), 1),
    Sent(R.SET_FEATURES, U64(SEABIOS | Feature.LOG_ALL), need_reply=True),
    Sent(R.SET_VRING_ADDR, layout(0, 256, log=0x3F000)[2].payload, need_reply=True),
    Sent(R.SET_FEATURES, U64(SEABIOS)),
    layout(0, 256)[2],
    *QEMU_STOP,
)

# ---- QEMU 10 ----------------------------------------------------------------------------------------------

QEMU_10 = (
    *QEMU_REALIZE,
    Sent(R.SET_FEATURES, U64(LINUX)),
    call(0),
    call(1),
    Sent(R.SET_FEATURES, U64(LINUX)),
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    *(one for queue in (0, 1) for one in (*layout(queue, 64), kick(queue), call(queue))),
    enable(0, 1, need_reply=True),
    enable(1, 1, need_reply=True),
    Sent(R.SET_CONFIG, ConfigAccess(32, 0, b"\0"), need_reply=True),
    Sent(R.REM_MEM_REG, SingleRegion(RAM), need_reply=True),
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    enable(0, 0, need_reply=True),
    enable(1, 0, need_reply=True),
    stop(0),
    stop(1),
    Sent(R.RESET_DEVICE),
    # The next driver: memory is not sent again, and SeaBIOS has larger rings than before.
    Sent(R.SET_FEATURES, U64(SEABIOS)),
    *layout(0, 256),
    kick(0),
    call(0),
    enable(0, 1, need_reply=True),
    stop(0),
)

# ---- cloud-hypervisor -------------------------------------------------------------------------------------

CLOUD_PROTOCOL = P.CONFIG | P.MQ | P.CONFIGURE_MEM_SLOTS | P.REPLY_ACK


def _cloud_start(base: int) -> tuple[Sent, ...]:
    rings = [layout(queue, 128, base) for queue in (0, 1)]
    return (
        Sent(R.SET_FEATURES, U64(LINUX), need_reply=True),
        Sent(R.SET_MEM_TABLE, MemoryTable((RAM,)), 1, need_reply=True),
        *(Sent(num.request, num.payload, need_reply=True) for num, _, _ in rings),
        *(
            Sent(one.request, one.payload, one.fds, need_reply=True)
            for queue, (_, set_base, addr) in enumerate(rings)
            for one in (addr, set_base, call(queue), kick(queue))
        ),
        enable(0, 1, need_reply=True),
        enable(1, 1, need_reply=True),
    )


CLOUD_HYPERVISOR = (
    Sent(R.SET_OWNER),
    Sent(R.GET_FEATURES),
    Sent(R.GET_PROTOCOL_FEATURES),
    Sent(R.SET_PROTOCOL_FEATURES, U64(CLOUD_PROTOCOL)),
    Sent(R.GET_QUEUE_NUM, need_reply=True),
    config(60, need_reply=True),
    *_cloud_start(0),
    # Pause, resume, and a reset, by ENABLE alone.
    enable(0, 0, need_reply=True),
    enable(1, 0, need_reply=True),
    enable(0, 1, need_reply=True),
    enable(1, 1, need_reply=True),
    enable(0, 0, need_reply=True),
    enable(1, 0, need_reply=True),
    Sent(R.RESET_OWNER, need_reply=True),
    *_cloud_start(0),
    # A guest may write wherever it likes.
    Sent(R.SET_CONFIG, ConfigAccess(0, 0, b"\1\2\3\4"), need_reply=True),
)
CLOUD_HYPERVISOR_RECONNECT = (
    Sent(R.SET_OWNER),
    Sent(R.GET_FEATURES),
    Sent(R.SET_PROTOCOL_FEATURES, U64(CLOUD_PROTOCOL)),  # without asking first
    *_cloud_start(0x1234),
)

# ---- libblkio ---------------------------------------------------------------------------------------------

LIBBLKIO_PROBE = (Sent(R.GET_FEATURES, need_reply=True), Sent(R.SET_OWNER))
LIBBLKIO = (
    Sent(R.GET_FEATURES, need_reply=True),
    Sent(R.SET_FEATURES, U64(LINUX)),
    Sent(R.GET_PROTOCOL_FEATURES, need_reply=True),
    Sent(R.SET_PROTOCOL_FEATURES, U64(P.MQ | P.REPLY_ACK | P.CONFIG | P.CONFIGURE_MEM_SLOTS)),
    Sent(R.SET_OWNER, need_reply=True),
    Sent(R.GET_QUEUE_NUM, need_reply=True),
    Sent(R.GET_MAX_MEM_SLOTS, need_reply=True),
    config(60, need_reply=True),
    config(36, need_reply=True),
    Sent(R.ADD_MEM_REG, SingleRegion(RINGS_REGION), 1, need_reply=True),
    *layout(0, 128),
    Sent(R.SET_VRING_KICK, VringFile(0, True), 1, need_reply=True),
    Sent(R.SET_VRING_CALL, VringFile(0, True), 1, need_reply=True),
    enable(0, 1, need_reply=True),
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    Sent(R.REM_MEM_REG, SingleRegion(RAM), need_reply=True),
)

# ---- Linux's virtio_uml -----------------------------------------------------------------------------------

VIRTIO_UML = (
    Sent(R.SET_OWNER),
    Sent(R.GET_FEATURES),
    Sent(R.GET_PROTOCOL_FEATURES),
    Sent(R.SET_PROTOCOL_FEATURES, U64(P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG), need_reply=True),
    Sent(R.SET_BACKEND_REQ_FD, fds=1, need_reply=True),
    *(config(size, need_reply=True) for size in (8, 16, 24, 33, 36, 57, 60)),
    Sent(R.SET_FEATURES, U64(LINUX), need_reply=True),
    Sent(R.SET_MEM_TABLE, MemoryTable((RAM,)), 1, need_reply=True),
    Sent(R.SET_VRING_CALL, VringFile(0, True), 1, need_reply=True),
    *(Sent(one.request, one.payload, one.fds, need_reply=True) for one in (*layout(0, 256), kick(0))),
    enable(0, 1, need_reply=True),
    # rmmod and insmod: the rings are quiet, but were never stopped
    enable(0, 0, need_reply=True),
    Sent(R.GET_FEATURES, need_reply=True),
    Sent(R.SET_FEATURES, U64(LINUX), need_reply=True),
    Sent(R.SET_VRING_CALL, VringFile(0, True), 1, need_reply=True),
    *(Sent(one.request, one.payload, one.fds, need_reply=True) for one in (*layout(0, 256), kick(0))),
    enable(0, 1, need_reply=True),
)

# ---- a frontend from before the protocol features ---------------------------------------------------------

PLAIN = (
    Sent(R.GET_FEATURES),
    Sent(R.SET_OWNER),
    Sent(R.SET_FEATURES, U64(LINUX & ~Feature.PROTOCOL_FEATURES)),
    Sent(R.SET_MEM_TABLE, MemoryTable((RAM,)), 1),
    *layout(0, 128),
    kick(0),
    call(0),
    stop(0),
)

TRACES = {
    "qemu 7.2": QEMU_7_2,
    "qemu 7.2, logging toggled": QEMU_7_2_LOGGING,
    "qemu 10": QEMU_10,
    "cloud-hypervisor": CLOUD_HYPERVISOR,
    "cloud-hypervisor, reconnect": CLOUD_HYPERVISOR_RECONNECT,
    "libblkio, probe": LIBBLKIO_PROBE,
    "libblkio": LIBBLKIO,
    "virtio_uml": VIRTIO_UML,
    "without protocol features": PLAIN,
}
