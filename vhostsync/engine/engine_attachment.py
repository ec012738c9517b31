# SPDX-License-Identifier: Apache-2.0
"""One frontend's side of the engine: its memory, its rings, its features, each set by an awaited command."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import anyio

from vhostsync._shim import lib
from vhostsync.host.owned_fd import OwnedFd
from vhostsync.vhost_user.attachment import MemoryRegion
from vhostsync.vhost_user.foreign_fd import check_memory

NO_LOG: Final = (1 << 64) - 1
"""In the place of a guest address: writes to the used ring are not in the dirty log."""


class EngineAttachment:
    """One frontend's memory and rings in the engine: vhost_user.attachment.Attachment."""

    def __init__(
        self,
        index: int,
        num_queues: int,
        command: Callable[..., Awaitable[int]],
        detach: Callable[["EngineAttachment"], Awaitable[None]],
    ) -> None:
        """`command` is Engine.command of this attachment, `detach` Engine.detach."""
        self.attached = True  # unless a renewal has ended halfway
        self._num_queues = num_queues
        self.index = index
        self._command = command
        self._detach = detach

    async def reset(self) -> None:
        for queue in range(self._num_queues):
            await self.stop_vring(queue)
            await self.set_vring_enable(queue, False)
        await self._command(lib.VS_CMD_RESET, "resetting the device")

    async def renew(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._command(lib.VS_CMD_DETACH, "ending the frontend's former session")
            self.attached = False
            await self._command(lib.VS_CMD_ATTACH, "attaching the frontend anew")
            self.attached = True
        await self._command(lib.VS_CMD_RESET, "resetting the device")

    async def set_features(self, features: int) -> None:
        await self._command(lib.VS_CMD_SET_FEATURES, "setting the features", value=features)

    async def set_log_base(self, fd: OwnedFd, size_bytes: int, offset: int) -> None:
        await check_memory([fd], "the dirty log")
        await self._command(
            lib.VS_CMD_SET_LOG_BASE,
            "mapping the dirty log",
            fd=fd.fileno(),
            fds=(fd,),
            area={"bytes": size_bytes, "offset": offset},
        )

    async def set_log_fd(self, fd: OwnedFd) -> None:
        await self._command(
            lib.VS_CMD_SET_LOG_FD, "setting the dirty log's descriptor", fd=fd.fileno(), fds=(fd,)
        )

    async def set_mem_table(self, regions: Sequence[tuple[MemoryRegion, OwnedFd]]) -> None:
        await check_memory([fd for _, fd in regions], "the guest's memory")
        await self._command(
            lib.VS_CMD_SET_MEM_TABLE,
            "mapping the guest's memory",
            fds=[fd for _, fd in regions],
            regions=[(region, fd.fileno()) for region, fd in regions],
        )

    async def add_mem_region(self, region: MemoryRegion, fd: OwnedFd) -> None:
        await check_memory([fd], "the guest's memory")
        await self._command(
            lib.VS_CMD_ADD_MEM_REGION, "mapping a region", fds=[fd], regions=[(region, fd.fileno())]
        )

    async def remove_mem_region(self, region: MemoryRegion) -> None:
        await self._command(lib.VS_CMD_REMOVE_MEM_REGION, "unmapping a region", regions=[(region, -1)])

    async def set_vring_num(self, queue: int, num: int) -> None:
        await self._command(lib.VS_CMD_VRING_NUM, f"setting the size of ring {queue}", queue=queue, value=num)

    async def set_vring_addr(self, queue: int, desc: int, used: int, avail: int, log: int | None) -> None:
        await self._command(
            lib.VS_CMD_VRING_ADDR,
            f"setting the addresses of ring {queue}",
            queue=queue,
            ring={"desc": desc, "used": used, "avail": avail, "log": NO_LOG if log is None else log},
        )

    async def set_vring_base(self, queue: int, base: int) -> None:
        await self._command(
            lib.VS_CMD_VRING_BASE, f"setting the base of ring {queue}", queue=queue, value=base
        )

    async def _set_fd(self, kind: int, doing: str, queue: int, fd: OwnedFd | None) -> None:
        await self._command(
            kind,
            f"{doing} of ring {queue}",
            queue=queue,
            fd=-1 if fd is None else fd.fileno(),
            fds=() if fd is None else (fd,),
        )

    async def set_vring_kick(self, queue: int, fd: OwnedFd) -> None:
        await self._set_fd(lib.VS_CMD_VRING_KICK, "setting the kick", queue, fd)

    async def set_vring_call(self, queue: int, fd: OwnedFd | None) -> None:
        await self._set_fd(lib.VS_CMD_VRING_CALL, "setting the call", queue, fd)

    async def set_vring_err(self, queue: int, fd: OwnedFd | None) -> None:
        await self._set_fd(lib.VS_CMD_VRING_ERR, "setting the error descriptor", queue, fd)

    async def set_vring_enable(self, queue: int, enabled: bool) -> None:
        await self._command(
            lib.VS_CMD_VRING_ENABLE, f"enabling ring {queue}", queue=queue, value=int(enabled)
        )

    async def stop_vring(self, queue: int) -> int:
        return await self._command(lib.VS_CMD_VRING_STOP, f"stopping ring {queue}", queue=queue)

    async def set_inflight(self, fd: OwnedFd, size_bytes: int, offset: int, queues: int) -> None:
        await check_memory([fd], "the record of requests in flight")
        await self._command(
            lib.VS_CMD_SET_INFLIGHT,
            "mapping the record of requests in flight",
            fd=fd.fileno(),
            fds=(fd,),
            area={"bytes": size_bytes, "offset": offset, "queues": queues},
        )

    async def write_cache(self) -> bool:
        return bool(await self._command(lib.VS_CMD_GET_WRITE_CACHE, "asking for the write cache mode"))

    async def set_write_cache(self, writeback: bool) -> None:
        await self._command(lib.VS_CMD_SET_WRITE_CACHE, "setting the write cache mode", value=int(writeback))

    async def close(self) -> None:
        await self._detach(self)
