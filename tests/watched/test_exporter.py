# SPDX-License-Identifier: Apache-2.0
"""One page for all backends of the host: what is on it, and that one backend spoils it for nobody."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from tests.daemon.named_host import Host
from tests.daemon.rig import Served, await_true, image, need_root, refused_start, write_block
from tests.guest.assets import AssetError, cache_folder, fetch_prometheus
from tests.guest.backends import vhostsync_command
from tests.hanging_disk import Op, hanging_disk
from tests.unit.control_fakes import FakeBackend, running
from tests.watched.exporter import Exporter, up
from vhostsync.control.client import RATION_BYTES
from vhostsync.exporter.backends import Place, find_places
from vhostsync.exporter.exporter_config import ExporterConfig
from vhostsync.exporter.process import Exporter as Collector
from vhostsync.record.names import find_name

pytestmark = pytest.mark.timeout(180)

BACKENDS = 100


def test_all_backends_are_on_one_page(work: Path) -> None:
    """Also one that begins later; and one that has ended is no more."""
    with Exporter(work) as exporter:
        assert exporter.up() == {}
        with (
            Served(work, image(work / "a.img"), name="vm1") as one,
            Served(work, image(work / "b.img"), "--no-state-file", name="vm2") as two,
            one.guest() as guest,
        ):
            write_block(guest, 1, 1)
            one.start_mirror(work / "c.img", create=True)
            page = exporter.page()
            assert up(page) == {"vm1": 1, "vm2": 1}
            assert 'vhostsync_mirror_state{vm="vm1",state="steady"} 1\n' in page
            assert 'vhostsync_mirror_state{vm="vm2",state="passthrough"} 1\n' in page
            assert 'vhostsync_queue_operations_total{vm="vm1",queue="0",operation="write"} 1\n' in page
            paths = f'source="{work}/a.img",destination="{work}/c.img"'
            assert f'vhostsync_disk_info{{vm="vm1",{paths}}} 1\n' in page
            assert 'vhostsync_disk_replaced{vm="vm1",disk="destination"} 0\n' in page
            two.stop()
            assert exporter.up() == {"vm1": 1}
        assert exporter.process.terminate() == 0


def test_all_disks_of_the_host_are_there_by_their_names(work: Path) -> None:
    """One that runs, one that is stopped, one that was killed; as `vhostsync list` has them."""
    host = Host(work)
    for name in ("vm1", "vm2", "vm3"):
        host.tell("create", name, "--disk", image(work / f"{name}.img"))
    with (
        Exporter(work, env=host.environment) as exporter,
        host.serve("vm1"),
        host.serve("vm3") as killed,
    ):
        assert exporter.up() == {"vm1": 1, "vm3": 1}
        killed.kill()
        page = exporter.page()
    assert up(page) == {"vm1": 1, "vm3": 0}
    stopped = dict(re.findall(r'^vhostsync_stopped\{vm="(.*)"\} (\d)$', page, re.MULTILINE))
    assert stopped == {"vm1": "0", "vm2": "1", "vm3": "0"}


def test_a_disk_that_was_just_stopped_is_not_waited_for_beyond_the_deadline(work: Path) -> None:
    """It might be between two backends."""
    host = Host(work)
    host.tell("create", "vm1", "--disk", image(work / "a.img"))
    record = find_name("vm1", host.state).record
    record.touch()
    assert 'vhostsync_stopped{vm="vm1"} 1\n' in host.tell("exporter", "--once", "--deadline", "500ms")


@pytest.mark.parametrize("used", [False, True])
def test_a_second_record_of_the_name_hides_no_disk(work: Path, used: bool) -> None:
    """In a state directory below that of the host: left behind there, or that another backend uses."""
    host, below = Host(work), Host(work)
    below.environment["STATE_DIRECTORY"] = str(host.state / "other")
    host.tell("create", "vm1", "--disk", image(work / "a.img"))
    below.tell("create", "vm1", "--disk", image(work / "b.img"))
    with host.serve("vm1"), Exporter(work, env=host.environment) as exporter, ExitStack() as stack:
        if used:
            other = Served(work, work / "b.img", control=work / "else", state_directory=host.state / "other")
            stack.enter_context(other)
        page = exporter.page()
        assert up(page) == {"vm1": 1}
        assert f'vhostsync_disk_info{{vm="vm1",source="{work}/a.img"' in page


def test_a_directory_of_records_that_hangs_hides_no_backend_and_ends_none(work: Path) -> None:
    """Another user's, below that of the host."""
    need_root()
    host = Host(work)
    host.tell("create", "vm1", "--disk", image(work / "a.img"))
    with (
        hanging_disk(host.state / "below", 4096) as hung,
        host.serve("vm1"),
        Exporter(work, "--deadline", "2s", env=host.environment) as exporter,
    ):
        assert exporter.up() == {"vm1": 1}
        hung.killable = True
        hung.hang(Op.GETATTR)
        await_true(lambda: exporter.up() == {"vm1": 1} and hung.holds(Op.GETATTR), "the directory hangs")
        assert exporter.up() == {"vm1": 1}
        said = [each["message"] for each in exporter.lines]
        assert "the disks of this host cannot be told" in said
        assert exporter.process.terminate() == 0


