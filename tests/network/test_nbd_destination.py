# SPDX-License-Identifier: Apache-2.0
"""A disk of an NBD server as the destination of a mirror: real servers, `serve` as a process, and a guest."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.daemon.rig import (
    Load,
    Served,
    answered,
    await_true,
    flush,
    image,
    lacking,
    same_content,
    write_block,
)
from tests.frontend import Frontend, FrontendTimeout
from tests.guest.images import new_image
from tests.network.servers import MIBS, Nbdkit, QemuNbd, Server, StorageDaemon, descriptors, threads
from tests.sizes import MIB

BLOCKS = 256
REGION = 64 << 10


def servers(folder: Path, raw: Path) -> dict[str, Server]:
    return {
        "nbdkit": Nbdkit(folder, "file", str(raw)),
        "qemu-nbd": QemuNbd(folder, raw),
        "qemu-storage-daemon": StorageDaemon(folder, raw),
    }


def wait_settled(served: Served) -> None:
    await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")


@pytest.mark.parametrize("program", ["nbdkit", "qemu-nbd", "qemu-storage-daemon"])
def test_it_holds_what_the_guest_has_written_and_verifies_equal(
    tmp_path: Path, disk: Path, raw: Path, program: str
) -> None:
    with servers(tmp_path, raw)[program] as server, Served(tmp_path, disk) as served:
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.start_mirror(server.uri)
            load.go_on()
            served.qmp.events.clear()
            served.qmp.execute("verify")
            assert served.qmp.wait_event("VERIFY_COMPLETED", 30)["state"] == "equal"
            load.go_on()
            expected = load.stop()
        served.stop()
    assert same_content(disk, raw) and lacking(raw, expected) == []


def test_a_flush_of_the_guest_waits_for_that_of_the_server(tmp_path: Path, disk: Path, raw: Path) -> None:
    control = tmp_path / "pause.sock"
    plugin = ("file", str(raw), f"pause-control={control}")
    with Nbdkit(tmp_path, *plugin, filters=["pause"]) as server, Served(tmp_path, disk) as served:
        served.start_mirror(server.uri)
        with served.guest() as guest, socket.socket(socket.AF_UNIX) as pause:
            pause.connect(str(control))
            pause.sendall(b"p")
            assert pause.recv(1) == b"P"
            write_block(guest, 3, 7)  # which does not wait for the server
            flushed = guest.flush()
            with pytest.raises(FrontendTimeout):
                guest.wait(flushed, timeout_s=0.5)
            pause.sendall(b"r")
            assert pause.recv(1) == b"R"
            guest.wait(flushed)
            assert flushed.ok and lacking(raw, {3: 7}) == []
        served.stop()


def test_each_flush_of_the_guest_is_one_of_the_server(tmp_path: Path, disk: Path, raw: Path) -> None:
    log = tmp_path / "requests"
    plugin = ("file", str(raw), f"logfile={log}")
    with Nbdkit(tmp_path, *plugin, filters=["log"]) as server, Served(tmp_path, disk) as served:
        served.start_mirror(server.uri)
        wait_settled(served)
        before = log.read_text().count(" Flush ")
        with served.guest() as guest:
            for number in range(5):
                write_block(guest, number, 1)
                flush(guest)
            flush(guest)  # it has nothing to do there
        assert 5 <= log.read_text().count(" Flush ") - before <= 7, "and perhaps a checkpoint"
        assert " fua=1" not in log.read_text(), "nobody is served from it"
        served.stop()


def test_a_cancel_leaves_a_copy_of_that_moment(tmp_path: Path, disk: Path, raw: Path) -> None:
    with QemuNbd(tmp_path, raw) as server, Served(tmp_path, disk) as served:
        served.start_mirror(server.uri)
        with served.guest() as guest:
            write_block(guest, 1, 1)  # and no flush
            served.qmp.execute("mirror-cancel")
            write_block(guest, 2, 2)
        served.stop()
    assert lacking(raw, {1: 1}) == [] and lacking(raw, {2: 2}) == [2]


def test_what_is_attached_again_gets_what_differs(tmp_path: Path, disk: Path, raw: Path) -> None:
    """Also after a restart of the backend, with the bitmap."""
    bitmap = ("--bitmap", tmp_path / "bits")
    with Nbdkit(tmp_path, "file", str(raw)) as server:
        with Served(tmp_path, disk, *bitmap) as served, served.guest() as guest:
            served.start_mirror(server.uri)
            wait_settled(served)
            served.qmp.execute("mirror-cancel")
            write_block(guest, 100, 2)
            served.start_mirror(server.uri)
            mirror = served.mirror()
            assert (mirror["full-copy-reason"], mirror["copy-bytes-total"]) == (None, REGION)
            wait_settled(served)
            guest.close()
            served.stop()
        with Served(tmp_path, disk, *bitmap) as served:
            served.await_resumed()
            mirror = served.mirror()
            assert (mirror["full-copy-reason"], mirror["copy-bytes-total"]) == (None, 0)
            served.stop()
    assert same_content(disk, raw)


def test_zeroes_and_holes(tmp_path: Path, raw: Path) -> None:
    """What is a hole stays one, and what the guest discards becomes one there."""
    disk = image(tmp_path / "a.img", 64, filled_mib=8)
    new_image(raw, 64)
    with QemuNbd(tmp_path, raw) as server, Served(tmp_path, disk) as served:
        served.start_mirror(server.uri)
        assert raw.stat().st_blocks * 512 <= 9 * MIB
        with served.guest() as guest:
            assert answered(guest, guest.discard(0, 4 * MIB))
            assert answered(guest, guest.write_zeroes(4 * MIB, 2 * MIB))
            flush(guest)
        served.stop()
    assert same_content(disk, raw)
    assert raw.stat().st_blocks * 512 <= 5 * MIB


@pytest.mark.parametrize("filters", [(), ("nozero",), ("noextents",), ("blocksize-policy",)])
def test_what_a_server_lacks_is_done_otherwise(
    tmp_path: Path, disk: Path, raw: Path, filters: tuple[str, ...]
) -> None:
    """No zeroing, no extents, small requests only, an end that is no whole block."""
    with raw.open("ab") as file:
        file.truncate(MIBS * MIB + 300)
    words = ["file", str(raw)]
    if "blocksize-policy" in filters:
        words += ["blocksize-maximum=64K", "blocksize-error-policy=error"]
    with (
        Nbdkit(tmp_path, *words, filters=filters) as server,
        Served(tmp_path, disk) as served,
        served.guest() as guest,
    ):
        served.start_mirror(server.uri)
        assert guest.write_now(MIB, bytes(range(256)) * 4096).ok
        assert answered(guest, guest.write_zeroes(2 * MIB, MIB))
        flush(guest)
        guest.close()
        served.stop()
    assert same_content(disk, raw)


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EINVAL"])
def test_an_error_of_the_server_degrades_and_the_guest_goes_on(
    tmp_path: Path, disk: Path, raw: Path, error: str
) -> None:
    inject = tmp_path / "inject"
    words = (f"error-pwrite={error}", "error-pwrite-rate=100%", f"error-pwrite-file={inject}")
    with (
        Nbdkit(tmp_path, "file", str(raw), *words, filters=["error"]) as server,
        Served(tmp_path, disk, "--destination-retry", "100ms") as served,
        served.guest() as guest,
    ):
        served.start_mirror(server.uri)
        inject.touch()
        write_block(guest, 1, 1)
        flush(guest)
        told = served.await_state("degraded")
        assert ("EIO" if error == "EINVAL" else error) in told["error"], told
        inject.unlink()
        # All was answered, so no fence is needed.
        await_true(lambda: served.state == "steady", "attached again")
        write_block(guest, 2, 2)
        flush(guest)
        guest.close()
        served.stop()
    assert same_content(disk, raw)


def lost_while(served: Served, guest: Frontend, moment: str, server: Server) -> None:
    """The server is gone, or stands still, at this moment."""
    if moment == "copy":
        served.qmp.execute("mirror-start", destination=server.uri, speed=MIB)
        await_true(lambda: served.mirror()["copy-bytes-done"] > 0, "the copy has begun")
    else:
        served.start_mirror(server.uri)
    if moment == "verify":
        served.qmp.execute("verify", speed=MIB)
    write_block(guest, 1, 1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("moment", ["copy", "steady", "verify"])
def test_a_server_that_is_lost_is_given_up(
    tmp_path: Path, disk: Path, raw: Path, moment: str, how: signal.Signals
) -> None:
    with (
        Nbdkit(tmp_path, "file", str(raw)) as server,
        Served(tmp_path, disk, "--destination-timeout", "500ms") as served,
        served.guest() as guest,
    ):
        lost_while(served, guest, moment, server)
        server.signal(how)
        write_block(guest, 2, 2)
        flush(guest)
        served.await_state("degraded")
        write_block(guest, 3, 3)
        flush(guest)
        server.kill()
        # Its requests have come back, whatever became of them: nothing keeps another disk out.
        other = image(tmp_path / "c.img", MIBS, filled_mib=0)
        served.start_mirror(other)
        guest.close()
        served.stop()
    assert same_content(disk, other) and lacking(disk, {1: 1, 2: 2, 3: 3}) == []


def test_a_backend_ends_although_the_server_stands_still(tmp_path: Path, disk: Path, raw: Path) -> None:
    with Nbdkit(tmp_path, "file", str(raw)) as server, Served(tmp_path, disk) as served:
        served.start_mirror(server.uri)
        with served.guest() as guest:
            server.signal(signal.SIGSTOP)
            write_block(guest, 1, 1)
            served.qmp.execute("quit", force=True)
        assert served.process.wait(30) == 0


def test_several_connections(tmp_path: Path, disk: Path, raw: Path) -> None:
    log = tmp_path / "requests"
    plugin = ("file", str(raw), f"logfile={log}")
    with (
        Nbdkit(tmp_path, *plugin, filters=["log"]) as server,
        Served(tmp_path, disk, "--connections", "4") as served,
    ):
        with Load(served, blocks=BLOCKS) as load:
            served.start_mirror(server.uri)
            load.go_on()
            load.stop()
        writing = set(re.findall(r"connection=(\d+) Write ", log.read_text()))
        assert len(writing) == 4
        served.stop()
    assert same_content(disk, raw)


def test_no_more_connections_than_may_work_together(tmp_path: Path, disk: Path, raw: Path) -> None:
    log = tmp_path / "requests"
    plugin = ("file", str(raw), f"logfile={log}", "multi-conn-mode=disable")
    with (
        Nbdkit(tmp_path, *plugin, filters=["log", "multi-conn"]) as server,
        Served(tmp_path, disk, "--connections", "4") as served,
    ):
        served.start_mirror(server.uri)
        assert log.read_text().count(" Connect ") == 1
        served.stop()


def test_the_loss_of_one_connection_is_the_loss_of_all(tmp_path: Path, disk: Path, raw: Path) -> None:
    with (
        Nbdkit(tmp_path, "file", str(raw)) as server,
        Served(tmp_path, disk, "--connections", "3") as served,
        served.guest() as guest,
    ):
        served.start_mirror(server.uri)
        before = descriptors(served.process.pid)
        server.kill()
        write_block(guest, 1, 1)
        flush(guest)
        served.await_state("degraded")
        await_true(lambda: descriptors(served.process.pid) <= before - 3, "all are closed")
        guest.close()
        served.stop()


def test_nothing_is_left_of_twenty_mirrors(tmp_path: Path, disk: Path, raw: Path) -> None:
    def held() -> tuple[int, int]:
        return descriptors(served.process.pid), threads(served.process.pid)

    def cycle() -> tuple[int, int]:
        served.start_mirror(server.uri)
        served.qmp.execute("mirror-cancel")
        return held()

    with Nbdkit(tmp_path, "file", str(raw)) as server, Served(tmp_path, disk, "--connections", "2") as served:
        first = cycle()
        for _ in range(19):
            cycle()
        await_true(lambda: all(now <= then for now, then in zip(held(), first, strict=True)), f"{first}")
        served.stop()


def test_a_qcow2_image_behind_qemu_nbd(tmp_path: Path, disk: Path) -> None:
    qcow2, back = tmp_path / "b.qcow2", tmp_path / "back.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), f"{MIBS}M"], check=True)
    with QemuNbd(tmp_path, qcow2, image_format="qcow2") as server, Served(tmp_path, disk) as served:
        with Load(served, blocks=BLOCKS) as load:
            served.start_mirror(server.uri)
            load.go_on()
            load.stop()
        served.stop()
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(back)], check=True)
    assert same_content(disk, back)
