# SPDX-License-Identifier: Apache-2.0
"""`vhostsync top`: the terminal around the view of top_view.py."""

import argparse
import curses
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import anyio

from vhostsync.cli.top_view import View
from vhostsync.errors import ConfigError, StateRecordError
from vhostsync.fleet.disks import host_disks

EXIT_OK = 0
KEY_S = 0.5
"""How often it is looked whether the terminal has another size."""


def _need_terminal() -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("top needs a terminal; without one: vhostsync list")
    try:
        curses.setupterm()
    except curses.error as error:  # initscr would end the process
        raise ConfigError(f"the terminal cannot be used ({error}); is TERM set right?") from error


@contextmanager
def _screen() -> "Iterator[curses.window]":
    """The whole terminal, which is put back in the end."""
    os.environ.setdefault("ESCDELAY", "25")
    screen = curses.initscr()
    try:
        curses.noecho()
        curses.cbreak()
        screen.keypad(True)
        screen.nodelay(True)
        with suppress(curses.error):
            curses.curs_set(0)
        yield screen
    finally:
        screen.keypad(False)
        curses.echo()
        curses.nocbreak()
        curses.endwin()


async def run(options: argparse.Namespace) -> int:
    """Until somebody presses q. ConfigError, StateRecordError."""
    _need_terminal()
    view = View()
    view.update(await host_disks(), time.monotonic())
    with _screen() as screen:
        async with anyio.create_task_group() as tasks:

            async def look() -> None:
                while True:
                    await anyio.sleep(options.interval)
                    with suppress(StateRecordError):  # what was seen last stays; the next look may go well
                        view.update(await host_disks(), time.monotonic())
                    _draw(screen, view)

            tasks.start_soon(look)
            _draw(screen, view)
            await _keys(screen, view)
            tasks.cancel_scope.cancel()
    return EXIT_OK


async def _keys(screen: "curses.window", view: View) -> None:
    while True:
        with anyio.move_on_after(KEY_S):
            await anyio.wait_readable(sys.stdin.fileno())
        key = screen.getch()
        if key == -1:
            continue
        if not view.press(key):
            return
        _draw(screen, view)


def _draw(screen: "curses.window", view: View) -> None:
    height, width = screen.getmaxyx()
    screen.erase()
    for at, (text, is_reversed) in enumerate(view.lines(width, height)):
        with suppress(curses.error):  # a terminal that has just become smaller
            screen.addnstr(at, 0, text, width - 1, curses.A_REVERSE if is_reversed else curses.A_NORMAL)
    screen.refresh()
