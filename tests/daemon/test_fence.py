# SPDX-License-Identifier: Apache-2.0
"""Disks whose server is not ours: one that forgets what was not flushed when the connection is lost, one that
carries out requests of a lost connection later, and what has to happen before such a disk is written to again
(docs/durability.md, rule 8)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.disk_server import DiskServer, HeldDisk
from tests.daemon.rig import Served, await_true, flush, image, refused_start, write_block
from tests.daemon.test_other_kind import SIZE, assert_holds, program, refusal
from tests.frontend import Frontend
from tests.sizes import MIB

QUICKLY = ("--destination-timeout", "300ms", "--destination-retry", "50ms")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DiskServer]:
    with DiskServer(tmp_path / "disks.sock") as server:
        server.disks["far:b"] = HeldDisk(bytearray(SIZE), hasty=True)
        yield server


def serve(folder: Path, server: DiskServer, *options: str, disk: str | None = None) -> Served:
    if disk is None:
        path = folder / "a.img"
        disk = str(path if path.exists() else image(path, SIZE // MIB))
    return Served(folder, disk, *options, before=program(server))


def same(folder: Path, held: HeldDisk) -> bool:
    return (folder / "a.img").read_bytes() == held.content


def kill_command(folder: Path, server: DiskServer) -> str:
    """Ends the process that serves far:b."""
    script = folder / "kill.py"
    script.write_text(
        "import json, os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "s.sendall(json.dumps({'name': os.environ['VHOSTSYNC_DISK'], 'wish': 'kill'}).encode() + b'\\n')\n"
        "assert s.makefile().readline()\n"
    )
    return f"{sys.executable} {script} {server.path}"


def lose_with_a_write_under_way(served: Served, guest: Frontend, held: HeldDisk) -> None:
    """The destination gets block 1 and does not answer. The guest goes on."""
    held.keep_back()
    write_block(guest, 1, 1)
    served.await_state("degraded")
    flush(guest)
    assert held.kept_back == 1


def test_what_was_not_flushed_is_copied_again_when_the_server_has_forgotten_it(
    tmp_path: Path, server: DiskServer
) -> None:
    held = server.disks["far:b"]
    held.forgets = True
    with serve(tmp_path, server, *QUICKLY) as served, served.guest() as guest:
        served.start_mirror("far:b")
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        for number in range(6):
            write_block(guest, number, 10 + number)
            await_true(lambda: served.mirror()["lag-writes"] == 0, "it is mirrored")
            if number == 2:
                flush(guest)
        expected = {number: 10 + number for number in range(6)}
        assert_holds(held, expected)
        before = bytes(held.content)
        server.cut_off()
        assert held.content != before, "it has forgotten the last three"
        write_block(guest, 9, 19)
        served.await_state("degraded")
        served.await_resumed()
        assert served.mirror()["full-copy-reason"] is None
        guest.close()
        served.stop()
    assert same(tmp_path, held)
    assert_holds(held, {**expected, 9: 19})


def test_a_late_server_is_attached_when_the_operator_says_so(tmp_path: Path, server: DiskServer) -> None:
    held = server.disks["far:b"]
    with serve(tmp_path, server, *QUICKLY) as served, served.guest() as guest:
        served.start_mirror("far:b")
        lose_with_a_write_under_way(served, guest, held)
        told = served.qmp.wait_event("DESTINATION_RETRY", 30, what="fence")["error"]
        assert "may still be carried out at far:b" in told and "mirror start far:b --fenced" in told
        assert served.mirror()["fence"] == "hand"
        assert told in refusal(served, "mirror-start", destination="far:b")
        write_block(guest, 1, 2)  # what the late one must not land upon
        flush(guest)
        assert held.kept_back == 1
        held.let_go()
        await_true(lambda: held.late == 1, "it lands")
        assert_holds(held, {1: 1})
        assert served.state == "degraded" and served.mirror()["fence"] == "hand", "nobody has said so"
        served.start_mirror("far:b", fenced=True)
        assert served.mirror()["fence"] is None and served.mirror()["full-copy-reason"] is None
        guest.close()
        served.stop()
    assert same(tmp_path, held)
    assert_holds(held, {1: 2})


def test_a_late_server_that_limits_its_connections_is_attached_when_it_lets_us_in(
    tmp_path: Path, server: DiskServer
) -> None:
    held = server.disks["far:b"]
    held.hasty = False
    with serve(tmp_path, server, *QUICKLY, "--fence", "limit") as served, served.guest() as guest:
        served.start_mirror("far:b")
        lose_with_a_write_under_way(served, guest, held)
        await_true(lambda: "in use" in served.mirror()["last-error"], "it does not let us in")
        assert served.mirror()["fence"] == "limit"
        write_block(guest, 1, 2)
        held.let_go()
        served.await_resumed()
        assert held.late == 1
        guest.close()
        served.stop()
    assert same(tmp_path, held)
    assert_holds(held, {1: 2})


@pytest.mark.parametrize("sandbox", ["off", "auto", "require"])
def test_a_command_ends_the_late_server(tmp_path: Path, server: DiskServer, sandbox: str) -> None:
    held, command = server.disks["far:b"], kill_command(tmp_path, server)
    options = (*QUICKLY, "--fence-command", command, "--sandbox", sandbox)
    with serve(tmp_path, server, *options) as served, served.guest() as guest:
        served.start_mirror("far:b")
        lose_with_a_write_under_way(served, guest, held)
        write_block(guest, 2, 2)
        served.await_resumed()
        assert held.late == 0, "it was never carried out"
        guest.close()
        served.stop()
    assert same(tmp_path, held)
    assert_holds(held, {1: 1, 2: 2})


def test_a_command_that_fails_fences_nothing(tmp_path: Path, server: DiskServer) -> None:
    held = server.disks["far:b"]
    said = f"{sys.executable} -c 'raise SystemExit(\"it runs on\")'"
    with serve(tmp_path, server, *QUICKLY, "--fence-command", said) as served, served.guest() as guest:
        served.start_mirror("far:b")
        lose_with_a_write_under_way(served, guest, held)
        why = "once --fence-command succeeds; it ended with exit code 1: it runs on"
        await_true(lambda: why in served.mirror()["last-error"], "the command has failed")
        assert served.state == "degraded" and served.mirror()["fence"] == "command"
        held.let_go()
        guest.close()
        served.stop()


def test_where_nothing_was_under_way_no_fence_is_needed(tmp_path: Path, server: DiskServer) -> None:
    """And a disk over a network is attached again without being asked for."""
    held = server.disks["far:b"]
    with serve(tmp_path, server) as served, served.guest() as guest:
        served.start_mirror("far:b")
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        server.cut_off()
        flush(guest)
        write_block(guest, 1, 1)
        served.await_state("degraded")
        served.await_resumed()
        guest.close()
        served.stop()
    assert same(tmp_path, held)
    record = served.record()
    assert record is not None and record.unfenced == (), "a clean end"


def test_a_backend_that_was_killed_leaves_it_unknown_what_is_under_way(
    tmp_path: Path, server: DiskServer
) -> None:
    held = server.disks["far:b"]
    with serve(tmp_path, server) as served:
        served.start_mirror("far:b")
        record = served.record()
        assert record is not None and [each.path for each in record.unfenced] == ["far:b"]
        served.kill()
    with serve(tmp_path, server) as served:
        await_true(lambda: served.mirror()["fence"] == "hand", "the mirror is not resumed")
        assert "may still be carried out at far:b" in served.mirror()["last-error"]
        served.start_mirror("far:b", fenced=True)
        served.stop()
    with serve(tmp_path, server) as served:
        served.await_resumed()
        served.kill()
    with serve(tmp_path, server, "--fence-command", kill_command(tmp_path, server)) as served:
        served.await_resumed()
        served.stop()
    assert same(tmp_path, held)


def test_a_source_is_not_written_to_before_it_is_fenced(tmp_path: Path, server: DiskServer) -> None:
    held = server.disks["far:b"]
    with serve(tmp_path, server, disk="far:b") as served:
        with served.guest() as guest:
            write_block(guest, 1, 1)
        served.kill()
    env = {"STATE_DIRECTORY": str(served.state_directory)}
    words = ("serve", "--blk-file", "far:b", "--socket-path", tmp_path / "x.sock")
    code, said = refused_start(*words, env=env, before=program(server))
    assert code == 1 and said.count("\n") == 1
    assert "requests of the last run may still be carried out at far:b" in said and "--fenced" in said
    for options in (
        ("--fence", "limit"), ("--fence-command", kill_command(tmp_path, server)), ("--fenced",)
    ):  # fmt: skip
        with serve(tmp_path, server, *options, disk="far:b") as served:
            served.kill()
    with serve(tmp_path, server, "--fenced", disk="far:b") as served:
        with served.guest() as guest:
            write_block(guest, 2, 2)
        served.stop()
    with serve(tmp_path, server, disk="far:b") as served:
        served.stop()
    assert_holds(held, {1: 1, 2: 2})


def test_the_source_that_a_switch_has_left_needs_no_fence(tmp_path: Path, server: DiskServer) -> None:
    server.disks["far:c"] = HeldDisk(bytearray(SIZE), hasty=True)
    with serve(tmp_path, server, disk="far:b") as served:
        served.start_mirror("far:c")
        served.qmp.execute("switch")
        await_true(lambda: len(served.record().unfenced) == 1, "the left one has answered all")  # type: ignore[union-attr]
        served.start_mirror("far:b")
        served.stop()


def test_a_local_disk_waits_for_nothing(tmp_path: Path, server: DiskServer) -> None:
    other = image(tmp_path / "c.img", SIZE // MIB, filled_mib=0)
    with serve(tmp_path, server) as served:
        served.start_mirror(other)
        record = served.record()
        assert record is not None and record.unfenced == ()
        served.kill()
    with serve(tmp_path, server) as served:
        served.await_resumed()
        served.stop()