def test_promtool_finds_no_fault(work: Path) -> None:
    try:
        promtool = fetch_prometheus(cache_folder(), "promtool")
    except AssetError as error:
        pytest.skip(f"NOT TESTED: promtool cannot be had here: {error}")
    with Exporter(work) as exporter, Served(work, image(work / "a.img"), name="vm1") as served:
        served.start_mirror(work / "c.img", create=True)
        page = exporter.page()
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    heads = re.findall(r"^# TYPE (\S+)", page, re.MULTILINE)
    assert len(heads) == len(set(heads))  # a family stands together


def test_a_backend_that_hangs_delays_one_page_and_no_more(work: Path) -> None:
    with (
        Served(work, image(work / "a.img"), name="vm1"),
        Served(work, image(work / "b.img"), name="vm2") as hanging,
        Exporter(work, "--deadline", "5s") as exporter,
    ):
        assert exporter.up() == {"vm1": 1, "vm2": 1}
        hanging.process.signal(signal.SIGSTOP)
        began = time.monotonic()
        assert exporter.up() == {"vm1": 1, "vm2": 0}
        assert time.monotonic() - began >= 4.9
        began = time.monotonic()
        assert exporter.up() == {"vm1": 1, "vm2": 0}
        assert time.monotonic() - began < 4.9  # it is not waited for again
        hanging.process.signal(signal.SIGCONT)
        await_true(lambda: exporter.up() == {"vm1": 1, "vm2": 1}, "the backend is up again")
        said = [each["message"] for each in exporter.lines if "vm" in each]
        assert said == ["backend is down", "backend is up again"]


def test_a_deadline_that_is_longer_than_a_scraper_may_take(work: Path) -> None:
    """All figures would be missing because of one backend that hangs."""
    with socket.socket(socket.AF_UNIX) as hanging, Exporter(work, "--deadline", "11s") as exporter:
        hanging.bind(str(work / "vm1.control"))
        hanging.listen()
        assert exporter.up() == {"vm1": 0}


def test_a_disk_that_was_replaced_is_told(work: Path) -> None:
    with Served(work, image(work / "a.img"), name="vm1"), Exporter(work) as exporter:
        (work / "a.img").rename(work / "moved.img")
        assert 'vhostsync_disk_replaced{vm="vm1",disk="source"} 1\n' in exporter.page()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_root_with_the_rights_that_the_unit_leaves_it_reaches_every_users_backend(work: Path) -> None:
    rights = ("setpriv", "--bounding-set=-all,+dac_override", "--inh-caps=-all", "--no-new-privs")
    work.chmod(0o755)
    folder = work / "nobodys"
    folder.mkdir()
    shutil.chown(folder, "nobody", "nogroup")
    disk = image(folder / "a.img")
    shutil.chown(disk, "nobody", "nogroup")
    with Served(folder, disk, "--user", "nobody", name="vm1"):
        assert (folder / "vm1.control").stat().st_mode & 0o777 == 0o600
        with Exporter(folder, before=rights, log=work / "exporter.log") as exporter:
            assert exporter.up() == {"vm1": 1}


