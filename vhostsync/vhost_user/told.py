# SPDX-License-Identifier: Apache-2.0
"""What a frontend has said and still means, as the messages that say it once more: to the backend's
successor, which takes the connection over (hand_over.py). The frontend itself says nothing again.

The descriptors are duplicates of those that the frontend has sent, for the engine owns (and may close) these.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from vhostsync.host.owned_fd import OwnedFd
from vhostsync.vhost_user.virtio_blk import WRITEBACK_OFFSET, Feature

from ..errors import FrontendError
from .attachment import MemoryRegion
from .foreign_fd import close_foreign
from .messages import Message, ProtocolFeature, Request
from .payloads import (
    FEATURE_PROTOCOL_FEATURES,
    MEM_TABLE_REGIONS_MAX,
    ConfigAccess,
    MemoryTable,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from .rules import State

# In the order in which they are said again: protocol features decide which of the others may come.
BEFORE_MEMORY: Final = (Request.SET_PROTOCOL_FEATURES, Request.SET_FEATURES, Request.SET_BACKEND_REQ_FD)
AFTER_MEMORY: Final = (Request.SET_INFLIGHT_FD,)
OF_A_RING: Final = (
    Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ADDR, Request.SET_VRING_CALL,
    Request.SET_VRING_ERR, Request.SET_VRING_KICK,
)  # fmt: skip
_KEPT: Final = frozenset(
    {*BEFORE_MEMORY, *AFTER_MEMORY, *OF_A_RING, Request.SET_MEM_TABLE, Request.ADD_MEM_REG}
)
_MEANS_THE_CONNECTION: Final = (Request.SET_PROTOCOL_FEATURES, Request.SET_BACKEND_REQ_FD)

Saying = tuple[Message, list[OwnedFd]]
Key = TypeVar("Key")


def duplicates(message: Message, fds: Sequence[OwnedFd]) -> list[OwnedFd]:
    """Of what came with a message that is kept; to be made before the engine takes them. FrontendError."""
    made: list[OwnedFd] = []
    if message.request in _KEPT:
        try:
            for fd in fds:
                made.append(OwnedFd(os.dup(fd.fileno())))
        except OSError as error:
            close_foreign(made)
            raise FrontendError(f"a descriptor of {message.request.name}: {error.strerror}") from error
    return made


@dataclass
class Told:
    """Of one connection. `note` what was obeyed; owns its descriptors until `close`."""

    logs: bool = False  # a dirty log was given: a live migration, which a successor knows nothing of
    _once: dict[Request, Saying] = field(default_factory=dict)
    _regions: dict[MemoryRegion, OwnedFd] = field(default_factory=dict)
    _rings: dict[tuple[int, Request], Saying] = field(default_factory=dict)

    def note(self, message: Message, fds: list[OwnedFd], after: State, answer: int | None) -> None:
        """`message` was obeyed and has led to `after`. Owns `fds`, the `duplicates` of what came with it.
        `answer`: what the engine has returned."""
        payload, request = message.payload, message.request
        if request is Request.SET_LOG_BASE:
            self.logs = True
        elif request is Request.GET_VRING_BASE and isinstance(payload, VringState):
            self._drop_ring(payload.queue, Request.SET_VRING_KICK)
            base = Message(Request.SET_VRING_BASE, VringState(payload.queue, answer or 0))
            self._keep(self._rings, (payload.queue, Request.SET_VRING_BASE), (base, []))
        elif request in OF_A_RING:
            assert isinstance(payload, VringState | VringAddress | VringFile)
            self._keep(self._rings, (payload.queue, request), (replace(message, need_reply=False), fds))
        elif isinstance(payload, MemoryTable):
            close_foreign(self._regions.values())
            self._regions = dict(zip(payload.regions, fds, strict=True))
        elif request is Request.ADD_MEM_REG and isinstance(payload, SingleRegion):
            (self._regions[payload.region],) = fds
        elif request in _KEPT:
            self._keep(self._once, request, (replace(message, need_reply=False), fds))
        elif request is Request.RESET_DEVICE:
            self._forget_rings(Request.SET_FEATURES)
        elif request is Request.SET_OWNER and not after.regions:
            self._forget_rings(*(each for each in self._once if each not in _MEANS_THE_CONNECTION))
        self._drop_regions(after.regions)

    @staticmethod
    def _keep(where: dict[Key, Saying], key: Key, saying: Saying) -> None:
        if (former := where.pop(key, None)) is not None:
            close_foreign(former[1])
        where[key] = saying

    def _drop_ring(self, queue: int, request: Request) -> None:
        if (former := self._rings.pop((queue, request), None)) is not None:
            close_foreign(former[1])

    def _forget_rings(self, *once: Request) -> None:
        for queue, request in list(self._rings):
            self._drop_ring(queue, request)
        for request in once:
            if (former := self._once.pop(request, None)) is not None:
                close_foreign(former[1])

    def _drop_regions(self, there: Sequence[MemoryRegion]) -> None:
        for region in [each for each in self._regions if each not in there]:
            close_foreign([self._regions.pop(region)])

    def again(self, state: State, bases: Mapping[int, int], *, writeback: bool) -> Iterator[Saying]:
        """The messages that lead a new session to `state`. `bases`: of the rings that are to run again, as
        the engine has told them when it stopped them. The descriptors stay this object's."""
        yield from (self._once[request] for request in BEFORE_MEMORY if request in self._once)
        yield from self._memory()
        yield from (self._once[request] for request in AFTER_MEMORY if request in self._once)
        if (state.features or 0) & Feature.CONFIG_WCE and state.protocol_features & ProtocolFeature.CONFIG:
            mode = ConfigAccess(WRITEBACK_OFFSET, 0, bytes([writeback]))
            yield Message(Request.SET_CONFIG, mode), []
        enabled_by_features = not (state.features or 0) & FEATURE_PROTOCOL_FEATURES
        for queue, ring in enumerate(state.rings):
            if queue in bases:
                base = Message(Request.SET_VRING_BASE, VringState(queue, bases[queue]))
                self._keep(self._rings, (queue, Request.SET_VRING_BASE), (base, []))
            for request in OF_A_RING:
                if (queue, request) in self._rings:
                    yield self._rings[queue, request]
            if ring.enabled and not enabled_by_features:
                yield Message(Request.SET_VRING_ENABLE, VringState(queue, 1)), []

    def _memory(self) -> Iterator[Saying]:
        regions = tuple(self._regions)
        if 0 < len(regions) <= MEM_TABLE_REGIONS_MAX:
            yield Message(Request.SET_MEM_TABLE, MemoryTable(regions)), list(self._regions.values())
            return
        for region in regions:  # so many have come one by one
            yield Message(Request.ADD_MEM_REG, SingleRegion(region)), [self._regions[region]]

    def close(self) -> None:
        self._forget_rings(*self._once)
        self._drop_regions(())
