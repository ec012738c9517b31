# SPDX-License-Identifier: Apache-2.0
"""Whoever may not be an owner, and owners that talk nonsense: each is turned away with a reason, and nobody
is held up."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.rig import image, refused_start
from tests.guest.processes import wait_said
from tests.network.receivers import (
    HOST,
    Authority,
    Receiving,
    RefusedError,
    children,
    needs_programs,
)
from tests.sizes import MIB
from vhostsync.receive.owners import CONNECTIONS_MAX
from vhostsync.receive.seldom import LINES

pytestmark = [*needs_programs, pytest.mark.timeout(240)]  # each start of a process takes its time



@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "ca")


@pytest.fixture(scope="module")
def certificates(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority.issue(tmp_path_factory.mktemp("both"), "server", "client")


@pytest.fixture
def receiving(tmp_path: Path, certificates: Path) -> Iterator[Receiving]:
    with Receiving(tmp_path, image(tmp_path / "d.img", 4), certificates) as receiving:
        yield receiving
        assert receiving.ask("query")["owned"] is False
        assert children(receiving.process.pid) == []
        receiving.stop()


def refusal(receiving: Receiving, certificates: Path) -> str:
    """With TLS 1.3 the client hears of it when it first reads."""
    with pytest.raises((OSError, RefusedError)) as refused, receiving.connect(certificates) as asking:
        asking.ask("query")
    return str(refused.value)


def test_who_has_no_certificate_or_a_wrong_one_is_out(
    receiving: Receiving, authority: Authority, tmp_path: Path
) -> None:
    bare = authority.issue(tmp_path / "bare")
    assert "CERTIFICATE_REQUIRED" in refusal(receiving, bare)
    expired = authority.issue(tmp_path / "expired", "client", expired=True)
    assert "CERTIFICATE_EXPIRED" in refusal(receiving, expired)
    wait_said(receiving.process, "certificate of the other side is refused: certificate has expired")
    stranger = Authority(tmp_path / "another-ca").issue(tmp_path / "stranger", "client")
    (stranger / "ca-cert.pem").write_bytes((bare / "ca-cert.pem").read_bytes())
    assert "UNKNOWN_CA" in refusal(receiving, stranger)
    # A server's certificate is not for clients.
    wrong_use = authority.issue(tmp_path / "wrong-use", "server")
    for what in ("cert", "key"):
        (wrong_use / f"server-{what}.pem").rename(wrong_use / f"client-{what}.pem")
    assert "UNSUPPORTED_CERTIFICATE" in refusal(receiving, wrong_use)


def test_certificates_are_read_again_when_they_have_changed(
    receiving: Receiving, authority: Authority, certificates: Path, tmp_path: Path
) -> None:
    new = authority.issue(tmp_path / "new", "server", "client", names=("another.example",))
    kept = {each.name: each.read_bytes() for each in certificates.iterdir()}
    try:
        for name in ("server-key.pem", "server-cert.pem"):  # half of it is no pair, and is not used
            with receiving.connect(new) as asking:
                asking.ask("query")
            (certificates / name).write_bytes((new / name).read_bytes())
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            receiving.connect(new)
    finally:
        for name, content in kept.items():
            (certificates / name).write_bytes(content)


def test_nobody_is_held_up_by_who_never_speaks_or_never_stops(
    receiving: Receiving, certificates: Path
) -> None:
    with contextlib.ExitStack() as left_open:
        for number in range(CONNECTIONS_MAX + 20):
            silent = left_open.enter_context(socket.create_connection((HOST, receiving.port)))
            if number % 2:
                silent.sendall(b"GET / HTTP/1.1\r\n\r\n"[:number])
        busy = [left_open.enter_context(receiving.connect()) for _ in range(4)]
        for each in busy:
            each.send(b'{"execute": "query", "arguments": {"x": "' + b"y" * 1000)
        began = time.monotonic()
        assert receiving.ask("query")["bytes"] == 4 * MIB
        assert time.monotonic() - began < 9, "before any patience ends"


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x00\xff\x80 garbage\n",
        b"[1, 2]\n",
        b'{"execute": 7}\n',
        b'{"arguments": {}}\n',
        b'{"execute": "query", "execute": {"a": [' + b"[" * 100 + b"\n",
        b"{" + b'"a": "' + b"x" * (1 << 20) + b'"}\n',
    ],
    ids=["garbage", "array", "number", "no-command", "deep", "huge"],
)
def test_what_is_no_request_ends_the_connection(receiving: Receiving, nonsense: bytes) -> None:
    with receiving.connect() as asking:
        with contextlib.suppress(OSError):  # it may be closed before all of it is sent
            asking.send(nonsense)
        with contextlib.suppress(OSError):
            if line := asking.line():  # what is sent on into a closed connection may take the answer with it
                assert "error" in json.loads(line)
            assert asking.line() == b""
    assert receiving.ask("query")["generation"] == 0


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        ("quit", {}, "has not been found"),
        ("rededicate", {}, "has not been found"),
        ("begin", {}, "Parameter 'instance' is missing"),
        ("begin", {"instance": "a", "token": 7}, "Invalid parameter type for 'token', expected: string"),
        ("begin", {"instance": "a", "generation": -1}, "expects a value from 0"),
        ("grow", {"disk": "a", "bytes": 0}, "expects a value from 1"),
        ("grow", {"disk": "a", "bytes": MIB}, "belongs to another owner"),
        ("own", {"disk": "a", "generation": 0, "token": "t"}, "that generation is over"),
    ],
)
def test_what_an_owner_may_not_ask_is_refused(
    receiving: Receiving, command: str, arguments: dict[str, object], why: str
) -> None:
    with receiving.connect() as asking:
        with pytest.raises(RefusedError, match=why):
            asking.ask(command, **arguments)
        assert asking.ask("query")["owned"] is False  # the connection goes on


def test_one_that_hangs_up_midway_is_served_to_the_end(receiving: Receiving, tmp_path: Path) -> None:
    with receiving.connect() as asking:
        asking.send(b'{"execute": "begin", "arguments": {"instance": "a"}}\n')
    status = receiving.await_status("it was begun all the same", generation=1)
    disk = status["disk"]
    receiving.await_status("and is served", attached=True)
    receiving.ask("end", disk=disk, generation=1)
    receiving.await_status("and ended", attached=False)


def test_strangers_at_the_data_port_do_not_fill_the_log(receiving: Receiving) -> None:
    strangers = 6 * LINES
    begun = receiving.ask("begin", instance="a")
    for _ in range(strangers):
        with socket.create_connection((HOST, begun["port"])) as stranger:
            stranger.settimeout(30)
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):
                    pass  # until he is turned away
    receiving.ask("end", disk=begun["disk"], generation=begun["generation"])
    receiving.await_status("its server has ended", attached=False)
    said = [line for line in receiving.log.read_text().splitlines() if "qemu-nbd says" in line]
    assert LINES < len(said) <= 3 * (LINES + 1), "a few minutes' lines at most, on a slow machine"
    assert any("more_than_were_shown" in line for line in said)


def test_starts_that_are_refused_say_why(tmp_path: Path, certificates: Path, authority: Authority) -> None:
    disk = image(tmp_path / "d.img", 4)

    def start(*options: str | Path, tls: Path = certificates, listen: str = f"{HOST}:0") -> str:
        words = ("receive", "--blk-file", disk, "--listen", listen, "--tls-certificates", tls, *options)
        code, text = refused_start(*words)
        assert code in (1, 2) and text.count("\n") <= 2, text
        return text

    assert "server-cert.pem: No such file" in start(tls=authority.issue(tmp_path / "none", "client"))
    assert "'nowhere' is no HOST:PORT" in start(listen="nowhere")
    assert "no port is left for the data" in start(listen=f"{HOST}:65535")
    assert "no such address" in start(listen="no.such.host.invalid:0")
    damaged = Path(f"{disk}.receive")
    damaged.write_text('{\n "kind": "state-receiver", "ver')
    assert "is damaged" in start() and damaged.exists()
    damaged.write_bytes(b"QFI\xfb" * 100)
    assert "is damaged" in start()
    damaged.unlink()
    with Receiving(tmp_path, disk, certificates):
        assert "in use by another process" in start()
        assert "is in use (QEMU's image lock)" in start("--state-file", tmp_path / "other")
    disk.unlink()
    damaged.unlink()
    assert "does not exist" in start()

