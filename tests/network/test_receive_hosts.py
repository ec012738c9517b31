# SPDX-License-Identifier: Apache-2.0
"""Another host and the cable to it: that is cut while the guest writes, and comes back; the first host is
lost."""

from __future__ import annotations

import importlib.util
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, await_true, flush, image, lacking, same_content, write_block
from tests.network.links import OtherHost
from tests.network.receivers import Authority, Receiving, needs_programs

pytestmark = [
    *needs_programs,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        importlib.util.find_spec("vhostsync._nbd") is None, reason="built without libnbd (package libnbd-dev)"
    ),
]

PORT = 7070
MIBS = 16
BLOCKS = 256


@pytest.fixture
def other() -> Iterator[OtherHost]:
    with OtherHost() as other:
        yield other


@pytest.fixture
def certificates(other: OtherHost, tmp_path: Path) -> Path:
    return Authority(tmp_path / "ca").issue(tmp_path / "both", "server", "client", names=(other.address,))


def receiving_there(tmp_path: Path, other: OtherHost, certificates: Path, *options: str) -> Receiving:
    (tmp_path / "other").mkdir(exist_ok=True)
    return Receiving(
        tmp_path / "other", tmp_path / "other" / "b.img", certificates, "--create", *options,
        host=other.address, port=PORT, before=other.inside(),
    )  # fmt: skip


def serving_here(tmp_path: Path, *options: str | Path) -> Served:
    (tmp_path / "one").mkdir(exist_ok=True)
    disk = tmp_path / "one" / "a.img"
    words = ("--destination-retry", "200ms", "--destination-timeout", "1s", *options)
    return Served(tmp_path / "one", image(disk, MIBS), *words)


def name_of(other: OtherHost, certificates: Path) -> str:
    return f"receive://{other.address}:{PORT}?tls-certificates={certificates}"


@pytest.mark.parametrize("how", ["drop", "reject with tcp reset"], ids=["silence", "reset"])
def test_a_cut_cable_costs_the_guest_nothing_and_what_differs_is_copied_when_it_is_back(
    tmp_path: Path, other: OtherHost, certificates: Path, how: str
) -> None:
    with (
        receiving_there(tmp_path, other, certificates) as receiving,
        serving_here(tmp_path) as served,
    ):
        served.start_mirror(name_of(other, certificates), create=True)
        with Load(served, blocks=BLOCKS) as load:
            for generation in (1, 2):
                load.go_on()
                assert receiving.status()["generation"] == generation
                other.cut(how)
                served.await_state("degraded")
                load.go_on()
                other.mend()
                await_true(lambda: served.state == "steady", "it is attached again", 120)
                assert served.mirror()["full-copy-reason"] is None
                served.await_worth("up-to-date")
            expected = load.stop()
        assert lacking(tmp_path / "other" / "b.img", expected) == []
        served.stop()
        receiving.await_status("its owner has gone", attached=False)
        receiving.stop()
    assert same_content(tmp_path / "one" / "a.img", tmp_path / "other" / "b.img")


def test_the_first_host_is_lost_and_the_other_one_has_all_that_was_flushed(
    tmp_path: Path, other: OtherHost, certificates: Path
) -> None:
    copy = tmp_path / "other" / "b.img"
    with receiving_there(tmp_path, other, certificates) as receiving:
        with serving_here(tmp_path) as served:
            served.start_mirror(name_of(other, certificates), create=True)
            with served.guest() as guest:
                for number in range(BLOCKS):
                    write_block(guest, number, number + 1)
                flush(guest)
                other.cut()
                served.kill()
        status = receiving.status()
        assert status["attached"]  # it does not know yet
        receiving.stop()
        assert lacking(copy, {number: number + 1 for number in range(BLOCKS)}) == []
    folder = tmp_path / "other"
    with Served(folder, copy) as served, served.guest() as guest:
        write_block(guest, 0, 99)
        flush(guest)
    assert lacking(copy, {0: 99}) == []
    # The first host comes back, and its mirror with it: the disk has gone on without it.
    other.mend()
    content = copy.read_bytes()
    with (
        receiving_there(tmp_path, other, certificates) as receiving,
        Served(tmp_path / "one", tmp_path / "one" / "a.img", "--destination-retry", "1s") as served,
    ):
        await_true(
            lambda: "somebody else has changed" in str(served.mirror()["last-error"]), "it is refused", 60
        )
        assert copy.read_bytes() == content
        served.stop()


def test_a_host_that_vanished_is_noticed_and_lets_go(
    tmp_path: Path, other: OtherHost, certificates: Path
) -> None:
    with (
        receiving_there(tmp_path, other, certificates) as receiving,
        serving_here(tmp_path) as served,
    ):
        served.start_mirror(name_of(other, certificates), create=True)
        other.cut()
        served.process.signal(signal.SIGSTOP)
        began = time.monotonic()
        receiving.await_status("its server has ended", attached=False)
        assert time.monotonic() - began < 60
        served.process.signal(signal.SIGCONT)
        other.mend()
        receiving.stop()


def test_a_backend_bound_to_its_ports_reaches_it(
    tmp_path: Path, other: OtherHost, certificates: Path
) -> None:
    library = importlib.util.find_spec("vhostsync._nbd")
    assert library is not None and library.origin is not None
    places = (certificates, Path(library.origin).parent)  # it lies where it is built, not with the system's
    bound = ["--sandbox", "require", "--allow-port", str(PORT)]
    bound += [word for place in places for word in ("--allow-path", str(place))]
    with receiving_there(tmp_path, other, certificates, "--sandbox", "require") as receiving:
        with serving_here(tmp_path, *bound) as served:
            with pytest.raises(Exception, match=f"TCP port {PORT + 1}, which this backend may not use"):
                served.qmp.execute("mirror-start", destination=name_of(other, certificates), create=True)
            served.stop()
        with serving_here(tmp_path, *bound, "--allow-port", str(PORT + 1)) as served:
            served.start_mirror(name_of(other, certificates), create=True)
            with served.guest() as guest:
                write_block(guest, 3, 3)
                flush(guest)
            assert lacking(tmp_path / "other" / "b.img", {3: 3}) == []
            served.stop()
        receiving.stop()
