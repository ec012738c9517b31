# SPDX-License-Identifier: Apache-2.0
"""The load generator, against qemu-storage-daemon: its figures are whole, its verifying mode finds what is
wrong."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.generator import find_loadgen
from bench.sample import BenchError
from tests.sizes import MIB


def _missing() -> str | None:
    if shutil.which("qemu-storage-daemon") is None:
        return "needs qemu-storage-daemon"
    try:
        find_loadgen()
    except BenchError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


class Export:
    def __init__(self, directory: Path) -> None:
        self.image = directory / "image"
        self.journal = directory / "journal"
        self.socket = directory / "socket"
        with self.image.open("wb") as file:
            file.truncate(16 * MIB)
        node = {"driver": "file", "node-name": "disk", "filename": str(self.image)}
        export = "type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=2,addr.type=unix"
        export += f",addr.path={self.socket}"
        self.process = subprocess.Popen(
            ["qemu-storage-daemon", "--blockdev", json.dumps(node), "--export", export]
        )
        deadline = time.monotonic() + 30
        while not self.socket.exists():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)  # nothing tells that it listens

    def run(self, *options: str, code: int = 0, operations: int = 4000) -> dict[str, Any]:
        command = [
            str(find_loadgen()),
            "--socket",
            str(self.socket),
            "--seconds",
            "20",
            "--operations",
            str(operations),
            *options,
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
        assert result.returncode == code, result.stderr + result.stdout
        parsed: dict[str, Any] = json.loads(result.stdout)
        return parsed

    def check(self, *options: str, code: int = 0) -> dict[str, Any]:
        command = [str(find_loadgen()), "--check", str(self.image), "--journal", str(self.journal), *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
        assert result.returncode == code, result.stderr + result.stdout
        parsed: dict[str, Any] = json.loads(result.stdout)
        return parsed


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Export]:
    export = Export(tmp_path)
    yield export
    export.process.kill()
    export.process.wait()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--poll",),
        ("--no-indirect",),
        ("--no-event-idx",),
        ("--bs", "512", "--depth", "1"),
        ("--bs", "1048576", "--depth", "4"),
        ("--depth", "256"),
        ("--queues", "2"),
    ],
)
def test_every_request_is_counted(export: Export, options: tuple[str, ...]) -> None:
    result = export.run("--rw", "randrw", "--flush-every", "64", *options, operations=1000)
    sides = result["operations"]
    assert sum(side["count"] for side in sides.values()) == result["submitted"] == 1000 * result["queues"]
    assert all(sum(count for _, count in side["histogram"]) == side["count"] for side in sides.values())
    latency = sides["read"]["latency_ns"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"] * 1.04


def test_good_data_passes_in_the_run_and_on_the_image(export: Export) -> None:
    journal = ("--verify", "--journal", str(export.journal))
    for drain in ((), ("--flush-drain",)):
        options = ("--rw", "randrw", "--flush-every", "16", "--queues", "2", *drain, *journal)
        verified = export.run(*options)["verify"]
        assert (verified["sectors_bad"], verified["sectors_checked"] > 0) == (0, True)
    completed, flushed = export.check(), export.check("--flushed-only")
    assert completed["sectors_bad"] == flushed["sectors_bad"] == 0
    assert 0 < flushed["sectors_checked"] <= completed["sectors_checked"]


def test_each_kind_of_damage_is_told_apart(export: Export) -> None:
    journal = ("--verify", "--journal", str(export.journal))
    export.run("--rw", "write", *journal, operations=4096)  # every block once
    with export.image.open("r+b", buffering=0) as image:
        old = os.pread(image.fileno(), 512, 0)
        export.run("--rw", "write", *journal, operations=4096)
        os.pwrite(image.fileno(), old, 0)
        os.pwrite(image.fileno(), os.pread(image.fileno(), 512, 8 * 4096), 9 * 4096)
        os.pwrite(image.fileno(), bytes(512), 10 * 4096)
        os.pwrite(image.fileno(), b"!", 11 * 4096 + 300)
    expected = ["old data", "data of another sector", "no data", "torn or damaged data"]
    found = export.check(code=2)
    assert [each["what"] for each in found["first"]] == expected
    read = export.run("--rw", "read", *journal, code=2, operations=4096)["verify"]
    in_order_of_completion = [each["what"] for each in read["first"]]
    assert (sorted(in_order_of_completion), read["sectors_bad"]) == (sorted(expected), 4)


def test_a_backend_that_dies_is_told_and_the_journal_stays_good(export: Export) -> None:
    command = [
        str(find_loadgen()),
        "--socket",
        str(export.socket),
        "--seconds",
        "30",
        "--rw",
        "randwrite",
        "--verify",
        "--journal",
        str(export.journal),
        "--flush-every",
        "8",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while export.image.stat().st_blocks < 1000 and time.monotonic() < deadline:
            time.sleep(0.01)  # until it is well under way
        export.process.kill()
        output, _ = process.communicate(timeout=30)
    assert (process.returncode, json.loads(output)["lost"]) == (3, True)
    export.process.wait()
    assert export.check()["sectors_bad"] == 0


def test_a_guest_that_stays_is_idle_until_its_time_is_over(export: Export) -> None:
    begin = time.monotonic()
    result = export.run("--seconds", "0.5", "--stay", operations=10)
    assert result["submitted"] == 10
    assert time.monotonic() - begin >= 0.5
