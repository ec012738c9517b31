# SPDX-License-Identifier: Apache-2.0
"""The engine of the fault runs: a guest at work, its disk mirrored over the network, and faults without end.

A round is a moment (what the backend is at) and a fault of the place where the second disk lies. When the
fault is mended, the mirror has to come back by itself, with the guest on its own disk; then both disks are
compared, while the guest goes on, and what the processes hold is counted. At the end both disks are held
against what the guest wrote."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon.rig import Served, await_true, same_content
from tests.guest.processes import ProcessError
from tests.guest.qmp_client import QmpError
from tests.holding import Holding, holding
from tests.network.fault_guests import FaultGuest
from tests.network.fault_places import LONG_S, Place
from tests.sizes import MIB

BACK_S = 300.0  # a busy machine starts servers slowly, and each try that fails doubles the next pause
SPEED = 4 * MIB  # of a copy or a verification that a fault is to meet
GROWTHS_MAX = 24
COMPARISONS_MAX = 20
MEMORY_KIB_MAX = 8 << 10  # so much more is the allocator's
REST_S = 30.0
Meanwhile = contextlib.AbstractContextManager[None]


@dataclass
class Report:
    faults: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    losses: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    memory_kib: int = 0  # the most that a process has grown by

    def __str__(self) -> str:
        found = (
            f"losses {len(self.losses)}, errors of the guest {len(self.errors)}, leaks {len(self.leaks)} "
            f"(descriptors, threads; memory grew by {self.memory_kib} KiB at most)"
        )
        happened = f"{sum(self.faults.values())} faults ({_counted(self.faults)})"
        during = f"during {_counted(self.moments)}; {_counted(self.outcomes)}; {self.requests} requests"
        details = (*self.losses[:5], *self.errors[:5], *self.leaks)
        return "\n".join((happened, during, found, *details))


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


class Leaks:
    """What processes hold after each round, when all is at rest: in the second half of its life none may hold
    more than in the first."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._seen: defaultdict[str, list[Holding]] = defaultdict(list)

    def look(self, name: str, pid: int) -> None:
        self._seen[name].append(holding(pid))

    def look_at_rest(self, name: str, pid: int, use_a_thread: Callable[[], None]) -> None:
        """Before it is judged. On a busy machine things happen at once that never did before, and the pool of
        threads grows for them; it shrinks when one is used after the others have been idle for 10 s. What has
        leaked stays."""
        seen = self._seen[name]
        before = max((each.threads for each in seen[: len(seen) // 2]), default=0)
        until = time.monotonic() + REST_S
        while (now := holding(pid)).threads > before and time.monotonic() < until:
            use_a_thread()
            time.sleep(0.5)
        seen.append(now)

    def judge(self, name: str) -> None:
        """Its life is over."""
        seen = self._seen.pop(name, [])
        if len(seen) < 6:
            return
        first, last = seen[: len(seen) // 2], seen[-3:]
        for what in ("descriptors", "threads"):
            before = max(getattr(each, what) for each in first)
            after = min(getattr(each, what) for each in last)
            if after > before:
                self._report.leaks.append(f"{name}: {before} to {after} {what}")
        grown = min(each.memory_kib for each in last) - max(each.memory_kib for each in first)
        self._report.memory_kib = max(self._report.memory_kib, grown)
        if grown > MEMORY_KIB_MAX:
            self._report.leaks.append(f"{name}: {grown} KiB more")

    def judge_all(self) -> None:
        for name in tuple(self._seen):
            self.judge(name)


class FaultRun:
    """Of one place and one guest."""

    def __init__(
        self, folder: Path, disk: Path, place: Place, make_guest: Callable[[Served], FaultGuest], seed: int
    ) -> None:
        self._folder, self._disk, self._place, self._make_guest = folder, disk, place, make_guest
        self._chance = random.Random(seed)
        self._former: list[Served] = []
        self._growths = 0
        self.report = Report()
        self._leaks = Leaks(self.report)
        self._moments: dict[str, Callable[[], Meanwhile]] = {
            "steady": contextlib.nullcontext, "copy": self._copying, "verify": self._verifying,
            "switch": self._switching, "resize": self._resizing,
        }  # fmt: skip

    def run(self, seconds: float) -> Report:
        self._serve(str(self._disk))
        try:
            with self._make_guest(self._served) as guest:
                self._guest = guest
                self._served.start_mirror(self._place.name, create=self._place.create)
                faults = dict(self._place.faults())
                if guest.survives_its_backend:
                    faults["backend killed"] = lambda _: self._kill_backend()
                until = time.monotonic() + seconds
                for moment, fault in self._deck(list(faults)):
                    if time.monotonic() >= until:
                        break
                    self._round(moment, fault, lambda: faults[fault](self))  # noqa: B023 called at once
                guest.stop()
                self.report.errors += guest.errors()
                self._come_home()
                self._tally()
                self._leaks.look_at_rest("serve", self._served.process.pid, self._use_a_thread)
                self._leaks.judge_all()
                self._served.stop(60)
                self._hold_against(guest)
        except BaseException:
            print(f"--- so far: {self.report}\n--- serve:\n{self._served.process.last_output(80)}")
            raise
        finally:
            self._end_former()
            self._served.kill()
        return self.report

    def _deck(self, faults: list[str]) -> Iterator[tuple[str, str]]:
        """Each fault in each moment, then all of it again; neighbours differ in both."""
        while True:
            self._chance.shuffle(faults)
            moments = list(self._moments)
            self._chance.shuffle(moments)
            for shift, number in itertools.product(range(len(moments)), range(len(faults))):
                yield moments[(number + shift) % len(moments)], faults[number]

    def _round(self, moment: str, fault: str, happen: Callable[[], None]) -> None:
        if moment == "resize" and self._growths >= GROWTHS_MAX:
            return
        self._guest.go_on()
        self.report.faults[fault] += 1
        self.report.moments[moment] += 1
        with self._moments[moment]():
            happen()
        self._come_home()
        self._end_former()
        self._compare()
        self._guest.go_on()
        self._look_for_leaks()

    # ---- the backend ------------------------------------------------------------------

    def _serve(self, disk: str) -> None:
        # A guest whose disk is over there goes back to its own should that one fail for good.
        options = (
            "--destination-timeout", f"{self._place.timeout_s:g}s", "--destination-retry", "100ms",
            "--on-source-error", "switch", "--bitmap", str(self._folder / "bitmap"), "--num-queues", "2",
            *self._place.options,
        )  # fmt: skip
        self._served = Served(self._folder, disk, *options)
        self._second = self._served.client()

    def _kill_backend(self) -> None:
        self._tally()
        self._leaks.judge("serve")
        self._served.process.kill()
        self._former.append(self._served)  # a command may still read from its socket
        try:
            self._serve(str(self._disk))
        except ProcessError:  # the guest had gone over
            self._serve(self._place.name)

    def _end_former(self) -> None:
        while self._former:
            self._former.pop().kill()

    def _tally(self) -> None:
        for queue in self._served.qmp.execute("query-stats")["queues"]:
            for name, each in queue["operations"].items():
                self.report.requests += each["operations"]
                if each["errors"]:
                    self.report.errors.append(f"{each['errors']} of the guest's {name}")

    def _look_for_leaks(self) -> None:
        self._leaks.look("serve", self._served.process.pid)
        for name, pid in self._place.processes().items():
            self._leaks.look(name, pid)

    def _use_a_thread(self) -> None:
        """The guest's disk is looked at in one; it is no larger than it was."""
        with contextlib.suppress(QmpError):
            self._served.qmp.execute("resize")

    # ---- what faults need -------------------------------------------------------------

    def let_rest(self, name: str, pid: int, use_a_thread: Callable[[], None]) -> None:
        """Before that process is ended: what it has for a while only is not taken for a leak."""
        self._leaks.look_at_rest(name, pid, use_a_thread)

    def forget_holding(self, name: str) -> None:
        """That process ends, and another one takes its place."""
        self._leaks.judge(name)

    def await_refusal(self, *words: str) -> None:
        """The connection is lost; the backend is not let in again, and says so in one sentence; the guest
        goes on meanwhile. Where the guest is over there, it waits."""
        self._place.lose_connection()
        began = time.monotonic()

        def is_refused() -> bool:
            mirror = self._served.mirror()
            if str(mirror["source"]) != str(self._disk):
                return time.monotonic() - began > LONG_S
            if mirror["state"] == "passthrough" and not mirror["wanted"]:
                return True  # the guest was over there, and has left that disk: nobody connects again
            if mirror["state"] == "steady":  # it had been let in before, or a switch was under way
                self._place.lose_connection()
                self._guest.go_on()
            said = str(mirror["last-error"])
            return mirror["state"] == "degraded" and all(word in said for word in words)

        await_true(is_refused, f"it is refused with {words}", BACK_S)
        if not self._is_away() and self._served.mirror()["state"] == "degraded":
            assert "\n" not in str(self._served.mirror()["last-error"])
            self._guest.go_on()
            self.report.outcomes["refused with a sentence"] += 1

    # ---- moments ----------------------------------------------------------------------

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        self._served.qmp.execute("mirror-cancel", force=True)
        self._served.qmp.execute("mirror-start", destination=self._place.name, full=True, speed=SPEED)
        yield
        with contextlib.suppress(QmpError):  # it has ended with what the fault did
            self._served.qmp.execute("mirror-set-speed", speed=0)

    @contextlib.contextmanager
    def _verifying(self) -> Iterator[None]:
        self._served.qmp.execute("verify", repair=True, speed=SPEED)
        yield

    @contextlib.contextmanager
    def _switching(self) -> Iterator[None]:
        with self._meanwhile("switch", keep_mirror=True, deadline_ms=5000):
            self._a_moment_later()
            yield

    @contextlib.contextmanager
    def _resizing(self) -> Iterator[None]:
        self._growths += 1
        size = self._disk.stat().st_size + MIB
        os.truncate(self._disk, size)
        self._place.grow(size)
        self._guest.go_on()
        self._come_home()
        with self._meanwhile("resize", size=size):
            self._a_moment_later()
            yield
        while not self._resize(size):
            pass
        self._guest.grown(size)

    def _resize(self, size: int) -> bool:
        """The guest's disk has that size, also if it had it before."""
        self._come_home()
        try:
            self._served.qmp.execute("resize", size=size)
        except QmpError as error:
            return "already" in str(error)
        return True

    def _a_moment_later(self) -> None:
        """When in the command's work the fault comes."""
        time.sleep(self._chance.choice((0.0, 0.01, 0.05, 0.2)))

    @contextlib.contextmanager
    def _meanwhile(self, command: str, **arguments: Any) -> Iterator[None]:
        """The command is under way, and over when this ends; it may well fail."""
        client = self._second

        def execute() -> None:
            try:
                client.execute(command, **arguments)
                self.report.outcomes[f"{command} done"] += 1
            except QmpError:
                self.report.outcomes[f"{command} refused"] += 1
            except (OSError, ValueError):
                self.report.outcomes[f"{command}: the backend is gone"] += 1

        thread = threading.Thread(target=execute, name=command)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    # ---- after a fault ----------------------------------------------------------------

    def _is_away(self) -> bool:
        """The guest is on the disk over there."""
        return str(self._served.mirror()["source"]) != str(self._disk)

    def _come_home(self) -> None:
        """Steady, and the guest on its own disk. Only a switch is taken back; a lost mirror comes back by
        itself."""
        await_true(self._is_home, "it comes back", BACK_S)
        self._served.await_worth("up-to-date")

    def _is_home(self) -> bool:
        mirror = self._served.mirror()
        is_away = str(mirror["source"]) != str(self._disk)
        with contextlib.suppress(QmpError):  # it is tried until it works
            if mirror["state"] == "steady" and is_away:
                self._served.qmp.execute("switch", keep_mirror=True, deadline_ms=5000)
                self.report.outcomes["came back"] += 1
            elif mirror["state"] == "passthrough" and not mirror["wanted"]:
                other = str(self._disk) if is_away else self._place.name
                self._served.qmp.execute("mirror-start", destination=other)
                self.report.outcomes["mirrored anew"] += 1
        return mirror["state"] == "steady" and not is_away

    def _compare(self) -> None:
        """Both disks, while the guest goes on: nothing differs."""
        for _ in range(COMPARISONS_MAX):
            if (found := self._verified()) in ("equal", "different", "repaired"):
                if found != "equal":
                    self.report.losses.append(f"both disks compared: {found}")
                return
            self._come_home()
        raise AssertionError(f"of {COMPARISONS_MAX} comparisons none came to its end")

    def _verified(self) -> str:
        """How that of the moment ended, if it has found something; else that of a new one."""
        if (former := self._await_verification()) in ("different", "repaired"):
            return former
        try:
            self._served.qmp.execute("verify")
        except QmpError:
            return "refused"
        return self._await_verification()

    def _await_verification(self) -> str:
        def state() -> str:
            return str(self._served.qmp.execute("query-verify")["state"])

        await_true(lambda: state() != "running", "the comparison ends", BACK_S)
        return state()

    def _hold_against(self, guest: FaultGuest) -> None:
        there = self._place.content()
        self.report.losses += guest.losses(self._disk) + guest.losses(there)
        if not same_content(self._disk, there):
            self.report.losses.append("the disks differ at the end")
