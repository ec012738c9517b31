# SPDX-License-Identifier: Apache-2.0
"""The socket: messages cut anywhere, descriptors where they belong and where not, ends of all kinds."""

import array
import os
import socket
from collections.abc import Iterator

import anyio
import pytest

from tests.protocol.fakes import WireFrontend, region, some_fds, wire, wire_of
from vhostsync.errors import FrontendError
from vhostsync.host.owned_fd import OwnedFd, close_all
from vhostsync.vhost_user.messages import HEADER, Message, Request, encode_reply
from vhostsync.vhost_user.payloads import U64, ConfigAccess, MemoryTable, VringFile, encode_u64
from vhostsync.vhost_user.transport import BackendChannel, Connection

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leak")]

TABLE = Message(Request.SET_MEM_TABLE, MemoryTable(tuple(region(number) for number in range(8))))
CALL = Message(Request.SET_VRING_CALL, VringFile(0, True))
FEATURES = Message(Request.SET_FEATURES, U64(5))


@pytest.fixture
def ends(anyio_backend: str) -> Iterator[tuple[Connection, WireFrontend]]:
    ours, theirs = socket.socketpair()
    connection, frontend = Connection(ours, message_timeout_s=20), WireFrontend(theirs)
    yield connection, frontend
    connection.close()
    frontend.close()


Ends = tuple[Connection, WireFrontend]


async def receive(connection: Connection) -> tuple[Message, int]:
    """The next message and how many descriptors came with it."""
    received = await connection.receive()
    assert received is not None
    message, fds = received
    for fd in fds:
        assert not os.get_inheritable(fd.fileno())
    close_all(fds)
    return message, len(fds)


@pytest.mark.parametrize(("message", "fds"), [(FEATURES, 0), (CALL, 1), (TABLE, 8)])
async def test_a_message_in_one_piece(ends: Ends, message: Message, fds: int) -> None:
    connection, frontend = ends
    await frontend.send(wire_of(message), fds)
    assert await receive(connection) == (message, fds)


@pytest.mark.parametrize(("message", "fds"), [(FEATURES, 0), (CALL, 1), (TABLE, 8)])
async def test_a_message_byte_by_byte(ends: Ends, message: Message, fds: int) -> None:
    connection, frontend = ends
    data = wire_of(message)

    async def send() -> None:
        await frontend.send(data[:1], fds)
        for at in range(1, len(data)):
            await anyio.lowlevel.checkpoint()
            await frontend.send(data[at : at + 1])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        assert await receive(connection) == (message, fds)


async def test_messages_that_arrive_together_keep_their_own_descriptors(ends: Ends) -> None:
    connection, frontend = ends
    for _ in range(3):
        await frontend.send(wire_of(FEATURES))
        await frontend.send(wire_of(CALL), 1)
        await frontend.send(wire_of(TABLE), 8)
    for _ in range(3):
        assert await receive(connection) == (FEATURES, 0)
        assert await receive(connection) == (CALL, 1)
        assert await receive(connection) == (TABLE, 8)


async def test_two_messages_in_one_piece(ends: Ends) -> None:
    connection, frontend = ends
    await frontend.send(wire_of(FEATURES) * 2)
    assert await receive(connection) == (FEATURES, 0)
    assert await receive(connection) == (FEATURES, 0)


@pytest.mark.parametrize("count", [9, 16, 100, 253])
async def test_too_many_descriptors(ends: Ends, count: int) -> None:
    """MSG_CTRUNC: the kernel closes what there is no room for, the rest is closed here."""
    connection, frontend = ends
    await frontend.send(wire_of(TABLE), count)
    with pytest.raises(FrontendError, match="more than 8 descriptors"):
        await connection.receive()


@pytest.mark.parametrize("count", [1, 8, 9, 200])
async def test_descriptors_where_none_belong(ends: Ends, count: int) -> None:
    connection, frontend = ends
    await frontend.send(wire_of(FEATURES), count)
    with pytest.raises(FrontendError, match="descriptors"):
        await connection.receive()


@pytest.mark.parametrize("at", [12, 13, 19])
async def test_descriptors_within_the_payload(ends: Ends, at: int) -> None:
    connection, frontend = ends
    data = wire_of(CALL)
    await frontend.send(data[:at])
    await frontend.send(data[at:], 1)
    with pytest.raises(FrontendError, match="in the middle of its payload"):
        await connection.receive()


async def test_more_descriptors_with_the_rest_of_the_header(ends: Ends) -> None:
    connection, frontend = ends
    data = wire_of(CALL)
    await frontend.send(data[:5], 1)
    await frontend.send(data[5:], 1)
    with pytest.raises(FrontendError, match="came with 2 descriptors"):
        await connection.receive()


async def test_a_descriptor_with_an_unknown_request(ends: Ends) -> None:
    connection, frontend = ends
    await frontend.send(HEADER.pack(99, 1, 0), 8)
    with pytest.raises(FrontendError, match="unknown request 99"):
        await connection.receive()


