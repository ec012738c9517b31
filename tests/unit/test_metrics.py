# SPDX-License-Identifier: Apache-2.0
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import STDOUT
from typing import Any

import anyio
import pytest

from tests.guest.assets import AssetError, cache_folder, fetch_prometheus
from tests.unit.control_fakes import FakeBackend
from vhostsync import metrics
from vhostsync.control import scrape
from vhostsync.control.command import dashed
from vhostsync.errors import ConfigError
from vhostsync.metrics_page import Family, Page
from vhostsync.option_values import TcpAddress

pytestmark = pytest.mark.anyio

SAMPLE = re.compile(r'(vhostsync_[a-z0-9_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)')


async def page_of(backend: FakeBackend) -> str:
    return metrics.page_of(
        dashed(await backend.query_status()),
        dashed(await backend.mirror.status()),
        await backend.query_stats(),
    ).text()


def samples(page: str, vm: str | None = "vm1") -> dict[str, float]:
    """The samples, without the label `vm` that each must have; checks the page's form on the way (Prometheus:
    text-based exposition format)."""
    found: dict[str, float] = {}
    family = ""
    for line in page.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert f"\n# TYPE {family} " in page
        elif not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            assert match[1].removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") in (
                family,
                match[1],
            )
            assert match[1].startswith(family)
            key = line.rsplit(" ", 1)[0]
            if vm is not None:  # its label comes first
                assert f'{{vm="{vm}"' in key, line
                key = key.replace(f'{{vm="{vm}"}}', "").replace(f'vm="{vm}",', "")
            assert key not in found
            found[key] = float(match[3])
    return found


async def test_the_page_has_what_there_is_and_not_what_is_undefined() -> None:
    backend = FakeBackend()
    page = samples(await page_of(backend))
    assert page["vhostsync_capacity_bytes"] == 1 << 30
    assert page["vhostsync_frontends_waiting"] == 1
    assert page['vhostsync_mirror_state{state="passthrough"}'] == 1
    assert page['vhostsync_mirror_state{state="steady"}'] == 0
    assert page["vhostsync_source_generation"] == 7
    assert "vhostsync_writes_mirrored" not in page
    assert page['vhostsync_queue_operations_total{queue="0",operation="write"}'] == 20
    assert page['vhostsync_queue_broken{queue="1"}'] == 1
    assert page['vhostsync_disk_bytes_total{disk="source",operation="read"}'] == 5 * 4096
    assert not any('disk="destination"' in key for key in page)


async def test_promtool_finds_no_fault() -> None:
    """Prometheus' own check of names, types and help texts."""
    backend = FakeBackend()
    backend.mirror.now = replace(backend.mirror.now, state="steady", destination="/disks/b.img")
    try:
        promtool = fetch_prometheus(cache_folder(), "promtool")
    except AssetError as error:
        pytest.skip(f"NOT TESTED: promtool cannot be had here: {error}")
    page = (await page_of(backend)).encode()
    checked = await anyio.run_process([promtool, "check", "metrics"], input=page, check=False, stderr=STDOUT)
    assert (checked.returncode, checked.stdout) == (0, b"")
    wrong = page.replace(b"epoch gauge", b"epoch counter")
    checked = await anyio.run_process([promtool, "check", "metrics"], input=wrong, check=False, stderr=STDOUT)
    assert b"_total" in checked.stdout


async def test_histograms_are_cumulative_and_in_seconds() -> None:
    page = samples(await page_of(FakeBackend()))
    rows = {
        key: value for key, value in page.items() if "request_latency" in key and 'operation="write"' in key
    }
    buckets = [value for key, value in rows.items() if "_bucket" in key]
    assert buckets == sorted(buckets)
    # The fake's 20 writes of each of two queues lie in [2^16, 2^17) ns.
    assert rows['vhostsync_request_latency_seconds_bucket{operation="write",le="6.5536e-05"}'] == 0
    assert rows['vhostsync_request_latency_seconds_bucket{operation="write",le="0.000131072"}'] == 40
    assert rows['vhostsync_request_latency_seconds_bucket{operation="write",le="+Inf"}'] == 40
    assert rows['vhostsync_request_latency_seconds_count{operation="write"}'] == 40
    assert rows['vhostsync_request_latency_seconds_sum{operation="write"}'] == pytest.approx(40 * 98.3e-6)


async def test_limits_are_there_where_the_guest_has_some() -> None:
    backend = FakeBackend()
    assert not any("_limit_" in key for key in samples(await page_of(backend)))
    await backend.limit({"bps": 100, "iops_wr": 7})
    page = samples(await page_of(backend))
    assert {key: value for key, value in page.items() if "_limit_" in key} == {
        'vhostsync_limit_bytes_per_second{of="all"}': 100,
        'vhostsync_limit_requests_per_second{of="writes"}': 7,
    }
    assert page["vhostsync_limited_seconds_total"] == 1.5


def test_a_page_of_nothing_is_a_page() -> None:
    samples(metrics.page_of({}, {}, {}).text(), vm=None)


def test_values_and_labels_are_escaped() -> None:
    page = Page()
    page.family(Family("x", "gauge", "X.", ("path",)))(float("nan"), 'a"b\\c\nd')
    assert 'vhostsync_x{path="a\\"b\\\\c\\nd"} NaN' in page.text()


