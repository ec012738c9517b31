# SPDX-License-Identifier: Apache-2.0
"""Child processes of a test: started with their output in a file, awaited with a deadline, never left
behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


class ProcessError(Exception):
    """A program of a test did not start, ended too early, or did not end; the message holds its last
    output."""


class Process:
    """One program in a session of its own, so that what it starts can be ended with it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.log = log
        words = [str(word) for word in command]
        if shutil.which(words[0]) is None:
            raise ProcessError(f"{words[0]} is not installed; `./run test` installs what it needs")
        # Should the test run be killed, the kernel ends this program, too. An `unshare` or `sh`
        # in front of a program keeps the setting, as each runs the next in its place.
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env} if env else None,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def last_output(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def wait(self, timeout_s: float) -> int:
        """The exit code (negative: the signal). Raises ProcessError when the program does not end in time."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProcessError(
                f"{self.name} did not end within {timeout_s:g} s:\n{self.last_output()}"
            ) from None

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            self._popen.send_signal(number)

    def terminate(self, timeout_s: float = 15.0) -> int:
        """SIGTERM, then wait; raises ProcessError when that does not end it (and ends it all the same)."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait(timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it now, with all that it started. Harmless when it is over."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def is_listening(process: Process, path: Path) -> bool:
    """Whether somebody accepts connections on this Unix socket, in the process's network namespace. Asks the
    kernel, so that no connection is spent."""
    try:
        sockets = Path(f"/proc/{process.pid}/net/unix").read_text()
    except OSError:
        return False  # it is gone
    for line in sockets.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == str(path) and int(fields[3], 16) & 0x10000:  # __SO_ACCEPTCON
            return True
    return False


def _starved_s(process: Process) -> float:
    """How long it has waited for a processor so far: on a busy machine that says nothing of it."""
    try:
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def wait_listening(process: Process, path: Path, timeout_s: float = 30.0) -> None:
    """Return when the process listens there. Linux has no event for this, so it is looked at every 10 ms.
    Time in which it was ready to run, and others did, does not count."""
    began = time.monotonic()
    while not is_listening(process, path):
        if not process.running:
            raise ProcessError(
                f"{process.name} ended instead of listening on {path}:\n{process.last_output()}"
            )
        if time.monotonic() - began - _starved_s(process) > timeout_s:
            raise ProcessError(f"{process.name} does not listen on {path}:\n{process.last_output()}")
        time.sleep(0.01)


def wait_said(process: Process, words: str, timeout_s: float = 60.0) -> str:
    """The first line of its output that has these words; looked at every 50 ms."""
    deadline = time.monotonic() + timeout_s
    while True:
        for line in process.log.read_text(errors="replace").splitlines():
            if words in line:
                return line
        if not process.running or time.monotonic() > deadline:
            raise ProcessError(f"{process.name} has not said “{words}”:\n{process.last_output()}")
        time.sleep(0.05)
