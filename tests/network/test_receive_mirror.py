# SPDX-License-Identifier: Apache-2.0
"""A disk of another host as the mirror of a guest's: `serve` and `receive` as processes, and a guest."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import le
from pathlib import Path
from typing import Any

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
from tests.network.receivers import Authority, Owner, Receiving, children, needs_programs
from tests.network.servers import descriptors
from tests.sizes import MIB
from vhostsync.record.state_file import StateFile

pytestmark = [
    *needs_programs,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        importlib.util.find_spec("vhostsync._nbd") is None, reason="built without libnbd (package libnbd-dev)"
    ),
]

MIBS = 16
BLOCKS = 256
RETRY = ("--destination-retry", "200ms")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "ca")


@pytest.fixture(scope="module")
def certificates(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority.issue(tmp_path_factory.mktemp("both"), "server", "client")


class Hosts:
    """The guest's host and the other one, each in a folder of its own."""

    def __init__(self, folder: Path, certificates: Path) -> None:
        self.one, self.other, self.certificates = folder / "one", folder / "other", certificates
        self.one.mkdir()
        self.other.mkdir()
        self.disk = image(self.one / "a.img", MIBS)
        self.copy = self.other / "b.img"

    def receiving(self, *options: str, port: int = 0) -> Receiving:
        return Receiving(self.other, self.copy, self.certificates, "--create", *options, port=port)

    def name(self, receiving: Receiving, certificates: Path | None = None) -> str:
        where = certificates or self.certificates
        return f"receive://{receiving.host}:{receiving.port}?tls-certificates={where}"

    def serving(self, *options: str) -> Served:
        return Served(self.one, self.disk, *RETRY, *options)


@pytest.fixture
def hosts(tmp_path: Path, certificates: Path) -> Hosts:
    return Hosts(tmp_path, certificates)


@contextmanager
def mirrored(hosts: Hosts, *options: str) -> Iterator[tuple[Receiving, Served]]:
    """Steady."""
    with hosts.receiving() as receiving, hosts.serving(*options) as served:
        served.start_mirror(hosts.name(receiving), create=True)
        yield receiving, served


def refusal(served: Served, command: str, **arguments: Any) -> str:
    with pytest.raises(Exception) as refused:
        served.qmp.execute(command, **arguments)
    return str(refused.value)


def await_resumed(served: Served) -> None:
    """Every start of a server takes its time, and every try that fails makes the next pause longer."""
    await_true(lambda: served.state == "steady", "the mirror is resumed", 120)
    served.await_worth("up-to-date")


def await_lost(served: Served) -> None:
    """The next request finds that the connection is lost."""
    with served.guest() as guest:
        write_block(guest, 0, 0)
        flush(guest)
    served.await_state("degraded")


def token_of(served: Served) -> str:
    record = served.record()
    assert record is not None and record.peer is not None and record.peer.mark is not None
    return record.peer.mark


def test_what_the_guest_flushes_is_durable_there(hosts: Hosts) -> None:
    with mirrored(hosts) as (receiving, served):
        status = receiving.status()
        assert status["owned"] and status["attached"] and status["generation"] == 1
        assert token_of(served) in (hosts.other / "b.img.receive").read_text()
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            expected = load.stop()
        server = status["server"]
        os.kill(server, signal.SIGKILL)  # whatever it had not made durable is not there
        assert lacking(hosts.copy, expected) == []
        await_lost(served)
        await_resumed(served)
        served.qmp.execute("verify")
        assert served.qmp.wait_event("VERIFY_COMPLETED", 60)["state"] == "equal"
        served.stop()
        receiving.await_status("its owner has gone", attached=False)
        receiving.stop()
    assert same_content(hosts.disk, hosts.copy)


def test_both_sides_are_killed_and_go_on_with_what_differs(hosts: Hosts) -> None:
    bitmap = ("--bitmap", str(hosts.one / "bitmap"))
    with mirrored(hosts, *bitmap) as (receiving, served):
        with served.guest() as guest:
            write_block(guest, 1, 1)
            flush(guest)
        served.kill()
        with hosts.serving(*bitmap) as served:
            await_resumed(served)
            assert served.mirror()["full-copy-reason"] is None
            with served.guest() as guest:
                write_block(guest, 2, 2)
                flush(guest)
                receiving.process.kill()
                write_block(guest, 3, 3)
                flush(guest)
                served.await_state("degraded")
                with hosts.receiving(port=receiving.port) as receiving:
                    await_resumed(served)
                    assert served.mirror()["full-copy-reason"] is None
                    write_block(guest, 4, 4)
                    flush(guest)
                    assert lacking(hosts.copy, {1: 1, 2: 2, 3: 3, 4: 4}) == []
                    assert receiving.status()["generation"] >= 3
            served.stop()
    assert same_content(hosts.disk, hosts.copy)


