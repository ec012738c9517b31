# SPDX-License-Identifier: Apache-2.0
import json
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from tests.unit.control_fakes import FakeBackend, running
from vhostsync import events
from vhostsync.control import client as client_module
from vhostsync.control import sockets
from vhostsync.control.client import RefusedError, ask_once, connect
from vhostsync.control.sockets import READ_BYTES
from vhostsync.errors import ControlError, UnreachableError

pytestmark = pytest.mark.anyio

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}
NEGOTIATED: dict[str, Any] = {"return": {}, "id": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


@asynccontextmanager
async def answering(path: Path, *messages: Any) -> AsyncIterator[list[bytes]]:
    """A server that sends these, one for each packet that it receives after the first, and then hangs up. The
    packets."""
    received: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for number, message in enumerate(messages):
                if number:
                    received.append(connection.recv(4096))
                connection.sendall(
                    message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
                )
            connection.recv(4096)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield received
        await anyio.to_thread.run_sync(thread.join)


async def test_commands_events_and_refusals(path: Path) -> None:
    backend = FakeBackend()
    async with running(path, backend), connect(path) as client:
        assert "QMP" in client.greeting
        await client.execute("mirror-start", {"destination": "/b"})
        with pytest.raises(RefusedError, match="cancel the mirror first") as caught:
            await client.execute("mirror-start", {"destination": "/b"})
        assert caught.value.kind == "GenericError"
        backend.events.publish(events.IO_ERROR, {"number": 1})
        assert (await client.next_event())["event"] == "MIRROR_STATE_CHANGE"
        assert (await client.next_event())["data"] == {"number": 1}


async def test_who_asks_once_wakes_the_backend_once(path: Path) -> None:
    event = {"event": "IO_ERROR", "data": {}, "timestamp": {}}
    refused = {"error": {"class": "GenericError", "desc": "no"}, "id": 3}
    replies = b"".join(
        json.dumps(each).encode() + b"\n"
        for each in (NEGOTIATED, event, {"return": {"x": 1}, "id": 2}, refused, {"return": 5, "id": 4})
    )
    async with answering(path, GREETING, replies) as received:
        status, refusal, last = await ask_once(path, "query-status", "nonsense", "query-x")
    assert (status, last) == ({"x": 1}, 5)
    assert isinstance(refusal, RefusedError) and str(refusal) == "no"
    (packet,) = received
    asked = [json.loads(line)["execute"] for line in packet.splitlines()]
    assert asked == ["qmp_capabilities", "query-status", "nonsense", "query-x"]
    async with answering(path.with_name("other"), b"SSH-2.0\n") as received:
        with pytest.raises(ControlError, match="what is no JSON"):
            await ask_once(path.with_name("other"), "query-status")
    assert received == []  # nothing is said to who is no backend


async def test_who_asks_once_is_answered_by_a_real_server(path: Path) -> None:
    async with running(path, FakeBackend()):
        version, unknown = await ask_once(path, "query-version", "nonsense")
    assert version["package"].startswith("vhostsync")
    assert isinstance(unknown, RefusedError) and unknown.kind == "CommandNotFound"
    with pytest.raises(UnreachableError, match="is the backend running"):
        await ask_once(path.with_name("none"), "query-version")


async def test_what_cannot_be_json_is_a_sentence(path: Path) -> None:
    async with answering(path, GREETING, b"[" * 200_000 + b"\n"):
        with pytest.raises(ControlError, match="what is no JSON"):
            await ask_once(path, "query-status")


@pytest.mark.parametrize("sent", [b'{"event": "X"}\n' * 100_000, b"x" * (1 << 20)])
async def test_a_backend_that_sends_without_an_end_takes_no_turn_from_others(
    path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """As if it were faster than this process: there is always something to read."""
    received = 0

    async def receive(_: socket.socket) -> bytes:
        nonlocal received
        received += READ_BYTES
        assert received < 1 << 26, "nobody else had a turn"
        at = (received - READ_BYTES) % len(sent)
        return (sent[at:] + sent)[:READ_BYTES]

    async with answering(path, GREETING, NEGOTIATED), connect(path) as client:
        monkeypatch.setattr(client_module, "LINE_BYTES_MAX", 1 << 30)
        monkeypatch.setattr(sockets, "receive", receive)
        with anyio.move_on_after(0.05) as scope:
            await client.execute("query-status")
        assert scope.cancelled_caught
        monkeypatch.undo()


@pytest.mark.parametrize("sent", [b'{"event": "X"}\n' * 1000, b"x" * READ_BYTES, b"x"])
async def test_of_a_backend_that_is_asked_once_only_so_much_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """However slowly it sends on and on."""
    received: list[int] = []

    async def receive(_: socket.socket) -> bytes:
        received.append(len(sent))
        assert len(received) <= 2000, "it is read for ever"
        return (b'{"QMP": {}}\n' if len(received) == 1 else b"") + sent

    async with answering(path):
        monkeypatch.setattr(sockets, "receive", receive)
        with pytest.raises(ControlError, match="sends without an end"):
            await ask_once(path, "query-status")
        monkeypatch.undo()
    assert sum(received) <= client_module.RATION_BYTES


async def test_what_a_backend_says_makes_no_sentence_too_long_to_read(path: Path) -> None:
    refused = {"error": {"class": "GenericError", "desc": "no " * 100_000}, "id": 2}
    for said in (refused, {"x" * 300_000: 1}):
        replies = b"".join(json.dumps(each).encode() + b"\n" for each in (NEGOTIATED, said))
        async with answering(path, GREETING, replies):
            try:
                [answer] = await ask_once(path, "query-status")
            except ControlError as error:
                answer = error
        assert isinstance(answer, ControlError) and len(str(answer)) < 2500
        path.unlink()


async def test_a_client_that_sends_without_an_end_takes_no_turn_from_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = 0

    async def receive(_: socket.socket) -> bytes:
        nonlocal received
        received += READ_BYTES
        return b" " * READ_BYTES if received < 1 << 26 else b""

    async with running(path, FakeBackend()), connect(path):
        with socket.socket(socket.AF_UNIX) as flooding:
            flooding.connect(str(path))
            await anyio.sleep(0.02)
            monkeypatch.setattr(sockets, "receive", receive)
            flooding.send(b" ")
            while not received:
                await anyio.sleep(0)
            assert received < 1 << 26, "nobody else had a turn"
            monkeypatch.undo()


async def test_a_wait_for_events_that_is_cancelled_loses_nothing(path: Path) -> None:
    backend = FakeBackend()
    async with running(path, backend), connect(path) as client:
        await client.execute("query-status")
        with anyio.move_on_after(0.01):
            await client.next_event()
        backend.events.publish(events.IO_ERROR)
        assert (await client.execute("query-version"))["package"].startswith("vhostsync")
        assert (await client.next_event())["event"] == "IO_ERROR"


async def test_no_socket_is_a_sentence(path: Path) -> None:
    with pytest.raises(UnreachableError, match="is the backend running"):
        async with connect(path):
            pass


async def test_a_leftover_socket_is_a_sentence(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as leftover:
        leftover.bind(str(path))
    with pytest.raises(UnreachableError, match="has ended"):
        async with connect(path):
            pass
    path.unlink()
    path.touch()
    with pytest.raises(UnreachableError, match="is no socket; name the one that"):
        async with connect(path):
            pass


async def test_a_path_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="Cannot connect"):
        async with connect(tmp_path / ("x" * 200)):
            pass


async def test_a_server_that_says_nothing_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "CONNECT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with pytest.raises(UnreachableError, match="does not answer"):
            async with connect(path):
                pass


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"SSH-2.0\n", "what is no JSON\\."),
        (b"[]\n", "no JSON object"),
        ({"hello": 1}, "its greeting is"),
        (b"x" * 100, "lines without an end"),
    ],
)
async def test_what_is_no_control_socket_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, greeting: Any, reason: str
) -> None:
    monkeypatch.setattr(client_module, "LINE_BYTES_MAX", 50)
    async with answering(path, greeting):
        with pytest.raises(ControlError, match=reason):
            async with connect(path):
                pass


