# SPDX-License-Identifier: Apache-2.0
import json
import os
import select
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest
from qemu.qmp import ConnectError, ExecuteError, QMPClient

from tests.unit.control_fakes import FakeBackend, running
from vhostsync import events
from vhostsync.control import client as control_client
from vhostsync.control import server
from vhostsync.control.commands import COMMANDS
from vhostsync.host import peer

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


class Raw:
    """A client that sends what it likes, for what a well-behaved one cannot do."""

    def __init__(self, stream: anyio.abc.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def send(self, *messages: Any) -> None:
        await self.stream.send(b"".join(json.dumps(message).encode() for message in messages))

    async def read(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            self.buffer += await self.stream.receive()
        line, _, self.buffer = self.buffer.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def negotiate(self) -> None:
        await self.send({"execute": "qmp_capabilities"})
        assert await self.read() == {"return": {}}


Connect = Callable[[], Awaitable[Raw]]


@pytest.fixture
async def connect(path: Path) -> AsyncIterator[Connect]:
    """Connects a raw client and reads the greeting; closes them all at the end."""
    async with AsyncExitStack() as stack:

        async def one() -> Raw:
            raw = Raw(await stack.enter_async_context(await anyio.connect_unix(path)))
            assert "QMP" in await raw.read()
            return raw

        yield one


async def test_a_real_qmp_client_works_on_it(path: Path, connect: Connect) -> None:
    backend = FakeBackend()
    async with running(path, backend):
        client = QMPClient("test")
        await client.connect(str(path))
        status = await client.execute("query-status")
        assert isinstance(status, dict)
        assert status["status"] == "running"
        listed = await client.execute("query-commands")
        assert isinstance(listed, list)
        assert {row["name"] for row in listed} == set(COMMANDS)
        with client.listener("MIRROR_STATE_CHANGE") as listener:
            assert await client.execute("mirror-start", {"destination": "/disks/b.img", "speed": 5}) == {}
            event = await listener.get()
            assert event["data"] == {"former": "passthrough", "state": "syncing", "reason": None}
        assert backend.mirror.target is not None
        assert backend.mirror.target.speed_bytes_per_s == 5
        with pytest.raises(ExecuteError, match="cancel the mirror first"):
            await client.execute("mirror-start", {"destination": "/disks/b.img"})
        with pytest.raises(ExecuteError, match="The command nope has not been found") as caught:
            await client.execute("nope")
        assert caught.value.error.error.class_ == "CommandNotFound"
        await client.disconnect()


async def test_a_real_qmp_client_cannot_talk_to_a_server_that_has_ended(path: Path) -> None:
    async with running(path, FakeBackend()):
        pass
    assert not path.exists()
    with pytest.raises(ConnectError):
        await QMPClient("test").connect(str(path))


async def test_only_the_owner_may_open_the_socket(path: Path) -> None:
    before = os.umask(0)
    try:
        async with running(path, FakeBackend()):
            assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize(("uid", "welcome"), [(0, True), (None, True), (12345, False)])
async def test_peers_of_other_users_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, uid: int | None, welcome: bool
) -> None:
    monkeypatch.setattr(peer, "peer_uid", lambda _: os.geteuid() if uid is None else uid)
    async with running(path, FakeBackend()):
        stream = await anyio.connect_unix(path)
        if welcome:
            assert b"QMP" in await stream.receive()
        else:
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()
        await stream.aclose()


async def test_the_peer_is_who_connected(path: Path) -> None:
    a, b = socket.socketpair(socket.AF_UNIX)
    with a, b:
        assert peer.peer_uid(a) == os.geteuid()


async def test_a_command_under_way_holds_up_only_its_own_client(path: Path, connect: Connect) -> None:
    backend = FakeBackend()
    backend.mirror.now = replace(backend.mirror.now, state="steady", destination="/disks/b.img")
    backend.mirror.hold_switch = anyio.Event()
    async with running(path, backend):
        slow, other = await connect(), await connect()
        await slow.negotiate()
        await other.negotiate()
        await slow.send({"execute": "switch", "id": 1}, {"execute": "query-version", "id": 2})
        await backend.mirror.switching.wait()
        await other.send({"execute": "query-status", "id": 3})
        assert (await other.read())["id"] == 3
        backend.mirror.hold_switch.set()
        answers = [await slow.read() for _ in range(3)]
        assert [answer["id"] for answer in answers if "id" in answer] == [1, 2]  # in order, as QEMU does


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_goes_away_does_not_cancel_its_switch(
    path: Path, connect: Connect, how: str
) -> None:
    backend = FakeBackend()
    backend.mirror.now = replace(backend.mirror.now, state="steady", destination="/disks/b.img")
    backend.mirror.hold_switch = anyio.Event()
    async with running(path, backend):
        client = await connect()
        await client.negotiate()
        await client.send({"execute": "switch"})
        await backend.mirror.switching.wait()
        if how == "reset":  # something unread at close makes it a reset
            backend.events.publish(events.IO_ERROR, {})
        await client.stream.aclose()
        with anyio.fail_after(5):
            other = await connect()
            await other.negotiate()
            backend.mirror.hold_switch.set()
            await backend.mirror.switched.wait()


async def test_a_client_that_sends_no_more_still_gets_its_answers(path: Path, connect: Connect) -> None:
    async with running(path, FakeBackend()):
        client = await connect()
        await client.send({"execute": "qmp_capabilities"}, {"execute": "query-status"})
        await client.stream.send_eof()
        assert await client.read() == {"return": {}}
        assert (await client.read())["return"]["status"] == "running"
        with pytest.raises(anyio.EndOfStream):
            await client.read()


async def test_a_client_that_never_reads_delays_nobody_and_is_disconnected(
    path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SEND_TIMEOUT_S", 0.3)
    backend = FakeBackend()
    async with running(path, backend):
        dead, lively = await connect(), await connect()
        await dead.negotiate()
        await lively.negotiate()
        for _ in range(100):
            backend.events.publish(events.IO_ERROR, {"filler": "x" * 30_000})
            assert (await lively.read())["event"] == "IO_ERROR"
        with anyio.fail_after(20):
            await anyio.to_thread.run_sync(wait_until_hung_up, dead)
        await lively.send({"execute": "query-status"})
        assert "return" in await lively.read()


def wait_until_hung_up(client: Raw) -> None:
    poll = select.poll()
    poll.register(client.stream.extra(anyio.abc.SocketAttribute.raw_socket), 0)  # POLLHUP is always told
    assert poll.poll(10_000)


async def test_a_slow_client_is_told_how_many_events_it_lost(path: Path, connect: Connect) -> None:
    backend = FakeBackend()
    async with running(path, backend):
        client = await connect()
        await client.negotiate()
        await client.send({"execute": "query-version"})
        await client.read()  # by now it is subscribed
        for number in range(events.BUFFER_EVENTS + 10):
            backend.events.publish(events.MIRROR_PROGRESS, {"number": number})
        first, second = await client.read(), await client.read()
        assert first["event"] == "EVENTS_LOST"
        assert first["data"] == {"count": 10}
        assert second["data"] == {"number": 10}


async def test_an_events_names_have_dashes(path: Path, connect: Connect) -> None:
    backend = FakeBackend()
    async with running(path, backend):
        client = await connect()
        await client.negotiate()
        await client.send({"execute": "query-version"})
        await client.read()
        backend.events.publish(events.SWITCH_COMPLETED, {"pause_us": 5})
        assert (await client.read())["data"] == {"pause-us": 5}


async def test_no_event_before_the_negotiation(path: Path, connect: Connect) -> None:
    backend = FakeBackend()
    async with running(path, backend):
        client = await connect()
        await client.send({"execute": "query-status"})
        backend.events.publish(events.IO_ERROR, {})
        assert "error" in await client.read()
        await client.negotiate()


async def test_quit_is_answered_and_announced(path: Path, connect: Connect) -> None:
    backend = FakeBackend()
    async with running(path, backend):
        client = await connect()
        await client.negotiate()
        await client.send({"execute": "quit", "arguments": {"force": True}, "id": 9})
        answers = []
        with anyio.fail_after(5), pytest.raises(anyio.EndOfStream):
            while True:
                answers.append(await client.read())
    assert {"return": {}, "id": 9} in answers
    assert "SHUTDOWN" in [answer.get("event") for answer in answers]
    assert backend.quit_force is True


async def test_a_command_that_the_end_cuts_short_is_answered(path: Path, connect: Connect) -> None:
    backend = FakeBackend()
    backend.mirror.now = replace(backend.mirror.now, state="steady", destination="/disks/b.img")
    backend.mirror.hold_switch = anyio.Event()
    async with running(path, backend) as scope:
        client = await connect()
        await client.negotiate()
        await client.send({"execute": "switch", "id": 1})
        await backend.mirror.switching.wait()
        scope.cancel()
        assert "going down" in (await client.read())["error"]["desc"]


async def test_the_end_does_not_wait_for_a_client_that_never_reads(
    path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLOSING_S", 0.2)
    backend = FakeBackend()
    with anyio.fail_after(5):
        async with running(path, backend):
            client = await connect()
            await client.negotiate()
            await client.send({"execute": "query-version"})
            await client.read()
            for _ in range(100):
                backend.events.publish(events.IO_ERROR, {"filler": "x" * 30_000})
            other = await connect()
            await other.negotiate()
            await backend.quit(force=False)
            with pytest.raises(anyio.EndOfStream):
                while True:
                    await other.read()


async def test_too_many_clients_are_refused(
    path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLIENTS_MAX", 2)
    async with running(path, FakeBackend()):
        clients = [await connect() for _ in range(2)]
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await connect()
        await clients[0].stream.aclose()
        with anyio.fail_after(5):
            while True:
                try:
                    await connect()
                    break
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    continue


async def test_more_requests_than_are_kept_are_all_answered(path: Path, connect: Connect) -> None:
    async with running(path, FakeBackend()), anyio.create_task_group() as tasks:
        client = await connect()
        await client.negotiate()
        tasks.start_soon(lambda: client.send(*({"execute": "query-status", "id": i} for i in range(2000))))
        assert [(await client.read())["id"] for _ in range(2000)] == list(range(2000))


async def test_rubbish_is_answered_and_the_client_goes_on(path: Path, connect: Connect) -> None:
    async with running(path, FakeBackend()):
        client = await connect()
        await client.stream.send(b"GET / HTTP/1.1\r\n")
        assert "JSON parse error" in (await client.read())["error"]["desc"]
        await client.negotiate()


@pytest.mark.usefixtures("own_logging")
async def test_a_defect_in_a_command_is_told_and_survived(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = FakeBackend()

    async def broken() -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(backend, "query_stats", broken)
    async with running(path, backend), control_client.connect(path) as client:
        with pytest.raises(control_client.RefusedError, match=r"Internal error \(ZeroDivisionError\)"):
            await client.execute("query-stats")
        assert (await client.execute("query-status"))["status"] == "running"
    assert "ZeroDivisionError" in capsys.readouterr().out


async def test_nothing_leaks(path: Path) -> None:
    def count() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = count()
    async with running(path, FakeBackend()):
        for _ in range(20):
            async with control_client.connect(path) as client:
                await client.execute("query-status")
    assert count() == before
