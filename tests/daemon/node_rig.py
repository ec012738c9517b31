# SPDX-License-Identifier: Apache-2.0
"""A node, and backends that are forked from it, as the other tests know backends."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tests.daemon.rig import WAIT_S, Served
from tests.guest.backends import vhostsync_command
from tests.guest.processes import Process, ProcessError, wait_listening
from vhostsync.errors import UnreachableError
from vhostsync.node.request import Request, Started, start


class Node(Process):
    def __init__(self, folder: Path, *options: str, before: Sequence[str] = ()) -> None:
        """`before`: a command that becomes the node, whose words are its last arguments."""
        self.socket = folder / "node"
        command = [*before, *vhostsync_command(), "node", "--listen", str(self.socket), *options]
        super().__init__("vhostsync node", command, folder / "node.log")
        wait_listening(self, self.socket)

    def kill_alone(self) -> None:
        """SIGKILL, and its backends go on."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait(WAIT_S)


class Forked(Process):
    """A backend whose parent is a node. Nothing but /proc tells of its end once that is gone."""

    def __init__(self, started: Started, log: Path) -> None:
        self.name, self.log, self._started = "vhostsync serve --from-node", log, started
        self._pidfd = os.pidfd_open(started.process)

    @property
    def pid(self) -> int:
        return self._started.process

    @property
    def running(self) -> bool:
        return Path(f"/proc/{self.pid}/exe").exists()

    def wait(self, timeout_s: float) -> int:
        """As the node tells it, or 0 where that has ended before."""
        try:
            return self._started.wait(timeout_s)
        except TimeoutError:
            raise ProcessError(f"{self.name} did not end:\n{self.last_output()}") from None
        except UnreachableError:
            until = time.monotonic() + timeout_s
            while self.running and time.monotonic() < until:
                time.sleep(0.01)
            return 0

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        if self._pidfd >= 0:
            self.signal(signal.SIGKILL)
            os.close(self._pidfd)
            self._started.close()
            self._pidfd = -1


class ForkedServed(Served):
    """A `Served` that a node has forked."""

    def __init__(
        self, node: Node, folder: Path, disk: Path, *options: str | Path, state_directory: Path | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._node = node
        super().__init__(folder, disk, *options, state_directory=state_directory)

    def start(self, words: Sequence[str | Path], *, pass_fds: Sequence[int] = ()) -> Process:
        assert not pass_fds
        told = [str(word) for word in words]
        told = told[told.index("serve") + 1 :]
        with self._log.open("ab") as log, Path(os.devnull).open("rb") as nothing:
            request = Request(
                tuple(told), {"STATE_DIRECTORY": str(self.state_directory), "PATH": os.defpath},
                str(self.folder), 0o077, (0, 1, 2),
            )  # fmt: skip
            return Forked(
                start(self._node.socket, request, [nothing.fileno(), log.fileno(), log.fileno()]), self._log
            )
