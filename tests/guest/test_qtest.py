# SPDX-License-Identifier: Apache-2.0
"""QEMU's own test of vhost-user-blk, unmodified, with `vhostsync serve` in the place of QEMU's daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.guest.backends import vhostsync_command
from tests.guest.qtest import QEMU, Qtest, built

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

DAEMON = Path(__file__).parent / "qtest-daemon.sh"
# What QEMU 7.2 has; a later one may have more.
KNOWN = {"basic", "hotplug", "idx", "indirect", "multiqueue", "nxvirtq"}


def run_qtest(qtest: Qtest, work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which(QEMU)
    assert program is not None
    environment = {
        **os.environ,
        "PATH": f"{Path(vhostsync_command()[0]).parent}:{os.environ['PATH']}",
        "QEMU_MODULE_DIR": str(qtest.modules),
        "QTEST_QEMU_BINARY": program,
        "QTEST_QEMU_STORAGE_DAEMON_BINARY": str(DAEMON),
        "TMPDIR": str(work),
    }
    command = [str(qtest.program), "--tap", "-k", *arguments]
    return subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_qemu_s_own_test_of_vhost_user_blk(work: Path) -> None:
    qtest = built()
    if qtest is None:
        pytest.skip("NOT TESTED: QEMU's own test of vhost-user-blk; `./run qtest` builds it and runs it")
    listed = run_qtest(qtest, work, "-l").stdout.splitlines()
    paths = [line for line in listed if line.startswith("/") and "/vhost-user-blk" in line]
    assert {path.rsplit("/", 1)[1] for path in paths} >= KNOWN
    done = run_qtest(qtest, work, *(word for path in paths for word in ("-p", path)))
    passed = {line.split(" ", 2)[2] for line in done.stdout.splitlines() if line.startswith("ok ")}
    assert (done.returncode, passed) == (0, set(paths)), done.stdout[-4000:] + done.stderr[-4000:]
