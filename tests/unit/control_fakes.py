# SPDX-License-Identifier: Apache-2.0
"""A backend that only plays one, for the tests of the control socket and of the command line."""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import anyio
import anyio.abc
from anyio.abc import TaskGroup

from tests.sizes import GIB
from vhostsync import events
from vhostsync.control.commands import dispatcher
from vhostsync.control.server import serve_control
from vhostsync.errors import MirrorError, SwitchError
from vhostsync.events import EventHub
from vhostsync.limits import NO_LIMITS
from vhostsync.mirror.mirror_status import MirrorStatus
from vhostsync.mirror_target import MirrorTarget


def status(**changes: Any) -> MirrorStatus:
    """Of a backend without a mirror: what is declared of it, each figure nothing but these."""
    shown: dict[str, Any] = {
        name: None if NoneType in get_args(kind) else (get_origin(kind) or kind)()
        for name, kind in get_type_hints(MirrorStatus).items()
    }
    shown |= {
        "state": "passthrough",
        "source": "/disks/a.img",
        "counts": {
            "source_generation": 7,
            "source_flushed": 5,
            "writes_mirrored": None,
            "flush_request": 5,
            "writes_flushed": None,
        },
    }
    return MirrorStatus(**{**shown, **changes})


@dataclass(frozen=True)
class FakeSwitchResult:
    pause_us: int
    attempts: int
    source_path: str
    destination_path: str | None
    accepted: dict[str, list[dict[str, int]]]


