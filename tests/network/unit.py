# SPDX-License-Identifier: Apache-2.0
"""An NBD server that an operator runs: a script ends the process that there was, and starts another one. The
same script is the backend's --fence-command. (docs/network.md has it in words.)"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from tests.network.links import OtherHost


class Unit:
    """A context manager. `words` start the server, which goes into the background and writes `pid_file`."""

    def __init__(self, pid_file: Path, words: Sequence[str | Path], uri: str) -> None:
        self._pid_file = pid_file
        self._words = [str(word) for word in words]
        self.uri = uri

    @property
    def restart_command(self) -> str:
        return shlex.join([sys.executable, __file__, str(self._pid_file), *self._words])

    def restart(self) -> None:
        subprocess.run(shlex.split(self.restart_command), check=True, stdout=subprocess.DEVNULL)

    def signal(self, number: signal.Signals) -> None:
        os.kill(int(self._pid_file.read_text()), number)

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self._pid_file)


def _needs(program: str, package: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (package {package})")


class QemuNbdUnit(Unit):
    """qemu-nbd over a raw image, on a Unix socket."""

    def __init__(self, folder: Path, image: Path) -> None:
        _needs("qemu-nbd", "qemu-utils")
        socket, pid_file = folder / "server.sock", folder / "server.pid"
        words = (
            "qemu-nbd", "--fork", "--persistent", "--format", "raw", "--discard", "unmap",
            "--pid-file", pid_file, "--socket", socket, image,
        )  # fmt: skip
        super().__init__(pid_file, words, f"nbd+unix:///?socket={socket}")


class NbdkitUnit(Unit):
    """nbdkit over a raw image, on another host, behind TLS. It forgets what was not flushed when it ends: its
    cache writes nothing before."""

    def __init__(
        self, folder: Path, image: Path, host: OtherHost, certificates: Path, trusted: Path
    ) -> None:
        """`certificates`: its own; `trusted`: those of whoever asks it."""
        _needs("nbdkit", "nbdkit")
        pid_file = folder / "server.pid"
        words = host.inside(
            "nbdkit", "--pidfile", pid_file, "--ipaddr", host.address, "--tls=require",
            f"--tls-certificates={certificates}", "--filter=cache", "file", image, "cache=writeback",
        )  # fmt: skip
        super().__init__(pid_file, words, f"nbds://{host.address}/?tls-certificates={trusted}")


def end(pid_file: Path) -> None:
    """Returns when the process is gone, whatever state it was in."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        process = os.pidfd_open(int(pid_file.read_text()))
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [])
        os.close(process)


if __name__ == "__main__":
    pid_of_server = Path(sys.argv[1])
    # The operator and the backend may both run this: one after the other, as a service manager would have it.
    with pid_of_server.with_suffix(".lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        end(pid_of_server)
        # Whoever runs this waits for the end of its output: the server gets none.
        code = subprocess.run(
            sys.argv[2:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode
    sys.exit(code)