def test_what_the_unit_shows_it_of_proc_tells_who_holds_a_record(work: Path) -> None:
    """By that a backend is found which listens elsewhere than in the place of its name."""
    need_root()
    unit = (Path(__file__).parents[2] / "share/systemd/vhostsync-exporter.service").read_text().splitlines()
    assert "ProtectProc=invisible" in unit
    shown = "hidepid=invisible,subset=pid" if "ProcSubset=pid" in unit else "hidepid=invisible"
    inside = f'mount -t proc -o {shown} proc /proc && exec setpriv --bounding-set=-all,+dac_override "$@"'
    host, disk = Host(work), image(work / "a.img")
    host.tell("create", "vm1", "--disk", disk)
    with Served(work, disk):
        page = subprocess.run(
            ["unshare", "--mount", "sh", "-c", inside, "sh", *vhostsync_command(), "exporter", "--once"],
            capture_output=True, text=True, check=True, timeout=60, env={**os.environ, **host.environment},
        ).stdout  # fmt: skip
    assert up(page) == {"vm1": 1}


def test_once_prints_the_page_and_ends(work: Path) -> None:
    words = [*vhostsync_command(), "exporter", "--once", "--sockets", str(work)]
    with Served(work, image(work / "a.img"), name="vm1"):
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert up(done.stdout) == {"vm1": 1}


def test_a_port_that_is_taken_is_one_sentence(work: Path) -> None:
    with Exporter(work) as exporter:
        host, _, port = str(exporter.address).rpartition(":")
        code, said = refused_start("exporter", "--listen", f"{host}:{port}")
    sentence = f"vhostsync: Cannot serve metrics on {host} port {port}: Address already in use.\n"
    assert (code, said) == (1, sentence)


# ---- without processes ----------------------------------------------------------


@asynccontextmanager
async def collector(folder: Path, deadline_s: float = 5.0) -> AsyncIterator[Collector]:
    config = ExporterConfig(directories=(folder,), deadline_s=deadline_s)
    async with anyio.create_task_group() as tasks:
        yield Collector(config, tasks)
        tasks.cancel_scope.cancel()


def test_names_are_those_of_the_sockets(tmp_path: Path) -> None:
    def listen(path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
        return path

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    (one / "no.control").write_text("a file")
    in_folder, plain = listen(one / "vm1" / "control"), listen(one / "vm2.sock.control")
    clash, other = listen(two / "vm1.control"), listen(two / "vm3.control")
    assert find_places([one, two, tmp_path / "missing"]) == [
        Place(str(in_folder), in_folder), Place(str(clash), clash), Place("vm2", plain), Place("vm3", other),
    ]  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize(
    "said",
    [
        {"disks": {"source": {"operations": {"read": {"operations": "1\nvhostsync_up 1"}}}}},
        {"disks": {"source": {"operations": {"read": {"operations": 1 << 70}}}}},
        {"queues": [{"index": "0} 1\n", "operations": {}}]},
        {
            "queues": [
                {"index": number, "running": True, "kicks": 1, "in-flight": 1, "operations": {}}
                for number in range(7000)
            ]
        },
        {"queues": 7},
        {"engine": []},
        [],
        None,
    ],
    ids=["no number", "a huge number", "no index", "too many", "no list", "no object", "a list", "null"],
)
async def test_a_backend_that_says_anything_spoils_its_own_figures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    good, bad = FakeBackend(), FakeBackend()

    async def query_stats() -> Any:
        return said

    monkeypatch.setattr(bad, "query_stats", query_stats)
    async with (
        running(tmp_path / "good.control", good), running(tmp_path / "bad.control", bad),
        collector(tmp_path) as collecting,
    ):  # fmt: skip
        page = await collecting.page()
    assert up(page) == {"bad": 0, "good": 1}
    about_it = {line.partition("{")[0] for line in page.splitlines() if 'vm="bad"' in line}
    assert about_it == {"vhostsync_up", "vhostsync_stopped"}
    assert 'vhostsync_capacity_bytes{vm="good"} 1073741824\n' in page


@pytest.mark.anyio
@pytest.mark.parametrize("sent", [b'{"event": "X"}\n' * 1000, b"x" * 10_000], ids=["events", "a line"])
async def test_a_backend_that_sends_on_and_on_keeps_no_page_waiting(tmp_path: Path, sent: bytes) -> None:
    """It is given up long before the deadline, and asked anew by the next scrape."""
    sent_bytes: list[int] = []

    def flood(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(b'{"QMP": {}}\n')
                sent_bytes.append(0)
                while True:
                    sent_bytes[-1] += connection.send(sent)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "bad.control"))
        listener.listen()
        flooding = threading.Thread(target=flood, args=(listener,))
        flooding.start()
        async with running(tmp_path / "good.control", FakeBackend()), collector(tmp_path, 59.0) as collecting:
            for _ in range(2):
                with anyio.fail_after(40):
                    assert up(await collecting.page()) == {"bad": 0, "good": 1}
        await anyio.to_thread.run_sync(flooding.join)
    # Beside what was read some may have been on the way.
    assert len(sent_bytes) == 2 and max(sent_bytes) < 2 * RATION_BYTES