@pytest.mark.parametrize(
    "reply",
    [{"return": {}, "id": 77}, {"id": 2}, {"error": "x", "id": 2}, {"hello": 1}, {"error": {"desc": "x"}}],
)
async def test_a_reply_that_is_none_is_told(path: Path, reply: Any) -> None:
    async with answering(path, GREETING, NEGOTIATED, reply), connect(path) as client:
        with pytest.raises(ControlError, match="what is no reply"):
            await client.execute("query-status")


async def test_a_backend_that_dies_in_a_command_is_told(path: Path) -> None:
    async with answering(path, GREETING, NEGOTIATED), connect(path) as client:
        with pytest.raises(UnreachableError, match="closed the connection"):
            await client.execute("query-status")
        with pytest.raises(UnreachableError):
            await client.next_event()


async def test_arguments_that_are_too_long_are_not_sent(path: Path) -> None:
    async with running(path, FakeBackend()), connect(path) as client:
        with pytest.raises(ControlError, match="too long"):
            await client.execute("mirror-start", {"destination": "/" + "x" * 70_000})
        await client.execute("query-status")


async def test_commands_that_are_asked_in_one_go_are_answered_each(tmp_path: Path) -> None:
    """One that is refused, too."""
    path = tmp_path / "control"
    async with running(path, FakeBackend()):
        status, refused, mirror = await ask_once(path, "query-status", "dance", "query-mirror")
    assert (status["name"], mirror["state"]) == ("vm1", "passthrough")
    assert isinstance(refused, RefusedError) and "dance" in str(refused)
