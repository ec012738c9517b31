# SPDX-License-Identifier: Apache-2.0
"""A guest at work without end, mirrored to an NBD server to which everything happens: killed (which makes it
forget what was not flushed), stopped for long and for a moment, its connections cut by resets and by silence;
while it is copied to, in steady, during a verification. After each fault the mirror has to come back by
itself, behind its fence, and hold every flushed block.

VHOSTSYNC_NETWORK_FAULTS_S=3600 runs for an hour; the counts are printed (-s)."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, await_true, image, lacking, same_content
from tests.guest.qmp_client import QmpError
from tests.network.links import OtherHost
from tests.network.unit import NbdkitUnit

RUN_S = float(os.environ.get("VHOSTSYNC_NETWORK_FAULTS_S", "40"))
MIBS = 8
BLOCKS = 512
TIMEOUT_S = 1.0

pytestmark = pytest.mark.slow


class Faults:
    """What may happen, by name."""

    def __init__(self, server: NbdkitUnit, host: OtherHost, chance: random.Random) -> None:
        self._server, self._host, self._chance = server, host, chance
        self.kinds: dict[str, Callable[[], None]] = {
            "killed": self.kill, "stopped for long": self.stop_for_long, "stopped for a moment": self.stop,
            "reset": self.reset, "silence": self.silence,
        }  # fmt: skip
        self.seen: Counter[str] = Counter()

    def happen(self) -> str:
        name = self._chance.choice(list(self.kinds))
        self.seen[name] += 1
        self.kinds[name]()
        return name

    def kill(self) -> None:
        self._server.signal(signal.SIGKILL)
        self._server.restart()

    def stop(self) -> None:
        self._stop_for(TIMEOUT_S / 5)

    def stop_for_long(self) -> None:
        self._stop_for(TIMEOUT_S * 2)

    def _stop_for(self, seconds: float) -> None:
        self._server.signal(signal.SIGSTOP)
        time.sleep(seconds)  # the fault itself
        with suppress(ProcessLookupError):  # --fence-command may have ended it meanwhile
            self._server.signal(signal.SIGCONT)

    def reset(self) -> None:
        self._host.cut("reject with tcp reset")
        time.sleep(0.1)
        self._host.mend()

    def silence(self) -> None:
        self._host.cut()
        time.sleep(TIMEOUT_S * 2)
        self._host.mend()


def disturb(served: Served, chance: random.Random) -> str:
    """What is under way when it happens."""
    what = chance.choice(("steady", "verify", "copy"))
    with suppress(QmpError):
        if what == "verify":
            served.qmp.execute("verify", repair=True, speed=MIBS << 19)
        elif what == "copy":
            destination = served.mirror()["destination"]
            served.qmp.execute("mirror-cancel", force=True)
            served.qmp.execute("mirror-start", destination=destination, full=True, speed=MIBS << 19)
    return what


@pytest.mark.timeout(RUN_S + 150)
def test_nothing_is_lost_whatever_happens_to_the_server(tmp_path: Path) -> None:
    chance = random.Random(int(os.environ.get("VHOSTSYNC_NETWORK_FAULTS_SEED", "1")))
    disk, raw = image(tmp_path / "a.img", MIBS), image(tmp_path / "b.img", MIBS, filled_mib=0)
    during: Counter[str] = Counter()
    with OtherHost() as host, NbdkitUnit(tmp_path, raw, host) as server:
        faults = Faults(server, host, chance)
        options = (
            "--destination-timeout", f"{TIMEOUT_S:g}s", "--destination-retry", "100ms", "--allow-plaintext",
            "--sandbox", "off", "--fence-command", server.restart_command,
        )  # fmt: skip
        with Served(tmp_path, disk, *options) as served:
            served.start_mirror(server.uri)
            until = time.monotonic() + RUN_S
            with Load(served, blocks=BLOCKS) as load:
                while time.monotonic() < until:
                    load.go_on(chance.randint(1, 10))
                    during[disturb(served, chance)] += 1
                    faults.happen()
                    load.go_on()
                    served.qmp.execute("mirror-set-speed", speed=0)
                    await_true(lambda: served.state == "steady", "it comes back by itself", 60)
                expected = load.stop()
            queues = served.qmp.execute("query-stats")["queues"]
            requests = sum(each["operations"] for queue in queues for each in queue["operations"].values())
            errors = sum(each["errors"] for queue in queues for each in queue["operations"].values())
            await_true(lambda: served.state == "steady", "it is attached at the end", 60)
            served.stop()
    losses = len(lacking(raw, expected))
    print(
        f"faults {dict(faults.seen)} during {dict(during)}; {requests} requests, {losses} losses, "
        f"{errors} errors of the guest"
    )
    assert losses == 0 and errors == 0 and same_content(disk, raw)
    assert sum(faults.seen.values()) >= RUN_S / 20
