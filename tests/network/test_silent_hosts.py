# SPDX-License-Identifier: Apache-2.0
"""Hosts that take a connection and never say a word, and name servers that never answer: whoever waits for
them waits for a bounded time, and nobody who wants to end waits at all."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.daemon.rig import Served, image
from tests.guest.qmp_client import Qmp
from tests.network.receivers import HOST, Authority, needs_programs
from vhostsync.errors import DiskError
from vhostsync.storage import nbd, receive
from vhostsync.storage.nbd import NBD
from vhostsync.storage.receive import Receiver, ReceiveUri

pytestmark = [
    *needs_programs,
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        importlib.util.find_spec("vhostsync._nbd") is None, reason="built without libnbd (package libnbd-dev)"
    ),
]


class Silent:
    """It takes every connection."""

    def __init__(self) -> None:
        self.listener = socket.create_server((HOST, 0))
        self.port = self.listener.getsockname()[1]
        self.came = threading.Event()
        self._taken: list[socket.socket] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with suppress(OSError):
            while True:
                self._taken.append(self.listener.accept()[0])
                self.came.set()

    def close(self) -> None:
        self.listener.close()
        for each in self._taken:
            each.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    it = Silent()
    yield it
    it.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    return Authority(folder / "ca").issue(folder / "client", "client")


@pytest.mark.parametrize("kind", ["nbd", "receive"])
def test_the_end_does_not_wait_for_one_that_is_being_attached(
    work: Path, silent: Silent, certificates: Path, kind: str
) -> None:
    name = f"nbd://{HOST}:{silent.port}"
    if kind == "receive":
        name = f"receive://{HOST}:{silent.port}?tls-certificates={certificates}"

    def start(client: Qmp) -> None:
        with suppress(ConnectionError):
            client.execute("mirror-start", destination=name)

    with Served(work, image(work / "a.img")) as served, ThreadPoolExecutor() as pool:
        started = pool.submit(start, served.client())
        assert silent.came.wait(30), "it is being attached"
        assert served.stop() < 4, "before any patience with the silent host ends"
        started.cancel()


@pytest.fixture
def hanging_name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    let_go = threading.Event()

    def hang(*_: object, **__: object) -> object:
        let_go.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    for module in (nbd, receive):
        monkeypatch.setattr(module, "NAME_S", 0.2)
        monkeypatch.setattr(module, "CONNECT_S", 0.2)
    yield
    let_go.set()


def test_a_name_server_that_does_not_answer_is_waited_for_in_bounds(
    hanging_name_server: None, certificates: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(DiskError, match="does not answer in time"):
        Receiver(ReceiveUri.parse(f"receive://far.example:7070?tls-certificates={certificates}"))
    assert time.monotonic() - began < 10


def test_that_libnbd_waits_for_one_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, closed = threading.Event(), threading.Event()

    class Connecting:
        """As libnbd's, within its own call of the resolver."""

        def __init__(self, *_: object) -> None:
            assert let_go.wait(60)

        def close(self) -> None:
            closed.set()

    monkeypatch.setattr(nbd, "Connection", Connecting)
    monkeypatch.setattr(nbd, "NAME_S", 0.2)
    monkeypatch.setattr(nbd, "CONNECT_S", 0.2)
    with pytest.raises(DiskError, match=r"no address of localhost was found within 0\.2 s"):
        NBD.open("nbd://localhost/disk", read_only=False, cache="none", lock_timeout_s=0.1)
    let_go.set()
    assert closed.wait(30), "what came late is closed again"
