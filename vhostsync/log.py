# SPDX-License-Identifier: Apache-2.0
"""Logging: readable lines on a terminal, one JSON object a line otherwise; always on stderr.

Use `structlog.get_logger()` where something is logged, with an event in words and values as keywords that
carry their unit: `log.warning("destination failed", disk=path, lag_bytes=n)`. What the standard library's
`logging` gets (asyncio's complaints, for example) comes out in the same form.

A line is written where it is logged, so a stderr that blocks for ever blocks the control plane (never the
data plane, which does not log)."""

import io
import logging
import sys
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

from .config import LogFormat, LogLevel
from .printable import printable, printable_lines

_LEVELS: dict[LogLevel, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure(log_format: LogFormat = "auto", level: LogLevel = "info", stream: TextIO | None = None) -> None:
    """Set up logging for this process. `auto` is text on a terminal and JSON otherwise. May be called
    again."""
    out = sys.stderr if stream is None else stream
    terminal = out.isatty()
    readable = log_format == "text" or (log_format == "auto" and terminal)
    processors: list[Processor] = [
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
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", _LineStream(out))),
        cache_logger_on_first_use=False,  # else a second call would not reach the loggers of modules
    )
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, _ToStructlog)]:
        root.removeHandler(handler)
    root.addHandler(_ToStructlog())
    # Other people's libraries at debug would tell about each wake-up of the event loop.
    root.setLevel(max(_LEVELS[level], logging.INFO))


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
