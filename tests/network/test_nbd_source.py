# SPDX-License-Identifier: Apache-2.0
"""A guest that is on a disk of an NBD server: each write is durable when it is answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.daemon.rig import BLOCK, Load, Served, await_true, block_of, flush, image, lacking, write_block
from tests.frontend import Frontend, Request
from tests.network.servers import Nbdkit, QemuNbd

MIB = 1 << 20
MIBS = 16
BLOCKS = 256


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "a.img", MIBS)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return image(tmp_path / "b.img", MIBS, filled_mib=0)


def answered(guest: Frontend, request: Request) -> bool:
    guest.wait(request)
    return request.ok


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
    with Nbdkit(tmp_path, "file", str(raw)) as server, Served(tmp_path, server.uri) as served:
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
        Served(tmp_path, server.uri, "--on-source-error", "switch") as served,
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
