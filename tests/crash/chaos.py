# SPDX-License-Identifier: Apache-2.0
"""A thread that does to a backend, at random and under load, all that an operator and fate may do: mirrors
begun, cancelled, verified, switched there and back; kills and restarts at any moment of these.

What must hold all the time is looked at by the load (tests/crash/load.py); here is looked at what the backend
says: no verification finds a difference, and no descriptor, thread or mapping is left behind.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.crash.backend_thread import BackendThread
from tests.guest.backends import Vhostsync
from tests.guest.processes import ProcessError
from tests.guest.qmp_client import QmpError
from vhostsync.record.state_file import StateFile

LEFT_BEHIND_MAX = 8
"""Descriptors that a process may have more than after its start, with a mirror and a client or two."""


class Chaos(BackendThread):
    """On two disks; until `deadline_s` have passed."""

    def __init__(
        self,
        folder: Path,
        disks: tuple[Path, Path],
        *,
        queues: int,
        rng: random.Random,
        news: Callable[[], None],
        deadline_s: float,
    ) -> None:
        super().__init__("chaos", news=news, deadline_s=deadline_s)
        self.done: Counter[str] = Counter()
        self.current = disks[0]
        self._folder, self._disks, self._queues = folder, disks, queues
        self._rng = rng
        self._descriptors = 0

    # -- what may happen ------------------------------------------------------

    def _work(self) -> None:
        actions = (
            [self._start_mirror, self._await_steady, self._switch_keeping] * 6
            + [self._verify] * 4
            + [self._kill] * 2
            + [self._switch, self._cancel, self._cancel_at_once, self._restart]
        )
        self._serve()
        while not self._time_is_up:
            action = self._rng.choice(actions)
            try:
                action()
                self.done[action.__name__.strip("_")] += 1
            except QmpError:
                self.done["refused"] += 1  # it did not fit the state: that is an answer, too
            self._stop.wait(self._rng.uniform(0, 0.05))
        self._settle()

    def _serve(self) -> None:
        """On the disk that the state record names, as an operator would."""
        record = StateFile(self._folder / "disk.state").load()
        if record is not None:
            self.current = Path(record.current.path)
        threads = self._rng.choice((1, 2, 3))
        options = ("--bitmap", str(self._folder / "bits"), "--threads", str(threads))
        self._serve_with(lambda: Vhostsync(self._folder, self.current, queues=self._queues, options=options))
        self._await_recovered()
        self._descriptors = self._count_descriptors()

    def _other(self) -> Path:
        return self._disks[self.current == self._disks[0]]

    def _start_mirror(self) -> None:
        self._served().start_mirror(self._other(), speed=self._rng.choice((0, 0, 64 << 20)))

    def _await_steady(self) -> None:
        if self._served().status()["state"] == "syncing":
            self._served().wait_steady(60)

    def _verify(self) -> None:
        backend = self._served()
        backend.qmp.execute("verify")
        found = backend.qmp.wait_event("VERIFY_COMPLETED", 60)
        assert found["state"] == "equal", found

    def _switch_keeping(self) -> None:
        self.current = Path(self._served().qmp.execute("switch", keep_mirror=True)["source-path"])

    def _switch(self) -> None:
        self.current = Path(self._served().qmp.execute("switch")["source-path"])

    def _cancel(self) -> None:
        self._served().qmp.execute("mirror-cancel")

    def _cancel_at_once(self) -> None:
        self._served().qmp.execute("mirror-cancel", force=True)

    def _kill(self) -> None:
        self._kill_backend()
        self._serve()

    def _restart(self) -> None:
        self._look_for_leaks()
        try:
            self._served().stop()
        finally:
            self._served().__exit__(None, None, None)
        self._serve()

    # -- what must hold -------------------------------------------------------

    def _count_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self._served().process.pid}/fd").iterdir()))

    def _look_for_leaks(self) -> None:
        now = self._count_descriptors()
        if now > self._descriptors + LEFT_BEHIND_MAX:
            raise ProcessError(f"{now} descriptors are open, {self._descriptors} were after the start")
        self.done["looked for leaks"] += 1

    def _settle(self) -> None:
        """The end: steady, and both disks found equal by the backend itself."""
        backend = self._served()
        if backend.status()["state"] not in ("syncing", "steady"):
            self._start_mirror_again()
        backend.wait_steady(60)
        self._verify()
        self._look_for_leaks()

    def _start_mirror_again(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                return self._served().start_mirror(self._other())
            except QmpError:  # the former destination is not over yet
                if time.monotonic() > deadline:
                    raise
                self._stop.wait(0.1)
