# SPDX-License-Identifier: Apache-2.0
"""A stderr that takes nothing, or is closed, holds up nobody: not the guest, not the record, not the end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, flush, image, lacking, tmpfs, write_block
from tests.guest.images import new_image
from vhostsync.record.state_record import Worth


def into(target: str) -> list[str]:
    return ["sh", "-c", f'exec "$@" 2>{target}', "sh"]


@contextlib.contextmanager
def unread(work: Path) -> Iterator[tuple[Path, int]]:
    """A pipe by name that nobody reads, and an end to fill it by."""
    path = work / "stderr"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield path, fd
    finally:
        os.close(fd)


def fill(fd: int) -> None:
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(fd, b"." * size)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_full_pipe_while_the_destination_is_full(work: Path, number: signal.Signals) -> None:
    source = image(work / "a.img", 64, filled_mib=2)
    with tmpfs(work, 8192) as small, unread(work) as (pipe, fd):
        other = new_image(small.folder / "b.img", 64)
        with Served(work, source, before=into(str(pipe))) as served:
            served.start_mirror(other)
            fill(fd)
            with Load(served, first=1024, blocks=8192, depth=64) as load:
                served.await_state("degraded")
                load.go_on()
                expected = load.stop()
                record = served.record()
                assert record is not None and record.peer_worth is Worth.OUTDATED
                assert lacking(source, expected) == []
            served.process.signal(number)
            assert served.process.wait(15) == 0
            record = served.record()
            assert record is not None and record.clean


def test_a_closed_stderr(work: Path) -> None:
    """The disk must not get its number: what is written to stderr would be written to the disk."""
    source = image(work / "a.img")
    with Served(work, source, before=into("&-")) as served, served.guest() as guest:
        assert Path(f"/proc/{served.process.pid}/fd/2").readlink() == Path(os.devnull)
        write_block(guest, 3, 1)
        flush(guest)
        guest.close()
        served.stop()
    assert lacking(source, {3: 1}) == []
