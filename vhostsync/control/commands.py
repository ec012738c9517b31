# SPDX-License-Identifier: Apache-2.0
"""The commands of the control socket of `serve`: one table from which requests are checked, carried out and
described.

`COMMANDS` names each command with its arguments, their types and bounds, what it returns and what it does;
`query-commands` shows the table and docs/control-protocol.md quotes it (a unit test compares)."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
from anyio.abc import TaskGroup

from ..events import EventHub
from ..limits import KINDS, RATE_MAX
from ..mirror_target import SPEED_BYTES_PER_S_MAX, MirrorTarget
from ..option_values import Cache
from . import qmp
from .command import Argument, Arguments, Command, Dispatcher, dashed, describe
from .group_commands import GROUP_COMMANDS, MAX_PAUSE_ARGUMENT, GroupMember

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEADLINE_MS: Final = 30_000
"""How long `switch` tries, unless told."""


class Mirror(Protocol):
    """What the commands need of the mirror (mirror.py). Each method raises VhostsyncError when refused."""

    async def status(self) -> "DataclassInstance": ...
    async def start(self, target: MirrorTarget) -> None: ...
    async def cancel(self, *, force: bool) -> None: ...
    async def set_speed(self, bytes_per_s: int) -> None: ...
    async def switch(
        self, *, deadline_s: float, max_pause_ms: float, keep_mirror: bool, accept_unreadable: bool,
        accept_different: bool,
    ) -> "DataclassInstance": ...


class Verifier(Protocol):
    """What the commands need of the verification (verify.py). `start` and `cancel` raise VhostsyncError when
    refused."""

    async def start(self, *, repair: bool, speed_bytes_per_s: int) -> None: ...
    async def cancel(self) -> None: ...
    async def status(self) -> "DataclassInstance": ...


class Backend(Protocol):
    """What the control server is given by the daemon (daemon.py)."""

    @property
    def mirror(self) -> Mirror: ...
    @property
    def verifier(self) -> Verifier: ...
    @property
    def events(self) -> EventHub: ...
    async def query_status(self) -> dict[str, Any]: ...
    async def query_stats(self) -> dict[str, Any]: ...
    async def limit(self, given: Mapping[str, int | None]) -> None: ...
    async def resize(self, wanted_bytes: int | None) -> int: ...
    async def hand_over(self, socket: Path | None, disk: str | None) -> None: ...
    async def quit(self, *, force: bool) -> None: ...
    def group_member(self, tasks: TaskGroup, is_there: Callable[[], bool]) -> GroupMember: ...


@dataclass(frozen=True)
class _Served:
    """What the commands of a client work on. `destination_cache` is for a mirror-start that names none."""

    backend: Backend
    destination_cache: Cache
    group: GroupMember | None = None  # None: outside of a conversation


class _ServeDispatcher(Dispatcher):
    @asynccontextmanager
    async def conversation(self, is_there: Callable[[], bool]) -> AsyncIterator[Dispatcher]:
        async with anyio.create_task_group() as tasks:
            group = self._subject.backend.group_member(tasks, is_there)
            yield Dispatcher(COMMANDS, replace(self._subject, group=group))
            tasks.cancel_scope.cancel()


def dispatcher(backend: Backend, destination_cache: Cache = "none") -> Dispatcher:
    return _ServeDispatcher(COMMANDS, _Served(backend, destination_cache))


async def _query_status(to: _Served, _: Arguments) -> Any:
    return dashed(await to.backend.query_status())


async def _query_mirror(to: _Served, _: Arguments) -> Any:
    return dashed(await to.backend.mirror.status())


async def _query_stats(to: _Served, _: Arguments) -> Any:
    return dashed(await to.backend.query_stats())


async def _query_version(_: _Served, __: Arguments) -> Any:
    return qmp.version()


async def _query_commands(_: _Served, __: Arguments) -> Any:
    return [describe(command) for command in COMMANDS.values()]


async def _mirror_start(to: _Served, given: Arguments) -> Any:
    target = MirrorTarget(
        name=given["destination"],
        create=given["create"],
        cache=given["cache"] or to.destination_cache,
        speed_bytes_per_s=given["speed"],
        full=given["full"],
        force=given["force"],
        fenced=given["fenced"],
    )
    await to.backend.mirror.start(target)
    return {}


async def _mirror_cancel(to: _Served, given: Arguments) -> Any:
    await to.backend.mirror.cancel(force=given["force"])
    return {}


async def _mirror_set_speed(to: _Served, given: Arguments) -> Any:
    await to.backend.mirror.set_speed(given["speed"])
    return {}


async def _switch(to: _Served, given: Arguments) -> Any:
    result = await to.backend.mirror.switch(
        deadline_s=given["deadline-ms"] / 1000,
        max_pause_ms=given["max-pause-ms"],
        keep_mirror=given["keep-mirror"],
        accept_unreadable=given["accept-unreadable"],
        accept_different=given["accept-different"],
    )
    return dashed(result)


async def _verify(to: _Served, given: Arguments) -> Any:
    await to.backend.verifier.start(repair=given["repair"], speed_bytes_per_s=given["speed"])
    return {}


async def _verify_cancel(to: _Served, _: Arguments) -> Any:
    await to.backend.verifier.cancel()
    return {}


async def _query_verify(to: _Served, _: Arguments) -> Any:
    return dashed(await to.backend.verifier.status())


async def _resize(to: _Served, given: Arguments) -> Any:
    return {"capacity": await to.backend.resize(given["size"])}


async def _hand_over(to: _Served, given: Arguments) -> Any:
    socket = Path(given["socket"]) if given["socket"] is not None else None
    await to.backend.hand_over(socket, given["disk"])
    return {}


async def _limit(to: _Served, given: Arguments) -> Any:
    await to.backend.limit(given)
    return {}


async def _quit(to: _Served, given: Arguments) -> Any:
    await to.backend.quit(force=given["force"])
    return {}


async def _negotiated(_: _Served, __: Arguments) -> Any:
    raise AssertionError("the session answers qmp_capabilities")


def _limit_arguments() -> tuple[Argument, ...]:
    """Nineteen, by six rules."""
    counted = {"bps": "Bytes a second", "iops": "Requests a second"}
    of = {"": "", "rd": " of reads", "wr": " of writes, discards and zeroes"}
    made = []
    for kind in KINDS:
        what, _, direction = kind.partition("_")
        help_text = f"{counted[what]}{of[direction]}; 0 is no limit. Not named, it stays as it is."
        burst = f"What {kind} may reach for a while; 0 is no burst."
        length = f"How many seconds {kind}_max may last."
        made.append(Argument(kind, "integer", help_text, most=RATE_MAX))
        made.append(Argument(f"{kind}_max", "integer", burst, most=RATE_MAX))
        made.append(Argument(f"{kind}_max_length", "integer", length, most=RATE_MAX))
    size = "A larger request counts as so many of this size; 0 or not given with an iops: each as one."
    return (*made, Argument("iops_size", "integer", size, most=RATE_MAX))


COMMANDS: Final[Mapping[str, Command]] = {
    command.name: command
    for command in (
        Command(
            qmp.CAPABILITIES,
            "End the negotiation; the first command of every client. There is nothing to negotiate.",
            _negotiated,
        ),
        Command(
            "query-status", "The device: its disk, its frontends, whether a guest runs on it.", _query_status
        ),
        Command(
            "query-mirror", "The mirror: state, counts, lag, progress of the copy, last error.", _query_mirror
        ),
        Command(
            "mirror-start",
            "Copy the disk to a destination while the guest runs; to the last one, only what differs. "
            "Returns when the copy has begun.",
            _mirror_start,
            (
                Argument(
                    "destination",
                    "string",
                    "Absolute path of an image file or a block device.",
                    required=True,
                ),
                Argument("create", "boolean", "Make the image file, at the size of the disk.", default=False),
                Argument(
                    "cache",
                    "string",
                    "none (direct I/O) or writeback (page cache); by default what `serve` was told.",
                    choices=("none", "writeback"),
                ),
                Argument(
                    "speed",
                    "integer",
                    "Bytes per second of the copy; 0 is no limit.",
                    default=0,
                    most=SPEED_BYTES_PER_S_MAX,
                ),
                Argument("full", "boolean", "Copy everything, even if less would do.", default=False),
                Argument(
                    "force",
                    "boolean",
                    "Overwrite the destination although it seems to hold something.",
                    default=False,
                ),
                Argument(
                    "fenced",
                    "boolean",
                    "What a lost connection to it has left under way is over for certain.",
                    default=False,
                ),
            ),
        ),
        Command(
            "mirror-cancel",
            "Let go of the destination; in steady it becomes a copy of this moment first.",
            _mirror_cancel,
            (
                Argument(
                    "force",
                    "boolean",
                    "Let go at once, without bringing the destination up to date.",
                    default=False,
                ),
            ),
        ),
        Command(
            "mirror-set-speed",
            "Limit the copy that runs, or end its limit.",
            _mirror_set_speed,
            (
                Argument(
                    "speed",
                    "integer",
                    "Bytes per second; 0 is no limit.",
                    required=True,
                    most=SPEED_BYTES_PER_S_MAX,
                ),
            ),
        ),
        Command(
            "switch",
            "Move the guest to the destination. Returns when it is there, or why it is not.",
            _switch,
            (
                Argument(
                    "deadline-ms", "number", "How long to try.", default=DEADLINE_MS, least=1, most=3_600_000
                ),
                MAX_PAUSE_ARGUMENT,
                Argument(
                    "keep-mirror", "boolean", "The old source becomes the new destination.", default=False
                ),
                Argument(
                    "accept-unreadable",
                    "boolean",
                    "Although ranges of the source are in doubt or unreadable; not with keep-mirror.",
                    default=False,
                ),
                Argument(
                    "accept-different",
                    "boolean",
                    "Although a verification has found that the destination differs.",
                    default=False,
                ),
            ),
        ),
        *GROUP_COMMANDS,
        Command(
            "block_set_io_throttle",
            "Limit what the guest may do, with QEMU's arguments; until the backend ends.",
            _limit,
            _limit_arguments(),
        ),
        Command(
            "resize",
            "Make the guest's disk larger, after the disk below it. Returns when the guest was told.",
            _resize,
            (
                Argument(
                    "size",
                    "integer",
                    "Bytes; by default all that the disk has.",
                    least=1,
                    most=SPEED_BYTES_PER_S_MAX,
                ),
            ),
        ),
        Command(
            "verify",
            "Compare both disks while the guest runs. Returns when that has begun.",
            _verify,
            (
                Argument("repair", "boolean", "Copy what differs to the destination again.", default=False),
                Argument(
                    "speed",
                    "integer",
                    "Bytes per second; 0 is no limit.",
                    default=0,
                    most=SPEED_BYTES_PER_S_MAX,
                ),
            ),
        ),
        Command("verify-cancel", "End the verification that runs.", _verify_cancel),
        Command("query-verify", "The last verification: state, progress, what differs.", _query_verify),
        Command(
            "query-stats", "Operations, bytes, errors and latencies, by queue and by disk.", _query_stats
        ),
        Command("query-commands", "This table.", _query_commands),
        Command("query-version", "The version of the backend.", _query_version),
        Command(
            "hand-over",
            "Leave the guest to a successor (`serve --take-over`) that listens for it, and end. Returns when "
            "that has begun.",
            _hand_over,
            (
                Argument("socket", "string", "The vhost-user socket that the successor was told to serve."),
                Argument("disk", "string", "The disk that it was told to serve; as query-status names it."),
            ),
        ),
        Command(
            "quit",
            "End the backend, after the mirror was brought up to date.",
            _quit,
            (Argument("force", "boolean", "Do not bring the mirror up to date.", default=False),),
        ),
    )
}
