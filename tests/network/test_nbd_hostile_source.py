# SPDX-License-Identifier: Apache-2.0
"""NBD servers that do not keep to what they have said, and the guest is on their disk. Of what fails the
guest is told, of nothing else; it waits for what is not answered, and the backend lives."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon.rig import (
    BLOCK,
    WAIT_S,
    Served,
    answered,
    await_true,
    block_of,
    flush,
    write_block,
)
from tests.frontend import Frontend, FrontendTimeout, Request
from tests.network.hostile_server import (
    EINVAL,
    EIO,
    ENOSPC,
    FLUSH,
    READ,
    WRITE,
    ZERO,
    HostileServer,
    Silence,
    well,
)
from tests.sizes import MIB
from tests.vhost_client import VhostUserTransport


def after_a_write(guest: Frontend) -> Request:
    """Else there is nothing that the server would have to flush."""
    write_block(guest, 5, 5)
    return guest.flush()


ASKED: dict[int, Callable[[Frontend], Request]] = {
    READ: lambda guest: guest.read(BLOCK, BLOCK),
    WRITE: lambda guest: guest.write(2 * BLOCK, block_of(2, 2)),
    FLUSH: after_a_write,
    ZERO: lambda guest: guest.write_zeroes(4 * BLOCK, BLOCK),
}
KINDS = pytest.mark.parametrize("kind", list(ASKED), ids=["read", "write", "flush", "zero"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HostileServer]:
    with HostileServer(tmp_path / "h.sock") as server:
        yield server


@pytest.fixture
def served(tmp_path: Path, server: HostileServer) -> Iterator[Served]:
    """What was not answered may be sent again: the server lets nobody in before it is done with it."""
    with Served(tmp_path, server.uri, "--fence", "limit", "--reconnect-timeout", "2s") as served:
        yield served


@pytest.fixture
def guest(served: Served) -> Iterator[Frontend]:
    with served.guest() as guest:
        write_block(guest, 1, 1)
        flush(guest)
        yield guest


def goes_on(served: Served, guest: Frontend) -> None:
    """With nothing that it had lost."""
    assert served.process.running
    assert guest.read_now(BLOCK, BLOCK) == block_of(1, 1)
    write_block(guest, 3, 3)
    flush(guest)
    guest.close()
    served.stop()


@KINDS
@pytest.mark.parametrize("error", [EIO, ENOSPC, EINVAL, 0x7FFFFFFF])
def test_an_error_for_every_command(
    server: HostileServer, served: Served, guest: Frontend, kind: int, error: int
) -> None:
    server.behave = lambda what, *_: error if what == kind else 0
    request = ASKED[kind](guest)
    guest.wait(request)
    # A zeroing that the server does not know is written out: it may well succeed.
    assert not request.ok or (kind == ZERO and error not in (EIO, ENOSPC))
    server.behave = well
    goes_on(served, guest)


@KINDS
def test_an_answer_that_is_never_given(
    server: HostileServer, served: Served, guest: Frontend, kind: int
) -> None:
    """The guest waits as long as the server is there; when the connection has ended it is asked again."""
    server.behave = lambda what, *_: Silence.NO_ANSWER if what == kind else 0
    request = ASKED[kind](guest)
    with pytest.raises(FrontendTimeout):
        guest.wait(request, timeout_s=0.5)
    server.behave = well
    server.cut()
    guest.wait(request)
    assert request.ok
    goes_on(served, guest)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("kind", "force"), [(READ, True), (WRITE, False), (FLUSH, True), (ZERO, False)])
def test_the_end_while_an_answer_is_never_given(
    tmp_path: Path, server: HostileServer, kind: int, force: bool
) -> None:
    """The backend ends; the guest, which has no answer and no error, gets it from the next one."""
    options = ("--fence", "limit", "--destination-timeout", "1s")
    with Served(tmp_path, server.uri, *options) as served, served.guest() as guest:
        write_block(guest, 1, 1)
        flush(guest)
        server.behave = lambda what, *_: Silence.NO_ANSWER if what == kind else 0
        request = ASKED[kind](guest)
        await_true(lambda: served.in_flight() == 1, "it is taken up")
        guest.poll()
        if force:
            served.qmp.execute("quit", force=True)
        else:
            served.process.signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
        assert not guest.poll() and not request.done
        server.behave = well
        with Served(tmp_path, server.uri, *options) as following:
            guest.transport.close()
            guest.transport = VhostUserTransport(following.socket, timeout_s=WAIT_S)
            guest.queues[0].base = guest.queues[0].ring.last_used
            guest.start()
            assert answered(guest, request)
            goes_on(following, guest)


def test_noise_ends_the_connection_and_the_guest_goes_on(
    server: HostileServer, served: Served, guest: Frontend
) -> None:
    noises = [bytes(64), b"\xff" * 16, b"HTTP/1.1 400 Bad Request\r\n\r\n"]  # no magic of a reply
    server.behave = lambda what, *_: noises.pop() if what == WRITE and noises else 0
    for number in range(16):
        assert answered(guest, guest.write(number * BLOCK, block_of(number, 1)))
    assert not noises
    goes_on(served, guest)


@pytest.mark.parametrize("size", [0, 8 * MIB, 24 * MIB])
def test_another_size_when_it_is_back(
    server: HostileServer, served: Served, guest: Frontend, size: int
) -> None:
    """The guest gets errors, and not another disk."""
    server.size = size
    server.cut()
    assert not answered(guest, guest.write(0, block_of(0, 2)))
    if size:
        await_true(lambda: "since its server is back" in served.process.last_output(50), "it is logged")
    assert served.process.running and server.content[:BLOCK] == bytes(BLOCK)
