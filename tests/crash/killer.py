# SPDX-License-Identifier: Apache-2.0
"""A thread that serves a disk with `vhostsync serve`, kills it with SIGKILL at random moments, and starts it
again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.crash.backend_thread import BackendThread
from tests.daemon.rig import await_true
from tests.guest.backends import Vhostsync
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import Worth


@dataclass
class KillFigures:
    """How often it killed, and when: `early` ones while the frontend came back, `mirrored` ones with
    a destination attached, `steady` of these when it was complete. `resynced`: mirrors that were begun again
    with what differs, and how much that was."""

    kills: int = 0
    early: int = 0
    mirrored: int = 0
    steady: int = 0
    resynced: int = 0
    copied_bytes: int = 0


class Killer(BackendThread):
    """With `destination` some kills happen while a mirror is attached, and the state record is looked at
    after the restart. With a `bitmap` too, every kill happens so, the mirror comes back by itself, and only
    the first copy may be of everything."""

    def __init__(
        self,
        folder: Path,
        disk: Path,
        *,
        queues: int,
        kills: int,
        rng: random.Random,
        news: Callable[[], None],
        destination: Path | None = None,
        bitmap: Path | None = None,
        deadline_s: float = float("inf"),
    ) -> None:
        super().__init__("killer", news=news, deadline_s=deadline_s)
        self.figures = KillFigures()
        self._folder, self._disk, self._queues = folder, disk, queues
        self._kills, self._rng = kills, rng
        self._destination, self._bitmap = destination, bitmap

    def _work(self) -> None:
        self._serve()
        for number in range(self._kills):
            if self._time_is_up:
                break
            always = self._bitmap is not None
            self._one_kill(early=not always and number % 4 == 3, mirrored=always or number % 4 == 1)

    def _serve(self) -> None:
        options = ("--resume-mirror", "off") if self._bitmap is None else ("--bitmap", str(self._bitmap))
        self._serve_with(lambda: Vhostsync(self._folder, self._disk, queues=self._queues, options=options))

    def _one_kill(self, *, early: bool, mirrored: bool) -> None:
        assert self.backend is not None
        mirrored = mirrored and self._destination is not None
        steady = False
        if early:
            if not self.connecting.wait(60):
                raise AssertionError("the frontend has not come back within 60 s")
            self._stop.wait(self._rng.uniform(0, 0.02))
        else:
            self._await_recovered()
            if mirrored:
                self._begin_mirror()
                steady = self._rng.random() < 0.5
                if steady:
                    self.backend.wait_steady()
            self._stop.wait(self._rng.uniform(0, 0.15))
        if self._stop.is_set():
            return
        self._kill_backend()
        self.figures.kills += 1
        self.figures.early += early
        self.figures.mirrored += mirrored
        self.figures.steady += steady
        self._serve()
        if mirrored:
            self._check_record()

    def _begin_mirror(self) -> None:
        assert self.backend is not None and self._destination is not None
        if self._bitmap is None or not self.figures.mirrored:
            self.backend.start_mirror(self._destination)
            return
        await_true(lambda: self._served().status()["state"] in ("syncing", "steady"), "it is resumed")
        mirror = self.backend.status()
        assert mirror["full-copy-reason"] is None, mirror["full-copy-reason"]
        self.figures.resynced += 1
        self.figures.copied_bytes += mirror["copy-bytes-total"]

    def _check_record(self) -> None:
        """Never "up to date" once the guest goes on without. "Inconsistent" though it was steady: killed
        before that was written, which errs on the safe side."""
        assert self.backend is not None
        record = StateFile(self._folder / "disk.state").load()
        assert record is not None and record.peer is not None and record.current.path == str(self._disk)
        assert record.wanted is not None and record.wanted.path == str(self._destination)
        if self._bitmap is None:
            assert record.peer_worth in {Worth.OUTDATED, Worth.INCONSISTENT}
            assert self.backend.status()["state"] == "passthrough"
