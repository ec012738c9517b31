# SPDX-License-Identifier: Apache-2.0
"""Real NBD servers that are killed, stopped, late, or cut off, with a guest at work: nothing is lost, and
none is written to again before what a lost connection has left under way there is over."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, await_true, flush, image, lacking, same_content, write_block
from tests.guest.processes import wait_said
from tests.guest.qmp_client import QmpError
from tests.network.hostile_server import WRITE, HostileServer, Silence
from tests.network.links import NbdkitThere, OtherHost
from tests.network.servers import Nbdkit, QemuNbd, free_port
from tests.network.unit import QemuNbdUnit

MIBS = 8
BLOCKS = 256
QUICKLY = ("--destination-retry", "100ms")


def disks(folder: Path) -> tuple[Path, Path]:
    return image(folder / "a.img", MIBS), image(folder / "b.img", MIBS, filled_mib=0)


@pytest.mark.timeout(180)
def test_a_server_that_is_killed_and_started_anew(tmp_path: Path) -> None:
    disk, raw = disks(tmp_path)
    with QemuNbdUnit(tmp_path, raw) as server:
        options = (*QUICKLY, "--fence-command", server.restart_command)
        with Served(tmp_path, disk, *options) as served, Load(served, blocks=BLOCKS) as load:
            served.start_mirror(server.uri)
            for _ in range(3):
                load.go_on()
                served.qmp.events.clear()
                server.signal(signal.SIGKILL)
                served.await_state("degraded")
                server.restart()  # the operator's; what was under way has gone with the killed process
                load.go_on()
                served.await_resumed()
                assert served.mirror()["full-copy-reason"] is None
            load.go_on()
            expected = load.stop()
            served.stop()
    assert lacking(raw, expected) == [] and same_content(disk, raw)


@pytest.mark.timeout(120)
def test_a_server_that_was_stopped_and_goes_on_is_late(tmp_path: Path) -> None:
    disk, raw = disks(tmp_path)
    options = (*QUICKLY, "--destination-timeout", "1s")
    with QemuNbd(tmp_path, raw) as server, Served(tmp_path, disk, *options) as served:
        with served.guest() as guest:
            served.start_mirror(server.uri)
            server.signal(signal.SIGSTOP)
            write_block(guest, 1, 1)
            served.await_state("degraded")
            write_block(guest, 1, 2)
            flush(guest)
            told = served.qmp.wait_event("DESTINATION_RETRY", 30, what="fence")["error"]
            assert "--fenced" in told and served.mirror()["fence"] == "hand"
            assert lacking(raw, {1: 1}) == [1]
            server.signal(signal.SIGCONT)
            await_true(lambda: lacking(raw, {1: 1}) == [], "the late write lands")
            assert served.state == "degraded"
            server.kill()
            server.start()
            served.start_mirror(server.uri, fenced=True)
            assert served.mirror()["full-copy-reason"] is None
        served.stop()
    assert lacking(raw, {1: 2}) == [] and same_content(disk, raw)


@pytest.mark.timeout(120)
def test_a_late_server_with_the_limit_filter(tmp_path: Path) -> None:
    disk, raw = disks(tmp_path)
    slow = tmp_path / "slow"
    put = f"dd of={raw} bs=64k conv=notrunc oflag=seek_bytes seek=$4 2>{tmp_path}/dd"
    plugin = (
        "eval",
        f"get_size=stat -c %s {raw}",
        f"pread=dd if={raw} bs=64k iflag=skip_bytes,count_bytes skip=$4 count=$3 2>{tmp_path}/dd",
        f"pwrite=if rm {slow} 2>{tmp_path}/rm; then sleep 6; fi; {put}",
        f"flush=sync {raw}",
    )
    options = (*QUICKLY, "--destination-timeout", "2s", "--fence", "limit")
    with Nbdkit(tmp_path, *plugin, filters=("limit",)) as server, Served(tmp_path, disk, *options) as served:
        with served.guest() as guest:
            served.start_mirror(server.uri)
            slow.touch()
            write_block(guest, 1, 1)
            served.await_state("degraded")
            write_block(guest, 1, 2)
            flush(guest)
            assert lacking(raw, {1: 1}) == [1], "the write is still under way"
            assert served.mirror()["fence"] == "limit" and served.state == "degraded"
            served.await_resumed()
            assert served.mirror()["full-copy-reason"] is None
        served.stop()
    assert lacking(raw, {1: 2}) == [] and same_content(disk, raw)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["drop", "reject with tcp reset"])
def test_a_link_that_is_cut(tmp_path: Path, how: str) -> None:
    disk, raw = disks(tmp_path)
    options = (*QUICKLY, "--destination-timeout", "1s", "--allow-plaintext", "--sandbox", "off")
    with (
        OtherHost() as host,
        NbdkitThere(host, tmp_path, "file", str(raw)) as server,
        Served(tmp_path, disk, *options) as served,
        served.guest() as guest,
    ):
        served.start_mirror(server.uri)
        write_block(guest, 1, 1)
        host.cut(how)
        write_block(guest, 2, 2)
        served.await_state("degraded")
        write_block(guest, 3, 3)
        flush(guest)
        await_true(lambda: served.mirror()["fence"] == "hand", "nobody knows what the server does")
        server.kill()
        host.mend()
        server.start()
        served.start_mirror(server.uri, fenced=True)
        assert served.mirror()["full-copy-reason"] is None
        guest.close()
        served.stop()
    assert lacking(raw, {1: 1, 2: 2, 3: 3}) == [] and same_content(disk, raw)


@pytest.mark.timeout(120)
def test_a_link_that_is_cut_in_silence_while_the_guest_is_idle(tmp_path: Path) -> None:
    """No packet tells of it. It is noticed, and nothing was under way that a fence would be needed for."""
    disk, raw = disks(tmp_path)
    options = (*QUICKLY, "--destination-timeout", "1s", "--allow-plaintext", "--sandbox", "off")
    with (
        OtherHost() as host,
        NbdkitThere(host, tmp_path, "file", str(raw)) as server,
        Served(tmp_path, disk, *options) as served,
    ):
        served.start_mirror(server.uri)
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        host.cut()
        assert "did not answer within" in served.await_state("degraded")["reason"]
        served.await_worth("outdated")
        host.mend()
        served.await_resumed()
        assert served.mirror()["copy-bytes-total"] == 0
        served.stop()
    assert same_content(disk, raw)


@pytest.mark.timeout(120)
def test_another_name_of_its_host_is_no_way_around_the_fence(tmp_path: Path) -> None:
    disk, raw = disks(tmp_path)
    server = QemuNbd(tmp_path, raw, port=free_port())
    other_name = server.uri.replace("127.0.0.1", "localhost")
    with server, Served(tmp_path, disk, *QUICKLY, "--destination-timeout", "1s") as served:
        with served.guest() as guest:
            served.start_mirror(server.uri)
            server.signal(signal.SIGSTOP)
            write_block(guest, 1, 1)
            served.await_state("degraded")
            await_true(lambda: served.mirror()["fence"] == "hand", "it waits for the operator")
            server.kill()
            server.start()
            with pytest.raises(QmpError, match=f"which was called {server.uri} then"):
                served.qmp.execute("mirror-start", destination=other_name, force=True)
            served.start_mirror(other_name, force=True, fenced=True)
            record = served.record()
            assert record is not None and [each.path for each in record.unfenced] == [other_name]
            served.qmp.execute("mirror-cancel")  # all is answered: neither name needs a fence
            served.start_mirror(server.uri, force=True)
        served.stop()
    assert same_content(disk, raw)


def test_the_guest_is_not_moved_to_a_disk_whose_connection_is_lost(tmp_path: Path) -> None:
    """Nobody has asked anything of it since: the loss is noticed all the same, and told at once."""
    disk, raw = disks(tmp_path)
    with QemuNbd(tmp_path, raw) as server, Served(tmp_path, disk) as served, served.guest() as guest:
        served.start_mirror(server.uri)
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        server.kill()
        assert served.await_state("degraded")["reason"] == "the connection to the destination is lost"
        served.await_worth("outdated")
        for keep in (True, False):
            with pytest.raises(QmpError, match="steady"):
                served.qmp.execute("switch", keep_mirror=keep)
            write_block(guest, 1, 1)
            flush(guest)
        assert served.mirror()["source"] == str(disk) and lacking(disk, {1: 1}) == []


def test_what_had_no_answer_is_known_where_the_loss_shows_when_something_is_sent(tmp_path: Path) -> None:
    """The server has read the first write, has not answered it, and may carry it out yet."""
    disk, _ = disks(tmp_path)
    deaf = False

    def answer(command: int, offset: int, length: int) -> int | Silence:
        return Silence.DEAF if deaf and command == WRITE else 0

    with (
        HostileServer(tmp_path / "played.sock", size=MIBS << 20, behave=answer) as server,
        Served(tmp_path, disk, *QUICKLY) as served,
        served.guest() as guest,
    ):
        served.start_mirror(server.uri, force=True)
        deaf = True
        write_block(guest, 1, 1)
        await_true(lambda: server.is_deaf, "the server has read it")
        write_block(guest, 2, 2)
        served.await_state("degraded")
        assert '"unanswered": true' in wait_said(served.process, "the former destination is closed")
        await_true(lambda: served.mirror()["fence"] == "hand", "it waits for the operator")
        served.stop()
