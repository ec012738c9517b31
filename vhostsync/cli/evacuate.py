# SPDX-License-Identifier: Apache-2.0
"""`vhostsync evacuate`: a bar for each disk on its way and one for all on a terminal, plain lines without
one, JSON for scripts."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Final, TextIO

import anyio

from vhostsync.cli import show
from vhostsync.fleet.disks import host_disks
from vhostsync.fleet.evacuation import (
    COPYING,
    ENDS,
    FAILED,
    MOVED,
    SWITCHING,
    WAITING,
    Evacuation,
    Progress,
    alone,
    needed_and_free,
)
from vhostsync.fleet.evacuation_plan import Move, plan_moves
from vhostsync.printable import printable, size

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
LINES_MAX: Final = 16
"""Of bars on a terminal; more are counted."""
_HEADINGS: Final = ("NAME", "STATE", "SIZE", "DISK", "DESTINATION")


async def run(options: argparse.Namespace) -> int:
    """The exit code. ConfigError, StateRecordError."""
    disks = await host_disks()
    moves = await plan_moves(disks, options.place, options.to)
    if options.dry_run:
        return await _show_plan(moves, options)
    async with alone(options.place, options.to):
        return await _evacuate(moves, options)


async def _evacuate(moves: Sequence[Move], options: argparse.Namespace) -> int:
    shown: Shown = JsonLines() if options.json else Bars(sys.stdout) if sys.stdout.isatty() else Lines()
    evacuation = Evacuation(
        moves, parallel=options.parallel, total_speed=options.total_speed, switch=options.switch,
        tell=lambda changed: shown.tell(changed, list(evacuation.progress.values())),
    )  # fmt: skip
    try:
        await evacuation.run()
    except anyio.get_cancelled_exc_class():
        shown.end()
        sys.stderr.write("vhostsync: The copies that run go on; start it again to go on with the rest.\n")
        raise
    except BaseExceptionGroup as several:  # each disk's task has failed to tell
        raise _first(several) from several
    shown.end()
    return _show_result(list(evacuation.progress.values()), options)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _show_plan(moves: Sequence[Move], options: argparse.Namespace) -> int:
    possible = [move for move in moves if move.why_not is None]
    needed, free = await needed_and_free(possible, options.to)
    if options.json:
        plan = [
            {"label": move.label, "disk": move.disk.disk, "destination": move.destination,
             "bytes": move.bytes, "state": move.disk.state, "why-not": move.why_not}
            for move in moves
        ]  # fmt: skip
        print_line(json.dumps({"plan": plan, "needed-bytes": needed, "free-bytes": free}))
    elif not moves:
        print_line(f"no disk of this host lies at {printable(options.place)}")
    else:
        rows = [_plan_row(move) for move in moves]
        sys.stdout.write(show.table([_HEADINGS, *rows]))
        room = "" if free is None else f"; {printable(options.to)} has {size(free)} free"
        print_line(f"{len(possible)} to move, at most {size(needed)} to write{room}")
        if free is not None and needed > free:
            print_line("they may not find room there")
    return EXIT_OK if len(possible) == len(moves) else EXIT_FAILED


def _plan_row(move: Move) -> Sequence[str]:
    to = move.destination if move.why_not is None else f"- {move.why_not}"
    words = (move.label, move.disk.state, size(move.bytes), move.disk.disk or "-", to or "-")
    return tuple(map(printable, words))


def _show_result(all_of: list[Progress], options: argparse.Namespace) -> int:
    failed = [each for each in all_of if each.phase == FAILED]
    done = len(all_of) - len(failed)
    if options.json:
        print_line(json.dumps({"done": done, "failed": [in_json(each) for each in failed]}))
    elif not all_of:
        print_line(f"no disk of this host lies at {printable(options.place)}")
    else:
        what = "moved" if options.switch else "up to date in both places"
        print_line(f"{done} of {len(all_of)} {what}")
    for each in failed:
        sys.stderr.write(f"vhostsync: {printable(each.label)}: {printable(str(each.error))}\n")
    return EXIT_FAILED if failed else EXIT_OK


def print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def in_json(of: Progress) -> dict[str, Any]:
    return {
        "label": of.label, "destination": of.destination, "phase": of.phase, "bytes-done": of.bytes_done,
        "bytes-total": of.bytes_total, "bytes-per-s": of.bytes_per_s, "error": of.error,
        "pause-us": of.pause_us,
    }  # fmt: skip


def total_line(all_of: Sequence[Progress], width: int | None = None) -> str:
    """All of them together, with an estimate."""
    counted = [each for each in all_of if each.phase != FAILED]
    total = sum(each.bytes_total for each in counted)
    done = sum(_bytes_done(each) for each in counted)
    rate = sum(each.bytes_per_s for each in counted)
    ended = sum(each.phase in ENDS for each in all_of)
    failed = len(all_of) - len(counted)
    percent = 1000 * done // total / 10 if total else 100.0
    text = f"{percent:5.1f} %  {ended} of {len(all_of)} disks, {size(done)} of {size(total)}"
    text += f", {failed} failed" if failed else ""
    if done < total:
        text += f"  {size(rate)}/s  "
        text += f"about {show.duration((total - done) / rate)} left" if rate > 0 else "estimating"
    return _with_bar(text, done, total, width)


def disk_line(of: Progress, width: int | None = None) -> str:
    text = f"{printable(of.label)}: {of.phase}"
    if of.phase == COPYING:
        percent = 1000 * of.bytes_done // of.bytes_total / 10 if of.bytes_total else 100.0
        text += f" {percent:5.1f} %  {size(of.bytes_done)} of {size(of.bytes_total)}"
        text += f"  {size(of.bytes_per_s)}/s"
    elif of.phase == FAILED:
        text += f", {printable(str(of.error))}"
    elif of.destination is not None:
        text += f" to {printable(of.destination)}" if of.phase in (SWITCHING, MOVED) else ""
        text += "" if of.pause_us is None else f", the guest was paused for {of.pause_us / 1000:.1f} ms"
    return _with_bar(text, of.bytes_done, of.bytes_total, width if of.phase == COPYING else None)


def _bytes_done(of: Progress) -> int:
    return of.bytes_total if of.phase in ENDS or of.phase == SWITCHING else of.bytes_done


def _with_bar(text: str, done: int, total: int, width: int | None) -> str:
    room = 0 if width is None else width - len(text) - 2
    return f"{show.bar(done, total, min(room, 40))} {text}" if room >= 10 else text


class Shown:
    """How the progress is shown."""

    def tell(self, changed: Progress, all_of: Sequence[Progress]) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Nothing more is told."""