@pytest.mark.anyio
async def test_names_of_a_backend_can_not_leave_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a name that it gives itself, nor a path, nor an operation."""
    backend = FakeBackend()
    backend.mirror._become(source='/a"} 1\nvhostsync_up{vm="x"} 1\n\udc00')
    status, stats = await backend.query_status(), await backend.query_stats()
    stats["queues"][0]["operations"]['x"} 1\n'] = stats["queues"][0]["operations"]["read"]

    async def query_status() -> dict[str, Any]:
        return {**status, "name": "somebody else"}

    async def query_stats() -> dict[str, Any]:
        return stats

    monkeypatch.setattr(backend, "query_status", query_status)
    monkeypatch.setattr(backend, "query_stats", query_stats)
    async with running(tmp_path / "vm1.control", backend), collector(tmp_path) as collecting:
        page = await collecting.page()
    assert up(page) == {"vm1": 1}
    assert "somebody else" not in page
    assert 'source="/a\\"} 1\\nvhostsync_up{vm=\\"x\\"} 1\\n?"' in page
    assert all(line.startswith(("#", "vhostsync_")) for line in page.splitlines())
    assert 'operation="x' not in page


@pytest.mark.anyio
async def test_two_that_scrape_at_once_see_the_same(tmp_path: Path) -> None:
    async with running(tmp_path / "vm1.control", FakeBackend()), collector(tmp_path) as collecting:
        pages: list[str] = []

        async def scrape() -> None:
            pages.append(await collecting.page())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(scrape)
            tasks.start_soon(scrape)
    assert [up(page) for page in pages] == [{"vm1": 1}, {"vm1": 1}]


@pytest.mark.anyio
async def test_many_backends_are_asked_at_once(tmp_path: Path) -> None:
    """None of them is asked after another: each waits for all to be asked before it answers."""
    asked = 0
    all_asked = anyio.Event()

    class Waiting(FakeBackend):
        async def query_status(self) -> dict[str, Any]:
            nonlocal asked
            asked += 1
            if asked == BACKENDS:
                all_asked.set()
            await all_asked.wait()
            return await super().query_status()

    async with AsyncExitStack() as stack:
        for number in range(BACKENDS):
            await stack.enter_async_context(running(tmp_path / f"vm{number}.control", Waiting()))
        collecting = await stack.enter_async_context(collector(tmp_path, deadline_s=40.0))
        page = await collecting.page()
    assert list(up(page).values()) == [1] * BACKENDS
