# SPDX-License-Identifier: Apache-2.0
"""What real frontends send, in their order.

QEMU 7.2's and 10.0's were recorded from qemu-system-x86_64 with SeaBIOS and Linux. libblkio's and
virtio_uml's follow the order and the oddities seen of them when they ran. cloud-hypervisor's (with rust-vmm's
vhost crate) and SPDK's were taken from the source of the releases that are named, message by message; they
did not run here.
"""

from dataclasses import dataclass, replace

from vhostsync.vhost_user.attachment import MemoryRegion
from vhostsync.vhost_user.messages import ProtocolFeature, Request
from vhostsync.vhost_user.payloads import (
    CONFIG_OLD_START,
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
)
from vhostsync.vhost_user.rules import INFLIGHT_RING_BYTES
from vhostsync.vhost_user.virtio_blk import Feature

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


def config(size: int, offset: int = 0, flags: int = 0, *, need_reply: bool = False) -> Sent:
    return Sent(R.GET_CONFIG, ConfigAccess(offset, flags, bytes(size)), need_reply=need_reply)


def acked(*messages: Sent) -> tuple[Sent, ...]:
    """The same, each with NEED_REPLY."""
    return tuple(replace(sent, need_reply=True) for sent in messages)


SEABIOS = (
    Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.BLK_SIZE | Feature.SEG_MAX | Feature.SIZE_MAX
)
LINUX = SEABIOS | Feature.FLUSH | Feature.CONFIG_WCE | Feature.MQ | Feature.DISCARD | Feature.WRITE_ZEROES
QEMU_PROTOCOL = (
    P.MQ
    | P.LOG_SHMFD
    | P.REPLY_ACK
    | P.BACKEND_REQ
    | P.CONFIG
    | P.INFLIGHT_SHMFD
    | P.RESET_DEVICE
    | P.CONFIGURE_MEM_SLOTS
)


def inflight(queues: int, *, new: bool) -> tuple[Sent, ...]:
    """A record is kept until the guest resets the device (`new`: there is none)."""
    ask = Sent(R.GET_INFLIGHT_FD, InflightArea(0, 0, queues, 128, 24))
    give = Sent(R.SET_INFLIGHT_FD, InflightArea(queues * INFLIGHT_RING_BYTES, 0, queues, 128, 24), 1)
    return (ask, give) if new else (give,)



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


def _qemu_features(features: int = SEABIOS, *, new: bool = True) -> tuple[Sent, ...]:
    set_features = Sent(R.SET_FEATURES, U64(features))
    return (set_features, *inflight(2, new=new), call(0), call(1), set_features)


QEMU_FEATURES = _qemu_features()
QEMU_RING_0 = (*layout(0, 256), kick(0), enable(0, 1), enable(1, 1))
QEMU_STOP = (enable(0, 0), enable(1, 0), stop(0))
QEMU_7_2 = (
    *QEMU_REALIZE,
    *QEMU_FEATURES,
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    *QEMU_RING_0,
    *QEMU_STOP,  # stop
    *_qemu_features(new=False),  # cont: the memory is not sent again
    *QEMU_RING_0,
    *QEMU_STOP,  # the guest resets
    *QEMU_FEATURES,
    *QEMU_RING_0,
    *QEMU_STOP,  # quit
)

