# SPDX-License-Identifier: Apache-2.0
"""`vhostsync top`: its order, its keys, and the program on a terminal of its own."""

from __future__ import annotations

import curses
import fcntl
import os
import select
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from anyio.to_thread import run_sync

from tests.unit.command_line import PROGRAM, ROOT
from tests.unit.control_fakes import FakeBackend, running, status
from vhostsync.cli.top_view import HELP, HELP_OF_DETAILS, View, trouble
from vhostsync.control.command import dashed
from vhostsync.fleet.host_disk import HostDisk


def disk(name: str, *, writes: int = 0, **changes: Any) -> HostDisk:
    """One whose backend runs."""
    mirror = dashed(status(**{"destination": "/b.img", "worth": "up-to-date", "state": "steady", **changes}))
    mirror["counts"]["source-generation"] = writes
    shown = {"name": name, "disk": f"/disks/{name}.img", "capacity": 4096, "frontends": 1, "active": True,
             "status": "running"}  # fmt: skip
    record, control = Path(f"/r/{name}"), Path("/c")
    return HostDisk(name=name, record_path=record, control=control, status=shown, mirror=mirror)


def names(view: View, width: int = 200, height: int = 40) -> list[str]:
    return [text.split()[0] for text, _ in view.lines(width, height)[2:-1] if text]


def chosen(view: View) -> str:
    [text] = [text for text, is_reversed in view.lines(200, 40) if is_reversed]
    return text.split()[0]


def press(view: View, *keys: int | str) -> bool:
    """All of them; whether it goes on."""
    goes_on = [view.press(key if isinstance(key, int) else ord(key)) for key in keys]
    return all(goes_on)


def test_it_is_ordered_by_trouble_lag_rate_and_name() -> None:
    view = View()
    disks = [disk("a", lag_ms=5.0), disk("b", state="degraded", last_error="gone"), disk("c", lag_ms=90.0),
             HostDisk(name="d", record_path=Path("/r/d"), problem="damaged")]  # fmt: skip
    view.update([*disks, disk("e", writes=100)], 1.0)
    assert names(view) == ["d", "b", "c", "a", "e"]
    view.update([*disks, disk("e", writes=300)], 3.0)
    for key, order in (("l", "cabde"), ("r", "eabcd"), ("n", "abcde"), ("t", "dbcae")):
        press(view, key)
        assert "".join(names(view)) == order
    assert any("100" in text.split() for text, _ in view.lines(200, 40))  # e's writes in a second


def test_a_backend_that_was_started_anew_has_no_rate() -> None:
    view = View()
    view.update([disk("a", writes=1000)], 1.0)
    view.update([disk("a", writes=3)], 2.0)
    assert any("0" in text.split() for text, _ in view.lines(200, 40)[2:3])


def test_the_chosen_one_stays_chosen_when_the_order_changes() -> None:
    view = View()
    view.update([disk("a"), disk("b"), disk("c")], 1.0)
    assert chosen(view) == "a"
    press(view, curses.KEY_DOWN, "j", "j", curses.KEY_UP)
    assert chosen(view) == "b"
    view.update([disk("a"), disk("b", paused=True), disk("c")], 2.0)
    assert names(view)[0] == chosen(view) == "b"
    view.update([disk("c"), disk("a")], 3.0)  # it is gone
    assert chosen(view) == "a"


def test_many_disks_scroll_with_the_chosen_one() -> None:
    view = View()
    view.update([disk(f"vm{at:03}") for at in range(100)], 1.0)
    assert names(view, height=10) == [f"vm{at:03}" for at in range(7)]
    press(view, *[curses.KEY_NPAGE] * 20)
    assert names(view, height=10)[-1] == "vm099"
    press(view, *[curses.KEY_PPAGE] * 20)
    assert names(view, height=10)[0] == "vm000"
    for width, height in ((0, 0), (1, 1), (3, 2), (40, 3)):
        lines = view.lines(width, height)
        assert len(lines) <= height and all(len(text) < max(width, 1) for text, _ in lines)


