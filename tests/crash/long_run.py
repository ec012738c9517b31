# SPDX-License-Identifier: Apache-2.0
"""python -m tests.crash.long_run [--minutes M] [--seed S] [--report FILE]

A real guest under a verified load for a long time, and everything that may go wrong beside it, several things
at once: backends killed and restarted at any moment of a copy, a mirror and a switch; destinations that are
full, fail, hang past their time limit or for a moment; a source that fails; mirrors cancelled, verified,
switched there and back; clients that hang up midway and a second frontend that talks nonsense.

Theory of operation. A *cycle* begins in passthrough, attaches one of three disks, does something during the
copy, something in steady, and ends in passthrough: there descriptors, mappings, threads and memory of the
backend are looked at, cycle after cycle of one process. What must hold is verified at once, by the one who
did the harm: on the host, on the image that must hold it. Every minute the guest reads everything back.

Root is needed (loop devices, frozen file systems). Exit code 0: nothing lost, nothing leaked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.crash.fault_disks import Disk, FailingDisk, HangingDisk, fault_disks
from tests.crash.fault_figures import Figures
from tests.crash.fault_rig import BLOCK_BYTES, DESTINATION_TIMEOUT_S, LOAD_BLOCKS, LOG_MIB, WAIT_S, Rig
from tests.daemon.rig import await_true
from tests.guest.assets import guest_assets
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB

DISK_MIB = 48
CHUNK_BYTES = 64 << 10
VERIFY_EVERY_S = 60
LIFE_CYCLES = (1, 2, 3, 6, 25)
"""How many cycles a backend process lives before it is killed or restarted for sure: short lives for faults,
long ones to see what leaks."""


class LongRun:
    def __init__(self, rig: Rig, failing: FailingDisk, full: Disk) -> None:
        self.rig, self.figures, self.rng = rig, rig.figures, rig.rng
        self.failing, self.full = failing, full
        self.other: Disk = failing  # the destination of this cycle
        self.kills_left_out = 0  # cycles that this process has still to live through
        self._verified_at = time.monotonic()

    # -- a cycle ---------------------------------------------------------------

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            self.cycle()
            assert self.rig.nuisance.alive
            self.figures.cycles += 1
            self.rig.sample()
            if time.monotonic() > self._verified_at + VERIFY_EVERY_S:
                self.rig.verify_in_guest()
                self._verified_at = time.monotonic()
                print(self.figures.line(), flush=True)
            self.kills_left_out -= 1
            if self.kills_left_out <= 0:
                self.rng.choice((self.kill, self.restart))()
                self.kills_left_out = self.rng.choice(LIFE_CYCLES)
        self.end()

    def cycle(self) -> None:
        if self.rig.state != "passthrough":  # a restart has resumed the last one
            self.other = self.rig.peer()
        elif self.rng.random() < 0.1:
            self.destination_full()
            return
        else:
            self.other = self._choose_other()
            self.rig.start_mirror(self.other, speed=self.rng.choice((0, 8 * MIB, 32 * MIB)))
        self.rng.choice(self._during_the_copy())()
        for _ in range(self.rng.randrange(1, 4)):
            if self.rig.state == "passthrough":
                break
            if self.rig.await_state("steady", "degraded") == "degraded":
                break
            self.rng.choice(self._in_steady())()
        self.leave()

    def _during_the_copy(self) -> list[Callable[[], None]]:
        acts: list[Callable[[], None]] = [self.nothing] * 4 + [self.cancel_at_once]
        if isinstance(self.other, HangingDisk):
            acts.append(self.hang)
        if self.kills_left_out <= 1:
            acts += [self.kill, self.kill_while_it_hangs, self.restart]
        return acts

    def _in_steady(self) -> list[Callable[[], None]]:
        acts: list[Callable[[], None]] = [
            *([self.verify, self.switch, self.switch_there_and_back] * 2),
            self.cancel,
            self.cancel_at_once,
        ]
        if isinstance(self.other, HangingDisk):
            acts += [self.hang, self.slow, self.slow]
        if self.other is self.failing:
            acts += [self.fail] * 2
        if self.rig.source is self.failing and self._unused_chunk() is not None:
            acts += [self.source_fails] * 4
        if self.kills_left_out <= 1:
            acts += [self.kill, self.kill_while_it_hangs, self.kill_in_a_switch, self.restart]
        return acts

    def leave(self) -> None:
        """Back to passthrough, with nothing wrong any more."""
        self.go_on()
        state = self.rig.state
        if state == "passthrough":
            return
        if state == "degraded":
            self.rig.qmp.execute("mirror-cancel")
        else:
            self.rig.await_state("steady")
            self.cancel()

    def go_on(self) -> None:
        for disk in self.rig.disks:
            if isinstance(disk, HangingDisk):
                disk.go_on()
        self.failing.mend()

    def end(self) -> None:
        """Both disks equal, as the backend and the host see it, and as the guest does."""
        rig = self.rig
        rig.nuisance.close()
        self.leave()
        self.other = self._choose_other()
        rig.start_mirror(self.other)
        rig.await_state("steady")
        self.verify()
        rig.await_state("steady")
        rig.verify_in_guest()
        rig.verify_in_guest()  # the new load's, too
        last = rig.guest.stop_load(rig.load)
        rig.guest.power_off()
        rig.count_requests()
        source, other = rig.source, self.other
        rig.backend.stop()
        for disk in (source, other):
            rig.verify(disk, synced=last.synced, issued=last.issued)

    def _choose_other(self) -> Disk:
        """Rather the last one, which gets only what differs."""
        others = [disk for disk in self.rig.disks if disk not in (self.rig.source, self.full)]
        return self.other if self.other in others and self.rng.random() < 0.6 else self.rng.choice(others)

    def _fault(self, name: str) -> None:
        self.figures.faults[name] += 1

    def _done(self, name: str) -> None:
        self.figures.done[name] += 1

    # -- in order --------------------------------------------------------------

    def nothing(self) -> None:
        pass

    def verify(self) -> None:
        qmp = self.rig.qmp
        qmp.events.clear()
        try:
            qmp.execute("verify")
        except QmpError as error:
            if "verif" not in str(error) and "steady" not in str(error):
                raise
            self._done("verify refused")  # one runs already, or it has just become too slow
            return
        found = qmp.wait_event("VERIFY_COMPLETED", WAIT_S)
        if found["state"] not in ("equal", "aborted"):
            self.figures.losses += 1
            raise AssertionError(f"the backend found a difference: {qmp.execute('query-verify')}")
        self._done(f"verify: {found['state']}")
        self.figures.bytes_compared_by_backend += found["bytes-done"]

    def cancel(self) -> None:
        """What is left is a copy of this moment."""
        rig = self.rig
        rig.qmp.events.clear()
        before = rig.report()
        rig.qmp.execute("mirror-cancel")
        steady = rig.was_steady_all_the_time()
        after = rig.report()
        if steady:
            rig.verify(self.other, synced=before.synced, issued=after.issued)
            self._done("cancel, destination verified")

    def cancel_at_once(self) -> None:
        """By force, in whatever state."""
        rig = self.rig
        was_steady = rig.state == "steady"
        rig.qmp.events.clear()
        before = rig.report()
        self._fault("mirror cancelled by force")
        rig.qmp.execute("mirror-cancel", force=True)
        if was_steady and rig.was_steady_all_the_time():
            rig.verify(self.other, synced=before.synced, issued=rig.report().issued)

    def _switch(self, **arguments: Any) -> bool:
        rig = self.rig
        before = rig.report()
        try:
            result = rig.qmp.execute("switch", **arguments)
        except QmpError as error:
            if "steady" not in str(error):
                raise
            self._done("switch refused")  # it has just become too slow
            return False
        former, rig.source, self.other = rig.source, self.other, rig.source
        assert result["source-path"] == str(rig.source.path)
        after = rig.report()
        rig.verify(rig.source, synced=after.synced)
        if not arguments:
            rig.verify(former, synced=before.synced, issued=after.issued)
        return True

    def switch(self) -> None:
        if self._switch():
            self._done("switch, both disks verified")

    def switch_there_and_back(self) -> None:
        for _ in range(self.rng.randrange(1, 4)):
            self.rig.await_state("steady")
            if self._switch(keep_mirror=True):
                self._done("switch --keep-mirror, verified")

    def restart(self) -> None:
        rig = self.rig
        self._fault("orderly restart of the backend")
        rig.report()
        rig.stop()
        self.serve_again()

    def serve_again(self) -> None:
        self.rig.serve_again(resume=self.rng.random() < 0.7)

    # -- faults ------------------------------------------------------------------

    def destination_full(self) -> None:
        self._fault("destination full")
        rig = self.rig
        rig.start_mirror(self.full)
        rig.await_state("degraded")
        rig.report()
        rig.qmp.execute("mirror-cancel")
        self.full.spoiled = True

    def kill(self) -> None:
        self._fault(f"SIGKILL of the backend in {self.rig.state}")
        self.rig.count_requests()
        self.rig.kill()
        self.rig.verify_after_kill()
        self.serve_again()

    def kill_while_it_hangs(self) -> None:
        rig = self.rig
        hanging = self._hanging()
        if hanging is None:
            self.kill()
            return
        self._fault(f"SIGKILL in {rig.state} while the destination hangs")
        rig.count_requests()
        hanging.hang()
        time.sleep(self.rng.uniform(0, 1.5 * DESTINATION_TIMEOUT_S))
        rig.kill()
        rig.verify_after_kill()
        self.serve_again()

    def kill_in_a_switch(self) -> None:
        rig = self.rig
        self._fault("SIGKILL in a switch")
        rig.count_requests()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(rig.backend.control))
            words = {"execute": "switch", "arguments": {"keep-mirror": self.rng.random() < 0.5}}
            client.sendall(b'{"execute": "qmp_capabilities"}' + json.dumps(words).encode())
            time.sleep(self.rng.uniform(0, 0.02))
            rig.kill()
        was = rig.source
        rig.verify_after_kill()
        if rig.source is not was:
            self.other = was
            self._done("killed after the switch was recorded")
        self.serve_again()

    def hang(self) -> None:
        """Past its time limit: it is given up, and what was flushed before is on it."""
        rig, hanging = self.rig, self._hanging()
        assert hanging is not None
        state = rig.state
        self._fault(f"destination hangs past its time limit in {state}")
        rig.qmp.events.clear()
        before = rig.report()
        hold = state == "steady" and rig.was_steady_all_the_time()
        hanging.hang()
        rig.await_state("degraded", "passthrough")
        rig.report()
        hanging.go_on()
        rig.qmp.execute("mirror-cancel")
        if hold:
            rig.verify(self.other, synced=before.synced)
            self._done("hung destination verified")

    def slow(self) -> None:
        """For a moment: the guest gets ahead, and it catches up."""
        rig, hanging = self.rig, self._hanging()
        assert hanging is not None
        self._fault("destination slow: guest ahead of it")
        hanging.hang()
        rig.await_state("ahead", "degraded")
        rig.report()
        hanging.go_on()
        rig.await_state("steady", "degraded")

    def fail(self) -> None:
        rig = self.rig
        self._fault("destination fails")
        self.failing.fail_everywhere()
        rig.await_state("degraded")
        rig.report()
        self.failing.mend()
        rig.qmp.execute("mirror-cancel")

    def source_fails(self) -> None:
        """A write of the guest that it has no room for: the guest goes on, with all that it had, on the
        other one."""
        rig = self.rig
        at = self._unused_chunk()
        assert at is not None
        before = rig.report()
        rig.qmp.events.clear()
        rig.await_state("steady")
        self._fault("source fails")
        self.failing.fail_holes()
        rig.guest.run(f"dd if=/dev/urandom of=/tmp/chunk bs={CHUNK_BYTES} count=1 2>/dev/null")
        write = f"dd if=/tmp/chunk of=/dev/vda bs={CHUNK_BYTES} seek={at} conv=notrunc,fsync 2>/dev/null"
        rig.guest.run(write, timeout_s=WAIT_S)
        await_true(lambda: rig.mirror()["source"] == str(self.other.path), "the source is left", WAIT_S)
        self.failing.mend()
        rig.source, self.other = self.other, rig.source
        after = rig.report()
        rig.verify(rig.source, synced=after.synced)
        rig.verify(self.other, synced=before.synced, issued=after.issued)
        rig.guest.run("echo 3 >/proc/sys/vm/drop_caches")
        read = f"dd if=/dev/vda bs={CHUNK_BYTES} skip={at} count=1 2>/dev/null"
        rig.guest.run(f"{read} | cmp - /tmp/chunk")
        self._done("source left, both disks verified")

    def _unused_chunk(self) -> int | None:
        """Of the failing disk, beyond what the load writes: its number."""
        offset = self.failing.hole(LOAD_BLOCKS * BLOCK_BYTES, DISK_MIB * MIB, CHUNK_BYTES)
        return None if offset is None else offset // CHUNK_BYTES

    def _hanging(self) -> HangingDisk | None:
        return self.other if isinstance(self.other, HangingDisk) else None


def _ended(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def play(minutes: float, seed: int) -> Figures:
    """The figures; what has failed is among them, and the folder is kept then."""
    figures = Figures(seed=seed, log_kib=LOG_MIB << 10)
    work = Path(tempfile.mkdtemp(prefix="vhs-", dir="/var/tmp"))
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        one, other, failing, full = stack.enter_context(fault_disks(work, DISK_MIB))
        rig = Rig(guest_assets(), work, (one, other, failing, full), figures)
        stack.callback(rig.close)
        try:
            LongRun(rig, failing, full).run(time.monotonic() + 60 * minutes)
        except (Exception, KeyboardInterrupt):
            figures.failure = traceback.format_exc()
            kept = Path(tempfile.mkdtemp(prefix="vhs-failed-", dir="/var/tmp"))
            for path in (*work.glob("*.log"), *work.glob("*.console"), *work.glob("*.state")):
                shutil.copy(path, kept)
            figures.failure += f"logs are in {kept}"
    figures.minutes = (time.monotonic() - began) / 60
    shutil.rmtree(work, ignore_errors=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120.0, help="how long (default 120)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it needs root, for loop devices and frozen file systems")
    signal.signal(signal.SIGTERM, _ended)
    figures = play(arguments.minutes, arguments.seed)
    print(figures.table())
    for trouble in (*figures.leaks, *figures.guest_io_errors, figures.failure):
        if trouble:
            print(trouble)
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(figures.as_json(), indent=1) + "\n")
    return 0 if figures.good else 1


if __name__ == "__main__":
    sys.exit(main())
