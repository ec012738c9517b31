# SPDX-License-Identifier: Apache-2.0
"""Idle backends that a node has forked (`./run bench --growth node`): what many disks on a host cost, the
node and the pages that they share included."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.contenders import Ours
from bench.sample import BenchError
from vhostsync.node.request import Request, Started, start

NODE_S = 15.0


class _Process:
    """What a contender does with the process that it has started."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self.pid = started.process

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 15)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)

    def wait(self, timeout: float | None = None) -> int:
        try:
            return self._started.wait(timeout)
        except TimeoutError as error:
            raise subprocess.TimeoutExpired("serve", timeout or 0) from error
        finally:
            self._started.close()


class ForkedOurs(Ours):
    """`start_ms`: from the request until it answers on its control socket."""

    def __init__(self, node: Path, *arguments: Any, **named: Any) -> None:
        self._node = node
        self.start_ms = 0.0
        super().__init__(*arguments, **named)

    def _spawn(self, command: Sequence[str]) -> Any:
        words = tuple(command[command.index("serve") + 1 :])
        with self._log.open("wb") as log, Path(os.devnull).open("rb") as nothing:
            request = Request(words, os.environ, str(self._directory), 0o077, (0, 1, 2))
            began = time.monotonic()
            started = start(self._node, request, [nothing.fileno(), log.fileno(), log.fileno()])
            while not self._monitor_path.exists() and time.monotonic() < began + NODE_S:
                time.sleep(0.001)
            self.start_ms = (time.monotonic() - began) * 1000
        return _Process(started)


@contextlib.contextmanager
def node_at(place: Path) -> Iterator[int]:
    """A node; its process."""
    command = [sys.executable, "-m", "vhostsync", "node", "--listen", str(place)]
    with place.with_suffix(".log").open("wb") as log, subprocess.Popen(command, stderr=log) as node:
        try:
            until = time.monotonic() + NODE_S
            while not place.exists():
                if time.monotonic() > until:
                    raise BenchError("the node does not listen")
                time.sleep(0.02)
            yield node.pid
        finally:
            node.terminate()


def pss_mib(processes: Sequence[int]) -> float:
    """What a page is shared by, each has a part of."""
    kib = 0
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kib += int(line.split()[1])
    return kib / 1024


def median_start_ms(running: Sequence[ForkedOurs]) -> float:
    return statistics.median(each.start_ms for each in running)
