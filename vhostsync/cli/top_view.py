# SPDX-License-Identifier: Apache-2.0
"""What `vhostsync top` shows and what its keys do, without any terminal: lines out of the host's disks."""

import curses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vhostsync.cli import show
from vhostsync.cli.disk_words import lag, state
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.printable import printable, size

HELP: Final = "sort: t trouble  l lag  r rate  n name   up/down   Enter details   q quit"
HELP_OF_DETAILS: Final = "up/down   q or Esc back"
_HEADINGS: Final = ("NAME", "STATE", "LAG", "WRITES/s", "COPY", "GUEST", "DISK", "TROUBLE")
ESCAPE: Final = 27


@dataclass(frozen=True)
class Seen:
    """A disk as it was found, and the rate of its guest's writes since it was found before."""

    disk: HostDisk
    writes_per_s: float = 0.0

    @property
    def lag_ms(self) -> float:
        return float(self.disk.mirror["lag-ms"]) if self.disk.mirror is not None else 0.0


def trouble(disk: HostDisk) -> tuple[int, str]:
    """How bad it is (0: nothing is), and why, in words."""
    mirror = disk.mirror or {}
    for badness, holds, why in (
        (9, mirror.get("flushes-fail"), "flushes fail: the record cannot be written"),
        (8, mirror.get("paused"), "flushes wait for a mirror"),
        (7, disk.problem, disk.problem or ""),
        (6, mirror.get("record-error"), "the record cannot be written"),
        (6, mirror.get("different-since"), "the disks differ"),
        (5, mirror.get("doubt"), "ranges in doubt"),
        (5, mirror.get("unreadable"), "unreadable ranges"),
        (4, disk.state == "degraded", mirror.get("last-error") or mirror.get("reason") or "degraded"),
        (3, disk.state == "ahead", "the destination is too slow"),
        (2, mirror.get("fence"), "the destination waits for its fence"),
        (1, disk.state == "stopped", "no backend runs"),
    ):
        if holds:
            return badness, str(why)
    return 0, ""


_ORDERS: Final[dict[str, tuple[str, Callable[[Seen], tuple[float, ...]]]]] = {
    "t": ("trouble", lambda seen: (-trouble(seen.disk)[0], -seen.lag_ms)),
    "l": ("lag", lambda seen: (-seen.lag_ms,)),
    "r": ("rate", lambda seen: (-seen.writes_per_s,)),
    "n": ("name", lambda seen: ()),
}


class View:
    """The disks as they were found last, in an order, one of them chosen."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._order = "t"
        self._chosen: str | None = None  # by what it is called: the order changes below it
        self._details = False
        self._first = 0
        self._writes: dict[str, tuple[float, int]] = {}

    def update(self, disks: Sequence[HostDisk], now_s: float) -> None:
        former, self._writes = self._writes, {}
        self._seen = [Seen(disk, self._rate(disk, former, now_s)) for disk in disks]

    def _rate(self, disk: HostDisk, former: dict[str, tuple[float, int]], now_s: float) -> float:
        if disk.mirror is None:
            return 0.0
        writes = int(disk.mirror["counts"].get("source-generation") or 0)
        self._writes[_key(disk)] = (now_s, writes)
        then_s, before = former.get(_key(disk), (now_s, writes))
        # A backend that was started anew counts from 0.
        return max(writes - before, 0) / (now_s - then_s) if now_s > then_s else 0.0

    @property
    def _ordered(self) -> list[Seen]:
        sort_by = _ORDERS[self._order][1]
        return sorted(self._seen, key=lambda seen: (*sort_by(seen), seen.disk.shown_name))

    def press(self, key: int) -> bool:
        """False: it is to end."""
        rows = [_key(seen.disk) for seen in self._ordered]
        at = rows.index(self._chosen) if self._chosen in rows else 0
        moves = {curses.KEY_UP: -1, ord("k"): -1, curses.KEY_DOWN: 1, ord("j"): 1,
                 curses.KEY_PPAGE: -10, curses.KEY_NPAGE: 10}  # fmt: skip
        if key in moves and rows:
            self._chosen = rows[min(max(at + moves[key], 0), len(rows) - 1)]
        elif key in (ord("q"), ESCAPE) and self._details:
            self._details = False
        elif key == ord("q"):
            return False
        elif key in (ord("\n"), ord("\r"), curses.KEY_ENTER) and rows:
            self._chosen, self._details = rows[at], True
        elif 0 < key < 128 and chr(key) in _ORDERS:
            self._order = chr(key)
        return True

    def lines(self, width: int, height: int) -> list[tuple[str, bool]]:
        """From the top of the screen, each no longer than that is wide; True: to be shown reversed."""
        body = self._details_of_chosen() if self._details else None
        shown = body if body is not None else self._table(height - 2)
        head = f"{len(self._seen)} disks, {self._in_trouble} in trouble, by {_ORDERS[self._order][0]}"
        foot = HELP if body is None else HELP_OF_DETAILS
        lines = [(head, False), *shown[: max(height - 2, 0)]]
        lines += [("", False)] * (height - 1 - len(lines)) + [(foot, False)]
        return [(text[: max(width - 1, 0)], reversed_) for text, reversed_ in lines[:height]]

    @property
    def _in_trouble(self) -> int:
        return sum(trouble(seen.disk)[0] > 1 for seen in self._seen)

    def _table(self, height: int) -> list[tuple[str, bool]]:
        """As much of it as there is room for; the chosen row is always among it."""
        ordered = self._ordered
        rows = [_key(seen.disk) for seen in ordered]
        at = rows.index(self._chosen) if self._chosen in rows else 0
        room = max(height - 1, 1)
        self._first = min(max(self._first, at - room + 1), at)
        self._first = max(min(self._first, len(rows) - room), 0)
        lines = show.table([_HEADINGS, *map(_row, ordered)]).splitlines()
        body = [(line, row == at) for row, line in enumerate(lines[1:])]
        return [(lines[0], False), *body[self._first : self._first + room]]

    def _details_of_chosen(self) -> list[tuple[str, bool]] | None:
        disk = next((seen.disk for seen in self._seen if _key(seen.disk) == self._chosen), None)
        if disk is None:
            return None
        if disk.status is not None and disk.mirror is not None:
            text = show.status_text(disk.status, disk.mirror)
        else:
            text = f"Disk         {printable(disk.disk or '-')}\n"
            text += f"Other        {printable(disk.other or '-')} ({disk.worth or '-'})\n"
        rows = (("Name", disk.shown_name), ("Trouble", trouble(disk)[1] or "none"),
                ("Record", str(disk.record_path or "-")), ("Control", str(disk.control or "-")))  # fmt: skip
        text += "".join(f"{name:<12} {printable(words)}\n" for name, words in rows)
        return [(line, False) for line in text.splitlines()]


def _key(disk: HostDisk) -> str:
    return str(disk.record_path or disk.control)


def _row(seen: Seen) -> Sequence[str]:
    disk = seen.disk
    mirror = disk.mirror or {}
    copies = disk.state == "syncing"
    copy = f"{size(mirror['copy-rate-bytes-per-s'])}/s" if copies else "-"
    words = (disk.shown_name[:30], state(disk), lag(disk), f"{seen.writes_per_s:,.0f}", copy,
             disk.guest or "-", disk.disk or "-", trouble(disk)[1])  # fmt: skip
    return tuple(map(printable, words))
