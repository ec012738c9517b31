# SPDX-License-Identifier: Apache-2.0
"""Live migration of a running guest from its QEMU to a second one on the same machine and the same disks.

The steps are apart, so that a test can do something in the middle: `begin` returns when all but the last part
of the memory was sent, and what is left then waits for `complete`.

There is no second pass over the memory while the guest runs: TCG before QEMU 9.0 misses what the guest itself
stores after the dirty bits were collected (QEMU's commit 03bfc2188f mended that), so that guests crash on
arrival. With no downtime allowed the bits are collected once, with the guest stopped, which is right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.guest.harness import Guest
from tests.guest.processes import wait_listening
from tests.guest.qmp_client import Qmp
from tests.sizes import MIB

_FAST_BYTES_PER_S = 24 * MIB
_SLOW_BYTES_PER_S = 64 << 10
_REST_BYTES = 24 * MIB


@dataclass(frozen=True)
class Figures:
    """What QEMU says of a migration that is over."""

    downtime_ms: int
    passes: int
    sent_bytes: int


class Migration:
    """The way of one guest to a new QEMU, which this starts. Use it in a `with`: a migration that is not
    completed there is cancelled, and the guest stays."""

    def __init__(self, guest: Guest, machine: Sequence[str], name: str) -> None:
        self._guest = guest
        self._completed = False
        self._uri = f"unix:{guest.qemu.monitor.with_name(name + '.migration')}"
        self.incoming = guest.launch(machine, name, "-incoming", "defer")
        self._outgoing_monitor: Qmp | None = None
        self._incoming_monitor: Qmp | None = None
        try:
            for port in (self.incoming.monitor, *self.incoming.ports):
                wait_listening(self.incoming.process, port)
            self._outgoing_monitor = _monitor(guest.qemu.monitor)
            self._incoming_monitor = _monitor(self.incoming.monitor)
            self._incoming_monitor.execute("migrate-incoming", uri=self._uri)
            guest.expect_at(self.incoming)
        except BaseException:
            self._end()
            raise

    @property
    def outgoing_monitor(self) -> Qmp:
        assert self._outgoing_monitor is not None
        return self._outgoing_monitor

    def begin(self) -> int:
        """Start. Returns how many bytes of the memory were not sent yet when it was slowed down: what is sent
        from then on until `complete` is next to nothing."""
        # A page of zeroes is sent in no time. Memory that was used once is not zero.
        self._guest.run("yes | head -c 128M >/tmp/fill; rm /tmp/fill")
        self._speed(_FAST_BYTES_PER_S)
        self.outgoing_monitor.execute("migrate", uri=self._uri)
        while (remaining := self._remaining()) > _REST_BYTES:
            time.sleep(0.01)  # QEMU has no event for this
        self._speed(_SLOW_BYTES_PER_S)
        return remaining

    def _remaining(self) -> int:
        told = self.outgoing_monitor.execute("query-migrate")
        assert told.get("status") in (None, "setup", "active"), f"QEMU was too quick: {told}"
        return int(told["ram"]["remaining"]) if told.get("ram", {}).get("transferred") else 1 << 62

    def _speed(self, bytes_per_s: int) -> None:
        self.outgoing_monitor.execute("migrate-set-parameters", max_bandwidth=bytes_per_s, downtime_limit=0)

    def still_active(self) -> bool:
        """Whether the guest is still where it was, and on its way."""
        return bool(self.outgoing_monitor.execute("query-migrate")["status"] == "active")

    def complete(self) -> Figures:
        """Let the guest go: at full speed, with a pause. Returns when it runs in the new QEMU."""
        assert self._incoming_monitor is not None
        self._speed(4096 * MIB)
        self.outgoing_monitor.wait_event("MIGRATION", status="completed")
        self._incoming_monitor.wait_event("RESUME")
        told: dict[str, Any] = self.outgoing_monitor.execute("query-migrate")
        ram = told["ram"]
        self._completed = True
        self._guest.moved_to(self.incoming)
        return Figures(told["downtime"], ram["dirty-sync-count"], ram["transferred"])

    def cancel(self) -> None:
        """Call it off: the guest stays where it is."""
        self.outgoing_monitor.execute("migrate_cancel")
        self.outgoing_monitor.wait_event("MIGRATION", status="cancelled")
        self._guest.stay()
        self.incoming.process.kill()

    def _end(self) -> None:
        for monitor in (self._outgoing_monitor, self._incoming_monitor):
            if monitor is not None:
                monitor.close()
        if not self._completed:
            self._guest.stay()
            self.incoming.process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


def _monitor(path: Path) -> Qmp:
    monitor = Qmp(path)
    monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    return monitor
