# SPDX-License-Identifier: Apache-2.0
"""A guest that is on a disk of an NBD server: each write is durable when it is answered."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import cast

import pytest

from tests.daemon.rig import (
    BLOCK,
    Load,
    Served,
    answered,
    await_true,
    block_of,
    flush,
    image,
    lacking,
    write_block,
)
from tests.frontend import FrontendTimeout
from tests.network.servers import MIBS, Nbdkit, QemuNbd
from tests.sizes import MIB
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.nbd import Connection, Loss, NbdDisk

BLOCKS = 256

# The backend holds requests for a server that is gone only once a flush of its own is answered. It sends that
# before the guest's first request. A server that answers in order has done so once it answers a flush.
ONE_AT_A_TIME = ("--threads", "1")
LOST = "the connection to an NBD server is lost"


def test_a_guest_passes_through_it_and_comes_back(tmp_path: Path, disk: Path, raw: Path) -> None:
    log = tmp_path / "requests"
    with (
        Nbdkit(tmp_path, "file", str(raw), f"logfile={log}", filters=["log"]) as server,
        Served(tmp_path, disk) as served,
        Load(served, blocks=BLOCKS) as load,
    ):
        load.go_on()
        served.start_mirror(server.uri)
        load.go_on()
        before = len(log.read_text())
        served.qmp.execute("switch", keep_mirror=True)
        load.go_on()
        assert served.mirror()["source"] == server.uri
        # The writes that the mirror had still under way were its last ones without.
        told = re.findall(r"Write id=\d+ .*fua=(\d)", log.read_text()[before:])
        assert told[-8:] == ["1"] * 8, told
        served.qmp.execute("switch", keep_mirror=True)
        load.go_on()
        assert served.mirror()["source"] == str(disk)
        expected = load.stop()
        served.stop()
    assert lacking(disk, expected) == [] and lacking(raw, expected) == []
    assert disk.read_bytes() == raw.read_bytes()


def test_it_is_served_and_what_is_written_or_zeroed_is_durable(tmp_path: Path, raw: Path) -> None:
    log = tmp_path / "requests"
    words = ["file", str(raw), f"logfile={log}"]
    with Nbdkit(tmp_path, *words, filters=["log"]) as server, Served(tmp_path, server.uri) as served:
        with served.guest() as guest:
            write_block(guest, 1, 5)
            pieces = guest.write(5 * BLOCK, block_of(5, 6), segments=4)
            assert answered(guest, pieces)
            assert answered(guest, guest.write_zeroes(8 * BLOCK, BLOCK))
            assert answered(guest, guest.discard(16 * BLOCK, BLOCK))
            assert guest.read_now(BLOCK, BLOCK) == block_of(1, 5)
            assert guest.read_now(5 * BLOCK, BLOCK) == block_of(5, 6)
            flush(guest)
        changed = re.findall(r"(Write|Zero|Trim) id=\d+ .*fua=(\d)", log.read_text())
        assert [what for what, _ in changed] == ["Write", "Write", "Zero", "Zero"]
        assert {fua for _, fua in changed} == {"1"}
        served.stop()
    assert lacking(raw, {1: 5, 5: 6}) == []


def test_it_is_mirrored_to_a_file_with_its_holes(tmp_path: Path, raw: Path) -> None:
    back = tmp_path / "c.img"
    with raw.open("r+b") as file:
        file.write(b"x" * 3 * MIB)
    with QemuNbd(tmp_path, raw) as server, Served(tmp_path, server.uri) as served:
        served.start_mirror(back, create=True)
        served.qmp.execute("switch")
        served.stop()
    assert back.read_bytes() == raw.read_bytes()
    assert back.stat().st_blocks * 512 <= 4 * MIB


def test_the_record_knows_it_again(tmp_path: Path, disk: Path, raw: Path) -> None:
    with Nbdkit(tmp_path, "file", str(raw)) as server:
        with Served(tmp_path, disk) as served:
            served.start_mirror(server.uri)
            served.qmp.execute("switch")
            served.stop()
        record = served.record()
        assert record is not None
        assert (record.current.kind, record.current.path) == ("nbd", server.uri)
        with Served(tmp_path, server.uri) as served:
            with served.guest() as guest:
                write_block(guest, 3, 3)
            served.stop()
    assert lacking(raw, {3: 3}) == []


def test_one_that_is_lost_is_an_error_of_the_disk(tmp_path: Path, raw: Path) -> None:
    patience = ("--reconnect-timeout", "500ms")
    with Nbdkit(tmp_path, "file", str(raw)) as server, Served(tmp_path, server.uri, *patience) as served:
        with served.guest() as guest:
            write_block(guest, 1, 1)
            server.kill()
            assert not answered(guest, guest.write(0, block_of(0, 2)))
            assert not answered(guest, guest.flush())
        assert served.process.running
        served.stop()


def test_the_guest_goes_to_the_other_disk_when_it_is_lost(tmp_path: Path, raw: Path) -> None:
    back = image(tmp_path / "c.img", MIBS, filled_mib=0)
    with (
        Nbdkit(tmp_path, "file", str(raw)) as server,
        Served(tmp_path, server.uri, "--on-source-error", "switch", "--reconnect-timeout", "1s") as served,
    ):
        with Load(served, blocks=BLOCKS) as load:
            served.start_mirror(back)
            load.go_on()
            server.kill()
            await_true(lambda: served.mirror()["source"] == str(back), "the guest is on the other disk")
            load.go_on()
            expected = load.stop()
        served.stop()
    assert lacking(back, expected) == []


@pytest.mark.parametrize("connections", ["1", "3"])
def test_an_idle_guest_does_not_notice_a_server_that_is_started_again(
    tmp_path: Path, raw: Path, connections: str
) -> None:
    with (
        Nbdkit(tmp_path, "file", str(raw), options=ONE_AT_A_TIME) as server,
        Served(tmp_path, server.uri, "--connections", connections) as served,
        served.guest() as guest,
    ):
        for _ in range(int(connections)):  # so that each has carried something
            write_block(guest, 1, 1)
            flush(guest)
        server.kill()
        await_true(lambda: LOST in served.process.last_output(), "nothing more is sent to it")
        write = guest.write(2 * BLOCK, block_of(2, 2))
        read = guest.read(BLOCK, BLOCK)
        flushed = guest.flush()
        with pytest.raises(FrontendTimeout):
            guest.wait(write, timeout_s=0.3)
        server.start()
        guest.wait(write, read, flushed)
        assert write.ok and flushed.ok and read.data == block_of(1, 1)
        guest.close()
        served.stop()
    assert lacking(raw, {1: 1, 2: 2}) == []


@pytest.mark.parametrize("fence", ["limit", "command"])
def test_a_guest_at_work_waits_for_its_server_and_loses_nothing(
    tmp_path: Path, raw: Path, fence: str
) -> None:
    """Its requests are sent again behind the fence."""
    said = tmp_path / "fenced"
    script = tmp_path / "fence.sh"
    script.write_text(f'#!/bin/sh\necho "$VHOSTSYNC_DISK" >>{said}\n')
    script.chmod(0o755)
    options = ("--fence", "limit") if fence == "limit" else ("--fence-command", str(script))
    with (
        Nbdkit(tmp_path, "file", str(raw), "limit=1", filters=["limit"]) as server,
        Served(tmp_path, server.uri, *options) as served,
        Load(served, blocks=BLOCKS) as load,
    ):
        for _ in range(3):
            load.go_on(3)
            server.kill()
            server.start()
        load.go_on()
        expected = load.stop()
        assert fence == "limit" or set(said.read_text().split()) == {server.uri}
        served.stop()
    assert lacking(raw, expected) == []


def test_what_is_unanswered_is_not_sent_again_without_a_fence(tmp_path: Path, raw: Path) -> None:
    control = tmp_path / "pause.sock"
    words = ["file", str(raw), f"pause-control={control}"]
    with Nbdkit(tmp_path, *words, filters=["pause"]) as server, Served(tmp_path, server.uri) as served:
        with served.guest() as guest, socket.socket(socket.AF_UNIX) as pause:
            write_block(guest, 1, 1)
            pause.connect(str(control))
            pause.sendall(b"p")
            assert pause.recv(1) == b"P"
            write = guest.write(2 * BLOCK, block_of(2, 2))
            with pytest.raises(FrontendTimeout):
                guest.wait(write, timeout_s=0.3)
            server.kill()
            server.start()
            guest.wait(write)
            assert not write.ok
        assert "may still be carried out" in served.process.last_output()
        served.stop()


def test_another_size_is_another_disk(tmp_path: Path, raw: Path) -> None:
    with (
        Nbdkit(tmp_path, "file", str(raw), options=ONE_AT_A_TIME) as server,
        Served(tmp_path, server.uri) as served,
    ):
        with served.guest() as guest:
            write_block(guest, 1, 1)
            flush(guest)
            server.kill()
            await_true(lambda: LOST in served.process.last_output(), "nothing more is sent to it")
            with raw.open("r+b") as file:
                file.truncate(2 * MIB)
            server.start()
            assert not answered(guest, guest.write(0, block_of(0, 2)))
        told = "has 2097152 since its server is back"
        await_true(lambda: told in served.process.last_output(), "it is logged")
        served.stop()


def test_a_backend_ends_while_a_guest_waits_for_its_server(tmp_path: Path, raw: Path) -> None:
    """It waits as long as the guest."""
    with (
        Nbdkit(tmp_path, "file", str(raw)) as server,
        Served(tmp_path, server.uri, "--reconnect-timeout", "2s") as served,
        served.guest() as guest,
    ):
        write_block(guest, 1, 1)
        server.kill()
        guest.write(0, block_of(0, 2))
        served.qmp.execute("quit", force=True)
        assert served.process.wait(30) == 0


class HeldConnection:
    """Which takes note of nothing: neither that it is given up, nor of another one."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def await_loss(self) -> Loss:
        assert self.told.count("lost") < 3
        self.told.append("lost")
        return Loss("the server is gone", held=True, uncertain=True)

    def give_up(self) -> None:
        self.told.append("given up")


def test_what_is_given_up_is_not_connected_again_nor_fenced_once_more() -> None:
    """The disk's own thread may take its time to see it."""
    connection = HeldConnection()
    disk = NbdDisk("nbd://a", cast(Connection, connection), DiskIdentity("nbd://a", "nbd", 0, 0, MIB), False)
    disk._look_after()
    assert connection.told == ["lost", "given up"]
