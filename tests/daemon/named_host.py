# SPDX-License-Identifier: Apache-2.0
"""A host of a test's own: its state directory, the places of its sockets, and backends that are served by
name."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.daemon.rig import WAIT_S, await_true
from tests.frontend import Frontend
from tests.guest.backends import vhostsync_command
from tests.guest.processes import Process, wait_listening
from tests.guest.qmp_client import Qmp
from tests.guest_ring import GuestMemory
from tests.sizes import MIB
from tests.vhost_client import VhostUserTransport
from vhostsync.record.names import find_name
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord, Worth


class Host:
    """The state and the runtime directory of a host of our own; `run`: that of another one."""

    def __init__(self, work: Path, run: Path | None = None) -> None:
        self.work = work
        self.state, self.run = work / "state", run if run is not None else work / "run"
        self.environment = {
            "STATE_DIRECTORY": str(self.state), "VHOSTSYNC_RUNTIME_DIRECTORY": str(self.run),
        }  # fmt: skip

    def tell(self, *words: str | Path, code: int = 0) -> str:
        """stdout, or stderr where it is to fail."""
        done = subprocess.run(
            [*vhostsync_command(), *map(str, words)], capture_output=True, text=True, check=False,
            env={**os.environ, **self.environment}, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    def list(self, code: int = 0) -> dict[str, dict[str, Any]]:
        """By label."""
        done = subprocess.run(
            [*vhostsync_command(), "list", "--json"], capture_output=True, text=True, check=False,
            env={**os.environ, **self.environment}, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return {each["label"]: each for each in json.loads(done.stdout)}

    def start(self, name: str, *options: str | Path) -> Process:
        """A backend; it may not listen yet."""
        return Process(
            f"serve {name}", [*vhostsync_command(), "serve", "--name", name, *options],
            self.work / f"{name}.log", env=self.environment,
        )  # fmt: skip

    @contextmanager
    def serve(self, name: str, *options: str | Path) -> Iterator[Process]:
        process = self.start(name, *options)
        try:
            wait_listening(process, self.run / name / "control")
            yield process
        finally:
            process.kill()

    def ask(self, name: str, command: str, **arguments: Any) -> dict[str, Any]:
        """What the backend of this name answers."""
        client = Qmp(self.run / name / "control")
        try:
            found: dict[str, Any] = client.execute(command, **arguments)
            return found
        finally:
            client.close()

    def status(self, name: str) -> dict[str, Any]:
        return self.ask(name, "query-status")

    def mirror(self, name: str, destination: Path, *, create: bool = True) -> None:
        """Returns in the steady state, when the record says so too."""
        self.ask(name, "mirror-start", destination=str(destination), create=create)
        self.await_state(name, "steady")
        await_true(lambda: self.recorded(name).peer_worth is Worth.UP_TO_DATE, f"{name}'s record says so")

    def recorded(self, name: str) -> StateRecord:
        record = StateFile(find_name(name, self.state).record).load()
        assert record is not None
        return record

    def guest(self, name: str) -> Frontend:
        """Not started yet: use it as a context manager."""
        transport = VhostUserTransport(self.run / name / "vm.sock", timeout_s=WAIT_S)
        return Frontend(transport, memory=GuestMemory((32 * MIB,)), timeout_s=WAIT_S)

    def await_state(self, name: str, state: str) -> None:
        await_true(lambda: self.status(name)["mirror"] == state, f"{name} is {state}")
