# SPDX-License-Identifier: Apache-2.0
"""Logging: readable lines on a terminal, one JSON object a line otherwise; always on stderr.

Use `structlog.get_logger()` where something is logged, with an event in words and values as keywords that
carry their unit: `log.warning("destination failed", disk=path, lag_bytes=n)`. What the standard library's
`logging` gets (asyncio's complaints, for example) comes out in the same form.

A stderr that takes nothing holds up nobody (log_writer.py): once `write_in_background` was called, what finds
no room is dropped and counted. Of lines that say the same (but for their values) at most KIND_LINES in
KIND_PERIOD_S are written; the rest is counted in one line."""

import errno
import io
import logging
import sys
from collections.abc import Callable
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

from .errors import EngineError, VhostsyncError, leaves
from .log_writer import KindLimit, LineWriter
from .option_values import LogFormat, LogLevel
from .printable import printable, printable_lines

_LEVELS: dict[LogLevel, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


KIND_LINES: Final = 20
KIND_PERIOD_S: Final = 10.0

_NOT_LIMITED: Final = ("debug", "critical")

LEFT_OUT: Final = "lines of one kind were left out"
DROPPED: Final = "log lines were dropped, because stderr did not take them"


def configure(log_format: LogFormat = "auto", level: LogLevel = "info", stream: TextIO | None = None) -> None:
    """Set up logging for this process. `auto` is text on a terminal and JSON otherwise. May be called
    again."""
    global _writer
    out = sys.stderr if stream is None else stream
    terminal = out.isatty()
    limit = KindLimit(KIND_LINES, KIND_PERIOD_S)
    _writer = _background_writer(out, limit) if stream is None else None
    readable = log_format == "text" or (log_format == "auto" and terminal)
    processors: list[Processor] = [
        _only_some(limit),
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if readable:
        processors += [
            _printable_values,
            structlog.dev.ConsoleRenderer(
                colors=terminal, exception_formatter=_plain_traceback, pad_event_to=32
            ),
        ]
    else:
        processors += [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            _common_first,
            structlog.processors.JSONRenderer(default=str),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", _writer or _LineStream(out))),
        cache_logger_on_first_use=False,  # else a second call would not reach the loggers of modules
    )
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, _ToStructlog)]:
        root.removeHandler(handler)
    root.addHandler(_ToStructlog())
    # Other people's libraries at debug would tell about each wake-up of the event loop.
    root.setLevel(max(_LEVELS[level], logging.INFO))


_writer: LineWriter | None = None


def write_in_background() -> None:
    """From here on nobody waits for stderr. Starts a thread."""
    if _writer is not None:
        _writer.start()


def end() -> None:
    """What is not written yet is, if stderr takes it soon."""
    if _writer is not None:
        _writer.end()


def say(text: str) -> None:
    """A line of its own form on stderr; waits for it no longer than a log line does."""
    if _writer is not None:
        _writer.write(text + "\n")
    else:
        sys.stderr.write(text + "\n")


def run_to_its_end(program: Callable[[], None]) -> int:
    """Its exit code: 1 where it ends by errors that have a reason outside the code, each of which is one
    sentence on stderr. Then what is left of the log is written."""
    failures: list[BaseException] = []
    try:
        program()
    except* VhostsyncError as group:
        failures += leaves(group)
    except* RuntimeError as group:
        if any(str(error) != "can't start new thread" for error in leaves(group)):
            raise
        failures += [EngineError.at_start("starting a thread", errno.EAGAIN)]
    for failure in failures:
        say(f"vhostsync: {printable(str(failure))}")
    end()
    return 1 if failures else 0


def dropped_lines() -> int:
    """How many found no room."""
    return _writer.dropped if _writer is not None else 0


def _background_writer(out: TextIO, limit: KindLimit) -> LineWriter | None:
    def idle(dropped: int, at_the_end: bool) -> float | None:
        if dropped:
            structlog.get_logger().warning(DROPPED, lines=dropped)
        _tell_left_out(limit, at_once=at_the_end)
        return limit.next_s()

    try:
        return LineWriter(out.fileno(), idle)
    except (OSError, ValueError):
        return None  # no descriptor: a test's


def _tell_left_out(limit: KindLimit, *, at_once: bool = False) -> None:
    for kind, lines in limit.over(at_once):
        structlog.get_logger().warning(LEFT_OUT, kind=kind, lines=lines, seconds=KIND_PERIOD_S)


def _only_some(limit: KindLimit) -> Processor:
    def processor(_: object, method: str, line: EventDict) -> EventDict:
        if method in _NOT_LIMITED or line["event"] in (LEFT_OUT, DROPPED):
            return line
        _tell_left_out(limit)
        role = line.get("disk")
        if not limit.admit(f"{line['event']} ({role})" if role in _ROLES else str(line["event"])):
            raise structlog.DropEvent
        return line

    return processor


_ROLES: Final = ("source", "destination")


def _printable_values(_: object, __: str, line: EventDict) -> EventDict:
    """What others have named (paths, processes) is text and does nothing else."""
    return {key: printable(value) if isinstance(value, str) else value for key, value in line.items()}


def _plain_traceback(out: TextIO, exc_info: ExcInfo) -> None:
    """Plain: one with the values of locals would show a client's or a guest's data."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    out.write(printable_lines(text.getvalue()))


def _common_first(_: object, __: str, line: EventDict) -> EventDict:
    """What every line has comes first, for people who read the JSON."""
    common = ("timestamp", "level", "message")
    return {key: line[key] for key in common} | {key: line[key] for key in line if key not in common}


class _LineStream:
    """Writes whole lines and survives a stderr that is gone: nobody can be told, and the guest's disk goes
    on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


class _ToStructlog(logging.Handler):
    """Hands the records of the standard library's logging to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        log = cast("Any", structlog.get_logger())
        name = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning"}.get(
            record.levelno, "error"
        )
        try:
            getattr(log, name)(record.getMessage(), logger=record.name, exc_info=record.exc_info or None)
        except Exception:
            self.handleError(record)
