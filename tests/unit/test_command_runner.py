# SPDX-License-Identifier: Apache-2.0
"""The process that runs one command of the operator's for a backend that may start none itself."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from vhostsync.config import ServeConfig
from vhostsync.errors import ConfigError, FenceError
from vhostsync.host.command_runner import CommandError, CommandRunner
from vhostsync.mirror.fence import DISK_VARIABLE, Fence, Means


@contextmanager
def runner(*words: str, timeout_s: float = 30.0) -> Iterator[CommandRunner]:
    made = CommandRunner(words, timeout_s, DISK_VARIABLE)
    try:
        yield made
    finally:
        made.close()
        made._process.wait(30)


def python(*lines: str) -> tuple[str, ...]:
    return sys.executable, "-c", "\n".join(("import os, subprocess, sys, time", *lines))


def test_it_runs_each_time_it_is_asked_and_knows_of_which_disk(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with runner(*python(f"print(os.environ['VHOSTSYNC_DISK'], file=open({str(said)!r}, 'a'))")) as it:
        it.run("nbd://a/; rm *")
        it.run("nbd://b")
    assert said.read_text() == "nbd://a/; rm *\nnbd://b\n"


def test_who_took_the_backend_over_sets_no_other_variable(tmp_path: Path) -> None:
    """LD_PRELOAD, say: the command runs outside of the sandbox."""
    said = tmp_path / "said"
    with runner(*python(f"print(*os.environ.values(), file=open({str(said)!r}, 'w'))")) as it:
        theirs = {"environment": {"LD_PRELOAD": "theirs.so"}, "variable": "PATH"}
        assert it._ask({"number": 1, "value": "one", **theirs}) is None
        assert "one" in said.read_text() and "theirs.so" not in said.read_text()
        with pytest.raises(CommandError, match="cannot be told"):
            it.run("a\0b")


def test_it_has_no_descriptor_of_ours(tmp_path: Path) -> None:
    """One of a disk would keep its lock."""
    said, disk = tmp_path / "said", tmp_path / "disk"
    lines = (
        "held = [os.path.realpath(f'/proc/self/fd/{each}') for each in os.listdir('/proc/self/fd')]",
        f"print(*held, file=open({str(said)!r}, 'w'))",
    )
    with disk.open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        with runner(*python(*lines)) as it:
            it.run("nbd://a")
            held = [os.path.realpath(each) for each in Path(f"/proc/{it._process.pid}/fd").iterdir()]
    assert held and str(disk) not in held
    assert str(disk) not in said.read_text().split()


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (("sys.exit('not yet')",), "it ended with exit code 1: not yet"),
        (("os.kill(os.getpid(), 9)",), "it ended with signal 9"),
    ],
)
def test_what_fails_says_why(lines: tuple[str, ...], why: str) -> None:
    with runner(*python(*lines)) as it, pytest.raises(CommandError, match=why):
        it.run("nbd://a")


def test_what_cannot_be_run_says_so() -> None:
    with runner("/no/such/program") as it, pytest.raises(CommandError, match="cannot be run: No such file"):
        it.run("nbd://a")


def test_what_takes_too_long_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    lines = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
        f"print(child.pid, file=open({str(pid)!r}, 'w'), flush=True)",
        "time.sleep(600)",
    )
    with runner(*python(*lines), timeout_s=5.0) as it:
        with pytest.raises(CommandError, match="not over within 5 s and was killed"):
            it.run("nbd://a")
        deadline = time.monotonic() + 20
        while is_alive(int(pid.read_text())):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(CommandError, match="killed"):
            it.run("nbd://a")


def test_what_it_leaves_behind_goes_on(tmp_path: Path) -> None:
    """The server that it has started anew, with the same stdout."""
    pid = tmp_path / "pid"
    lines = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
        f"print(child.pid, file=open({str(pid)!r}, 'w'), flush=True)",
    )
    with runner(*python(*lines), timeout_s=10.0) as it:
        it.run("nbd://a")
    left = int(pid.read_text())
    try:
        assert is_alive(left)
    finally:
        os.kill(left, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_ends_with_the_backend() -> None:
    made = CommandRunner(("true",), 5.0, DISK_VARIABLE)
    made.close()
    assert made._process.wait(30) == 0
    with pytest.raises(CommandError):
        made.run("nbd://a")


def config(*words: str) -> ServeConfig:
    return ServeConfig(socket_path=Path("/s"), blk_file="/a", fence_command=shlex.join(words))


def test_a_command_is_words_and_no_shell() -> None:
    assert config("/bin/fence", "a b", "$HOME;").fence_words == ("/bin/fence", "a b", "$HOME;")
    for wrong, why in (("", "is empty"), ("'", "No closing quotation")):
        with pytest.raises(ConfigError, match=why):
            ServeConfig(socket_path=Path("/s"), blk_file="/a", fence_command=wrong)
    with pytest.raises(ConfigError, match="not both"):
        ServeConfig(socket_path=Path("/s"), blk_file="/a", fence_command="x", fence="limit")


def test_the_fence_says_what_it_waits_for() -> None:
    fence = Fence.of(config(*python("sys.exit(3)")))
    assert fence.means is Means.COMMAND and fence.command is not None
    try:
        with pytest.raises(FenceError, match=r"once --fence-command succeeds; it ended with exit code 3"):
            anyio.run(fence.make_certain, "nbd://a")
    finally:
        fence.close()
        fence.command._process.wait(30)
    with pytest.raises(FenceError, match="mirror start nbd://a --fenced"):
        anyio.run(Fence().make_certain, "nbd://a")
    anyio.run(Fence(Means.LIMIT).make_certain, "nbd://a")  # that it can be opened is the proof
