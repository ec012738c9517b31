# SPDX-License-Identifier: Apache-2.0
"""One session without a socket, for the tests of the state table; the fixture `desk` is one."""

from typing import Any

from tests.protocol.fakes import WANTED, RecordingAttachment, RecordingChannel, device, some_fds
from vhostsync.host.owned_fd import OwnedFd, close_all
from vhostsync.vhost_user.messages import HEADER, Message, ProtocolFeature, Request
from vhostsync.vhost_user.payloads import U64, Empty, Payload, VringAddress, VringFile, VringState
from vhostsync.vhost_user.rules import OFFERED
from vhostsync.vhost_user.session import Session
from vhostsync.vhost_user.virtio_blk import BlkDevice

R = Request


class Desk:
    """A session, its attachment and its channels, and a short way to say things to it."""

    def __init__(self, blk: BlkDevice | None = None) -> None:
        self.blk = blk or device()
        self.attachment = RecordingAttachment()
        self.channels: list[RecordingChannel] = []
        self.session = Session(self.blk, self._open)
        self.refusals: list[str] = []
        self.shared: list[OwnedFd] = []

    def _open(self, fd: OwnedFd) -> RecordingChannel:
        fd.close()
        self.channels.append(RecordingChannel())
        return self.channels[-1]

    async def say(
        self, request: Request, payload: Payload | None = None, fds: int = 0, *, need_reply: bool = False
    ) -> bytes | None:
        """The reply's payload, or None if there was no reply."""
        owned = some_fds(fds)
        try:
            message = Message(request, payload or Empty(), need_reply)
            outcome = await self.session.handle(message, owned, self.attachment)
        finally:
            close_all(owned)
        if outcome.share is not None:
            self.shared.append(outcome.share)
        if outcome.refusal is not None:
            self.refusals.append(outcome.refusal)
        if outcome.reply is None:
            return None
        number, flags, size = HEADER.unpack_from(outcome.reply)
        content = outcome.reply[HEADER.size :]
        assert (number, flags, size) == (request, 0x5, len(content))
        return content

    async def negotiate(self, protocol: ProtocolFeature = OFFERED, features: int = WANTED) -> None:
        await self.say(R.SET_PROTOCOL_FEATURES, U64(protocol))
        await self.say(R.SET_FEATURES, U64(features))
        self.attachment.calls.clear()

    async def lay_out(self, queue: int = 0) -> None:
        await self.say(R.SET_VRING_NUM, VringState(queue, 128))
        await self.say(R.SET_VRING_ADDR, VringAddress(queue, 0x1000, 0x3000, 0x2000, None))

    async def start(self, queue: int = 0) -> None:
        """Make the ring run."""
        await self.lay_out(queue)
        await self.say(R.SET_VRING_KICK, VringFile(queue, True), 1)
        await self.say(R.SET_VRING_ENABLE, VringState(queue, 1))
        self.attachment.calls.clear()

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        return self.attachment.calls
