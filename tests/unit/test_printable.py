# SPDX-License-Identifier: Apache-2.0
"""Text of others reaches a terminal as text: no escape sequence, no line that looks like ours."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.control_fakes import FakeBackend
from tests.unit.test_disks import opened
from vhostsync import daemon, log
from vhostsync.cli import main as cli
from vhostsync.cli import show
from vhostsync.config import ServeConfig
from vhostsync.control.command import dashed
from vhostsync.errors import DiskError
from vhostsync.host import service_manager
from vhostsync.printable import printable, printable_lines
from vhostsync.storage.file import create_image

EVIL = "/x\x1b]0;title\x07\x9b2J\r\nvhostsync: all is well\u202e\udcff"
SHOWN = r"/x\x1b]0;title\x07\x9b2J\x0d\x0avhostsync: all is well\u202e\xff"


pytestmark = pytest.mark.usefixtures("own_logging")


def harmless(text: str) -> bool:
    return all(each.isprintable() or each == "\n" for each in text)


@given(st.text(st.characters(codec=None)))
def test_it_is_one_printable_line_and_stays_what_it_is(text: str) -> None:
    once = printable(text)
    assert once.isprintable() and printable(once) == once
    once.encode()
    if text.isprintable():
        assert once == text
    assert printable_lines(text).count("\n") == text.count("\n")


def test_what_it_looks_like() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("/disks/größe 1.img") == "/disks/größe 1.img"
    assert printable("\U000e0001") == r"\U000e0001"


def test_the_log_on_a_terminal() -> None:
    out = io.StringIO()
    log.configure("text", "info", out)
    try:
        raise DiskError(EVIL)
    except DiskError:
        structlog.get_logger().exception(f"failed {EVIL}", path=EVIL, paths=[EVIL], where=Path(EVIL))
    assert harmless(out.getvalue()) and "Traceback" in out.getvalue()
    assert "\nvhostsync:" not in out.getvalue().split("Traceback")[0]


def test_the_last_words_of_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name of the process that has the disk is that process's to choose."""
    image = tmp_path / "a.img"
    create_image(image, 1 << 20)
    named = tmp_path / "\x1b[2J\nvhostsync"
    named.symlink_to(shutil.which("cat") or "cat")
    disk = opened(image)
    with subprocess.Popen([named], stdin=subprocess.PIPE, pass_fds=[disk.fd.fileno()]) as child:
        disk.close()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("vhostsync.device.opening.SOURCE_LOCK_S", 0.0)
            patched.setattr(daemon, "load_modules", lambda: None)
            config = ServeConfig(
                blk_file=str(image), socket_path=tmp_path / "s", no_state_file=True, cache="writeback",
                log_format="json",
            )
            assert daemon.run(config) == 1
        child.kill()
    said = capsys.readouterr().err
    assert harmless(said) and said.count("\n") == 1 and r"open by \x1b[2J\x0avhostsync (pid " in said


@pytest.mark.parametrize("words", [["status", EVIL.replace("\udcff", "")], ["--control", EVIL, "status"]])
def test_wrong_usage_and_no_backend(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert cli.main(words) == 3
    except SystemExit as end:
        assert end.code == 2
    said = capsys.readouterr().err
    assert harmless(said) and said.count("\n") == 1 and r"\x1b" in said


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_a_backend_tells() -> None:
    backend = FakeBackend()
    mirror: dict[str, Any] = dashed(backend.mirror.now)
    mirror |= {"state": "steady", "destination": EVIL, "last-error": EVIL, "outdated-since": EVIL}
    status = {**dashed(await backend.query_status()), "disk": EVIL}
    text = show.status_text(status, mirror)
    assert harmless(text) and SHOWN in text and "\nvhostsync:" not in text
    stats = dashed(await backend.query_stats())
    for disk in stats["disks"].values():
        if disk is not None:
            disk["path"] = EVIL
    assert harmless(show.stats_text(stats))
    out = io.StringIO()
    live = show.Live(out, terminal=True)
    live.update(f"steady {EVIL}")
    live.say(f"event {EVIL}")
    live.end_line(EVIL)
    ours = out.getvalue().replace("\x1b[K", "").replace("\r", "")
    assert harmless(ours) and SHOWN in ours


def test_a_path_adds_nothing_to_what_the_service_manager_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(tmp_path / "notify"))
        teller = service_manager.ServiceManager()
        teller.tell(READY=1, STATUS="serving /a\nMAINPID=1\udcff")
        teller.close()
        assert manager.recv(1000) == b"READY=1\nSTATUS=serving /a\\x0aMAINPID=1\\xff"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may give files away")
def test_a_directory_that_is_made_is_given_to_nobody_by_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vhostsync.errors import StateRecordError
    from vhostsync.record import state_index

    victim, wanted = tmp_path / "victim", tmp_path / "state"
    (victim / "in it").mkdir(parents=True)
    make = os.mkdir

    ways: tuple[Callable[[Path], object], ...] = (lambda path: path.symlink_to(victim), victim.rename)
    for replace in ways:

        def make_and_lose(
            path: str, mode: int, *, dir_fd: int, replace: Callable[[Path], object] = replace
        ) -> None:
            make(path, mode, dir_fd=dir_fd)
            wanted.rmdir()
            replace(wanted)

        monkeypatch.setattr(os, "mkdir", make_and_lose)
        with pytest.raises(StateRecordError, match="cannot be made"):
            state_index.make_directory(wanted, (12345, 12345))
        monkeypatch.undo()
        assert wanted.stat().st_uid == 0
        if wanted.is_symlink():
            wanted.unlink()
    shutil.rmtree(wanted)
    state_index.make_directory(wanted / "below", (12345, 12345))
    assert (wanted.stat().st_uid, (wanted / "below").stat().st_uid) == (0, 12345)
