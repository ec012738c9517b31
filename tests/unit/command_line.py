# SPDX-License-Identifier: Apache-2.0
"""A backend that runs beside a test of the command line, and the command line run in this process."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from tests.unit.control_fakes import FakeBackend, running, status
from vhostsync.cli import main as cli
from vhostsync.cli import operate

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "vhostsync"]


class Served:
    """A backend that runs in a thread beside the test, because the command line runs an event loop of its
    own."""

    def __init__(self, portal: BlockingPortal, backend: FakeBackend, path: Path) -> None:
        self.portal = portal
        self.backend = backend
        self.path = path

    def become(self, **changes: Any) -> None:
        self.backend.mirror.now = status(**changes)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(operate, "LOOK_EVERY_S", 0.01)
    path = tmp_path / "control"
    monkeypatch.setenv("VHOSTSYNC_CONTROL", str(path))
    with start_blocking_portal("asyncio") as portal:
        backend = portal.call(FakeBackend)
        with portal.wrap_async_context_manager(running(path, backend)):
            yield Served(portal, backend, path)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out = capsys.readouterr()
        # The fake's log shares this process.
        return code, "".join(line for line in out.out.splitlines(True) if "[info" not in line), out.err

    return call


def start(*words: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*PROGRAM, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
