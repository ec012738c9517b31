# SPDX-License-Identifier: Apache-2.0
"""One process of `serve` goes on for another while the guest runs: its connection stays, its mirror stays
steady, and whichever of the two dies, the guest's disk is served by one of them or by a plain start."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.habits import HABITS, Habits, Kept, Returning, Unconnected
from tests.daemon.rig import (
    BLOCK,
    WAIT_S,
    Load,
    Served,
    await_true,
    block_of,
    flush,
    image,
    lacking,
    need_root,
    refused_start,
    same_content,
    write_block,
)
from tests.frontend import DEFAULT_FEATURES, Feature, Frontend
from tests.guest.processes import Process
from tests.guest.qmp_client import QmpError
from tests.guest_ring import GuestMemory
from tests.sizes import MIB
from tests.vhost_client import LOG, WANTED_PROTOCOL, Message, ProtocolFeature, VhostUserTransport
from vhostsync import hand_over
from vhostsync.cli import upgrade
from vhostsync.errors import HandOverError
from vhostsync.host.owned_fd import OwnedFd, close_all, new_memory
from vhostsync.host.parcel import receive_parcel
from vhostsync.host.unix_socket import bind_unix_socket

HANDED_OVER = "frontend handed over"


def handed_over(served: Served) -> int:
    lines = [json.loads(line) for line in served.process.log.read_text().splitlines()]
    return sum(line["message"] == HANDED_OVER for line in lines)


@pytest.mark.parametrize("bitmap", [False, True], ids=["without a bitmap", "with a bitmap"])
def test_the_guest_goes_on_and_so_does_the_mirror(work: Path, bitmap: bool) -> None:
    """Nothing is copied; of a bitmap what it has marked, while the guest runs."""
    source, other = image(work / "a.img"), image(work / "b.img")
    options = ("--bitmap", work / "bits") if bitmap else ()
    with Served(work, source, *options) as served:
        served.start_mirror(other)
        with Load(served) as load:
            load.go_on()
            for run in range(1, 4):
                assert served.hand_over() == 0
                assert handed_over(served) == run
                assert bitmap or served.state == "steady"
                served.await_resumed()
                assert served.mirror()["full-copy-reason"] is None
                assert served.qmp.execute("query-status")["frontends"] == 1
                load.go_on()
            expected = load.stop()
        served.stop()
    assert lacking(source, expected) == lacking(other, expected) == []
    assert same_content(source, other)


def test_requests_wait_in_their_rings_meanwhile(work: Path) -> None:
    """Also those that nobody kicks for again."""
    source = image(work / "a.img")
    with Served(work, source) as served, served.guest(queues=3) as guest:
        end = threading.Event()

        def write() -> None:
            number = 0
            while not end.is_set():
                requests = [
                    guest.write(n * BLOCK, block_of(n, number + n), queue=n % 3) for n in range(30)
                ]
                guest.wait(*requests)
                for request in requests:
                    assert request.ok
                    guest.recycle(request)
                number += 30

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(3):
                assert served.hand_over() == 0
        finally:
            end.set()
            writer.join()
        write_block(guest, 1, 9)
        served.stop()
    assert lacking(source, {1: 9}) == []


@pytest.mark.parametrize("packed", [False, True], ids=["split rings", "packed rings"])
@pytest.mark.parametrize("habits", HABITS, ids=lambda habits: habits.name)
def test_what_a_frontend_has_set_holds(work: Path, habits: Habits, packed: bool) -> None:
    """Its memory, its rings, the record of what is in flight, the write cache mode; and after a crash of the
    successor it goes on as after any."""
    source = image(work / "a.img")
    features = DEFAULT_FEATURES | (Feature.RING_PACKED if packed else 0)
    frontend, kept = Frontend(Unconnected(), queues=2, queue_size=64, features=features), Kept()
    with Served(work, source) as served, contextlib.ExitStack() as undo:
        undo.callback(frontend.close)
        undo.callback(kept.close)
        first = Returning(served.socket)
        undo.callback(first.close)
        first.connect(frontend, habits, kept)
        first.client.set_config(32, b"\0")
        for number in range(100):  # the rings wrap
            write_block(frontend, number, 1)
        assert served.hand_over() == 0
        assert served.qmp.execute("query-status")["write-cache"] is False
        assert first.client.get_config()[32] == 0
        for number in range(100):
            write_block(frontend, number, 2)
        assert kept.marked(0) == kept.marked(1) == []
        assert frontend.stop() == frontend.stop()  # it may still command its rings
        for number in range(2):
            frontend.start_queue(number)
        write_block(frontend, 7, 3)
        served.kill()
        assert first.lost()
        waiting = frontend.write(8 * BLOCK, block_of(8, 4))
        again = Served(work, source)
        undo.enter_context(again)
        second = Returning(again.socket)
        undo.callback(second.close)
        second.connect(frontend, habits, kept)
        frontend.wait(waiting)
        assert waiting.ok
        assert again.qmp.execute("query-status")["write-cache"] is False
        assert frontend.read_now(6 * BLOCK, 3 * BLOCK) == block_of(6, 2) + block_of(7, 3) + block_of(8, 4)


def test_memory_that_comes_piece_by_piece(work: Path) -> None:
    """More pieces than one message can name, and one of them gone again."""
    source = image(work / "a.img")
    with Served(work, source) as served:
        transport = VhostUserTransport(served.socket, mem_slots=True)
        with Frontend(transport, memory=GuestMemory((8 * MIB, *(MIB for _ in range(11))))) as guest:
            for run in range(2):
                transport.remove_memory(guest.memory.regions[-1 - run])
                assert served.hand_over() == 0
                write_block(guest, 3, run)
            flush(guest)
            served.stop()
    assert lacking(source, {3: 1}) == []


def test_without_a_guest_the_next_one_finds_the_socket(work: Path) -> None:
    source = image(work / "a.img")
    with Served(work, source) as served:
        made = served.socket.stat().st_ino
        assert served.hand_over() == 0
        assert served.socket.stat().st_ino == made
        with served.guest() as guest:
            write_block(guest, 0, 1)
        served.stop()
        assert not served.socket.exists()


def test_a_socket_that_somebody_else_has_made_is_left_to_that_one(work: Path) -> None:
    source, path = image(work / "a.img"), work / "vm.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        number = listener.fileno()
        with Served(work, source, "--fd", str(number), pass_fds=(number,)) as served:
            with served.guest() as guest:
                assert served.hand_over() == 0
                write_block(guest, 0, 1)
            served.stop()
        assert path.exists()


# ---- what it is refused for ------------------------------------------------------------


def test_a_successor_for_another_socket_is_refused_and_nothing_changes(work: Path) -> None:
    source = image(work / "a.img")
    with Served(work, source) as served, served.guest() as guest:
        code, said = refused_start(
            "serve", "--blk-file", source, "--control", served.control, "--socket-path", work / "x",
            "--take-over",
        )  # fmt: skip
        assert code == 1 and "start it with the same --socket-path" in said
        write_block(guest, 0, 1)
        assert not hand_over.meeting_place(served.control).exists()


@pytest.mark.parametrize("record", [True, False], ids=["with a record", "without a record"])
def test_the_disk_that_the_guest_has_left_is_not_taken_for_its_own(work: Path, record: bool) -> None:
    """Its words name the former disk: as in a start it would be refused, or served as it was before."""
    source, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, source, *([] if record else ["--no-state-file"])) as served, served.guest() as guest:
        served.qmp.execute("mirror-start", destination=str(other))
        served.await_state("steady")
        served.qmp.execute("switch")
        write_block(guest, 0, 1)
        code, said = refused_start("upgrade", "--control", served.control)
        assert code == 1 and f"The guest is on {other}, and the successor was told to serve {source}" in said
        write_block(guest, 1, 1)
        assert served.qmp.execute("query-status")["disk"] == str(other)
        served.stop()
    assert lacking(other, {0: 1, 1: 1}) == []


def test_a_disk_that_has_lost_its_name_stays_with_who_has_it(work: Path) -> None:
    source = image(work / "a.img")
    with Served(work, source) as served, served.guest() as guest:
        source.rename(work / "aside.img")
        image(source)
        code, said = refused_start("upgrade", "--control", served.control)
        assert code == 1 and "does not lead to the guest's disk any more" in said
        write_block(guest, 0, 1)


def test_an_answer_is_for_one_start(work: Path) -> None:
    """--new-disk, given once more, would be refused: by then the disk has a record."""
    with Served(work, image(work / "a.img"), "--new-disk") as served, served.guest() as guest:
        write_block(guest, 0, 1)
        assert served.hand_over() == 0
        write_block(guest, 1, 1)


def test_a_guest_that_is_migrated_is_not_handed_over(work: Path) -> None:
    source = image(work / "a.img")
    with Served(work, source) as served, served.guest() as guest, new_memory("log", 1 << 20) as memory:
        client = guest.transport.client  # type: ignore[attr-defined]
        protocol = int(WANTED_PROTOCOL | ProtocolFeature.LOG_SHMFD)
        client.send(Message.SET_PROTOCOL_FEATURES, protocol.to_bytes(8, "little"))
        client.send(Message.SET_LOG_BASE, LOG.pack(1 << 20, 0), [memory.fileno()])
        client.receive()
        with pytest.raises(QmpError, match="is being migrated"):
            served.qmp.execute("hand-over")
        write_block(guest, 0, 1)


def test_nobody_listens(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served, served.guest() as guest:
        with pytest.raises(QmpError, match="No successor listens"):
            served.qmp.execute("hand-over")
        write_block(guest, 0, 1)


def test_without_a_backend_there_is_nothing_to_take_over(work: Path) -> None:
    code, said = refused_start(
        "serve", "--blk-file", image(work / "a.img"), "--socket-path", work / "s", "--take-over"
    )
    assert code == 1 and "There is no control socket" in said


# ---- one of the two dies ------------------------------------------------------------


def _received(connection: socket.socket) -> tuple[bytes, list[OwnedFd]]:
    return receive_parcel(connection, hand_over.PARCEL_BYTES_MAX, hand_over.PARCEL_FDS_MAX)


@contextlib.contextmanager
def meeting(served: Served) -> Iterator[socket.socket]:
    """Where the backend comes to, in the place of its successor."""
    place = hand_over.meeting_place(served.control)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        listener.settimeout(WAIT_S)
        try:
            yield listener
        finally:
            place.unlink()


@pytest.mark.parametrize("after", ["it was told", "all was given"])
def test_a_successor_that_dies_leaves_a_plain_restart(work: Path, after: str) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    frontend, kept = Frontend(Unconnected(), queues=2, queue_size=64), Kept()
    with contextlib.ExitStack() as undo:
        undo.callback(frontend.close)
        undo.callback(kept.close)
        with Served(work, source) as served:
            served.start_mirror(other)
            first = Returning(served.socket)
            undo.callback(first.close)
            first.connect(frontend, HABITS[0], kept)
            write_block(frontend, 0, 1)
            with meeting(served) as listener:
                served.qmp.execute("hand-over")
                connection, _ = listener.accept()
                with connection:
                    if after == "all was given":
                        data, fds = _received(connection)
                        described = json.loads(data)
                        assert described["equal"]
                        assert len(fds) == 3  # the log, the listening socket, the connection
                        for _ in range(described["said"][0]):
                            fds += _received(connection)[1]
                        close_all(fds)
            assert served.process.wait(WAIT_S) == 1
            assert "The successor" in served.process.last_output()
        await_true(first.lost, "the frontend notices")
        waiting = frontend.write(BLOCK, block_of(1, 2))
        with Served(work, source) as served:
            second = Returning(served.socket)
            undo.callback(second.close)
            second.connect(frontend, HABITS[0], kept)
            frontend.wait(waiting)
            assert waiting.ok
            served.await_resumed()
            frontend.close()
            served.stop()
    assert lacking(other, {0: 1, 1: 2}) == [] and same_content(source, other)


def test_a_successor_that_dies_before_it_asks_changes_nothing(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served, served.guest() as guest:
        with meeting(served), contextlib.suppress(FileNotFoundError):
            pass
        write_block(guest, 0, 1)
        assert served.hand_over() == 0  # the place is free again
        write_block(guest, 1, 1)


@pytest.mark.parametrize("manner", ["dies", "older"])
def test_without_what_a_predecessor_leaves_it_starts_as_ever(work: Path, manner: str) -> None:
    """The predecessor dies meanwhile, or is of a version that hands nothing over."""
    control, script = work / "vm.control", Path(__file__).with_name("played_backend.py")
    words = [sys.executable, str(script), str(control), manner, str(work / "a.img")]
    with Process("a played backend", words, work / "played.log") as played:
        await_true(control.exists, "it listens")
        with Served(work, image(work / "a.img"), "--take-over") as served, served.guest() as guest:
            assert played.wait(WAIT_S) == 0
            write_block(guest, 0, 1)
            served.stop()


def test_the_command_of_the_operator(work: Path) -> None:
    """The new process has the options of the former, and goes on in its log."""
    source, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(other)
        with Load(served) as load:
            load.go_on()
            for run in (1, 2):
                code, said = refused_start("upgrade", "--control", served.control)
                assert (code, said) == (0, "")
                assert handed_over(served) == run
                load.go_on()
            load.stop()
        assert served.process.wait(WAIT_S) == 0
        client = served.client()
        assert client.execute("query-mirror")["state"] == "steady"
        client.execute("quit")
        await_true(lambda: served.process.log.read_text().count('"ended"') == 3, "the last one ends")
    assert same_content(source, other)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fails", "why"),
    [
        ("raise OSError(11, 'no')", r"BlockingIOError: \[Errno 11\] no"),
        ("os.kill(0, 9)", "the attempt was killed"),
    ],
)
async def test_an_upgrade_that_cannot_begin_is_one_sentence(
    work: Path, monkeypatch: pytest.MonkeyPatch, fails: str, why: str
) -> None:
    monkeypatch.setattr(upgrade, "_START_AND_END", f"import os; {fails}")
    with Served(work, image(work / "a.img")) as served:
        given = argparse.Namespace(control=served.control, force=False, words=[], timeout=WAIT_S)
        with pytest.raises(HandOverError, match=f"No new backend could be started: {why}."):
            await upgrade.run(given)
        assert served.qmp.execute("query-status")["frontends"] == 0


def test_an_upgrade_that_is_refused_says_why(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served, served.guest() as guest:
        code, said = refused_start(
            "upgrade", "--control", served.control, "--", "--socket-path", work / "x", "--blk-file",
            work / "a.img", "--control", served.control,
        )  # fmt: skip
        assert code == 1 and "start it with the same --socket-path" in said
        write_block(guest, 0, 1)


def test_roots_meeting_place_is_given_away_and_nothing_else(work: Path) -> None:
    """The directory is the backend's, which could put a link there; what that leads to stays whose it is."""
    need_root()
    bound, precious = bind_unix_socket(work / "vm.control.successor"), image(work / "a.img")
    try:
        hand_over._give_away(bound, 12345)
        assert bound.path.stat().st_uid == 12345
        for lead in (os.symlink, os.link):
            bound.path.unlink()
            lead(precious, bound.path)
            with pytest.raises(HandOverError, match="in the place of"):
                hand_over._give_away(bound, 12345)
            assert precious.stat().st_uid == 0
    finally:
        bound.close()