class FakeMirror:
    """Copies in `copy_steps` steps, one for each time that somebody asks; `hold_switch` keeps a switch
    under way."""

    def __init__(self, hub: EventHub) -> None:
        self.hub = hub
        self.now = status()
        self.target: MirrorTarget | None = None
        self.copy_steps = 4
        self.fail_copy: str | None = None
        self.hold_switch: anyio.Event | None = None
        self.switching = anyio.Event()
        self.switched = anyio.Event()
        self.switch_error: Exception | None = None
        self.switch_takes_its_time = False
        self.switch_arguments: dict[str, Any] = {}
        self.accepts_unreadable = self.accepts_different = False
        self.calls: list[str] = []

    def _become(self, **changes: Any) -> None:
        before = self.now.state
        self.now = replace(self.now, **changes)
        if self.now.state != before:
            self.hub.publish(
                events.MIRROR_STATE_CHANGE,
                {"former": before, "state": self.now.state, "reason": self.now.reason},
            )

    async def status(self) -> MirrorStatus:
        if self.now.state == "syncing":
            if self.fail_copy is not None:
                self._become(
                    state="degraded", worth="inconsistent", reason=self.fail_copy, last_error=self.fail_copy
                )
            elif self.now.copy_bytes_done >= GIB:
                self._become(state="steady", worth="up-to-date")
            elif self.copy_steps:
                done = min(GIB, self.now.copy_bytes_done + GIB // self.copy_steps)
                self._become(
                    copy_bytes_done=done, copy_rate_bytes_per_s=1e8, copy_remaining_s=(GIB - done) / 1e8
                )
        return self.now

    async def start(self, target: MirrorTarget) -> None:
        self.calls.append("start")
        if self.now.state != "passthrough":
            raise MirrorError("There is a destination already; cancel the mirror first.")
        self.target = target
        self._become(
            state="syncing",
            worth="inconsistent",
            destination=target.name,
            copy_bytes_total=GIB,
            speed_bytes_per_s=target.speed_bytes_per_s,
        )

    async def cancel(self, *, force: bool) -> None:
        self.calls.append(f"cancel {force}")
        if self.now.state == "passthrough":
            raise MirrorError("There is no mirror to cancel.")
        self._become(state="passthrough", worth=None, destination=None)

    async def set_speed(self, bytes_per_s: int) -> None:
        self._become(speed_bytes_per_s=bytes_per_s)

    async def switch(
        self, *, deadline_s: float, max_pause_ms: float, keep_mirror: bool, accept_unreadable: bool,
        accept_different: bool,
    ) -> FakeSwitchResult:
        self.switch_arguments = {"deadline_s": deadline_s, "max_pause_ms": max_pause_ms, "keep": keep_mirror}
        self.accepts_unreadable, self.accepts_different = accept_unreadable, accept_different
        if self.now.state != "steady":
            raise SwitchError(f"The mirror is {self.now.state}, not steady; the guest stays where it is.")
        self.switching.set()
        if self.hold_switch is not None:
            await self.hold_switch.wait()
        if self.switch_error is not None:
            if self.switch_takes_its_time:
                await anyio.sleep(deadline_s)
            raise self.switch_error
        self.switched.set()
        new = str(self.now.destination)
        self._become(state="passthrough", source=new, destination=None, worth=None)
        accepted = {"doubt": [], "unreadable": list(self.now.unreadable)} if accept_unreadable else {}
        return FakeSwitchResult(1234, 1, new, None, accepted)


@dataclass(frozen=True)
class FakeOpened:
    pause_us: int
    opened_ns: int
    source_path: str
    destination_path: str | None


class FakeGroupMember:
    """Of one client: what it has begun, and whether it is gone. A step of `refused` is refused that often,
    one of `silent` not answered, and one of `kept` done."""

    def __init__(
        self, mirror: FakeMirror, refused: dict[str, int], silent: set[str], kept: set[str]
    ) -> None:
        self._mirror = mirror
        self._refused = refused
        self._silent = silent
        self._kept = {"open", *kept}
        self.steps: list[str] = []
        self.left = anyio.Event()

    async def prepare_switch(self, *, max_pause_ms: float, keep_mirror: bool) -> None:
        await self._prepare(f"switch {max_pause_ms:g} {keep_mirror}")

    async def cut(self, step: str, group: str | None, record: str | None) -> dict[str, str]:
        self.steps.append(f"cut {step} {group} {record}")
        return {"loss": "1055"} if step == "let-go" else {}

    async def prepare_snapshot(self, *, max_pause_ms: float, cut: str | None) -> None:
        await self._prepare(f"snapshot {max_pause_ms:g}")

    async def _prepare(self, what: str) -> None:
        if self._mirror.now.state != "steady":
            raise SwitchError(f"The mirror is {self._mirror.now.state}, not steady.")
        self.steps.append(what)
        await self._fall_silent("prepare")

    async def _fall_silent(self, name: str) -> None:
        if name in self._silent:
            await anyio.sleep_forever()

    async def take(self, name: str) -> Any:
        self.steps.append(name)
        await self._fall_silent(name)
        if self._refused.get(name):
            self._refused[name] -= 1
            raise MirrorError(f"No {name} now.")
        return FakeOpened(1000, time.monotonic_ns(), "/b.img", "/a.img") if name in self._kept else {}

    async def leave_at_the_end(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.left.set()


@dataclass(frozen=True)
class FakeVerifyStatus:
    state: str = "none"
    bytes_total: int = 0
    bytes_done: int = 0
    bytes_skipped: int = 0
    bytes_differing: int = 0
    bytes_repaired: int = 0
    differing: tuple[dict[str, int], ...] = ()


class FakeVerifier:
    """Is over, with `result`, when somebody asks for the second time."""

    def __init__(self) -> None:
        self.result = FakeVerifyStatus(state="equal", bytes_total=GIB, bytes_done=GIB)
        self.now = FakeVerifyStatus()
        self.calls: list[str] = []

    async def start(self, *, repair: bool, speed_bytes_per_s: int) -> None:
        self.calls.append(f"verify {repair} {speed_bytes_per_s}")
        self.now = FakeVerifyStatus(state="running", bytes_total=GIB)

    async def cancel(self) -> None:
        if self.now.state != "running":
            raise MirrorError("no verification is under way")
        self.now = replace(self.now, state="cancelled")

    async def status(self) -> FakeVerifyStatus:
        before = self.now
        if before.state == "running":
            self.now = self.result
        return before


class FakeBackend:
    def __init__(self) -> None:
        self.events = EventHub()
        self.verifier = FakeVerifier()
        self.mirror = FakeMirror(self.events)
        self.members: list[FakeGroupMember] = []
        self.refused_steps: dict[str, int] = {}
        self.limits = NO_LIMITS
        self.shows_limits = True
        self.silent_steps: set[str] = set()
        self.kept_steps: set[str] = set()
        self.quit_asked = anyio.Event()
        self.quit_force: bool | None = None
        self.handed_over: Path | None = None

    async def query_status(self) -> dict[str, Any]:
        return {
            "status": "running",
            "name": "vm1",
            "frontends": 1,
            "active": True,
            "active-frontend": 1,
            "waiting-frontends": [{"frontend": 2, "pid": 7, "uid": 0, "since": "2026-11-28T12:00:00+00:00"}],
            "disk": self.mirror.now.source,
            "capacity": GIB,
            "epoch": 3,
            **({"limits": self.limits.shown()} if self.shows_limits else {}),
        }

    def group_member(self, tasks: TaskGroup, _: Callable[[], bool]) -> FakeGroupMember:
        member = FakeGroupMember(self.mirror, self.refused_steps, self.silent_steps, self.kept_steps)
        self.members.append(member)
        tasks.start_soon(self.members[-1].leave_at_the_end)
        return self.members[-1]

    async def query_stats(self) -> dict[str, Any]:
        def operation(count: int) -> dict[str, Any]:
            log2 = [0] * 32
            log2[16] = count
            return {
                "operations": count,
                "bytes": count * 4096,
                "errors": 0,
                "latency-us": {"mean": 98.3, "p50": 98.3, "p99": 131.1, "p999": 131.1},
                "latency-log2-ns": log2,
            }

        def disk(path: str) -> dict[str, Any]:
            kinds = ("read", "write", "flush", "zero")
            return {"path": path, "in-flight": 0, "operations": {kind: operation(5) for kind in kinds}}

        queue = {
            "index": 0,
            "running": True,
            "broken": None,
            "in-flight": 2,
            "malformed": 0,
            "kicks": 9,
            "notifications": 8,
            "operations": {"read": operation(10), "write": operation(20), "flush": operation(3)},
        }
        return {
            "queues": [queue, {**queue, "index": 1, "running": False, "broken": "a chain that loops"}],
            "disks": {"source": disk("/disks/a.img"), "destination": None},
            "engine": {
                "threads": 2,
                "lent-operations": 30,
                "wakeups": 40,
                "syscalls": 50,
                "throttled-ms": 0,
                "limited-requests": 7,
                "limited-bytes": 8192,
                "limited-ms": 1500.0,
                "polls": 6,
                "poll-hits": 5,
                "polled-ms": 1.5,
                "events-lost": 0,
                "log-bytes-used": 4096,
                "log-bytes": 64 << 20,
            },
        }

    async def limit(self, given: Mapping[str, int | None]) -> None:
        self.limits = self.limits.changed(given)

    async def resize(self, wanted_bytes: int | None) -> int:
        if wanted_bytes is not None and wanted_bytes < GIB:
            raise MirrorError("the guest's disk cannot shrink")
        return wanted_bytes or 2 * GIB

    async def hand_over(self, socket: Path | None, disk: str | None) -> None:
        self.handed_over = socket

    async def quit(self, *, force: bool) -> None:
        self.quit_force = force
        self.quit_asked.set()


@asynccontextmanager
async def running(path: Path, backend: FakeBackend) -> AsyncIterator[anyio.CancelScope]:
    """The control server at `path`, until the block ends, the scope is cancelled, or somebody sends
    `quit`."""
    scope = anyio.CancelScope()

    async def serve(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        with scope:
            await serve_control(path, backend.events, dispatcher(backend), task_status=task_status)

    async def until_quit() -> None:
        await backend.quit_asked.wait()
        backend.events.publish(events.SHUTDOWN, {"reason": "quit"})
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        await tasks.start(serve)
        tasks.start_soon(until_quit)
        yield scope
        tasks.cancel_scope.cancel()
