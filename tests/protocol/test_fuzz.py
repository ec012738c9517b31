# SPDX-License-Identifier: Apache-2.0
"""Messages at random, mostly right, into a session and over a real socket: no fault, no leak, no desync."""

import errno
import socket
from collections.abc import Mapping
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.protocol.conftest import open_fds
from tests.protocol.fakes import RecordingAttachment, RecordingChannel, device, region, some_fds, wire_of
from tests.protocol.traces import TRACES
from vhostsync.errors import FrontendError
from vhostsync.host.owned_fd import OwnedFd, close_all
from vhostsync.vhost_user.attachment import Attachment, MemoryRegion
from vhostsync.vhost_user.listener import Endpoint
from vhostsync.vhost_user.messages import FORMATS, HEADER, Header, Message, Request, parse_message
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
)
from vhostsync.vhost_user.rules import MEM_SLOTS, OFFERED
from vhostsync.vhost_user.server import FrontendServer
from vhostsync.vhost_user.session import Session

U64S = st.one_of(
    st.sampled_from([0, 1, 0x1000, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1)
)
QUEUES = st.one_of(st.integers(0, 3), st.sampled_from([4, 63, 255]))
REGIONS = st.one_of(
    st.integers(0, 9).map(region), st.builds(MemoryRegion, U64S, U64S, U64S, U64S), st.just(region(0))
)
FEATURES = st.one_of(st.integers(0, (1 << 64) - 1).map(lambda bits: bits & device().features), U64S)
NUMS = st.one_of(st.sampled_from([0, 1, 64, 128, 256, 1024, 2048]), st.integers(0, (1 << 32) - 1))
ADDRESSES = st.integers(0, 1 << 40).map(lambda number: number * 16)

PAYLOADS: dict[Request, st.SearchStrategy[Payload]] = {
    Request.SET_FEATURES: st.builds(U64, FEATURES),
    Request.SET_PROTOCOL_FEATURES: st.one_of(
        st.just(U64(OFFERED)), st.builds(U64, st.integers(0, 0xFFFF).map(lambda bits: bits & OFFERED))
    ),
    Request.SET_MEM_TABLE: st.builds(
        lambda regions: MemoryTable(tuple(regions)), st.lists(REGIONS, min_size=1, max_size=8)
    ),
    Request.ADD_MEM_REG: st.builds(SingleRegion, REGIONS),
    Request.REM_MEM_REG: st.builds(SingleRegion, REGIONS),
    Request.SET_VRING_NUM: st.builds(VringState, QUEUES, NUMS),
    Request.SET_VRING_BASE: st.builds(VringState, QUEUES, st.integers(0, 0x10000)),
    Request.GET_VRING_BASE: st.builds(VringState, QUEUES, st.just(0)),
    Request.SET_VRING_ENABLE: st.builds(VringState, QUEUES, st.integers(0, 2)),
    Request.SET_VRING_ADDR: st.builds(VringAddress, QUEUES, ADDRESSES, ADDRESSES, ADDRESSES, st.none()),
    Request.SET_VRING_KICK: st.builds(VringFile, QUEUES, st.booleans()),
    Request.SET_VRING_CALL: st.builds(VringFile, QUEUES, st.booleans()),
    Request.SET_VRING_ERR: st.builds(VringFile, QUEUES, st.booleans()),
    Request.GET_CONFIG: st.builds(
        lambda offset, size: ConfigAccess(offset, 0, bytes(size)), st.integers(0, 200), st.integers(1, 60)
    ),
    Request.SET_CONFIG: st.builds(
        ConfigAccess,
        st.sampled_from([32, 32, 32, 0, 255]),
        st.integers(0, 1),
        st.binary(min_size=1, max_size=2),
    ),
    Request.SET_LOG_BASE: st.builds(LogArea, U64S, U64S),
    Request.GET_INFLIGHT_FD: st.just(InflightArea(0, 0, 1, 128, 24)),
    Request.SET_INFLIGHT_FD: st.just(InflightArea(4096, 0, 1, 128, 20)),
}


@st.composite
def messages(draw: st.DrawFn) -> tuple[Message, int]:
    """A message and how many descriptors go with it; now and then a number that does not fit."""
    request = draw(st.sampled_from(sorted(FORMATS)))
    payload = draw(PAYLOADS.get(request, st.just(Empty())))
    match payload:
        case MemoryTable(regions):
            fds = len(regions)
        case VringFile(_, has_fd):
            fds = int(has_fd)
        case _:
            fds = FORMATS[request].least_fds
    if draw(st.integers(0, 30)) == 0:
        fds = draw(st.integers(0, 8))
    return Message(request, payload, draw(st.booleans())), fds


def check_session(session: Session, blk_queues: int = 4) -> None:
    """What must hold of any state."""
    state = session.state
    assert len(state.rings) == blk_queues
    assert len(state.regions) <= MEM_SLOTS
    assert state.protocol_features & ~OFFERED == 0
    assert (state.features or 0) & ~session.device.features == 0
    for ring in state.rings:
        assert not ring.started or (ring.num is not None and ring.addressed)


async def converse(script: list[tuple[Message, int]], refuse: frozenset[str]) -> None:
    session = Session(device(), _open_channel)
    attachment = RecordingAttachment(refuse=dict.fromkeys(refuse, errno.EIO))
    for message, fd_count in script:
        # Through the wire's own checks first, as the transport does.
        data = encode_payload(message.payload)
        fds = some_fds(fd_count)
        before = session.state
        try:
            header = Header(message.request, message.need_reply, len(data))
            outcome = await session.handle(parse_message(header, data, fd_count), fds, attachment)
            if outcome.share is not None:
                outcome.share.close()
        except FrontendError:
            assert session.state == before
        else:
            replies = message.need_reply or message.request.name.startswith(("GET_", "SET_LOG_BASE"))
            assert (outcome.reply is not None) == replies
        finally:
            close_all(fds)
        check_session(session)
    session.close()


def _open_channel(fd: OwnedFd) -> RecordingChannel:
    fd.close()
    return RecordingChannel()


CALLS = sorted(name for name in vars(Attachment) if not name.startswith("_"))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(messages(), max_size=40),
    st.one_of(st.just(frozenset[str]()), st.frozensets(st.sampled_from(CALLS), max_size=2)),
)
def test_any_messages_in_any_order(script: list[tuple[Message, int]], refuse: frozenset[str]) -> None:
    before = open_fds()
    anyio.run(converse, script, refuse)
    assert open_fds() == before


