# SPDX-License-Identifier: Apache-2.0
import contextlib
import fcntl
import io
import json
import logging
import os
import re
from collections.abc import Iterator

import pytest
import structlog

from vhostsync import log, log_writer
from vhostsync.option_values import LogFormat


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


pytestmark = pytest.mark.usefixtures("own_logging")


def test_json_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    log.configure("auto", "info", out)
    structlog.get_logger().warning("destination failed", lag_bytes=5)
    line = json.loads(out.getvalue())
    assert list(line) == ["timestamp", "level", "message", "lag_bytes"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    assert line == {"level": "warning", "message": "destination failed", "lag_bytes": 5}


def test_text_on_a_terminal() -> None:
    out = Terminal()
    log.configure("auto", "info", out)
    structlog.get_logger().info("ready", path="/x")
    assert "ready" in out.getvalue()
    assert not out.getvalue().startswith("{")


@pytest.mark.parametrize(("form", "start"), [("text", "2"), ("json", "{")])
def test_the_form_can_be_told(form: LogFormat, start: str) -> None:
    out = io.StringIO()
    log.configure(form, "info", out)
    structlog.get_logger().info("ready")
    assert out.getvalue().startswith(start)


def test_levels() -> None:
    out = io.StringIO()
    log.configure("json", "warning", out)
    logger = structlog.get_logger()
    logger.info("no")
    logger.warning("yes")
    assert out.getvalue().count("\n") == 1


def test_a_second_call_reaches_loggers_that_were_made_before() -> None:
    logger = structlog.get_logger("module")
    one, two = io.StringIO(), io.StringIO()
    log.configure("json", "info", one)
    logger.info("first")
    log.configure("json", "info", two)
    logger.info("second")
    logging.getLogger("other").warning("third")
    assert (one.getvalue().count("\n"), two.getvalue().count("\n")) == (1, 2)


def test_other_libraries_come_out_in_the_same_form() -> None:
    out = io.StringIO()
    log.configure("json", "info", out)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        logging.getLogger("asyncio").exception("it %s", "failed")
    line = json.loads(out.getvalue())
    assert (line["message"], line["logger"], line["level"]) == ("it failed", "asyncio", "error")
    assert "ZeroDivisionError" in line["exception"]


def test_a_stderr_that_is_gone_is_survived() -> None:
    out = io.StringIO()
    log.configure("json", "info", out)
    out.close()
    structlog.get_logger().info("nobody hears")


# ---- a stderr that takes nothing ------------------------------------------------------


class Pipe:
    """Whoever writes to `end` waits once `fill` has filled it, until somebody reads."""

    def __init__(self) -> None:
        self.read_end, self.end = os.pipe()
        fcntl.fcntl(self.end, fcntl.F_SETPIPE_SZ, 4096)

    def fill(self) -> None:
        os.set_blocking(self.end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.end, b"." * 4096)
        os.set_blocking(self.end, True)

    def lines(self, count: int) -> list[str]:
        """What is read until so many lines have come; the filling is left out."""
        text = b""
        while text.count(b"\n") < count:
            text += os.read(self.read_end, 65536)
        return text.decode().lstrip(".").splitlines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    it = Pipe()
    yield it
    os.close(it.read_end)
    os.close(it.end)


def test_nobody_waits_for_a_full_pipe_and_what_is_dropped_is_counted(pipe: Pipe) -> None:
    pipe.fill()
    dropped: list[int] = []

    def idle(lines: int, _at_the_end: bool) -> None:
        dropped.append(lines)

    writer = log_writer.LineWriter(pipe.end, idle, queue_bytes=100)
    writer.start()
    for number in range(30):
        writer.write(f"line {number:03}\n")  # 9 bytes each: one is being written, 10 or 11 are kept
    assert 18 <= writer.dropped <= 20
    kept = 30 - writer.dropped
    assert pipe.lines(kept) == [f"line {number:03}" for number in range(kept)]
    writer.write("afterwards\n")
    assert pipe.lines(1) == ["afterwards"]
    writer.end(10)
    assert sum(dropped) == writer.dropped


def test_the_end_does_not_wait_for_a_full_pipe(pipe: Pipe) -> None:
    pipe.fill()
    writer = log_writer.LineWriter(pipe.end, lambda *_: None)
    writer.start()
    writer.write("nobody reads it\n")
    writer.end(0.01)
    writer.write("nor this\n")
    assert writer.dropped == 1
    assert pipe.lines(1) == ["nobody reads it"]


def test_what_is_left_at_the_end_is_written_first(pipe: Pipe) -> None:
    writer: log_writer.LineWriter

    def idle(_: int, at_the_end: bool) -> None:
        if at_the_end:
            writer.write("last\n")

    writer = log_writer.LineWriter(pipe.end, idle)
    writer.start()
    for number in range(50):
        writer.write(f"{number}\n")
    writer.end(10)
    assert pipe.lines(51) == [*(str(number) for number in range(50)), "last"]


def test_a_disk_that_fails_every_request_does_not_fill_the_log() -> None:
    out = io.StringIO()
    log.configure("json", "info", out)
    logger = structlog.get_logger()
    for number in range(993):
        logger.error("I/O error", disk="source", offset=number)
    logger.error("I/O error", disk="destination", offset=0)
    logger.debug("detail")
    messages = [json.loads(line)["message"] for line in out.getvalue().splitlines()]
    assert messages == ["I/O error"] * (log.KIND_LINES + 1)


def test_lines_of_one_kind_are_limited_and_the_rest_is_counted() -> None:
    now_s = 0.0
    limit = log_writer.KindLimit(2, 10.0, lambda: now_s)
    assert [limit.admit("a") for _ in range(5)] == [True, True, False, False, False]
    assert limit.admit("b")
    assert (limit.over(), limit.next_s()) == ([], 10.0)
    now_s = 10.0
    assert (limit.over(), limit.next_s()) == ([("a", 3)], None)
    assert limit.admit("a")
    now_s = 21.0
    assert limit.over() == []
    assert [limit.admit("a") for _ in range(3)] == [True, True, False]
    assert limit.over(at_once=True) == [("a", 1)]
    for kind in range(1000):
        assert limit.admit(f"kind {kind}")