class JsonLines(Shown):
    def __init__(self) -> None:
        self._shown: dict[str, tuple[str, float]] = {}

    def tell(self, changed: Progress, all_of: Sequence[Progress]) -> None:
        phase, next_s = self._shown.get(changed.label, ("", 0.0))
        if phase == changed.phase and time.monotonic() < next_s:
            return
        self._shown[changed.label] = (changed.phase, time.monotonic() + show.PLAIN_EVERY_S)
        print_line(json.dumps(in_json(changed)))


class Lines(Shown):
    """A line for each new phase of a disk, and now and then one for all."""

    def __init__(self) -> None:
        self._phases: dict[str, str] = {}
        self._next_s = time.monotonic() + show.PLAIN_EVERY_S

    def tell(self, changed: Progress, all_of: Sequence[Progress]) -> None:
        if self._phases.get(changed.label) != changed.phase:
            self._phases[changed.label] = changed.phase
            print_line(disk_line(changed))
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + show.PLAIN_EVERY_S
            print_line(total_line(all_of))


class Bars(Shown):
    """On a terminal: a line for each disk that has ended, for good; below, what is kept current."""

    def __init__(self, stream: TextIO) -> None:
        self._live = show.LiveBlock(stream)
        self._ended: set[str] = set()

    def tell(self, changed: Progress, all_of: Sequence[Progress]) -> None:
        width = self._live.width
        under_way = [each for each in all_of if each.phase not in (WAITING, *ENDS)]
        lines = [disk_line(each, width) for each in under_way[:LINES_MAX]]
        if len(under_way) > LINES_MAX:
            lines.append(f"and {len(under_way) - LINES_MAX} more")
        lines.append(total_line(all_of, width))
        ended = None
        if changed.phase in ENDS and changed.label not in self._ended:
            self._ended.add(changed.label)
            ended = disk_line(changed)
        self._live.update(lines, above=ended)

    def end(self) -> None:
        self._live.end()
