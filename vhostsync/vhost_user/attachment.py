# SPDX-License-Identifier: Apache-2.0
"""What a vhost-user session asks of the data plane: one attachment of one frontend.

`vhostsync.engine` implements it; tests put a recording one in its place. Nothing here does anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vhostsync.host.owned_fd import OwnedFd


@dataclass(frozen=True)
class MemoryRegion:
    """One region of the frontend's memory: `bytes` long at `guest_addr` for the guest, at `user_addr` in the
    frontend's own address space (ring addresses are of that kind) and at `mmap_offset` of its descriptor."""

    guest_addr: int
    bytes: int
    user_addr: int
    mmap_offset: int


class Attachment(Protocol):
    """One frontend's memory and rings.

    Every method raises EngineError when it is refused. A descriptor handed over is taken (`OwnedFd.take`)
    and closed by the engine whatever the outcome; but FrontendError, and it is not taken, where memory is
    expected and what was sent is none that always answers (foreign_fd.py).
    """

    async def reset(self) -> None:
        """Device reset: rings stopped and disabled, features 0; memory stays. The write cache mode is as at
        the start, but left alone while another frontend is connected."""

    async def renew(self) -> None:
        """As of a frontend that has just connected: memory, rings, features, records and logs are gone; the
        write cache mode is as after `reset`."""

    async def set_features(self, features: int) -> None:
        """Virtio feature bits as negotiated (VHOST_USER_F_PROTOCOL_FEATURES, bit 30, removed). Bit 26,
        VHOST_F_LOG_ALL: data and status of all requests answered from now on go into the dirty log."""

    async def set_log_base(self, fd: OwnedFd, size_bytes: int, offset: int) -> None:
        """The dirty log, in the place of a former one."""

    async def set_log_fd(self, fd: OwnedFd) -> None:
        """A descriptor that is signalled when the dirty log has changed."""

    async def set_mem_table(self, regions: Sequence[tuple[MemoryRegion, OwnedFd]]) -> None:
        """Replace all regions; rings are translated anew."""

    async def add_mem_region(self, region: MemoryRegion, fd: OwnedFd) -> None: ...

    async def remove_mem_region(self, region: MemoryRegion) -> None:
        """Returns when no request uses it any more."""

    async def set_vring_num(self, queue: int, num: int) -> None: ...

    async def set_vring_addr(self, queue: int, desc: int, used: int, avail: int, log: int | None) -> None:
        """User addresses of the ring's parts; `log` is the guest address under which what is written
        to the used ring goes into the dirty log, None where it does not."""

    async def set_vring_base(self, queue: int, base: int) -> None: ...

    async def set_vring_kick(self, queue: int, fd: OwnedFd) -> None:
        """Starts the ring; on a started ring, only replaces the descriptor."""

    async def set_vring_call(self, queue: int, fd: OwnedFd | None) -> None: ...

    async def set_vring_err(self, queue: int, fd: OwnedFd | None) -> None: ...

    async def set_vring_enable(self, queue: int, enabled: bool) -> None:
        """False: returns when the ring is quiet."""

    async def stop_vring(self, queue: int) -> int:
        """Drains and stops the ring; returns its base, the next available index."""

    async def set_inflight(self, fd: OwnedFd, size_bytes: int, offset: int, queues: int) -> None:
        """The record of requests in flight, before the rings start: what it says was not answered is taken
        up again. So is the write cache mode, which the record keeps as well."""

    async def write_cache(self) -> bool:
        """The write cache mode that this frontend's guest finds (True: write-back)."""

    async def set_write_cache(self, writeback: bool) -> None: ...

    async def close(self) -> None:
        """When this returns, its last request is over, its memory unmapped. EngineError ETIMEDOUT: not so."""
