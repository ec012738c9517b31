# SPDX-License-Identifier: Apache-2.0
"""Machines that get nothing from their disk, and the operator is told why: a second one on the same socket,
and those whose memory the backend cannot see. Their firmware is all the guest that this needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest.backends import Vhostsync
from tests.guest.images import new_image
from tests.guest.processes import Process, wait_said
from vhostsync.cli.show import status_text

pytestmark = [pytest.mark.guest, pytest.mark.timeout(180)]

SHARED = "memory-backend-memfd,size=64M,share=on"


@contextmanager
def machine(work: Path, backend: Vhostsync, name: str, memory: str | None) -> Iterator[Process]:
    """SeaBIOS, which reads the boot sector of its disk and stays there."""
    command = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"),
        *("-chardev", f"socket,id=disk,path={backend.socket}"),
        *("-device", "vhost-user-blk-pci,chardev=disk,num-queues=1,bootindex=0", "-m", "64"),
    ]
    if memory is not None:
        command += ["-object", f"{memory},id=mem", "-machine", "memory-backend=mem"]
    with Process(name, command, work / f"{name}.log") as process:
        yield process


def said(backend: Vhostsync, words: str) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(wait_said(backend.process, words))
    return line


def wait_read(backend: Vhostsync) -> None:
    """Returns when a guest has read its boot sector."""
    while not backend.qmp.execute("query-stats")["queues"][0]["operations"]["read"]["operations"]:
        pass


@pytest.mark.parametrize(
    ("memory", "why"),
    [
        (None, "its rings lie in no memory that it has sent"),
        ("memory-backend-ram,size=64M", "its rings lie in no memory that it has sent"),
        ("memory-backend-memfd,size=64M,share=off", "its rings are empty as seen from here"),
    ],
)
def test_memory_that_is_not_shared(work: Path, memory: str | None, why: str) -> None:
    with Vhostsync(work, new_image(work / "disk.img", 8)) as backend, machine(work, backend, "vm", memory):
        line = said(backend, "frontend does not get on")
        assert line["level"] == "warning"
        assert line["frontend"] == 1
        assert why in line["reason"]
        assert "memory-backend-memfd,id=mem,size=…,share=on -machine memory-backend=mem" in line["reason"]
        assert backend.process.log.read_text().count("frontend does not get on") == 1


def test_a_second_machine_on_the_same_socket(work: Path) -> None:
    with Vhostsync(work, new_image(work / "disk.img", 8)) as backend:
        with machine(work, backend, "first", SHARED) as first:
            wait_read(backend)
            status = backend.qmp.execute("query-status")
            assert (status["active-frontend"], status["waiting-frontends"]) == (1, [])
            with machine(work, backend, "second", SHARED) as second:
                line = said(backend, "frontend does not get on")
                assert line["frontend"] == 2
                assert "frontend 1 has stopped its rings" in line["reason"]
                status = backend.qmp.execute("query-status")
                assert status["active-frontend"] == 1
                (waiting,) = status["waiting-frontends"]
                assert (waiting["frontend"], waiting["pid"]) == (2, second.pid)
                text = status_text(status, backend.status())
                assert f"frontend 2 since {waiting['since']}: frontend 1 runs the rings" in text
                first.kill()
                assert said(backend, "frontend gets on")["frontend"] == 2
                status = backend.qmp.execute("query-status")
                assert (status["active-frontend"], status["waiting-frontends"]) == (2, [])
        backend.stop()