@asynccontextmanager
async def serving(where: Path | TcpAddress, backend: FakeBackend) -> AsyncIterator[Path | TcpAddress]:
    async with anyio.create_task_group() as tasks:
        yield await tasks.start(
            lambda *, task_status: metrics.serve_metrics(where, backend, task_status=task_status)
        )
        tasks.cancel_scope.cancel()


async def connect(place: Path | TcpAddress) -> anyio.abc.ByteStream:
    if isinstance(place, Path):
        return await anyio.connect_unix(place)
    return await anyio.connect_tcp(place.host, place.port)


async def fetch(place: Path | TcpAddress, request: bytes) -> tuple[str, str]:
    async with await connect(place) as stream:
        answer = b""
        await stream.send(request)
        try:
            while True:
                answer += await stream.receive()
        except anyio.EndOfStream:
            head, _, body = answer.partition(b"\r\n\r\n")
            return head.decode(), body.decode()


def place_for(kind: str, folder: Path) -> Path | TcpAddress:
    return folder / "metrics" if kind == "unix" else TcpAddress("127.0.0.1", 0)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_it_is_served_over_http(tmp_path: Path, kind: str) -> None:
    where = place_for(kind, tmp_path)
    async with serving(where, FakeBackend()) as place:
        head, body = await fetch(place, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert head.startswith("HTTP/1.1 200 OK\r\n")
        assert f"Content-Length: {len(body)}" in head
        assert samples(body)
        head, body = await fetch(place, b"HEAD /metrics?x=y HTTP/1.1\r\n\r\n")
        assert head.startswith("HTTP/1.1 200")
        assert body == ""


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"\r\n\r\n", 405),
        (b"\xff\xfe\r\n\r\n", 405),
        (b"GET /" + b"x" * 9000, 431),
    ],
)
async def test_other_requests_are_answered_too(tmp_path: Path, request_bytes: bytes, code: int) -> None:
    async with serving(tmp_path / "metrics", FakeBackend()) as place:
        head, _ = await fetch(place, request_bytes)
        assert head.startswith(f"HTTP/1.1 {code} ")


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        (b"127.0.0.1:9100", True),
        (b"127.8.0.1", True),
        (b"LocalHost:8080", True),
        (b"[::1]:9100", True),
        (b"[::1]", True),
        (b"rebound.example", False),
        (b"rebound.example:9100", False),
        (b"127.0.0.1.rebound.example", False),
        (b"192.0.2.1", False),
        (b"", False),
        (b"localhost\r\nhOST:rebound.example", False),
        (b"\xff", False),
    ],
)
async def test_a_page_of_another_name_reads_nothing(tmp_path: Path, host: bytes, answered: bool) -> None:
    """To a unix socket no browser connects, and what a proxy before it says is the proxy's matter."""
    request = b"GET /metrics HTTP/1.1\r\nAccept: x\r\nHost: " + host + b"\r\n\r\n"
    async with serving(place_for("tcp", tmp_path), FakeBackend()) as place:
        head, body = await fetch(place, request)
        assert head.startswith("HTTP/1.1 " + ("200" if answered else "421"))
        assert ("vhostsync_" in body) == answered
    async with serving(place_for("unix", tmp_path), FakeBackend()) as place:
        head, _ = await fetch(place, request)
        assert head.startswith("HTTP/1.1 200")


@pytest.mark.parametrize(
    "head",
    [
        b"Host:" + b" " * 4000 + b"\n\r\n\r\n",
        b"Host:" + b"\t" * 4000 + b"x\n",
        b"host" + b" " * 4000 + b"\r\n" * 99,
    ],
)
async def test_no_request_holds_up_the_backend(tmp_path: Path, head: bytes) -> None:
    """Reading a Host is no search that takes the cube of its length: that would stop all else for hours."""
    async with serving(place_for("tcp", tmp_path), FakeBackend()) as place:
        began = time.process_time()
        await fetch(place, b"GET /metrics HTTP/1.1\r\n" + head + b"\r\n\r\n")
        assert time.process_time() - began < 2


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("say", [b"", b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n"])
async def test_connections_that_are_held_delay_no_scraper(tmp_path: Path, kind: str, say: bytes) -> None:
    """However many: the oldest of them goes. None of them is near its own time limit in this test."""
    backend = FakeBackend()
    async with serving(place_for(kind, tmp_path), backend) as place, AsyncExitStack() as held:
        for _ in range(scrape.CONNECTIONS_MAX + 3):
            stream = await held.enter_async_context(await connect(place))
            if say:
                await stream.send(say)
        with anyio.fail_after(scrape.CONNECTION_S / 2):
            head, _ = await fetch(place, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert " 200 " in head


async def test_scrapers_that_say_nothing_and_a_defect_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend()
    async with serving(tmp_path / "metrics", backend) as place:
        with monkeypatch.context() as patch:
            patch.setattr(scrape, "CONNECTION_S", 0.05)
            async with await connect(place) as silent:
                with pytest.raises(anyio.EndOfStream):
                    await silent.receive()

        async def broken() -> dict[str, Any]:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(backend, "query_stats", broken)
            assert await fetch(place, b"GET /metrics HTTP/1.1\r\n\r\n") == ("", "")
        head, _ = await fetch(place, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert " 200 " in head


async def test_a_port_that_is_taken_is_a_sentence() -> None:
    async with serving(TcpAddress("127.0.0.1", 0), FakeBackend()) as place:
        assert isinstance(place, TcpAddress)
        with pytest.raises(ConfigError, match="Address already in use"):
            await metrics.serve_metrics(place, FakeBackend())
