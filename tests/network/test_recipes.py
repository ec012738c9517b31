# SPDX-License-Identifier: Apache-2.0
"""Recipes of docs/recipes/ as they are written there, with places of the test's own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon.named_host import Host
from tests.daemon.rig import image, same_content
from tests.guest.backends import vhostsync_command
from tests.sizes import MIB

RECIPES = Path(__file__).parents[2] / "docs/recipes"
TOO_BUSY = "Unable to get accurate CPU usage"
"""qemu-img, which measures how often it can derive a key in a second, and finds the machine too busy for it.
That is its first step: nothing is there yet that a second try would find."""
TRIES = 8
KNOWN = b"a word that is to be found on no encrypted disk"


def commands(recipe: str, heading: str) -> str:
    """The first block of commands below a heading."""
    section = (RECIPES / recipe).read_text().split(f"## {heading}\n", 1)[1]
    block = re.search(r"(?:^    .*\n)+", section, re.MULTILINE)
    assert block is not None
    return block[0]


@contextmanager
def server_ended(work: Path) -> Iterator[None]:
    """The recipe's server goes into the background; it ends with the test."""
    try:
        yield
    finally:
        for found in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = found.read_bytes()
            except OSError:
                continue
            if words.startswith(b"qemu-nbd\0") and str(work).encode() in words:
                os.kill(int(found.parent.name), signal.SIGKILL)


@pytest.mark.timeout(180)
def test_a_running_disk_is_encrypted_with_qemus_luks(work: Path) -> None:
    if shutil.which("qemu-nbd") is None:
        pytest.skip("NOT TESTED: qemu-nbd is not installed")
    for name in ("disks", "keys", "run", "tools"):
        (work / name).mkdir()
    disk = image(work / "disks/vm1.img")
    with disk.open("r+b") as file:
        file.write(KNOWN)
    host = Host(work)
    host.tell("create", "vm1", "--disk", disk)
    tools = work / "tools"
    (tools / "vhostsync").write_text(f'#!/bin/sh\nexec {" ".join(map(str, vhostsync_command()))} "$@"\n')
    (tools / "vhostsync").chmod(0o755)
    script = commands("encrypt-a-running-disk.md", "With QEMU's LUKS")
    for place in ("/keys/", "/disks/", "/run/vm1.nbd"):
        script = script.replace(place, f"{work}{place}")
    environment = {**os.environ, **host.environment, "PATH": f"{tools}:{os.environ['PATH']}"}
    with server_ended(work), host.serve("vm1"):
        for _ in range(TRIES):
            done = subprocess.run(
                ["sh", "-e", "-x", "-c", script], env=environment, capture_output=True, text=True,
                check=False, timeout=120,
            )  # fmt: skip
            if TOO_BUSY not in done.stderr:
                break
        assert done.returncode == 0, done.stdout + done.stderr
        shown = host.list()["vm1"]
        assert shown["disk"] == f"nbd+unix:///?socket={work}/run/vm1.nbd"
    encrypted = work / "disks/vm1.luks"
    assert encrypted.read_bytes().startswith(b"LUKS")
    assert KNOWN not in encrypted.read_bytes()
    plain = work / "plain.img"
    subprocess.run(
        ["qemu-img", "convert", "-q", "--object", f"secret,id=k,file={work}/keys/vm1", "--image-opts",
         f"driver=luks,key-secret=k,file.filename={encrypted}", "-O", "raw", plain],
        check=True, timeout=60,
    )  # fmt: skip
    assert plain.stat().st_size == disk.stat().st_size == 16 * MIB
    assert same_content(plain, disk)
