# SPDX-License-Identifier: Apache-2.0
"""`./run demo` tells its story to the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest.backends import storage_daemon_wanted
from tests.network.ceph_cluster import lacking

pytestmark = [
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(storage_daemon_wanted(), reason="the demo shows vhostsync's own commands"),
    pytest.mark.usefixtures("assets"),
]


def tell(steps: int, *options: str) -> None:
    command = [sys.executable, "-m", "tests.guest.demo", *options]
    top = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=top, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert f"[{steps}/{steps}]" in done.stdout
    assert "What you have seen" in done.stdout


def test_demo() -> None:
    tell(9)


def test_an_upgrade() -> None:
    tell(7, "--upgrade")


@pytest.mark.skipif(lacking() is not None, reason=f"a Ceph cluster {lacking()}")
def test_into_ceph_and_back() -> None:
    tell(7, "--ceph")


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
@pytest.mark.skipif(shutil.which("certtool") is None, reason="needs certtool (gnutls-bin)")
def test_two_hosts() -> None:
    tell(8, "--two-hosts")
