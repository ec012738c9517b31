# SPDX-License-Identifier: Apache-2.0
"""One connection's side of the protocol, without the socket: obeys messages in order, as `rules` has it.

The calls of a step are made in order, and the state changes only after the last of them, so a call that the
engine refused leaves the state as it was.

NEED_REPLY is answered wherever the flag is set, also on the very SET_PROTOCOL_FEATURES that turns REPLY_ACK
on (virtio_uml), and also where REPLY_ACK was not negotiated: who sets it waits, and libvhost-user answers as
well. A request with a reply of its own gets that one only (libblkio sets the flag on those too).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from vhostsync.host.owned_fd import OwnedFd
from vhostsync.vhost_user.virtio_blk import BlkDevice

from ..errors import EngineError, FrontendError
from .attachment import Attachment
from .foreign_fd import close_foreign
from .messages import Message, encode_reply
from .payloads import encode_u64
from .rules import Call, Ring, State, plan
from .told import Told, duplicates

ACK_OK: Final = encode_u64(0)
ACK_REFUSED: Final = encode_u64(1)


@dataclass(frozen=True)
class Outcome:
    """The bytes to send, if any, with a descriptor, if any (the caller closes it), and what to log of a
    request that was refused but does no harm."""

    reply: bytes | None
    refusal: str | None = None
    share: OwnedFd | None = None


class Channel(Protocol):
    """The channel for the backend's own requests. Neither method waits."""

    def config_changed(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Session:
    """One connection. `open_channel` makes a channel of the descriptor that SET_BACKEND_REQ_FD brings (and
    takes it), or raises FrontendError."""

    device: BlkDevice
    open_channel: Callable[[OwnedFd], Channel]
    state: State = field(init=False)
    told: Told = field(init=False, default_factory=Told)
    channel: Channel | None = field(init=False, default=None)
    _config_pending: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.state = State(rings=(Ring(),) * self.device.shape.num_queues)

    async def handle(self, message: Message, fds: Sequence[OwnedFd], attachment: Attachment) -> Outcome:
        """Obey `message` and say what to answer. The caller closes what of `fds` was not taken.

        FrontendError ends the connection: the message was wrong, or the engine refused it and there is no
        way to tell the frontend.
        """
        step = plan(self.state, self.device, message, fds)
        refusal = step.refusal
        if refusal is None:
            kept = duplicates(message, fds)
            try:
                result = await _make(step.calls, attachment)
                if step.channel is not None:
                    self._adopt(self.open_channel(step.channel))
            except EngineError as error:
                close_foreign(kept)
                # An acknowledgement can say that one call had no effect, but not that half of it had.
                if not message.need_reply or step.answer is not None or len(step.calls) > 1:
                    raise FrontendError(f"{message.request.name} failed: {error}") from error
                refusal = str(error)
            except BaseException:
                close_foreign(kept)
                raise
            else:
                self.state = step.state
                self.told.note(message, kept, self.state, result)
                self._notify()
                if step.answer is not None:
                    share = step.share() if step.share is not None else None
                    return Outcome(encode_reply(message.request, step.answer(result)), share=share)
        if refusal is not None:
            refusal = f"{message.request.name} refused: {refusal}"
        if not message.need_reply:
            return Outcome(None, refusal)
        return Outcome(encode_reply(message.request, ACK_OK if refusal is None else ACK_REFUSED), refusal)

    def config_changed(self) -> None:
        """The config space changed: tell the frontend now, or once one of its rings is started and it has
        given a channel. Several changes before that are told as one."""
        self._config_pending = True
        self._notify()

    def close(self) -> None:
        """Close the channel for the backend's own requests, and forget what was said."""
        self._close_channel()
        self.told.close()

    def leave_told(self) -> Told:
        """What was said, which is the caller's to close."""
        told, self.told = self.told, Told()
        return told

    def _close_channel(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _adopt(self, channel: Channel) -> None:
        self._close_channel()
        self.channel = channel

    def _notify(self) -> None:
        # "While all vrings are stopped, the device … must not send any messages to the front-end."
        if self._config_pending and self.channel and any(ring.started for ring in self.state.rings):
            self._config_pending = False
            self.channel.config_changed()


async def _make(calls: Sequence[Call], attachment: Attachment) -> int | None:
    result = None
    for call in calls:
        result = await call(attachment)
    return result