def test_a_stopped_backend_that_was_followed_writes_nothing_any_more(hosts: Hosts) -> None:
    with mirrored(hosts) as (receiving, served):
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.process.signal(signal.SIGSTOP)
            successor = Owner("the successor", token=token_of(served), disk=receiving.status()["disk"])
            receiving.begin(successor)
            content = hosts.copy.read_bytes()
            served.process.signal(signal.SIGCONT)
            served.await_state("degraded", 60)
            load.go_on()  # the guest has its own disk
            error = ""
            while "has gone on without this backend" not in error:
                retried = served.qmp.wait_event("DESTINATION_RETRY", 60)
                error = retried["error"] or ""
            load.stop()
        assert hosts.copy.read_bytes() == content
        assert receiving.status()["generation"] == 2
        served.stop()


def test_a_disk_that_took_the_place_is_left_alone(hosts: Hosts) -> None:
    with mirrored(hosts) as (receiving, served):
        receiving.stop()
        await_lost(served)
        other = image(hosts.other / "other.img", MIBS, filled_mib=1)
        content = other.read_bytes()
        other.rename(hosts.copy)
        with hosts.receiving(port=receiving.port) as receiving:
            while "another disk has taken the place" not in str(served.mirror()["last-error"]):
                served.qmp.wait_event("DESTINATION_RETRY", 60)
            assert served.state == "degraded" and hosts.copy.read_bytes() == content
            receiving.stop()
        served.stop()


def test_another_backend_does_not_get_it(hosts: Hosts, tmp_path: Path) -> None:
    with mirrored(hosts) as (receiving, served):
        folder = tmp_path / "third"
        folder.mkdir()
        with Served(folder, image(folder / "c.img", MIBS), *RETRY) as stranger:
            said = refusal(stranger, "mirror-start", destination=hosts.name(receiving), force=True)
            assert "belongs to another owner" in said and "rededicate" in said
            stranger.stop()
        with served.guest() as guest:
            write_block(guest, 1, 7)
            flush(guest)
        assert served.state == "steady" and lacking(hosts.copy, {1: 7}) == []
        served.stop()


def test_what_is_refused_leaves_no_owner(hosts: Hosts, authority: Authority, tmp_path: Path) -> None:
    small = image(hosts.copy, 1, filled_mib=0)
    with hosts.receiving() as receiving, hosts.serving() as served:
        assert "is too small" in refusal(served, "mirror-start", destination=hosts.name(receiving))
        receiving.await_status("nobody has it", owned=False, attached=False)
        said = refusal(served, "mirror-start", destination=hosts.name(receiving), create=True)
        assert "exists already and is not overwritten" in said
        bare = authority.issue(tmp_path / "bare")
        said = refusal(served, "mirror-start", destination=hosts.name(receiving, bare))
        assert "client-cert.pem: No such file" in said
        expired = authority.issue(tmp_path / "expired", "client", expired=True)
        said = refusal(served, "mirror-start", destination=hosts.name(receiving, expired))
        assert "the certificate of this one has expired" in said, said
        stranger = Authority(tmp_path / "another").issue(tmp_path / "stranger", "client")
        said = refusal(served, "mirror-start", destination=hosts.name(receiving, stranger))
        assert "the certificate of the other side is refused" in said, said
        wrong_name = hosts.name(receiving).replace("127.0.0.1", "localhost")
        assert "not valid for 'localhost'" in refusal(served, "mirror-start", destination=wrong_name)
        assert "names no receiver" in refusal(served, "mirror-start", destination="receive://nowhere")
        receiving.stop()
        said = refusal(served, "mirror-start", destination=hosts.name(receiving))
        assert "cannot be asked: Connection refused" in said
        served.stop()
    assert small.stat().st_size == MIB


