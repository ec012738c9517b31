# SPDX-License-Identifier: Apache-2.0
"""Idle backends that a node has forked (`./run bench --growth node`): what many disks on a host cost, the
node and the pages that they share included, and how long it takes to ask all of them."""

import contextlib
import os
import pwd
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contenders import Ours
from bench.sample import BenchError
from vhostsync.node.request import Request, Started, start

NODE_S = 15.0
ASKED_TIMES = 3
OF_ONE_USER = 100  # rings of more are over the usual limit on locked memory, 8 MiB, which is a user's


@dataclass(frozen=True)
class User:
    """Whom backends run as (--user)."""

    name: str
    uid: int
    gid: int

    def give(self, *paths: Path) -> None:
        for path in paths:
            os.chown(path, self.uid, self.gid)


def user_of(number: int) -> User | None:
    """Of the backend of this number: one for each OF_ONE_USER, of those that the system has. None: the
    bench's own user, who may not become another one."""
    if os.geteuid() != 0:
        return None
    others = sorted((each.pw_uid, each.pw_gid, each.pw_name) for each in pwd.getpwall() if each.pw_uid)
    uid, gid, name = others[number // OF_ONE_USER]
    return User(name, uid, gid)


@dataclass(frozen=True)
class Host:
    """A host of the bench's own: its backends find their place there, and commands find the backends."""

    folder: Path

    @property
    def node(self) -> Path:
        return self.folder / "node"

    @property
    def disks(self) -> Path:
        return self.folder / "disks"

    @property
    def away(self) -> Path:
        return self.folder / "away"

    def state_of(self, user: User) -> Path:
        return self.folder / "state" / user.name

    def environment(self, user: User | None = None) -> dict[str, str]:
        """Of a backend of this user, or of a command."""
        own = {
            "STATE_DIRECTORY": self.state_of(user) if user is not None else self.folder / "state",
            "VHOSTSYNC_RUNTIME_DIRECTORY": self.folder / "run",
        }
        return {**os.environ, **{name: str(place) for name, place in own.items()}}

    def median_s(self, *words: str, says: str, times: int) -> float:
        """Of so many runs of a command that asks all disks; BenchError unless it says that, so often."""
        took = []
        for _ in range(ASKED_TIMES):
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "vhostsync", *words], env=self.environment(), capture_output=True,
                text=True, check=False,
            )  # fmt: skip
            took.append(time.monotonic() - began)
            if done.stdout.count(says) != times:
                raise BenchError(f"{words[0]} did not reach all backends: {done.stderr[-300:]}")
        return statistics.median(took)


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

    def __init__(self, host: Host, user: User | None, *arguments: Any, **named: Any) -> None:
        self._host = host
        self._user = user
        self.start_ms = 0.0
        super().__init__(*arguments, **named)

    def _state_options(self) -> tuple[str, ...]:
        return ("--user", self._user.name) if self._user is not None else ()

    def _spawn(self, command: Sequence[str]) -> Any:
        if self._user is not None:
            state = self._host.state_of(self._user)
            state.mkdir(parents=True, exist_ok=True)
            self._user.give(state, self._directory)
        words = tuple(command[command.index("serve") + 1 :])
        with self._log.open("wb") as log, Path(os.devnull).open("rb") as nothing:
            environment, place = self._host.environment(self._user), str(self._directory)
            request = Request(words, environment, place, 0o077, (0, 1, 2))
            began = time.monotonic()
            started = start(self._host.node, request, [nothing.fileno(), log.fileno(), log.fileno()])
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


def asking_s(host: Host, count: int) -> tuple[float, float, float]:
    """How long `list`, a dry run of `evacuate` and one scrape take over all of them."""
    evacuate = ("evacuate", str(host.disks), "--to", str(host.away), "--dry-run", "--json")
    return (
        host.median_s("list", "--json", says='"state": "steady"', times=count),
        host.median_s(*evacuate, says='"why-not"', times=count),
        _scrape_s(host, count),
    )


def _scrape_s(host: Host, count: int) -> float:
    """The median of a few of an exporter that runs, which BenchError says has not reached all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "vhostsync", "exporter", "--listen", address, "--log-level", "error"]
    took: list[float] = []
    with subprocess.Popen(command, env=host.environment()) as exporter:
        try:
            until = time.monotonic() + NODE_S
            while len(took) < ASKED_TIMES:
                began = time.monotonic()
                try:
                    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as page:
                        text = page.read().decode()
                except urllib.error.URLError as error:  # it does not listen yet
                    if took or time.monotonic() > until:
                        raise BenchError(f"the exporter does not answer: {error}") from error
                    time.sleep(0.05)
                    continue
                took.append(time.monotonic() - began)
                if len(re.findall(r"^vhostsync_up{.*} 1$", text, re.MULTILINE)) != count:
                    raise BenchError("the exporter did not reach all backends")
        finally:
            exporter.terminate()
    return statistics.median(took)