# The device is removed and another one is added on the chardev, which stays connected: no word of the first
# one's end, and the memory comes again.
QEMU_7_2_DEVICE_DEL_AND_ADD = (
    *QEMU_REALIZE,
    *QEMU_FEATURES,
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    *QEMU_RING_0,
    *QEMU_STOP,
    *QEMU_REALIZE,
    *QEMU_FEATURES,
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    *QEMU_RING_0,
    *QEMU_STOP,
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

QEMU_10_ENABLE = acked(enable(0, 1), enable(1, 1))
QEMU_10_STOP = (*acked(enable(0, 0), enable(1, 0)), stop(0))
QEMU_10_RINGS = tuple(one for queue in (0, 1) for one in (*layout(queue, 1024), kick(queue)))
QEMU_10_REALIZE = (*QEMU_REALIZE, Sent(R.RESET_DEVICE), Sent(R.RESET_DEVICE))
QEMU_10_FIRST_DRIVER = (
    *QEMU_10_REALIZE,
    *_qemu_features(),
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    *layout(0, 256),  # SeaBIOS uses one ring
    kick(0),
    *QEMU_10_ENABLE,
    *QEMU_10_STOP,
    Sent(R.RESET_DEVICE),
)
QEMU_10 = (
    *QEMU_10_FIRST_DRIVER,
    # The next driver: memory is not sent again.
    *_qemu_features(LINUX),
    *QEMU_10_RINGS,
    *QEMU_10_ENABLE,
    Sent(R.SET_CONFIG, ConfigAccess(32, 0, b"\0"), need_reply=True),
    Sent(R.REM_MEM_REG, SingleRegion(RAM), need_reply=True),
    Sent(R.ADD_MEM_REG, SingleRegion(RAM), 1, need_reply=True),
    *QEMU_10_STOP,
    stop(1),
    *_qemu_features(LINUX, new=False),  # stop and cont
    *QEMU_10_RINGS,
    *QEMU_10_ENABLE,
    *QEMU_10_STOP,
    stop(1),
    Sent(R.RESET_DEVICE),
    *QEMU_10_FIRST_DRIVER,  # device_del and device_add
)

# ---- cloud-hypervisor, through rust-vmm's vhost crate ------------------------------------------------------

CLOUD_PROTOCOL = P.CONFIG | P.MQ | P.CONFIGURE_MEM_SLOTS | P.REPLY_ACK | P.INFLIGHT_SHMFD | P.LOG_SHMFD
CLOUD_INFLIGHT = InflightArea(0, 0, 2, 128, 24)
WRITABLE = 1


def _cloud_realize(config_offset: int) -> tuple[Sent, ...]:
    return (
        Sent(R.SET_OWNER),
        Sent(R.GET_FEATURES),
        Sent(R.GET_PROTOCOL_FEATURES),
        Sent(R.SET_PROTOCOL_FEATURES, U64(CLOUD_PROTOCOL)),
        *acked(Sent(R.GET_QUEUE_NUM), config(60, config_offset, WRITABLE)),
    )


def _cloud_start(base: int, *, inflight_is_new: bool = True) -> tuple[Sent, ...]:
    """`base` is the available index at that moment, also after a reconnect."""
    rings = [layout(queue, 128, base) for queue in (0, 1)]
    given = InflightArea(2 * INFLIGHT_RING_BYTES, 0, 2, 128, 24)
    return acked(
        Sent(R.SET_FEATURES, U64(LINUX)),
        Sent(R.SET_MEM_TABLE, MemoryTable((RAM,)), 1),
        *(num for num, _, _ in rings),
        *((Sent(R.GET_INFLIGHT_FD, CLOUD_INFLIGHT),) if inflight_is_new else ()),
        Sent(R.SET_INFLIGHT_FD, given, 1),
        *(
            one
            for queue, (_, set_base, addr) in enumerate(rings)
            for one in (addr, set_base, call(queue), kick(queue))
        ),
        enable(0, 1),
        enable(1, 1),
    )


CLOUD_PAUSE_AND_RESUME = acked(enable(0, 0), enable(1, 0), enable(0, 1), enable(1, 1))
CLOUD_RESET = acked(enable(0, 0), stop(0), enable(1, 0), stop(1))  # since 28.0
CLOUD_WRITEBACK = acked(Sent(R.SET_CONFIG, ConfigAccess(32, WRITABLE, b"\0")))
CLOUD_HYPERVISOR = (  # 51.0 to 53.0
    *_cloud_realize(0),
    *_cloud_start(0),
    *CLOUD_WRITEBACK,
    *CLOUD_PAUSE_AND_RESUME,
    *CLOUD_RESET,
    *_cloud_start(0, inflight_is_new=False),
)
CLOUD_HYPERVISOR_50 = (  # 28.0 to 50.1, with vhost 0.4 to 0.14
    *_cloud_realize(CONFIG_OLD_START),
    *_cloud_start(0),
    *CLOUD_WRITEBACK,
    *CLOUD_PAUSE_AND_RESUME,
    *CLOUD_RESET,
    *_cloud_start(0),
)
CLOUD_HYPERVISOR_20 = (  # resets by ENABLE 0 and RESET_OWNER
    *_cloud_realize(CONFIG_OLD_START),
    *_cloud_start(0),
    *acked(enable(0, 0), enable(1, 0), Sent(R.RESET_OWNER)),
    *_cloud_start(0),
)
CLOUD_HYPERVISOR_RECONNECT = (
    Sent(R.SET_OWNER),
    Sent(R.GET_FEATURES),
    Sent(R.SET_PROTOCOL_FEATURES, U64(CLOUD_PROTOCOL)),  # without asking first
    *_cloud_start(0x1234, inflight_is_new=False),
)

# Other users of the crate may write as it demanded before its release 0.1.0, and whatever their guest writes.
VHOST_CRATE_WRITES = (
    *_cloud_realize(CONFIG_OLD_START),
    *_cloud_start(0),
    *acked(
        Sent(R.SET_CONFIG, ConfigAccess(CONFIG_OLD_START + 32, WRITABLE, b"\1")),
        Sent(R.SET_CONFIG, ConfigAccess(0, WRITABLE, b"\1\2\3\4")),
        Sent(R.SET_CONFIG, ConfigAccess(CONFIG_OLD_START, 2, b"\1\2\3\4")),  # LIVE_MIGRATION
    ),
)

# ---- SPDK's initiator: protocol features after SET_FEATURES, ENABLE before all else of a ring -------------

HUGE_PAGES = tuple(MemoryRegion(at, 2 << 20, at, 0) for at in (0x2000_0020_0000, 0x2000_0060_0000))


def _spdk_memory() -> tuple[Sent, Sent]:
    return Sent(R.SET_MEM_TABLE, MemoryTable(HUGE_PAGES), len(HUGE_PAGES)), Sent(R.GET_FEATURES)


SPDK = (
    Sent(R.SET_OWNER),
    Sent(R.GET_FEATURES),
    Sent(R.SET_FEATURES, U64(LINUX)),
    Sent(R.GET_PROTOCOL_FEATURES),
    Sent(R.SET_PROTOCOL_FEATURES, U64(P.MQ | P.CONFIG)),
    *(config(256) for _ in ("blk_size", "capacity", "num_queues", "size_max", "seg_max")),
    enable(0, 1),
    enable(1, 1),
    Sent(R.GET_QUEUE_NUM),
    call(0),
    call(1),
    *_spdk_memory(),
    *(one for queue in (0, 1) for one in (*layout(queue, 512), kick(queue))),
    # What writes to the config space has room for 256 bytes, whatever the size.
    Sent(R.SET_CONFIG, ConfigAccess(32, 0, b"\1", padding_bytes=255)),
    stop(0),
    stop(1),
    *_spdk_memory(),
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
    "qemu 7.2, device_del and device_add": QEMU_7_2_DEVICE_DEL_AND_ADD,
    "qemu 7.2, logging toggled": QEMU_7_2_LOGGING,
    "qemu 10": QEMU_10,
    "cloud-hypervisor 20": CLOUD_HYPERVISOR_20,
    "cloud-hypervisor 28 to 50": CLOUD_HYPERVISOR_50,
    "cloud-hypervisor 51 to 53": CLOUD_HYPERVISOR,
    "cloud-hypervisor, reconnect": CLOUD_HYPERVISOR_RECONNECT,
    "rust-vmm's vhost, writes": VHOST_CRATE_WRITES,
    "spdk 26.05": SPDK,
    "libblkio, probe": LIBBLKIO_PROBE,
    "libblkio": LIBBLKIO,
    "virtio_uml": VIRTIO_UML,
    "without protocol features": PLAIN,
}
