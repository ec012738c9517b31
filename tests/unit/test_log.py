# SPDX-License-Identifier: Apache-2.0
import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
import structlog

from vhostsync import log
from vhostsync.config import LogFormat


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


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