class Bench:
    """A server at one end of a pair of sockets."""

    def __init__(self) -> None:
        self.attachments: list[RecordingAttachment] = []
        self.faults: list[str] = []
        self.server = FrontendServer(device(), self._attach, self._publish)

    async def _attach(self) -> Attachment:
        self.attachments.append(RecordingAttachment())
        return self.attachments[-1]

    def _publish(self, name: str, data: Mapping[str, Any]) -> None:
        if "a fault" in str(data.get("reason")):
            self.faults.append(data["reason"])


async def throw(pieces: list[tuple[bytes, int]]) -> None:
    """The pieces, each with its descriptors, then the end of the connection."""
    bench = Bench()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bench.server.serve, Endpoint(ours, listening=False))
            for data, fd_count in pieces:
                fds = some_fds(fd_count)
                try:
                    if data:
                        socket.send_fds(theirs, [data], [fd.fileno() for fd in fds])
                except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                    break  # the server ended the connection, or is behind: both are fine
                finally:
                    close_all(fds)
                await anyio.lowlevel.checkpoint()
            theirs.close()
    assert bench.faults == []
    assert all(attachment.closed for attachment in bench.attachments)


BYTES_OF_MESSAGES = messages().map(lambda pair: (wire_of(pair[0]), pair[1]))
HEADERS = st.builds(HEADER.pack, st.integers(0, 50), st.integers(0, 15), st.integers(0, 300))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            BYTES_OF_MESSAGES,
            BYTES_OF_MESSAGES,
            st.tuples(HEADERS, st.integers(0, 12)),
            st.tuples(st.binary(max_size=400), st.integers(0, 12)),
        ),
        max_size=20,
    )
)
def test_any_bytes_over_a_socket(pieces: list[tuple[bytes, int]]) -> None:
    before = open_fds()
    anyio.run(throw, pieces)
    assert open_fds() == before


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TRACES)), st.data())
def test_a_real_conversation_with_one_thing_wrong(name: str, data: st.DataObject) -> None:
    """A bit flipped, bytes left out or doubled, descriptors more or fewer, at one place."""
    trace = TRACES[name]
    pieces = [(wire_of(Message(sent.request, sent.payload, sent.need_reply)), sent.fds) for sent in trace]
    place = data.draw(st.integers(0, len(pieces) - 1))
    piece, fds = pieces[place]
    match data.draw(st.integers(0, 3)):
        case 0:
            bit = data.draw(st.integers(0, len(piece) * 8 - 1))
            changed = bytearray(piece)
            changed[bit // 8] ^= 1 << bit % 8
            pieces[place] = (bytes(changed), fds)
        case 1:
            pieces[place] = (piece[: data.draw(st.integers(0, len(piece) - 1))], fds)
        case 2:
            pieces[place] = (piece + piece[: data.draw(st.integers(1, len(piece)))], fds)
        case _:
            pieces[place] = (piece, data.draw(st.integers(0, 20)))
    before = open_fds()
    anyio.run(throw, pieces)
    assert open_fds() == before


@pytest.mark.parametrize("name", TRACES)
def test_an_end_after_every_message(name: str) -> None:
    before = open_fds()
    trace = TRACES[name]
    for length in range(0, len(trace), 7):
        sent = trace[:length]
        anyio.run(
            throw, [(wire_of(Message(one.request, one.payload, one.need_reply)), one.fds) for one in sent]
        )
    assert open_fds() == before
