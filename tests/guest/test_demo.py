# SPDX-License-Identifier: Apache-2.0
"""`./run demo` tells its story to the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest.backends import storage_daemon_wanted


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(storage_daemon_wanted(), reason="the demo shows vhostsync's own commands")
@pytest.mark.usefixtures("assets")
def test_demo() -> None:
    command = [sys.executable, "-m", "tests.guest.demo"]
    top = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=top, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "[9/9]" in done.stdout
    assert "What you have seen" in done.stdout
