# SPDX-License-Identifier: Apache-2.0
"""Connections: many at once, each with its end, none of which harms another. Over real sockets."""

import errno
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import capture_logs

from tests.protocol.fakes import RecordingAttachment, WireFrontend, device, wire
from tests.protocol.traces import QEMU_7_2, TRACES, Sent
from vhostsync.errors import EngineError
from vhostsync.vhost_user import server as server_module
from vhostsync.vhost_user.attachment import Attachment
from vhostsync.vhost_user.listener import Endpoint, adopt, listen_at
from vhostsync.vhost_user.messages import HEADER, Request
from vhostsync.vhost_user.payloads import U64, VringState, encode_u64, encode_vring_state
from vhostsync.vhost_user.server import ATTACHMENTS_MAX, FrontendServer
from vhostsync.vhost_user.virtio_blk import BlkDevice

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leak")]


class House:
    """A server with recording attachments, and the events it published."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blk = device()
        self.attachments: list[RecordingAttachment] = []
        self.refuse_attachments = 0
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self._news = anyio.Event()
        self.server = FrontendServer(self.blk, self._attach, self._publish)

    async def _attach(self) -> Attachment:
        if self.refuse_attachments:
            raise EngineError.from_errno("attaching", self.refuse_attachments)
        self.attachments.append(RecordingAttachment())
        return self.attachments[-1]

    def _publish(self, name: str, data: Mapping[str, Any]) -> None:
        self.events.append((name, data))
        self._news.set()
        self._news = anyio.Event()

    async def connect(self) -> WireFrontend:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.path))
        return WireFrontend(sock)

    async def gone(self, count: int) -> list[str | None]:
        """Waits for that many ends of connections; their reasons."""
        while True:
            reasons = [data["reason"] for name, data in self.events if name == "FRONTEND_DISCONNECTED"]
            if len(reasons) >= count:
                return reasons
            await self._news.wait()

    async def connected(self, count: int) -> None:
        while sum(name == "FRONTEND_CONNECTED" for name, _ in self.events) < count:
            await self._news.wait()


@asynccontextmanager
async def house(tmp_path: Path) -> AsyncIterator[House]:
    one = House(tmp_path / "vhost.sock")
    endpoint = listen_at(one.path)
    try:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one.server.serve, endpoint)
                yield one
                tasks.cancel_scope.cancel()
    finally:
        endpoint.close()
    assert one.server.frontends == 0
    assert all(attachment.closed for attachment in one.attachments)


async def say(frontend: WireFrontend, sent: Sent) -> bytes | None:
    await frontend.send(wire(sent.request, sent.payload, need_reply=sent.need_reply), sent.fds)
    if not sent.replied:
        return None
    number, flags, content = await frontend.reply()
    assert (number, flags) == (sent.request, 5)
    return content


@pytest.mark.parametrize("name", TRACES)
async def test_whole_conversations(tmp_path: Path, name: str) -> None:
    async with house(tmp_path) as one:
        frontend = await one.connect()
        for sent in TRACES[name]:
            await say(frontend, sent)
        frontend.close()
        assert await one.gone(1) == [None]
    assert one.attachments[0].calls[-1] == ("close",)
    peer = one.events[0][1]
    assert one.events[0][0] == "FRONTEND_CONNECTED"
    assert peer["frontend"] == 1
    assert peer["pid"] > 0


async def test_the_next_connection_works_after_every_kind_of_end(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        rubbish = [
            (HEADER.pack(99, 1, 0), 3),
            (HEADER.pack(1, 2, 0), 0),
            (wire(Request.SET_FEATURES, U64(1)), 8),
            (wire(Request.SET_FEATURES, U64(1 << 63)), 0),
            (wire(Request.GET_VRING_BASE, VringState(64, 0)), 0),
            (wire(Request.SET_VRING_NUM, VringState(0, 3)), 0),
            (bytes(300), 9),
        ]
        with capture_logs() as logs:
            for data, fds in rubbish:
                frontend = await one.connect()
                await frontend.send(data, fds)
                assert await frontend.at_end()
                frontend.close()
            half = await one.connect()
            await half.send(wire(Request.SET_FEATURES, U64(1))[:5], 2)
            half.close()
            reasons = await one.gone(len(rubbish) + 1)
        assert all(reasons)
        warnings = [log["reason"] for log in logs if log["event"] == "frontend's connection ended"]
        assert warnings == reasons  # each said, each with its reason
        frontend = await one.connect()
        assert await frontend.ask(Request.GET_FEATURES) == encode_u64(one.blk.features)
        frontend.close()


async def test_one_that_does_not_finish_its_message_stops_nobody(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        slow = await one.connect()
        await slow.send(wire(Request.SET_FEATURES, U64(1))[:13], 0)
        silent = await one.connect()
        await one.connected(2)
        other = await one.connect()
        for sent in QEMU_7_2:
            await say(other, sent)
        for frontend in (slow, silent, other):
            frontend.close()
        await one.gone(3)


async def test_one_that_waits_for_the_engine_stops_nobody(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        first, second = await one.connect(), await one.connect()
        await one.connected(2)
        drained = one.attachments[0].hold["stop_vring"] = anyio.Event()
        await first.send(wire(Request.GET_VRING_BASE, VringState(0, 0)))
        await first.send(wire(Request.GET_QUEUE_NUM))  # answered only after that
        assert await second.ask(Request.GET_QUEUE_NUM) == encode_u64(4)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(BlockingIOError):
            first.sock.recv(1)
        drained.set()
        number, _, content = await first.reply()
        assert (number, content) == (Request.GET_VRING_BASE, encode_vring_state(0, 7))
        assert (await first.reply())[0] == Request.GET_QUEUE_NUM
        first.close()
        second.close()


async def test_one_too_many_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        frontends = [await one.connect() for _ in range(ATTACHMENTS_MAX)]
        await one.connected(ATTACHMENTS_MAX)
        with capture_logs() as logs:
            surplus = await one.connect()
            assert await surplus.at_end()
        assert [log["event"] for log in logs] == ["frontend refused: too many are connected"]
        surplus.close()
        assert one.server.frontends == ATTACHMENTS_MAX
        frontends[3].close()
        await one.gone(1)
        again = await one.connect()
        assert await again.ask(Request.GET_QUEUE_NUM) == encode_u64(4)
        for frontend in (*frontends, again):
            frontend.close()


async def test_the_socket_closes_after_the_last_request(tmp_path: Path) -> None:
    """A frontend that sees its connection end takes up at the used index: nothing may be answered after that.
    Another one may come meanwhile."""
    async with house(tmp_path) as one:
        frontend = await one.connect()
        await one.connected(1)
        over = one.attachments[0].hold["close"] = anyio.Event()
        await frontend.send(HEADER.pack(99, 1, 0))
        again = await one.connect()
        assert await again.ask(Request.GET_QUEUE_NUM) == encode_u64(4)
        await anyio.wait_all_tasks_blocked()
        assert one.server.frontends == 2
        assert frontend.open()
        over.set()
        assert await frontend.at_end()
        await one.gone(1)
        frontend.close()
        again.close()


async def test_stopping_waits_for_the_last_request(tmp_path: Path) -> None:
    one = House(tmp_path / "s")
    endpoint = listen_at(one.path)
    over = anyio.Event()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as outer:
            scope = anyio.CancelScope()
            stopped = anyio.Event()

            async def serve() -> None:
                with scope:
                    await one.server.serve(endpoint)
                stopped.set()

            outer.start_soon(serve)
            frontend = await one.connect()
            await one.connected(1)
            one.attachments[0].hold["close"] = over
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            assert not stopped.is_set()
            over.set()
            assert await frontend.at_end()
            await stopped.wait()
    assert one.events[-1][1]["reason"] == "the backend stops"
    frontend.close()
    endpoint.close()


async def test_an_attachment_that_the_engine_lost(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        first, second = await one.connect(), await one.connect()
        await one.connected(2)
        one.server.disconnect(one.attachments[0], "its memory is gone")
        assert await first.at_end()
        assert await one.gone(1) == ["its memory is gone"]
        one.server.disconnect(one.attachments[0], "again")
        assert await second.ask(Request.GET_QUEUE_NUM) == encode_u64(4)
        first.close()
        second.close()


async def test_an_engine_that_takes_nobody(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        one.refuse_attachments = errno.EBUSY
        frontend = await one.connect()
        assert await frontend.at_end()
        assert "EBUSY" in str(await one.gone(1))
        frontend.close()
        one.refuse_attachments = 0
        frontend = await one.connect()
        assert await frontend.ask(Request.GET_QUEUE_NUM) == encode_u64(4)
        frontend.close()


async def test_a_fault_of_ours_ends_one_connection_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: BlkDevice, offset: int, size: int, *, writeback: bool) -> bytes:
        raise RuntimeError("a fault on purpose")

    monkeypatch.setattr(BlkDevice, "read_config", broken)
    async with house(tmp_path) as one:
        bystander, victim = await one.connect(), await one.connect()
        await one.connected(2)
        for sent in TRACES["qemu 7.2"][:3]:
            await say(victim, sent)
        with capture_logs() as logs:
            config = next(sent for sent in QEMU_7_2 if sent.request is Request.GET_CONFIG)
            await victim.send(wire(config.request, config.payload))
            assert await victim.at_end()
            assert "a fault on purpose" in str(await one.gone(1))
        assert any(log.get("exc_info") for log in logs)
        assert await bystander.ask(Request.GET_QUEUE_NUM) == encode_u64(4)
        bystander.close()
        victim.close()


async def test_a_failed_detach_is_logged(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        frontend = await one.connect()
        await one.connected(1)
        one.attachments[0].refuse["close"] = errno.EIO
        with capture_logs() as logs:
            frontend.close()
            await one.gone(1)
        assert any(log["event"] == "detaching a frontend failed" for log in logs)
        assert one.server.frontends == 0
        one.attachments[0].closed = True


async def test_a_config_change_reaches_those_who_can_be_told(tmp_path: Path) -> None:
    async with house(tmp_path) as one:
        frontend = await one.connect()
        for sent in QEMU_7_2[:5]:
            await say(frontend, sent)
        ours, theirs = socket.socketpair()
        socket.send_fds(frontend.sock, [wire(Request.SET_BACKEND_REQ_FD, need_reply=True)], [theirs.fileno()])
        theirs.close()
        assert (await frontend.reply())[2] == encode_u64(0)
        active_before = one.server.active
        one.server.config_changed()
        channel = WireFrontend(ours)
        for sent in QEMU_7_2[6:25]:
            await say(frontend, sent)
        assert await channel.read(HEADER.size) == HEADER.pack(2, 0x1, 0)
        assert (active_before, one.server.active) == (False, True)
        frontend.close()
        assert await channel.at_end()
        channel.close()


async def test_an_inherited_connection_ends_with_its_frontend() -> None:
    ours, theirs = socket.socketpair()
    one = House(Path("unused"))
    endpoint = adopt(ours.detach())
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.server.serve, endpoint)
            frontend = WireFrontend(theirs)
            assert await frontend.ask(Request.GET_QUEUE_NUM) == encode_u64(4)
            frontend.close()
    endpoint.close()
    assert one.attachments[0].closed


async def test_running_out_of_descriptors_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poor:
        """A listening socket whose first accepts fail."""

        def __init__(self, sock: socket.socket) -> None:
            self._sock = sock
            self.failures = [errno.EMFILE, errno.ECONNABORTED, errno.EAGAIN]

        def fileno(self) -> int:
            return self._sock.fileno()

        def accept(self) -> tuple[socket.socket, Any]:
            if self.failures:
                number = self.failures.pop(0)
                raise OSError(number, "on purpose")
            return self._sock.accept()

    monkeypatch.setattr(server_module, "_ACCEPT_PAUSE_S", 0.001)
    one = House(tmp_path / "s")
    endpoint = listen_at(one.path)
    poor: Any = Poor(endpoint.sock)
    with anyio.fail_after(30), capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.server.serve, Endpoint(poor, True))
            frontend = await one.connect()
            assert await frontend.ask(Request.GET_QUEUE_NUM) == encode_u64(4)
            tasks.cancel_scope.cancel()
    assert [log["error"] for log in logs if "accepting" in log["event"]] == ["on purpose", "on purpose"]
    frontend.close()
    endpoint.close()


def test_the_log_is_structlog_s() -> None:
    assert isinstance(server_module.log, type(structlog.get_logger()))
