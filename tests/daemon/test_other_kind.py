# SPDX-License-Identifier: Apache-2.0
"""A kind of disk that lies on no file system of this host and is no part of vhostsync (served_disks.py): all
that a backend does with an image file, it does with one of these."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import served_disks
from tests.daemon.disk_server import DiskServer, HeldDisk
from tests.daemon.rig import (
    BLOCK,
    Load,
    Served,
    await_true,
    block_of,
    flush,
    image,
    refused_start,
    write_block,
)
from tests.sizes import MIB

SIZE = 4 * MIB
BLOCKS = 64


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DiskServer]:
    with DiskServer(tmp_path / "disks.sock") as server:
        server.disks["mem:a"] = HeldDisk(bytearray(b"a" * SIZE))
        yield server


def program(server: DiskServer) -> tuple[str, str, str]:
    return sys.executable, served_disks.__file__, str(server.path)


def serve(folder: Path, disk: str, server: DiskServer, *options: str, name: str = "vm") -> Served:
    return Served(folder, disk, *options, name=name, before=program(server))


def assert_holds(held: HeldDisk, expected: dict[int, int]) -> None:
    wrong = [
        number
        for number, seed in expected.items()
        if held.content[number * BLOCK : (number + 1) * BLOCK] != block_of(number, seed)
    ]
    assert wrong == []


def refusal(served: Served, command: str, **arguments: Any) -> str:
    with pytest.raises(Exception) as refused:
        served.qmp.execute(command, **arguments)
    return str(refused.value)


def test_it_is_served_mirrored_switched_to_and_recognised(tmp_path: Path, server: DiskServer) -> None:
    with serve(tmp_path, "mem:a", server) as served:
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.start_mirror("mem:b", create=True)
            load.go_on()
            served.qmp.execute("switch", keep_mirror=True)
            load.go_on()
            expected = load.stop()
        assert served.mirror()["source"] == "mem:b" and served.mirror()["destination"] == "mem:a"
        served.stop()
    record = served.record()
    assert record is not None
    assert (record.current.path, record.current.kind) == ("mem:b", "mem")
    assert record.current.serial == server.disks["mem:b"].token
    for held in server.disks.values():
        assert_holds(held, expected)
        assert held.flushes and not held.owned
    assert server.disks["mem:a"].content == server.disks["mem:b"].content
    env = {"STATE_DIRECTORY": str(served.state_directory)}
    words = ("serve", "--blk-file", "mem:a", "--socket-path", tmp_path / "x.sock")
    code, said = refused_start(*words, env=env, before=program(server))
    assert code == 1 and "mem:a is the other half of a mirror (up-to-date), not the current disk" in said
    server.disks["mem:moved"] = server.disks.pop("mem:b")  # what it is goes before what it is called
    with serve(tmp_path, "mem:moved", server) as served:
        served.await_resumed()
        with served.guest() as guest:
            write_block(guest, 3, 77)
            flush(guest)
        assert_holds(server.disks["mem:a"], {3: 77})
        assert_holds(server.disks["mem:moved"], {3: 77})
        served.stop()


def test_it_mirrors_to_a_file_and_back(tmp_path: Path, server: DiskServer) -> None:
    file = image(tmp_path / "b.img", SIZE // MIB, filled_mib=0)
    with serve(tmp_path, "mem:a", server) as served:
        served.start_mirror(file)
        with served.guest() as guest:
            write_block(guest, 1, 5)
            flush(guest)
        served.qmp.execute("switch", keep_mirror=True)
        with served.guest() as guest:
            write_block(guest, 2, 6)
            flush(guest)
        served.stop()
    assert file.read_bytes() == server.disks["mem:a"].content
    assert_holds(server.disks["mem:a"], {1: 5, 2: 6})


def test_one_that_is_in_use_is_refused(tmp_path: Path, server: DiskServer) -> None:
    (tmp_path / "other").mkdir()
    with serve(tmp_path, "mem:a", server) as served:
        said = refusal(served, "mirror-start", destination="mem:a")
        assert "mem:a and the source mem:a are the same storage (one disk)" in said
        server.disks["mem:c"] = HeldDisk(bytearray(SIZE))
        with serve(tmp_path / "other", "mem:c", server):
            said = refusal(served, "mirror-start", destination="mem:c")
            assert "mem:c is in use by another backend" in said
        served.start_mirror("mem:c")  # the one that had it has ended
        served.stop()


def test_one_that_is_too_small_is_not_kept_and_a_bad_name_is_a_sentence(
    tmp_path: Path, server: DiskServer
) -> None:
    with serve(tmp_path, "mem:a", server) as served:
        server.disks["mem:small"] = HeldDisk(bytearray(MIB))
        assert "mem:small is too small" in refusal(served, "mirror-start", destination="mem:small")
        assert "names no disk of a server" in refusal(served, "mirror-start", destination="mem:B/")
        said = refusal(served, "mirror-start", destination="iscsi://host/b")
        assert "there are no disks of the kind iscsi here" in said and "mem:…" in said
        assert served.state == "passthrough"
        await_true(lambda: not server.disks["mem:small"].owned, "the server has seen it let go")
        served.stop()
    code, said = refused_start(
        "serve", "--blk-file", "mem:", "--socket-path", tmp_path / "x", before=program(server)
    )
    assert code == 2 and said.count("\n") == 1 and "names no disk of a server" in said


def test_one_whose_server_is_gone_is_given_up_and_attached_again(tmp_path: Path, server: DiskServer) -> None:
    file = image(tmp_path / "a.img", SIZE // MIB)
    with serve(tmp_path, str(file), server, "--destination-retry", "100ms") as served:
        served.start_mirror("mem:b", create=True)
        with served.guest() as guest:
            write_block(guest, 1, 1)
            flush(guest)
            server.cut_off()
            write_block(guest, 2, 2)
            flush(guest)
            served.await_state("degraded")
            served.await_resumed()
            write_block(guest, 3, 3)
            flush(guest)
        served.stop()
    assert server.disks["mem:b"].content == file.read_bytes()


def test_it_grows(tmp_path: Path, server: DiskServer) -> None:
    with serve(tmp_path, "mem:a", server) as served:
        server.disks["mem:a"].content.extend(bytes(MIB))
        assert served.qmp.execute("resize") == {"capacity": SIZE + MIB}
        served.stop()


def test_one_that_can_only_be_a_destination_is_no_source(tmp_path: Path, server: DiskServer) -> None:
    why = "no guest can be served from mem:sink: its server cannot make each write durable"
    with serve(tmp_path, "mem:a", server) as served:
        served.start_mirror("mem:sink", create=True)
        assert why in refusal(served, "switch") and served.state == "steady"
        served.stop()
    words = ("serve", "--blk-file", "mem:sink", "--socket-path", tmp_path / "x")
    code, said = refused_start(*words, before=program(server))
    assert code == 1 and why in said
