# SPDX-License-Identifier: Apache-2.0
"""A receiver and its owners: who is let in, who is out for ever, and what lands on the disk."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.daemon.rig import await_true, image, refused_start
from tests.guest.backends import vhostsync_command
from tests.network.receivers import Authority, Data, Owner, Receiving, RefusedError, children, needs_programs
from tests.sizes import MIB

pytestmark = [*needs_programs, pytest.mark.timeout(240)]  # each start of a process takes its time

SIZE = 8 * MIB


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    return Authority(folder / "ca").issue(folder / "both", "server", "client")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "d.img", SIZE // MIB, filled_mib=0)


def test_what_an_owner_flushes_is_on_the_disk_and_its_leaving_ends_the_generation(
    tmp_path: Path, disk: Path, certificates: Path
) -> None:
    with Receiving(tmp_path, disk, certificates, "--sandbox", "require") as receiving:
        owner = Owner("a")
        begun = receiving.begin(owner)
        assert begun["bytes"] == SIZE and len(begun["key"]) == 64
        with Data(tmp_path, begun) as data:
            data.write(MIB, 64 * 1024, 0x41)
            status = receiving.status()
            assert status["attached"] and status["owned"] and status["owner"] == "the client at 127.0.0.1"
            assert children(receiving.process.pid) == [status["server"]]
            assert disk.read_bytes()[MIB : MIB + 64 * 1024] == b"A" * 64 * 1024
            data.leave()
        receiving.await_status("its server has ended", attached=False)
        assert children(receiving.process.pid) == []
        code, said = refused_start("serve", "--blk-file", disk, "--socket-path", tmp_path / "s")
        assert code == 1 and "is in use (QEMU's image lock)" in said
        receiving.stop()
    assert disk.read_bytes().count(b"A") == 64 * 1024


def test_an_old_key_opens_nothing(tmp_path: Path, disk: Path, certificates: Path) -> None:
    with Receiving(tmp_path, disk, certificates) as receiving:
        owner = Owner("a")
        first = receiving.begin(owner)
        with Data(tmp_path, first) as old:
            old.write(0, 4096, 0x41)
            second = receiving.begin(owner)
            assert second["key"] != first["key"] and second["generation"] == first["generation"] + 1
            said = old.leave()  # it was cut off
        with Data(tmp_path, first) as late:
            said = late.leave()
            assert "TLS" in said or "handshake" in said or "Failed" in said, said
        with Data(tmp_path, second) as new:
            new.write(4096, 4096, 0x42)
    assert disk.read_bytes()[:8192] == b"A" * 4096 + b"B" * 4096


def test_a_stopped_owner_that_goes_on_does_not_land_one_byte(
    tmp_path: Path, disk: Path, certificates: Path
) -> None:
    with Receiving(tmp_path, disk, certificates) as receiving:
        owner = Owner("a")
        with Data(tmp_path, receiving.begin(owner)) as stale:
            stale.write(0, MIB, 0x41)
            for number in range(200):  # on their way when it is stopped, and when it goes on
                stale.send(f"aio_write -q -P 65 {number % 8}M 1M")
            os.kill(stale.pid, signal.SIGSTOP)
            successor = owner.successor("b")
            with Data(tmp_path, receiving.begin(successor)) as new:
                new.write(0, SIZE, 0x42)
                os.kill(stale.pid, signal.SIGCONT)
                stale.send("write -P 65 0 8M")
                stale.leave()
                with pytest.raises(RefusedError, match=r"has gone on without this backend: .* generation 2"):
                    receiving.begin(owner)
                assert disk.read_bytes() == b"B" * SIZE
                new.write(0, 4096, 0x43)
        receiving.stop()
    assert disk.read_bytes() == b"C" * 4096 + b"B" * (SIZE - 4096)


def test_requests_that_a_stopped_server_had_read_are_over_before_the_next_begins(
    tmp_path: Path, disk: Path, certificates: Path
) -> None:
    with Receiving(tmp_path, disk, certificates) as receiving:
        owner = Owner("a")
        with Data(tmp_path, receiving.begin(owner)) as old:
            old.write(0, 4096, 0x41)
            server = receiving.status()["server"]
            os.kill(server, signal.SIGSTOP)
            for number in range(50):
                old.send(f"aio_write -q -P 65 {number % 8}M 1M")
            begun = receiving.begin(owner)
            assert not Path(f"/proc/{server}").exists()
            with Data(tmp_path, begun) as new:
                new.write(0, SIZE, 0x42)
        assert disk.read_bytes() == b"B" * SIZE


def test_nobody_else_is_let_in(tmp_path: Path, disk: Path, certificates: Path) -> None:
    with Receiving(tmp_path, disk, certificates) as receiving:
        owner = Owner("a")
        with Data(tmp_path, receiving.begin(owner)) as data:
            for stranger, why in (
                (Owner("b"), "belongs to another owner"),
                (Owner("b", token="another"), "the token that was shown is not its"),
                (Owner("a", token=owner.token, disk="another"), "another one has taken its place"),
            ):
                with pytest.raises(RefusedError, match=why):
                    receiving.begin(stranger)
            with pytest.raises(RefusedError, match="belongs to another owner"):
                receiving.ask("own", disk=owner.disk, generation=owner.generation, token="b")
            receiving.ask("end", disk=owner.disk, generation=owner.generation, token="b")
            data.write(0, 4096, 0x41)  # nothing was ended
        assert receiving.status()["refused"] == 4
        receiving.stop()


def test_only_one_of_two_that_attach_a_free_disk_at_once_has_it(
    tmp_path: Path, disk: Path, certificates: Path
) -> None:
    with Receiving(tmp_path, disk, certificates) as receiving:
        begun, refused = [], []

        def attach(instance: str) -> None:
            try:
                begun.append((instance, receiving.ask("begin", instance=instance)))
            except RefusedError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=attach, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(begun) == 1 and all("is being attached by" in said for said in refused), (begun, refused)
        assert len(children(receiving.process.pid)) == 1
        # Those of one process follow each other: only the last one's key is worth anything.
        keys = [receiving.ask("begin", instance=begun[0][0]) for _ in range(2)]
        with Data(tmp_path, keys[-1]) as data:
            data.write(0, 4096, 0x41)
        receiving.stop()


def test_it_goes_on_after_a_kill(tmp_path: Path, disk: Path, certificates: Path) -> None:
    owner = Owner("a")
    with Receiving(tmp_path, disk, certificates) as receiving, Data(tmp_path, receiving.begin(owner)) as data:
        data.write(0, 4096, 0x41)
        server = receiving.status()["server"]
        receiving.process.kill()
        await_true(lambda: not Path(f"/proc/{server}").exists(), "the server dies with its parent")
    with Receiving(tmp_path, disk, certificates, port=receiving.port) as receiving:
        with pytest.raises(RefusedError, match="belongs to another owner"):
            receiving.begin(Owner("b"))
        begun = receiving.begin(owner)
        assert begun["generation"] == 2
        with Data(tmp_path, begun) as data:
            data.write(4096, 4096, 0x42)
            os.kill(receiving.status()["server"], signal.SIGKILL)
            receiving.await_status("the server's death is seen", attached=False, lost_servers=1, why_not=None)
        with Data(tmp_path, receiving.begin(owner)) as data:
            data.write(8192, 4096, 0x43)
        receiving.stop()
    assert disk.read_bytes()[: 3 * 4096] == b"A" * 4096 + b"B" * 4096 + b"C" * 4096


def test_killed_at_any_moment_of_a_beginning_it_knows_its_owner(
    tmp_path: Path, disk: Path, certificates: Path
) -> None:
    owner, chance = Owner("a"), random.Random(1)
    with Receiving(tmp_path, disk, certificates) as receiving:
        receiving.begin(owner)
        receiving.stop()
    for _ in range(3):
        with Receiving(tmp_path, disk, certificates) as receiving:
            timer = threading.Timer(chance.uniform(0, 0.4), receiving.process.kill)
            timer.start()
            try:
                while True:
                    receiving.begin(owner)
            except (OSError, ValueError):
                pass  # it was killed
            timer.join()
    with Receiving(tmp_path, disk, certificates) as receiving:
        with pytest.raises(RefusedError, match="belongs to another owner"):
            receiving.begin(Owner("b"))
        with Data(tmp_path, receiving.begin(owner)) as data:
            data.write(0, 4096, 0x41)
        receiving.stop()


def test_a_disk_that_took_the_place_or_was_changed_is_not_written_to(
    tmp_path: Path, disk: Path, certificates: Path
) -> None:
    owner = Owner("a")
    with Receiving(tmp_path, disk, certificates) as receiving:
        with Data(tmp_path, receiving.begin(owner)) as data:
            data.write(0, 4096, 0x41)
            data.leave()
        receiving.await_status("it has left", attached=False)
        other = image(tmp_path / "other.img", SIZE // MIB)
        content = other.read_bytes()
        other.rename(disk)
        with pytest.raises(RefusedError, match=r"another disk has taken the place .* rededicate"):
            receiving.begin(owner)
        receiving.stop()
    assert disk.read_bytes() == content
    with Receiving(tmp_path, disk, certificates) as receiving:
        assert "another disk has taken the place" in receiving.status()["why-not"]
        command("--control", receiving.control, "rededicate")
        with pytest.raises(RefusedError, match="was given to a new owner"):
            receiving.begin(owner)
        new = Owner("b")
        with Data(tmp_path, receiving.begin(new)) as data:
            data.write(0, 4096, 0x42)
        receiving.stop()
    with disk.open("r+b") as file:
        file.write(b"somebody else's")
    with Receiving(tmp_path, disk, certificates) as receiving:
        with pytest.raises(RefusedError, match=r"somebody else has changed .*changed since \(ctime\)\)"):
            receiving.begin(new)
        receiving.stop()
    assert disk.read_bytes().startswith(b"somebody else's")


def test_an_image_is_made_for_an_owner_and_taken_back(tmp_path: Path, certificates: Path) -> None:
    disk = tmp_path / "new.img"
    with Receiving(tmp_path, disk, certificates, "--create") as receiving:
        with pytest.raises(RefusedError, match="have it made"):
            receiving.begin(Owner("a"))
        made = receiving.ask("create", bytes=SIZE)["disk"]
        assert disk.stat().st_size == SIZE
        with pytest.raises(RefusedError, match="exists already and is not overwritten"):
            receiving.ask("create", bytes=SIZE)
        receiving.ask("remove", disk="another")
        assert disk.exists()
        receiving.ask("remove", disk=made)
        assert not disk.exists()
        owner = Owner("a")
        owner.disk = receiving.ask("create", bytes=SIZE)["disk"]
        receiving.begin(owner)
        receiving.ask("remove", disk=owner.disk)
        assert disk.exists()  # it has an owner
        receiving.stop()
    with Receiving(tmp_path, disk, certificates) as receiving:
        with pytest.raises(RefusedError, match="has no --create"):
            receiving.ask("create", bytes=SIZE)
        receiving.begin(owner)
        receiving.stop()


def is_locked(disk: Path) -> bool:
    opened = subprocess.run(["qemu-io", "-f", "raw", "-c", "quit", disk], check=False, capture_output=True)
    return opened.returncode != 0


def test_an_image_that_was_there_before_is_neither_removed_nor_let_go(
    tmp_path: Path, disk: Path, certificates: Path
) -> None:
    """Also where images may be made, and nobody owns it yet."""
    with Receiving(tmp_path, disk, certificates, "--create") as receiving:
        receiving.ask("remove", disk=receiving.ask("query")["disk"])
        assert disk.exists()
        with pytest.raises(RefusedError, match="exists already and is not overwritten"):
            receiving.ask("create", bytes=SIZE)
        assert is_locked(disk)
        receiving.stop()
    assert not is_locked(disk)


def test_it_grows_and_the_next_generation_has_it_all(tmp_path: Path, disk: Path, certificates: Path) -> None:
    with Receiving(tmp_path, disk, certificates) as receiving:
        owner = Owner("a")
        with Data(tmp_path, receiving.begin(owner)) as data:
            data.write(0, 4096, 0x41)
            said = command("--control", receiving.control, "resize", "--size", "12M")
            assert "12.0 MiB" in said
            data.leave()  # it was ended
        begun = receiving.begin(owner)
        assert begun["bytes"] == 12 * MIB
        with pytest.raises(RefusedError, match="belongs to another owner"):
            receiving.ask("grow", bytes=13 * MIB, disk=owner.disk, token="b")
        receiving.ask("grow", bytes=13 * MIB, disk=owner.disk, token=owner.token)
        with pytest.raises(RefusedError, match="cannot shrink"):
            receiving.ask("grow", bytes=MIB, disk=owner.disk, token=owner.token)
        with Data(tmp_path, receiving.begin(owner)) as data:
            data.write(12 * MIB, MIB, 0x42)
        receiving.stop()
    assert disk.read_bytes() == b"A" * 4096 + bytes(12 * MIB - 4096) + b"B" * MIB


def test_the_operator_sees_it_and_ends_it(tmp_path: Path, disk: Path, certificates: Path) -> None:
    page = tmp_path / "metrics"
    with Receiving(tmp_path, disk, certificates, "--metrics", page) as receiving:
        assert "nobody yet" in command("--control", receiving.control, "status")
        with Data(tmp_path, receiving.begin(Owner("a"))) as data:
            data.write(0, 4096, 0x41)
            said = command("--control", receiving.control, "status")
            assert "the client at 127.0.0.1, since" in said and "1, attached, server" in said, said
            found = scrape(page)
            assert "vhostsync_receive_attached 1\n" in found and "vhostsync_receive_generation 1\n" in found
            command("--control", receiving.control, "quit")
            assert receiving.process.wait(1) == 0
            data.leave()
    assert not list(tmp_path.glob("*.key/*")), "a key is left behind"


def test_nothing_piles_up(tmp_path: Path, disk: Path, certificates: Path) -> None:
    with Receiving(tmp_path, disk, certificates) as receiving:
        owner = Owner("a")

        def cycle() -> None:
            with Data(tmp_path, receiving.begin(owner)) as data:
                data.write(0, 4096, 0x41)
            with pytest.raises(RefusedError):
                receiving.begin(Owner("b"))
            receiving.ask("end", disk=owner.disk, generation=owner.generation, token=owner.token)

        def held() -> Counter[str]:
            receiving.await_status("it has ended", attached=False)
            names = ["child"] * len(children(receiving.process.pid))
            for fd in Path(f"/proc/{receiving.process.pid}/fd").iterdir():
                with suppress(FileNotFoundError):  # closed by now: the connection that has asked, above
                    names.append(str(fd.readlink()).split(":[")[0])
            return Counter(names)

        def no_more_than(least: Counter[str]) -> bool:
            return held() <= least

        cycle()
        # A connection that was closed here may not be over there yet: the least that was seen is what it
        # holds at rest.
        least = held()
        for _ in range(4):
            cycle()
            await_true(partial(no_more_than, least), f"no more is held than was: {least}")
            least &= held()
        receiving.stop()


def scrape(place: Path) -> str:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(place))
        asking.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return asking.makefile().read()


def command(*words: str | Path) -> str:
    """What a `vhostsync` command says; it must succeed."""
    done = subprocess.run(
        [*vhostsync_command(), *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


