# SPDX-License-Identifier: Apache-2.0
"""A backend hands over to a successor under a verified load, and one of the two is killed with SIGKILL at any
moment of it: afterwards one of them serves, or a plain start does, and nothing is lost or answered twice.

VHOSTSYNC_CRASH_HAND_OVERS is how many (6 unless told), VHOSTSYNC_CRASH_SEED the seed.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.crash.habits import HABITS, Unconnected
from tests.crash.load import BLOCK_BYTES, VerifiedLoad
from tests.crash.test_reconnect import PACKED
from tests.daemon.rig import WAIT_S, Served, await_true
from tests.frontend import DEFAULT_FEATURES, Frontend
from tests.guest.images import digest, new_image
from tests.guest.processes import Process, wait_listening
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB
from vhostsync.hand_over import meeting_place

HAND_OVERS = int(os.environ.get("VHOSTSYNC_CRASH_HAND_OVERS", "6"))
SEED = int(os.environ.get("VHOSTSYNC_CRASH_SEED", "1"))
DISK_MIB = 16
BEGUN = "frontend handed over"  # in the log of both; the place where they meet is there for a moment only
WITHIN_S = 0.3  # a hand-over takes less where nothing else runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 30 * HAND_OVERS)]


class Chaos(threading.Thread):
    """Hands over again and again, and kills."""

    def __init__(self, work: Path, disk: Path, destination: Path, load: VerifiedLoad) -> None:
        super().__init__(name="chaos")
        self.over, self.released = threading.Event(), threading.Event()
        self.failure: BaseException | None = None
        self.outcomes: Counter[str] = Counter()
        self._load, self._rng = load, random.Random(SEED)
        self.served = Served(work, disk, name="disk")
        self.served.start_mirror(destination)

    def run(self) -> None:
        try:
            for number in range(HAND_OVERS):
                self._one(kill_successor=number % 2 == 0)
        except BaseException as failure:
            self.failure = failure
        finally:
            self.over.set()
            self._load.news.set()
            self.released.wait()  # a process ends with the thread that has started it

    def _one(self, *, kill_successor: bool) -> None:
        self._await_load()
        self.served.await_resumed()
        former, place = self.served.process, meeting_place(self.served.control)
        so_far = former.log.read_text().count(BEGUN)
        successor = self.served.start([*self.served._words, "--take-over"])
        await_true(
            lambda: place.exists() or former.log.read_text().count(BEGUN) > so_far or not successor.running,
            "the successor meets the backend",
        )
        time.sleep(self._rng.uniform(0, WITHIN_S))
        self.served._close_clients()
        if kill_successor:
            successor.kill()
            self.served.process = self._after_the_successor(former)
        else:
            former.kill()
            self.served.process = self._after_the_former(successor)
        wait_listening(self.served.process, self.served.control)
        self.served.qmp = self.served.client()

    def _after_the_successor(self, former: Process) -> Process:
        """The former one goes on if it had not begun; else it ends, unless it was done by then."""
        try:
            self.served.client().execute("hand-over")
        except QmpError as error:
            if "No successor listens" in str(error):
                self.outcomes["the former goes on"] += 1
                return former
        except OSError:
            pass  # it has no control socket any more
        self.served._close_clients()
        former.wait(WAIT_S)
        self.outcomes["both gone, a plain start"] += 1
        return self.served.start(self.served._words)

    def _after_the_former(self, successor: Process) -> Process:
        """It serves, or could not even ask."""
        await_true(
            lambda: not successor.running or self._listens(successor),
            "the successor serves, or has ended",
        )
        if successor.running:
            self.outcomes["the successor serves"] += 1
            return successor
        self.outcomes["both gone, a plain start"] += 1
        return self.served.start(self.served._words)

    def _listens(self, successor: Process) -> bool:
        try:
            return self.served.client().process == successor.pid
        except OSError:
            return False

    def _await_load(self) -> None:
        """The guest goes on, and its requests are answered."""
        wanted = self._load.figures.requests + 300
        await_true(lambda: self._load.figures.requests >= wanted, "the guest goes on", 2 * WAIT_S)


@pytest.mark.parametrize("features", [DEFAULT_FEATURES, PACKED], ids=["split rings", "packed rings"])
def test_one_of_the_two_is_killed(work: Path, features: int) -> None:
    disk, destination = new_image(work / "a.img", DISK_MIB), new_image(work / "b.img", DISK_MIB)
    frontend = Frontend(Unconnected(), queues=2, queue_size=64, features=features)
    blocks = DISK_MIB * MIB // BLOCK_BYTES
    load = VerifiedLoad(frontend, work / "disk.sock", HABITS[1], blocks=blocks, rng=random.Random(SEED))
    chaos = Chaos(work, disk, destination, load)
    try:
        chaos.start()
        try:
            load.run(finished=chaos.over.is_set, connecting=lambda: None, recovered=lambda: None)
        finally:
            chaos.over.wait()
            if chaos.failure is not None:
                raise chaos.failure
        load.disconnect()
        chaos.served.await_resumed()
        chaos.served.stop()
        load.verify_image(disk)
        assert digest(disk) == digest(destination)
        print(f"{dict(chaos.outcomes)} {load.figures} losses 0 duplicates 0")
        assert sum(chaos.outcomes.values()) == HAND_OVERS
    finally:
        chaos.served.__exit__(*sys.exc_info())
        chaos.released.set()
        load.close()
        frontend.close()