async def test_an_end_between_messages(ends: Ends) -> None:
    connection, frontend = ends
    await frontend.send(wire_of(FEATURES))
    frontend.close()
    assert await receive(connection) == (FEATURES, 0)
    assert await connection.receive() is None


@pytest.mark.parametrize("size", range(1, len(wire_of(CALL))))
async def test_an_end_within_a_message(ends: Ends, size: int) -> None:
    connection, frontend = ends
    await frontend.send(wire_of(CALL)[:size], 1)
    frontend.close()
    with pytest.raises(FrontendError, match="the connection ended within"):
        await connection.receive()


async def test_a_frontend_that_is_killed_with_a_reply_unread(ends: Ends) -> None:
    connection, frontend = ends
    await connection.send(encode_reply(Request.GET_FEATURES, encode_u64(1)))
    frontend.close()
    assert await connection.receive() is None
    with pytest.raises(FrontendError, match="went away"):
        await connection.send(encode_reply(Request.GET_FEATURES, encode_u64(1)))


async def test_a_message_that_does_not_arrive_in_time() -> None:
    ours, theirs = socket.socketpair()
    connection, frontend = Connection(ours, message_timeout_s=0.05), WireFrontend(theirs)
    await frontend.send(wire_of(CALL)[:15], 1)
    with pytest.raises(FrontendError, match=r"more than 0\.05 s"):
        await connection.receive()
    connection.close()
    frontend.close()


async def test_nothing_leaks_when_reading_is_cancelled(ends: Ends) -> None:
    connection, frontend = ends
    await frontend.send(wire_of(TABLE)[:100], 8)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.receive)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()


async def test_a_long_reply_to_a_slow_reader(ends: Ends) -> None:
    connection, frontend = ends
    data = os.urandom(1 << 20)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.send, data)
        await anyio.wait_all_tasks_blocked()
        assert await frontend.read(len(data)) == data


async def test_sending_to_a_dead_reader_is_no_signal(ends: Ends) -> None:
    connection, frontend = ends
    frontend.close()
    with pytest.raises(FrontendError, match="went away"):
        await connection.send(b"anything")


# ---- the backend's own channel -----------------------------------------------------------------------------


async def test_a_config_change_is_told() -> None:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(OwnedFd(ours.detach()))
    channel.config_changed()
    assert theirs.recv(100) == HEADER.pack(2, 0x1, 0)
    channel.close()
    assert theirs.recv(100) == b""
    theirs.close()


async def test_a_full_channel_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(OwnedFd(ours.detach()))
    for _ in range(5000):
        channel.config_changed()
    theirs.setblocking(False)
    received = bytearray()
    with pytest.raises(BlockingIOError):
        while True:
            received += theirs.recv(1 << 16)
    assert len(received) % HEADER.size == 0
    assert len(received) < 5000 * HEADER.size  # it was full at some time
    channel.config_changed()
    assert theirs.recv(100) == HEADER.pack(2, 0x1, 0)
    theirs.close()
    channel.close()


async def test_a_channel_whose_frontend_is_gone() -> None:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(OwnedFd(ours.detach()))
    theirs.close()
    channel.config_changed()
    channel.config_changed()
    channel.close()


async def test_a_channel_must_be_a_stream_socket() -> None:
    with OwnedFd(os.eventfd(0)) as fd, pytest.raises(FrontendError, match="no socket"):
        BackendChannel(fd)
    datagrams, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)  # whose close may linger
    for sock in (datagrams, tcp):
        with OwnedFd(sock.detach()) as fd, pytest.raises(FrontendError, match="no Unix stream"):
            BackendChannel(fd)
    peer.close()


# ---- descriptors with one owner --------------------------------------------------------------------------


def test_an_owned_descriptor() -> None:
    (fd,) = some_fds(1)
    number = fd.fileno()
    assert repr(fd) == f"OwnedFd({number})"
    assert (fd.owned, fd.take(), fd.owned) == (True, number, False)
    fd.close()
    os.fstat(number)  # still open: its new owner's
    os.close(number)
    for gone in (fd.take, fd.fileno):
        with pytest.raises(ValueError, match="taken or closed"):
            gone()
    with some_fds(1)[0] as other:
        number = other.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    other.close()
    assert repr(other) == "OwnedFd(gone)"
    with pytest.raises(ValueError, match="no file descriptor"):
        OwnedFd(-1)


async def test_a_config_message_as_large_as_any(ends: Ends) -> None:
    connection, frontend = ends
    message = Message(Request.SET_CONFIG, ConfigAccess(0, 1, bytes(range(256))))
    await frontend.send(wire_of(message))
    assert await receive(connection) == (message, 0)
    await frontend.send(wire(Request.SET_OWNER, need_reply=True))
    assert (await receive(connection))[0].need_reply


async def test_an_empty_array_of_descriptors(ends: Ends) -> None:
    connection, frontend = ends
    frontend.sock.sendmsg([wire_of(FEATURES)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i"))])
    assert await receive(connection) == (FEATURES, 0)