def test_the_details_of_one_and_back() -> None:
    view = View()
    view.update([disk("a"), HostDisk(name="b", record_path=Path("/r/b"))], 1.0)
    press(view, "n", "\n")
    text = "\n".join(line for line, _ in view.lines(200, 40))
    assert "/disks/a.img" in text and "Mirror       steady" in text and text.endswith(HELP_OF_DETAILS)
    press(view, "j")
    assert "Record       /r/b" in "\n".join(line for line, _ in view.lines(200, 40))
    assert press(view, "q")
    assert view.lines(200, 40)[-1][0] == HELP
    assert press(view, "\n", 27) and not press(view, "q")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"flushes_fail": True}, "flushes fail"), ({"paused": True}, "flushes wait"),
        ({"different_since": "x"}, "the disks differ"), ({"doubt": [{"offset": 0, "length": 1}]}, "in doubt"),
        ({"state": "ahead"}, "too slow"), ({"state": "degraded", "last_error": "no room"}, "no room"),
        ({}, ""),
    ],
)  # fmt: skip
def test_what_is_trouble(changes: dict[str, Any], why: str) -> None:
    badness, words = trouble(disk("a", **changes))
    assert why in words and (badness > 0) == bool(why)


def test_what_others_have_named_does_not_reach_the_terminal() -> None:
    view = View()
    view.update([disk("a", state="degraded", last_error="evil\x1b[2J")], 1.0)
    assert not any("\x1b" in text for text, _ in view.lines(200, 40))


# ---- on a terminal ---------------------------------------------------------------


class Terminal:
    """`vhostsync top` in a terminal of its own."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.program = subprocess.Popen(
            [*PROGRAM, "top", "--interval", "100ms"], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
            env={**os.environ, "TERM": "xterm", **environment}, start_new_session=True,
        )  # fmt: skip
        self.shown = ""

    def await_text(self, text: str) -> None:
        deadline_s = time.monotonic() + 30
        while text not in self.shown:
            ready, _, _ = select.select([self.ours], [], [], deadline_s - time.monotonic())
            assert ready, self.shown
            self.shown += os.read(self.ours, 4096).decode(errors="replace")

    def press(self, keys: str) -> None:
        self.shown = ""
        os.write(self.ours, keys.encode())

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.mark.anyio
async def test_a_terminal_shows_all_disks_live(tmp_path: Path) -> None:
    backend = FakeBackend()
    places = {"STATE_DIRECTORY": str(tmp_path / "state"), "VHOSTSYNC_RUNTIME_DIRECTORY": str(tmp_path)}
    (tmp_path / "vm1").mkdir()
    async with running(tmp_path / "vm1" / "control", backend):
        terminal = Terminal(places)
        try:
            await run_sync(terminal.await_text, "1 disks, 0 in trouble, by trouble")
            await run_sync(terminal.await_text, "passthrough")
            backend.mirror.now = status(state="degraded", destination="/b.img", last_error="no room left")
            await run_sync(terminal.await_text, "no room left")
            terminal.press("l")
            await run_sync(terminal.await_text, "lag")
            terminal.press("\n")
            await run_sync(terminal.await_text, "Last error")
            terminal.press("q")
            await run_sync(terminal.await_text, "WRITES/s")
            terminal.press("q")
            assert await run_sync(terminal.program.wait, 30) == 0
            assert termios.tcgetattr(terminal.theirs) == terminal.before
        finally:
            terminal.close()


def test_without_a_terminal_it_says_what_does_without(tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "top"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "STATE_DIRECTORY": str(tmp_path), "VHOSTSYNC_RUNTIME_DIRECTORY": str(tmp_path)},
    )  # fmt: skip
    sentence = "vhostsync: top needs a terminal; without one: vhostsync list\n"
    assert (done.returncode, done.stderr) == (1, sentence)
