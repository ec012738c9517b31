# SPDX-License-Identifier: Apache-2.0
"""What the command line prints about a backend: numbers for people, a progress bar, tables. Pure but for
`Live`."""

import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, TextIO

from vhostsync.printable import printable, size

PLAIN_EVERY_S: Final = 5.0
"""Without a terminal: at most one line of progress in this time."""



def duration(seconds: float) -> str:
    """95 -> "1 min 35 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def bar(done: int, total: int, width: int) -> str:
    """ "[####----]", `width` characters wide; full only where all is done."""
    inner = max(width - 2, 1)
    filled = inner if done >= total else done * inner // total
    return "[" + "#" * filled + "-" * (inner - filled) + "]"


def copy_line(mirror: Mapping[str, Any], width: int | None = None) -> str:
    """Progress of the copy in one line; with a bar where the width of the terminal is known."""
    done, total = mirror["copy-bytes-done"], mirror["copy-bytes-total"]
    # Rounded down, so that 100 % means all.
    percent = 1000 * done // total / 10 if total else 100.0
    remaining = mirror.get("copy-remaining-s")
    parts = [f"{percent:5.1f} %", f"{size(done)} of {size(total)}"]
    if done < total:
        parts.append(f"{size(mirror['copy-rate-bytes-per-s'])}/s")
        parts.append("estimating" if remaining is None else f"about {duration(remaining)} left")
    text = "  ".join(parts)
    if width is None:
        return text.strip()
    room = width - len(text) - 3
    return f"{bar(done, total, min(room, 40))} {text}" if room >= 10 else text


def mirror_line(mirror: Mapping[str, Any], width: int | None = None) -> str:
    """The mirror in one line: progress while it copies, the lag otherwise."""
    state = mirror["state"]
    if state == "syncing":
        return f"syncing  {copy_line(mirror, None if width is None else width - 9)}"
    if state == "passthrough":
        former = mirror["destination"]
        return "passthrough  no destination" + (
            f"; the former one, {former}, is {mirror['worth']}" if former else ""
        )
    lag = f"lag {mirror['lag-writes']} writes, {size(mirror['lag-bytes'])}, {mirror['lag-ms']:.0f} ms"
    if state == "steady":
        worth = "differs (see Different)" if mirror.get("different-since") else "is up to date"
        return f"steady  {mirror['destination']} {worth}; {lag}"
    reason = mirror["last-error"] or mirror["reason"] or "no reason given"
    return f"{state}  {mirror['destination']} is {mirror['worth']}: {reason}; {lag}{_differing(mirror)}"


def verify_line(found: Mapping[str, Any], width: int | None = None) -> str:
    """A verification in one line."""
    done, total = found["bytes-done"], found["bytes-total"]
    percent = 1000 * done // total / 10 if total else 100.0
    text = f"{found['state']}  {percent:5.1f} %  {size(done)} of {size(total)}"
    if found["bytes-differing"]:
        text += f", {found['bytes-differing']:,} bytes differ"
    if found["bytes-repaired"]:
        text += f", {size(found['bytes-repaired'])} copied again"
    if found["bytes-skipped"]:
        text += f", {size(found['bytes-skipped'])} skipped"
    room = 0 if width is None else width - len(text) - 1
    return f"{bar(done, total, min(room, 40))} {text}" if room >= 10 else text


def fence_text(means: str, destination: str) -> str:
    """What the destination waits for, before it is attached again."""
    over = "a lost connection may still be carried out there"
    text = {
        "hand": f"requests of {over}. End that server's process, then: "
        f"vhostsync mirror start {destination} --fenced",
        "limit": f"requests of {over}: it is attached once the server lets us in (--fence limit)",
        "command": f"requests of {over}: it is attached once --fence-command succeeds",
    }
    return text[means]


_LIMITED: Final = {
    "bps": "{}/s", "bps-rd": "reads {}/s", "bps-wr": "writes {}/s", "iops": "{} requests/s",
    "iops-rd": "{} reads/s", "iops-wr": "{} writes/s",
}  # fmt: skip
"""A limit in words, by its name in query-status."""


def limits_line(limits: Mapping[str, int]) -> str:
    """All limits of the guest in one line; empty: there is none."""
    parts = []
    for name, words in _LIMITED.items():
        rate, burst, length_s = (limits[name + end] for end in ("", "-max", "-max-length"))
        amount = size if name.startswith("bps") else "{:,}".format
        if rate:
            up_to = f" ({amount(burst)} for {length_s} s)" if burst else ""
            parts.append(words.format(amount(rate)) + up_to)
    if parts and limits["iops-size"]:
        parts.append(f"a request counts by {size(limits['iops-size'])}")
    return ", ".join(parts)


def limits_text(limits: Mapping[str, int], engine: Mapping[str, Any]) -> str:
    """What `vhostsync limit` prints."""
    waited = f"{engine['limited-requests']:,} requests, {size(engine['limited-bytes'])}"
    rows = [("Limits", limits_line(limits) or "none")]
    rows.append(("Waited", f"{waited}; some ring for {engine['limited-ms'] / 1000:.1f} s in all"))
    return "".join(f"{name:<12} {text}\n" for name, text in rows)


def _differing(mirror: Mapping[str, Any]) -> str:
    """How much would have to be copied, where that is known and the guest is ahead."""
    differing = mirror.get("differing-bytes")
    return f"; {size(differing)} to copy" if mirror["state"] == "ahead" and differing is not None else ""


def receiver_text(status: Mapping[str, Any]) -> str:
    """What `vhostsync status` prints of a receiver."""
    whole, kept = status["capacity"], status["allocated"]
    disk = f"{status['receiver']}, {'not there' if whole is None else size(whole)}"
    rows = [("Disk", disk + (f", {size(kept)} of it kept" if kept is not None else ""))]
    rows.append(("Listening", status["listening"]))
    owner = f"{status['owner']}, since {status['since']}" if status["owner"] else "nobody yet"
    if status["owner"] and not status["owned"]:
        owner += " (it has not shown a token yet)"
    rows.append(("Owner", owner))
    server = f"attached, server {status['server']}" if status["attached"] else "not attached"
    if status["bytes-written"] is not None:
        server += f", {size(status['bytes-written'])} written"
    rows.append(("Generation", f"{status['generation']}, {server}"))
    if status["why-not"]:
        rows.append(("Refused", status["why-not"]))
    if status["log-lines-dropped"]:
        rows.append(("Log", f"{status['log-lines-dropped']:,} lines dropped: stderr does not take them"))
    return "".join(f"{name:<12} {printable(text)}\n" for name, text in rows)


def status_text(
    status: Mapping[str, Any], mirror: Mapping[str, Any], verify: Mapping[str, Any] | None = None
) -> str:
    """What `vhostsync status` prints."""
    frontends = status["frontends"]
    guest = f"{frontends} frontend{'' if frontends == 1 else 's'} connected"
    if status.get("active"):
        guest += ", one runs rings"
    rows = [
        (
            "Disk",
            f"{status['disk']}, {size(status['capacity'])}{', read-only' if status.get('read-only') else ''}",
        ),
        ("Backend", f"{status['status']}, {guest}"),
        ("Mirror", mirror_line(mirror)),
    ]
    if limits := limits_line(status["limits"]) if "limits" in status else "":
        rows.append(("Limits", limits))
    for waiting in status.get("waiting-frontends") or ():
        runs = f"frontend {status['active-frontend']} runs the rings"
        rows.append(("Waiting", f"frontend {waiting['frontend']} since {waiting['since']}: {runs}"))
    if status.get("log-lines-dropped"):
        rows.append(("Log", f"{status['log-lines-dropped']:,} lines dropped: stderr does not take them"))
    if mirror["state"] != "passthrough":
        counts = {key: "-" if count is None else f"{count:,}" for key, count in mirror["counts"].items()}
        source = f"{counts['source-generation']} writes completed, {counts['source-flushed']} durable"
        destination = f"{counts['writes-mirrored']} writes mirrored, {counts['writes-flushed']} durable"
        asked = f"; the guest asked for {counts['flush-request']}"
        rows += [("Source", source), ("Destination", destination + asked)]
        sparse = mirror["copy-bytes-sparse"]
        rows.append(("Copy", copy_line(mirror) + (f", {size(sparse)} of it sparse" if sparse else "")))
        if mirror["speed-bytes-per-s"]:
            rows.append(("Speed limit", f"{size(mirror['speed-bytes-per-s'])}/s"))
    if mirror.get("outdated-since"):
        rows.append(("Outdated", f"since {mirror['outdated-since']}"))
    if verify is not None and verify["state"] != "none":
        rows.append(("Verify", verify_line(verify)))
    if mirror.get("different-since"):
        rows.append(("Different", f"as a verification has found; known since {mirror['different-since']}"))
    if mirror.get("fence"):
        rows.append(("Fence", fence_text(mirror["fence"], mirror["destination"])))
    if mirror.get("last-error"):
        rows.append(("Last error", mirror["last-error"]))
    if mirror.get("record-error"):
        fail = "; the guest's flushes fail until it can be" if mirror.get("flushes-fail") else ""
        rows.append(("Record", f"{mirror['record-error']}{fail}"))
    for doubt in mirror.get("doubt") or ():
        rows.append(("In doubt", f"{doubt['length']} bytes of the source from {doubt['offset']} on"))
    if mirror.get("paused"):
        waiting, seconds = mirror["paused-requests"], mirror["paused-s"]
        text = f"for {seconds:.0f} s; {waiting} flushes wait for a mirror, or for mirror cancel"
        rows.append(("Paused", text))
    if mirror.get("paused-released"):
        text = f"{mirror['paused-released']} flushes without a mirror: the frontend could not wait"
        rows.append(("Let go", text))
    if mirror.get("reads-from-destination"):
        rows.append(("Fallback", f"{mirror['reads-from-destination']:,} reads answered by the destination"))
    for bad in mirror.get("unreadable") or ():
        rows.append(("Unreadable", f"{bad['length']} bytes of the source from {bad['offset']} on"))
    return "".join(f"{name:<12} {printable(text)}\n" for name, text in rows)


_COLUMNS: Final = ("", "operations", "bytes", "errors", "mean us", "p50", "p99", "p99.9")


def stats_text(stats: Mapping[str, Any]) -> str:
    """What `vhostsync stats` prints."""
    parts = []
    for queue in stats["queues"]:
        state = "running" if queue["running"] else "stopped"
        if queue["broken"]:
            state = f"broken ({queue['broken']})"
        taken = f"{queue['in-flight']} in flight, {queue['malformed']} malformed"
        signals = f"{queue['kicks']} kicks, {queue['notifications']} notifications"
        parts.append(f"Queue {queue['index']}: {state}, {taken}, {signals}\n")
        parts.append(_table(queue["operations"]))
    for role, disk in stats["disks"].items():
        if disk is not None:
            path = printable(disk["path"])
            parts.append(f"{role.capitalize()} {path}: {disk['in-flight']} in flight\n")
            parts.append(_table(disk["operations"]))
    engine = stats["engine"]
    parts.append(
        f"Engine: {engine['threads']} {'thread' if engine['threads'] == 1 else 'threads'} (lent "
        f"{engine['lent-operations']:,} disk operations), {engine['wakeups']:,} wake-ups, "
        f"{engine['syscalls']:,} system calls, "
        f"log {size(engine['log-bytes-used'])} of {size(engine['log-bytes'])}, "
        f"writes throttled for {engine['throttled-ms']:,} ms, polling "
        f"{engine['polled-ms']:,} ms, {engine['events-lost']} events lost\n"
    )
    return "".join(parts)


def _table(operations: Mapping[str, Mapping[str, Any]]) -> str:
    rows: list[Sequence[str]] = [_COLUMNS]
    for name, operation in operations.items():
        if not operation["operations"] and not operation["errors"]:
            continue
        latency = operation["latency-us"]
        rows.append(
            (
                name,
                f"{operation['operations']:,}",
                size(operation["bytes"]),
                f"{operation['errors']:,}",
                *(_microseconds(latency[key]) for key in ("mean", "p50", "p99", "p999")),
            )
        )
    if len(rows) == 1:
        return "  nothing yet\n"
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = []
    for first, *rest in rows:
        cells = [
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)),
        ]
        lines.append("  " + "  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _microseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_plain(each)}" for key, each in value.items() if each is not None) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(_plain(each) for each in value) or "none"
    return str(value)


def event_text(event: Mapping[str, Any]) -> str:
    """One event of the control socket as a line."""
    stamp = event["timestamp"]
    clock = time.strftime("%H:%M:%S", time.localtime(stamp["seconds"]))
    given = event.get("data", {}).items()
    data = ", ".join(f"{key} {_plain(value)}" for key, value in given if value is not None)
    return f"{clock}  {event['event'].lower().replace('_', ' ')}{': ' if data else ''}{data}"


class Live:
    """A line that is kept current: rewritten in place on a terminal, printed now and then without one."""

    def __init__(self, stream: TextIO, terminal: bool | None = None) -> None:
        self._stream = stream
        self._terminal = stream.isatty() if terminal is None else terminal
        self._shown = ""
        self._next_s = 0.0

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None without one."""
        return shutil.get_terminal_size().columns if self._terminal else None

    def update(self, line: str) -> None:
        """Show `line` in the place of the one before."""
        line = printable(line)
        if self._terminal:
            if line != self._shown:
                self._stream.write("\r" + line[: (self.width or 80) - 1] + "\x1b[K")
                self._stream.flush()
        elif time.monotonic() >= self._next_s and line != self._shown:
            self._next_s = time.monotonic() + PLAIN_EVERY_S
            self._stream.write(line + "\n")
            self._stream.flush()
        else:
            return
        self._shown = line

    def say(self, line: str) -> None:
        """Print `line` for good, above the line that is kept current."""
        line = printable(line)
        if self._terminal:
            self._stream.write("\r" + line + "\x1b[K\n")
            if self._shown:
                self._stream.write(self._shown[: (self.width or 80) - 1])
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def end_line(self, line: str | None = None) -> None:
        """End with `line`, or with what is shown."""
        line = printable(line) if line else None
        if self._terminal and (line or self._shown):
            self._stream.write("\r" + (line or self._shown) + "\x1b[K\n")
        elif line and line != self._shown:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._shown = ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """With headings first; each column as wide as it has to be, the last one as long as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(line.rstrip() + "\n" for line in lines)


class LiveBlock:
    """Lines that are kept current, rewritten in place; for a terminal alone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = 0

    @property
    def width(self) -> int:
        return shutil.get_terminal_size().columns

    def update(self, lines: Sequence[str], above: str | None = None) -> None:
        """In the place of those before; `above` is printed above them for good. No line is longer than the
        terminal is wide, or it would take two."""
        width = self.width
        for_good = [] if above is None else [above]
        text = f"\x1b[{self._shown}A" if self._shown else ""
        for line in (*for_good, *(line[: width - 1] for line in lines)):
            text += f"\r{line}\x1b[K\n"
        text += "\x1b[J"
        self._stream.write(text)
        self._stream.flush()
        self._shown = len(lines)

    def end(self) -> None:
        """What is shown stays."""
        self._shown = 0
