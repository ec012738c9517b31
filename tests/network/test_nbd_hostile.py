# SPDX-License-Identifier: Apache-2.0
"""NBD servers that do not keep to the protocol, or not to what they have said. libnbd's parsing is libnbd's;
what is made of its answers is ours: the guest goes on, the backend lives, and nothing is taken for durable
that is not."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.rig import Served, await_true, flush, image, write_block
from tests.guest.qmp_client import QmpError
from tests.network import hostile_server as hostile
from tests.network.hostile_server import (
    EINVAL,
    EIO,
    ENOSPC,
    FLUSH,
    MULTI_CONN,
    READ,
    STATUS,
    WRITE,
    ZERO,
    HostileServer,
    Silence,
)
from tests.sizes import MIB

HOLE, DATA = 3, 0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    disk = image(tmp_path / "a.img", 16)
    with Served(tmp_path, disk, "--destination-timeout", "500ms") as served:
        yield served
        assert served.process.running, "the backend lives"
        with served.guest() as guest:
            write_block(guest, 9, 9)
            flush(guest)
        served.stop()


def degrades(served: Served, server: HostileServer) -> None:
    served.qmp.events.clear()
    served.qmp.execute("mirror-start", destination=server.uri, fenced=True)
    served.await_state("degraded")


@pytest.mark.parametrize("kind", [WRITE, FLUSH, ZERO])
@pytest.mark.parametrize("error", [EIO, ENOSPC, EINVAL, 0x7FFFFFFF])
def test_an_error_for_every_command(tmp_path: Path, served: Served, kind: int, error: int) -> None:
    if kind == ZERO and error not in (EIO, ENOSPC):  # any other is EINVAL for libnbd
        pytest.skip("zeroes are written then")
    behave = lambda what, *_: error if what == kind else 0  # noqa: E731
    with HostileServer(tmp_path / "h.sock", behave=behave) as server:
        degrades(served, server)


@pytest.mark.parametrize("kind", [WRITE, FLUSH, ZERO])
def test_an_answer_that_is_never_given(tmp_path: Path, served: Served, kind: int) -> None:
    behave = lambda what, *_: Silence.NO_ANSWER if what == kind else 0  # noqa: E731
    with HostileServer(tmp_path / "h.sock", behave=behave) as server:
        degrades(served, server)
        other = image(tmp_path / "c.img", 16, filled_mib=0)
        served.start_mirror(other)  # what was not answered is in nobody's way


def test_an_answer_about_extents_that_is_never_given(tmp_path: Path, served: Served) -> None:
    behave = lambda what, *_: Silence.NO_ANSWER if what == STATUS else 0  # noqa: E731
    with HostileServer(tmp_path / "h.sock", extents=b"", behave=behave) as server:
        degrades(served, server)


def test_reads_that_are_not_answered_before_it_is_the_engines(tmp_path: Path, served: Served) -> None:
    behave = lambda what, *_: Silence.NO_ANSWER if what == READ else 0  # noqa: E731
    with HostileServer(tmp_path / "h.sock", behave=behave) as server:
        with pytest.raises(QmpError, match=r"cannot be found out \(Connection timed out\)"):
            served.qmp.execute("mirror-start", destination=server.uri)
        assert served.state == "passthrough"


@pytest.mark.parametrize(("answer", "found"), [(EIO, "different"), (Silence.NO_ANSWER, "aborted")])
def test_a_comparison_is_not_answered(
    tmp_path: Path, served: Served, answer: int | Silence, found: str
) -> None:
    """What cannot be read back there is not known to be equal."""
    with HostileServer(tmp_path / "h.sock") as server:
        served.start_mirror(server.uri)
        server.behave = lambda what, *_: answer if what == READ else 0
        served.qmp.execute("verify")
        assert served.qmp.wait_event("VERIFY_COMPLETED")["state"] == found


def test_an_answer_that_nobody_asked_for(tmp_path: Path, served: Served) -> None:
    stray = struct.pack(">IIQ", 0x67446698, 0, 0xDEADBEEF)
    with HostileServer(tmp_path / "h.sock", behave=lambda what, *_: stray if what == WRITE else 0) as server:
        degrades(served, server)


@pytest.mark.parametrize("seed", range(5))
def test_noise(tmp_path: Path, served: Served, seed: int) -> None:
    chance = random.Random(seed)

    def behave(kind: int, *_: int) -> int | bytes:
        return chance.randbytes(chance.randrange(1, 64)) if kind == WRITE and chance.random() < 0.3 else 0

    with HostileServer(tmp_path / "h.sock", behave=behave) as server:
        degrades(served, server)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [(0, HOLE)] * 3,
        [(0xFFFFFFFF, HOLE)],
        [(0xFFFFFFFF, DATA)],
        [(4096, HOLE), (4096, DATA)] * 200,
        [(1, HOLE), (1, DATA), (512, HOLE)],
        [(65536, 0xFFFFFFFE)],
    ],
)
def test_extents_that_cannot_be_or_are_wrong(
    tmp_path: Path, served: Served, entries: list[tuple[int, int]]
) -> None:
    """Those of a destination are believed where they say that it is zero there already; nothing else depends
    on them."""
    extents = b"".join(struct.pack(">II", *entry) for entry in entries)
    with HostileServer(tmp_path / "h.sock", extents=extents) as server:
        served.qmp.execute("mirror-start", destination=server.uri)
        await_true(lambda: served.state in ("steady", "degraded"), "the copy ends")
        if served.state == "steady":
            assert server.content == (tmp_path / "a.img").read_bytes()
            served.qmp.execute("mirror-cancel")


def test_an_error_for_each_question_about_extents(tmp_path: Path, served: Served) -> None:
    behave = lambda what, *_: EIO if what == STATUS else 0  # noqa: E731
    with HostileServer(tmp_path / "h.sock", extents=b"", behave=behave) as server:
        served.start_mirror(server.uri)
        assert server.content == (tmp_path / "a.img").read_bytes()
        served.qmp.execute("mirror-cancel")


@pytest.mark.parametrize("size", [0, 1, 511, 16 * MIB - 512, (1 << 63) - 1, (1 << 64) - 1])
def test_sizes_that_cannot_be(tmp_path: Path, served: Served, size: int) -> None:
    with HostileServer(tmp_path / "h.sock") as server:
        server.size = size
        try:
            served.qmp.execute("mirror-start", destination=server.uri)
        except QmpError as error:
            assert "Internal error" not in str(error) and "\n" not in str(error)
        else:
            assert size >= 16 * MIB
            served.qmp.execute("mirror-cancel", force=True)


def test_another_size_when_it_is_attached_again(tmp_path: Path, served: Served) -> None:
    with HostileServer(tmp_path / "h.sock") as server:
        served.start_mirror(server.uri)
        served.qmp.execute("mirror-cancel")
        server.size = 8 * MIB
        with pytest.raises(QmpError, match="is too small"):
            served.qmp.execute("mirror-start", destination=server.uri, fenced=True)


@pytest.mark.parametrize(
    ("size", "why"), [(0, "is empty"), (8 * MIB, "is too small"), (16 * MIB - 512, "is too small")]
)
def test_another_size_when_it_comes_back_by_itself(tmp_path: Path, size: int, why: str) -> None:
    """It stays degraded and says why, for as long as it is so."""
    disk = image(tmp_path / "a.img", 16)
    options = ("--fence", "limit", "--destination-retry", "50ms")
    with HostileServer(tmp_path / "h.sock") as server, Served(tmp_path, disk, *options) as served:
        served.start_mirror(server.uri)
        server.size = size
        server.cut()
        await_true(lambda: why in str(served.mirror()["last-error"]), "it says why")
        assert served.state == "degraded"
        server.size = 17 * MIB
        served.await_resumed()
        served.stop()
        assert server.content == disk.read_bytes()


class TwoFaced(HostileServer):
    """Whoever is not the only one is shown another size."""

    present = 0

    def _serve(self, connection: socket.socket) -> None:
        self.present += 1
        self.size = 16 * MIB if self.present == 1 else 8 * MIB
        super()._serve(connection)

    def _command(self, connection: socket.socket) -> bool:
        goes_on = super()._command(connection)
        self.present -= not goes_on  # before the client can see its end
        return goes_on


def test_connections_that_differ_in_size(tmp_path: Path) -> None:
    disk = image(tmp_path / "a.img", 16)
    server = TwoFaced(tmp_path / "h.sock", flags=hostile.FLAGS | MULTI_CONN)
    with server, Served(tmp_path, disk, "--connections", "2") as served:
        with pytest.raises(QmpError, match="exports of different sizes under one name"):
            served.qmp.execute("mirror-start", destination=server.uri)
        assert served.state == "passthrough"
        served.stop()


def test_reads_that_fail_before_it_is_the_engines(tmp_path: Path, served: Served) -> None:
    behave = lambda what, *_: EIO if what == READ else 0  # noqa: E731
    with HostileServer(tmp_path / "h.sock", behave=behave) as server, pytest.raises(QmpError) as refused:
        served.qmp.execute("mirror-start", destination=server.uri)
    assert "cannot be found out (Input/output error)" in str(refused.value)


def test_one_that_says_that_it_cannot_and_one_that_says_nothing(tmp_path: Path, served: Served) -> None:
    for flags in (0, 1, 1 | 1 << 1 | 1 << 2):
        server = HostileServer(tmp_path / f"h{flags}.sock", flags=flags)
        with server, pytest.raises(QmpError) as refused:
            served.qmp.execute("mirror-start", destination=server.uri)
        assert any(word in str(refused.value) for word in ("FLUSH", "read-only", "cannot be reached"))
    assert hostile.FLAGS & 1
