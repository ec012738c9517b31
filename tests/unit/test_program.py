# SPDX-License-Identifier: Apache-2.0
"""The command line as a program of its own: exit codes, signals, its terminal, output that cannot be
written."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.command_line import PROGRAM, ROOT, Served, served, start
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord
from vhostsync.storage.identity import DiskIdentity

__all__ = ["served"]  # fixtures


def test_as_a_program_it_ends_with_the_code(served: Served, tmp_path: Path) -> None:
    with start("status") as program:
        out, err = program.communicate(timeout=30)
    assert (program.returncode, err) == (0, "")
    assert "/disks/a.img" in out
    with start("status", "--control", str(tmp_path / "nobody")) as program:
        program.communicate(timeout=30)
    assert program.returncode == 3


def test_help_and_capabilities_need_no_library(tmp_path: Path) -> None:
    for words in (["--help"], ["serve", "--help"], ["--print-capabilities"]):
        done = subprocess.run(
            [sys.executable, "-S", "-m", "vhostsync", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupted_wait_leaves_the_copy_alone(served: Served) -> None:
    served.backend.mirror.copy_steps = 0
    with start("mirror", "start", "/b.img", "--wait") as program:
        assert program.stdout is not None
        assert program.stdout.readline().startswith("syncing")
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=30)
    assert program.returncode == 130
    assert err == (
        "vhostsync: The copy goes on; `vhostsync watch` shows it, `vhostsync mirror cancel` ends it.\n"
    )
    assert served.backend.mirror.now.state == "syncing"


def test_watch_shows_events_and_ends_with_the_backend(served: Served) -> None:
    with start("watch", "--json", "--interval", "50ms") as program:
        assert program.stdout is not None
        assert json.loads(program.stdout.readline())["mirror"]["state"] == "passthrough"
        served.portal.call(served.backend.events.publish, "IO_ERROR", {"disk": "source"})
        while "event" not in (line := json.loads(program.stdout.readline())):
            pass
        assert line["data"] == {"disk": "source"}
        served.portal.call(served.backend.quit_asked.set)
        rest, err = program.communicate(timeout=30)
    assert (program.returncode, err) == (0, "")
    assert "SHUTDOWN" in rest


def test_a_reader_that_leaves_is_no_error(served: Served) -> None:
    with start("watch", "--json", "--interval", "1ms") as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.readline()
        program.stdout.close()
        program.wait(timeout=30)
        assert program.stderr.read() == ""
    assert program.returncode == 1


SENTENCE = "vhostsync: The output cannot be written: No space left on device.\n"


@pytest.mark.parametrize(
    "words",
    [
        ["status"], ["status", "--json"], ["stats"], ["mirror", "start", "/b.img"],
        ["mirror", "start", "/b.img", "--wait"], ["watch"], ["watch", "--json"], ["record"],
        ["record", "--json"], ["serve", "--print-capabilities"], ["--print-capabilities"], ["--help"],
        ["serve", "--help"], ["--version"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_output_that_cannot_be_written_is_one_sentence(
    served: Served, tmp_path: Path, words: list[str]
) -> None:
    StateFile(tmp_path / "vm.record.json").change(StateRecord.first(DiskIdentity("/a.img", "file", 1, 2, 3)))
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, *words], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "STATE_DIRECTORY": str(tmp_path)}, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, SENTENCE)


@pytest.mark.parametrize("words", [["status"], ["serve", "--print-capabilities"], ["--help"]], ids=" ".join)
def test_without_a_standard_output_nothing_is_complained_of(served: Served, words: list[str]) -> None:
    command = shlex.join([*PROGRAM, *words])
    done = subprocess.run(
        ["sh", "-c", f"exec {command} >&-"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


SERVE = ["serve", "--blk-file", "/no", "--socket-path", "/no/no"]


# What is loaded when the signal comes: -X importtime tells of each module when it is there.
@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["--help"], "argparse"), (["status"], "vhostsync.config"), (["status"], "anyio"),
        (["record"], "vhostsync.record.state_record"), (SERVE, "structlog"),
        (SERVE, "vhostsync.engine.engine_event"),
    ],
    ids=lambda each: each if isinstance(each, str) else each[0],
)  # fmt: skip
def test_an_interrupted_start_is_quiet(tmp_path: Path, words: list[str], module: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "vhostsync", *words], cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "STATE_DIRECTORY": str(tmp_path), "VHOSTSYNC_CONTROL": str(tmp_path / "none")},
    ) as program:  # fmt: skip
        assert program.stderr is not None
        loaded = next(line for line in program.stderr if line.rstrip().endswith(f" {module}"))
        program.send_signal(signal.SIGINT)
        rest = [line for line in program.stderr if not line.startswith("import time:")]
    assert (loaded != "", rest) == (True, [])
    # By the signal, if it met code that is run from a string (dataclasses): 130 to a shell, too.
    assert program.returncode in (130, -signal.SIGINT)


def test_a_terminal_gets_a_bar(served: Served) -> None:
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": "100", "LINES": "24"}
    program = subprocess.Popen(
        [*PROGRAM, "mirror", "start", "/b.img", "--wait"],
        cwd=ROOT,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        try:
            while data := terminal.read(4096):
                shown += data
        except OSError:
            pass  # EIO: the program has closed it
    assert program.wait(timeout=30) == 0
    text = shown.decode()
    assert "syncing  [#######----------------------]  25.0 %" in text
    assert "\r" in text
    assert text.rstrip().split("\r\n")[-1].strip("\r\x1b[K").startswith("/b.img is up to date")
