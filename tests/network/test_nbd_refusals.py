# SPDX-License-Identifier: Apache-2.0
"""What is no disk for us is refused with one sentence, in bounded time, and nothing was changed."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.daemon.rig import Served, flush, image, refused_start, write_block
from tests.guest.qmp_client import QmpError
from tests.network.servers import Nbdkit, free_port
from tests.sizes import MIB
from vhostsync.errors import ConfigError, DiskError
from vhostsync.storage import kinds
from vhostsync.storage.nbd import NBD, Export, check_same
from vhostsync.storage.nbd_uri import NbdUri


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, image(tmp_path / "a.img", 16)) as served:
        yield served
        assert served.state == "passthrough"
        with served.guest() as guest:
            write_block(guest, 1, 1)
            flush(guest)
        served.stop()


def refusal(served: Served, name: str, **arguments: bool) -> str:
    with pytest.raises(QmpError) as refused:
        served.qmp.execute("mirror-start", destination=name, **arguments)
    said = str(refused.value)
    assert "\n" not in said and "Internal error" not in said
    return said


@pytest.mark.parametrize(
    ("words", "filters", "options", "expected"),
    [
        (["memory", "16M"], [], ["-r"], "read-only"),
        (["memory", "15M"], [], [], "is too small: 15728640 bytes"),
        (["memory", "0"], [], [], "is empty (0 bytes)"),
        (["memory", "16M", "blocksize-minimum=4096"], ["blocksize-policy"], [], "logical blocks of 4096"),
        (["eval", "get_size=echo 16M", "can_write=exit 0", "pwrite=cat >/dev/null", "can_flush=exit 3",
          "pread=dd if=/dev/zero count=$3 iflag=count_bytes"], [], [], "has no FLUSH"),
    ],
)  # fmt: skip
def test_an_export_that_is_no_destination(
    tmp_path: Path, served: Served, words: list[str], filters: list[str], options: list[str], expected: str
) -> None:
    with Nbdkit(tmp_path, *words, filters=filters, options=options) as server:
        assert expected in refusal(served, server.uri)


def test_one_that_cannot_be_made(tmp_path: Path, served: Served) -> None:
    with Nbdkit(tmp_path, "memory", "16M") as server:
        said = refusal(served, server.uri, create=True)
        assert "NBD has no command for that" in said and "16777216 bytes" in said


def test_one_that_holds_something(tmp_path: Path, served: Served) -> None:
    qcow2 = tmp_path / "b.qcow2"
    qcow2.write_bytes(b"QFI\xfb" + bytes(16 * MIB))
    with Nbdkit(tmp_path, "file", str(qcow2)) as server:
        assert "holds something that would be lost: qcow2 image" in refusal(served, server.uri)
        served.start_mirror(server.uri, force=True)
        said = refusal(served, server.uri)
        assert "is steady already" in said
        served.qmp.execute("mirror-cancel")


def test_plain_text_to_another_host(served: Served) -> None:
    for host in ("disks.example.org", "192.0.2.7", "[2001:db8::7]:10810"):
        said = refusal(served, f"nbd://{host}/b")
        assert "nbds://" in said and "--allow-plaintext" in said


def test_one_server_is_no_mirror_of_itself(tmp_path: Path) -> None:
    with Nbdkit(tmp_path, "memory", "16M") as server, Served(tmp_path, server.uri) as served:
        assert "are the same storage (one export of one server)" in refusal(served, server.uri, fenced=True)
        served.stop()


def test_nobody_there(tmp_path: Path, served: Served) -> None:
    missing = f"nbd+unix:///?socket={tmp_path / 'none'}"
    assert "cannot be reached" in refusal(served, missing)
    assert "Connection refused" in refusal(served, f"nbd://127.0.0.1:{free_port()}/")


@contextlib.contextmanager
def listening(path: Path, answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """A server that answers each connection so. Its name."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                kept.append(connection)
                answer(connection)

    kept: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"nbd+unix:///?socket={path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda connection: connection.close(), "cannot be reached"),
        (lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "cannot be reached"),
        (lambda connection: connection.sendall(b"NBDMAGIC" + bytes(8)), "cannot be reached"),
        (lambda connection: None, "does not answer in time"),
    ],
)
def test_what_is_no_nbd_server(
    tmp_path: Path, served: Served, answer: Callable[[socket.socket], object], expected: str
) -> None:
    began = time.monotonic()
    with listening(tmp_path / "odd.sock", answer) as name:
        assert expected in refusal(served, name)
    assert time.monotonic() - began < 20


