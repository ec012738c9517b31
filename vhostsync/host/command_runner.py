# SPDX-License-Identifier: Apache-2.0
"""One command of the operator's that this process may have run, again and again, once it is confined: a
filter on system calls keeps it from starting any program itself.

So a process of its own, which is started before that and has none of our descriptors, runs that one command
and no other. All that it takes from this process, which a guest may have taken over, is the text of one
variable of the command's environment, whose name was fixed before. It ends when this process does. The
command is a list of words and goes through no shell; it may take so long and no longer, and is killed then
with all that it has started in its process group.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAID_BYTES = 500  # of what it says, the end
GRACE_S = 5.0  # beyond the command's own time
MESSAGE_BYTES = 65536


class CommandError(Exception):
    """It did not end with exit code 0: why, as a phrase."""


class CommandRunner:
    """Made before this process is confined. OSError."""

    def __init__(self, words: Sequence[str], timeout_s: float, variable: str) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(  # noqa: S603 our own interpreter and this file
                [sys.executable, "-I", "-S", str(Path(__file__)), str(timeout_s), variable, *words],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._socket.settimeout(timeout_s + GRACE_S)

    def run(self, value: str) -> None:
        """Returns when the command, with this in its variable, has ended with 0. Blocks, for `timeout_s` at
        most and a moment. CommandError.

        Whoever comes while it runs for somebody else gets a run of his own: one that began earlier may have
        looked at what is not so any more."""
        with self._lock:
            self._number += 1
            try:
                why = self._ask({"number": self._number, "value": value})
            except TimeoutError as error:
                raise CommandError("it was killed and is not over all the same") from error
            except OSError as error:
                raise CommandError(
                    "the helper process that runs it has ended; restart the backend"
                ) from error
        if why is not None:
            raise CommandError(why)

    def _ask(self, question: dict[str, Any]) -> str | None:
        """Why not; None: exit code 0. OSError."""
        self._socket.send(json.dumps(question).encode())
        while text := self._socket.recv(MESSAGE_BYTES):
            answer: dict[str, Any] = json.loads(text)
            if answer["number"] == question["number"]:  # else one that nobody waits for any more
                why: str | None = answer["why"]
                return why
        raise ConnectionResetError

    def close(self) -> None:
        """The helper process ends, once a command that it runs is over."""
        self._socket.close()


# ---- the process of its own -----------------------------------------------------------


def _why_not(words: Sequence[str], timeout_s: float, variable: str, value: str) -> str | None:
    # What it says goes to a file in memory. It may leave a process behind on purpose, the server that it has
    # started anew, say: of a pipe nobody would see the end as long as that lives, nor might that speak later.
    with os.fdopen(os.memfd_create("said", os.MFD_CLOEXEC), "r+b") as output:
        try:
            process = subprocess.Popen(  # noqa: S603 what the operator has written
                words, env={**os.environ, variable: value}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )
        except OSError as error:
            return f"it cannot be run: {error.strerror}"
        except ValueError as error:
            return f"it cannot be told {value!r}: {error}"
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"it was not over within {timeout_s:g} s and was killed"
        output.seek(max(0, output.seek(0, os.SEEK_END) - SAID_BYTES))
        said = output.read()
    if process.returncode == 0:
        return None
    last = said.decode(errors="replace").strip()
    ended = f"exit code {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
    return f"it ended with {ended}" + (f": {last}" if last else "")


def _serve(timeout_s: float, variable: str, words: Sequence[str]) -> None:
    """Until the other end is closed."""
    asked = socket.socket(fileno=0)
    while text := asked.recv(MESSAGE_BYTES):
        question = json.loads(text)
        why = _why_not(words, timeout_s, variable, str(question["value"]))
        try:
            asked.send(json.dumps({"number": question["number"], "why": why}).encode())
        except OSError:
            return  # whoever has asked is gone


if __name__ == "__main__":
    # A signal for the backend's whole process group (Ctrl-C) ends the backend; its end ends this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(float(sys.argv[1]), sys.argv[2], sys.argv[3:])