def test_it_is_switched_to_and_served_after_a_restart(hosts: Hosts) -> None:
    with mirrored(hosts) as (receiving, served):
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.qmp.execute("switch", keep_mirror=True)
            load.go_on()
            expected = load.stop()
        assert lacking(hosts.copy, expected) == [] and lacking(hosts.disk, expected) == []
        name = hosts.name(receiving)
        served.stop()
        with Served(hosts.one, name, *RETRY) as served:
            await_resumed(served)
            with served.guest() as guest:
                write_block(guest, 5, 99)
                flush(guest)
            assert lacking(hosts.copy, {5: 99}) == [] and lacking(hosts.disk, {5: 99}) == []
            served.stop()
        record = StateFile(next((hosts.one / "state").glob("*.record.json"))).load()
        assert record is not None and record.current.kind == "receive"
        receiving.stop()


def test_a_guest_on_it_waits_for_it_and_loses_nothing(hosts: Hosts) -> None:
    """Its server is killed, then the whole receiver: a generation is begun anew, which is the fence."""
    with mirrored(hosts) as (receiving, served):
        served.qmp.execute("switch")
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            generation = receiving.status()["generation"]
            os.kill(receiving.status()["server"], signal.SIGKILL)
            load.go_on(timeout_s=60)
            assert receiving.status()["generation"] > generation
            receiving.process.kill()
            with hosts.receiving(port=receiving.port) as receiving:
                load.go_on(timeout_s=60)
                expected = load.stop()
                served.stop()
                receiving.stop()
    assert lacking(hosts.copy, expected) == []


def test_a_guest_on_it_gets_errors_once_another_has_gone_on_with_it(hosts: Hosts) -> None:
    """Whoever has begun a later generation may have written: what this one has not answered is not sent again
    there."""
    with mirrored(hosts) as (receiving, served):
        served.qmp.execute("switch")
        record = served.record()
        assert record is not None and record.current.mark is not None
        with served.guest(timeout_s=60) as guest:
            write_block(guest, 1, 1)
            flush(guest)
            disk = receiving.status()["disk"]
            receiving.begin(Owner("the successor", token=record.current.mark, disk=disk))
            content = hosts.copy.read_bytes()
            assert not answered(guest, guest.write(4096, bytes(4096)))
        await_true(  # a thread of its own writes the log
            lambda: "has gone on without this backend" in served.process.last_output(), "it is said why"
        )
        assert hosts.copy.read_bytes() == content
        served.qmp.execute("quit", force=True)


def test_it_grows_with_the_guests_disk(hosts: Hosts) -> None:
    with mirrored(hosts) as (receiving, served):
        os.truncate(hosts.disk, (MIBS + 4) * MIB)
        assert "enlarge it first" in refusal(served, "resize")
        receiving.ask(
            "grow", bytes=(MIBS + 4) * MIB, disk=receiving.status()["disk"], token=token_of(served)
        )
        await_lost(served)  # the generation has ended
        await_resumed(served)
        assert served.qmp.execute("resize") == {"capacity": (MIBS + 4) * MIB}
        with served.guest() as guest:
            last = (MIBS + 4) * MIB // 4096 - 1
            write_block(guest, last, 1)
            flush(guest)
        assert lacking(hosts.copy, {last: 1}) == []
        served.stop()
        receiving.stop()


@pytest.mark.timeout(480)  # six generations, each at the end of growing pauses
def test_nothing_piles_up_over_generations(hosts: Hosts) -> None:
    with mirrored(hosts) as (receiving, served):

        def cycle() -> None:
            os.kill(receiving.status()["server"], signal.SIGKILL)
            await_lost(served)
            await_resumed(served)

        def held() -> tuple[int, int]:
            return descriptors(served.process.pid), descriptors(receiving.process.pid)

        def no_more_than(least: tuple[int, int]) -> bool:
            return all(map(le, held(), least))

        cycle()
        cycle()
        # A connection that was closed here may not be over there yet: the least that was seen is what they
        # hold at rest.
        least = held()
        for _ in range(4):
            cycle()
            await_true(partial(no_more_than, least), f"no more is held than was: {least}")
            least = min(held()[0], least[0]), min(held()[1], least[1])
        assert len(children(receiving.process.pid)) == 1
        served.stop()
        receiving.stop()