def test_a_guest_is_not_served_from_what_cannot_write_durably(tmp_path: Path) -> None:
    """But it may be a destination."""
    with Nbdkit(tmp_path, "memory", "16M", filters=["fua"]) as server:
        code, said = refused_start("serve", "--blk-file", server.uri, "--socket-path", tmp_path / "x.sock")
        assert code == 1 and "no guest can be served from" in said and "no FUA" in said
        with Served(tmp_path, image(tmp_path / "a.img", 16)) as served:
            served.start_mirror(server.uri)
            with pytest.raises(QmpError, match="no FUA"):
                served.qmp.execute("switch")
            assert served.state == "steady"
            served.stop()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nbd:///b", "names no host"),
        ("nbd+unix:///b", "names no socket"),
        ("nbd+unix://host/b?socket=/s", "on this host"),
        ("nbd://host:99999/b", "is no NBD URI"),
        ("nbds://one:secret@host/b", "has no password"),
        ("nbd://host/b?tls-psk-file=/k", "uses no TLS"),
        ("nbds://host/b?tls-verify-peer=false", "tls-verify-peer is not known here"),
        ("nbds://host/b?tls-psk-file=", "is empty"),
    ],
)
def test_a_name_that_names_nothing(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        kinds.absolute_name(name, "The destination")
    assert expected in str(refused.value) and "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("nbd://host/b", "nbd://HOST:10809/b", True),
        ("nbd://host/b", "nbds://one@host/b?tls-psk-file=/k", True),
        ("nbd://host/b", "nbd://host/c", False),
        ("nbd://host/b", "nbd://host:1/b", False),
        ("nbd+unix:///b?socket=/tmp/./s", "nbd+unix:///b?socket=/tmp/s", True),
        ("nbd+unix:///a%62?socket=/tmp/s", "nbd+unix:///ab?socket=/tmp/s", True),
    ],
)
def test_which_names_name_one_export(one: str, other: str, same: bool) -> None:
    assert (NbdUri.parse(one).place == NbdUri.parse(other).place) is same


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("nbd://localhost/b", "nbd://127.0.0.1/b", True),
        ("nbd://localhost/b", "nbd://127.0.0.1/c", False),
        ("nbd://localhost/b", "nbd://127.0.0.1:1/b", False),
        ("nbd://127.0.0.1/b", "nbd://127.0.0.2/b", False),
        ("nbd://no-such-host.invalid/b", "nbd://127.0.0.1/b", False),
        ("nbd://127.0.0.1/b", "nbd+unix:///b?socket=/tmp/s", False),
    ],
)
def test_two_names_of_one_host(one: str, other: str, same: bool) -> None:
    """As source and destination they are one disk; they are not known as one disk else."""
    assert (NBD.overlap(one, other) is not None) is same
    assert NbdUri.parse(one).place != NbdUri.parse(other).place


def test_a_guest_does_not_go_on_where_a_server_comes_back_with_less() -> None:
    before = Export(
        bytes=MIB, minimum_bytes=1, preferred_bytes=4096, maximum_bytes=32 * MIB, read_only=False,
        can_flush=True, can_fua=True, encrypted=False, connections=1,
    )  # fmt: skip
    check_same("nbd://a", before, before)
    for less in (
        replace(before, bytes=2 * MIB), replace(before, maximum_bytes=MIB), replace(before, can_fua=False),
        replace(before, minimum_bytes=4096), replace(before, can_flush=False),
    ):  # fmt: skip
        with pytest.raises(DiskError):
            check_same("nbd://a", before, less)


def test_paths_in_a_name_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    name = kinds.absolute_name("nbds+unix:///b?socket=s&tls-certificates=tls%20files", "The destination")
    assert name == f"nbds+unix:///b?socket={tmp_path}/s&tls-certificates={tmp_path}/tls%20files"
    assert kinds.absolute_name(name, "The destination") == name
