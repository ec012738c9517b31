# SPDX-License-Identifier: Apache-2.0
"""The commands of the control socket: one table from which requests are checked, carried out and described.

`COMMANDS` names each command with its arguments, their types and bounds, what it returns and what it does;
`query-commands` shows the table and docs/control-protocol.md quotes it (a unit test compares).

A refusal is a VhostsyncError, whose sentence becomes the reply's text. Anything else that a command raises
is a defect: it is logged with its traceback, the client is told so, and the server goes on."""

import dataclasses
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import structlog

from ..config import SPEED_BYTES_PER_S_MAX, Cache, MirrorTarget
from ..errors import VhostsyncError
from ..events import EventHub
from . import qmp

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = structlog.get_logger(__name__)

DEADLINE_MS: Final = 30_000
"""How long `switch` tries, unless told."""

MAX_PAUSE_MS: Final = 500
"""How long one try of `switch` may hold the guest's requests, unless told."""


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
    async def resize(self, wanted_bytes: int | None) -> int: ...
    async def quit(self, *, force: bool) -> None: ...


class ArgumentError(VhostsyncError):
    """The arguments of a request do not fit the table; the text is QEMU's where QEMU has one."""


ArgumentType = Literal["string", "boolean", "integer", "number"]


@dataclass(frozen=True)
class Argument:
    """One argument. `least` and `most` bound numbers; `choices` are the strings allowed, where only some
    are."""

    name: str
    type: ArgumentType
    help: str
    required: bool = False
    default: Any = None
    least: float = 0
    most: float = math.inf
    choices: tuple[str, ...] = ()

    def check(self, value: Any) -> Any:
        """`value` if it is one of these; ArgumentError."""
        # In JSON true is no number; in Python True is an int.
        fits = {
            "string": isinstance(value, str),
            "boolean": isinstance(value, bool),
            "integer": isinstance(value, int) and not isinstance(value, bool),
            "number": isinstance(value, int | float) and not isinstance(value, bool),
        }[self.type]
        if not fits:
            raise ArgumentError(f"Invalid parameter type for '{self.name}', expected: {self.type}")
        if self.choices and value not in self.choices:
            raise ArgumentError(f"Parameter '{self.name}' expects {' or '.join(self.choices)}")
        if self.type in ("integer", "number") and not self.least <= value <= self.most:
            raise ArgumentError(
                f"Parameter '{self.name}' expects a value from {self.least:g} to {self.most:g}"
            )
        return value


Arguments = Mapping[str, Any]
Handler = Callable[["Dispatcher", Arguments], Awaitable[Any]]


@dataclass(frozen=True)
class Command:
    """One row of the table."""

    name: str
    help: str
    handler: Handler
    arguments: tuple[Argument, ...] = field(default=())

    def check(self, given: Arguments) -> Arguments:
        """The arguments with their defaults filled in; ArgumentError."""
        known = {argument.name for argument in self.arguments}
        for name in given:
            if name not in known:
                raise ArgumentError(f"Parameter '{name}' is unexpected")
        checked = {}
        for argument in self.arguments:
            if argument.name in given:
                checked[argument.name] = argument.check(given[argument.name])
            elif argument.required:
                raise ArgumentError(f"Parameter '{argument.name}' is missing")
            else:
                checked[argument.name] = argument.default
        return checked


class Dispatcher:
    """Carries out requests against a backend. `destination_cache` is for a mirror-start that names none."""

    def __init__(self, backend: Backend, destination_cache: Cache = "none") -> None:
        self.backend = backend
        self.destination_cache = destination_cache

    async def execute(self, request: qmp.Request) -> bytes:
        """The line to answer with; never raises but when cancelled."""
        command = COMMANDS.get(request.command)
        if command is None:
            return qmp.error_line(
                f"The command {request.command} has not been found", request.id, qmp.COMMAND_NOT_FOUND
            )
        try:
            result = await command.handler(self, command.check(request.arguments))
            return qmp.return_line(result, request.id)
        except VhostsyncError as error:
            if not isinstance(error, ArgumentError):
                log.info("command refused", command=command.name, reason=str(error))
            return qmp.error_line(str(error), request.id)
        except Exception as error:
            log.exception("a command failed in a way that nobody foresaw", command=command.name)
            return qmp.error_line(
                f"Internal error ({type(error).__name__}); the log of the backend has its traceback.",
                request.id,
            )


def dashed(value: Any) -> Any:
    """A dataclass, or a container of them, as JSON has it: names with dashes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key).replace("_", "-"): dashed(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [dashed(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return value


async def _query_status(to: Dispatcher, _: Arguments) -> Any:
    return dashed(await to.backend.query_status())


async def _query_mirror(to: Dispatcher, _: Arguments) -> Any:
    return dashed(await to.backend.mirror.status())


async def _query_stats(to: Dispatcher, _: Arguments) -> Any:
    return dashed(await to.backend.query_stats())


async def _query_version(_: Dispatcher, __: Arguments) -> Any:
    return qmp.version()


async def _query_commands(_: Dispatcher, __: Arguments) -> Any:
    return [describe(command) for command in COMMANDS.values()]


async def _mirror_start(to: Dispatcher, given: Arguments) -> Any:
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


async def _mirror_cancel(to: Dispatcher, given: Arguments) -> Any:
    await to.backend.mirror.cancel(force=given["force"])
    return {}


async def _mirror_set_speed(to: Dispatcher, given: Arguments) -> Any:
    await to.backend.mirror.set_speed(given["speed"])
    return {}


async def _switch(to: Dispatcher, given: Arguments) -> Any:
    result = await to.backend.mirror.switch(
        deadline_s=given["deadline-ms"] / 1000,
        max_pause_ms=given["max-pause-ms"],
        keep_mirror=given["keep-mirror"],
        accept_unreadable=given["accept-unreadable"],
        accept_different=given["accept-different"],
    )
    return dashed(result)


async def _verify(to: Dispatcher, given: Arguments) -> Any:
    await to.backend.verifier.start(repair=given["repair"], speed_bytes_per_s=given["speed"])
    return {}


async def _verify_cancel(to: Dispatcher, _: Arguments) -> Any:
    await to.backend.verifier.cancel()
    return {}


async def _query_verify(to: Dispatcher, _: Arguments) -> Any:
    return dashed(await to.backend.verifier.status())


async def _resize(to: Dispatcher, given: Arguments) -> Any:
    return {"capacity": await to.backend.resize(given["size"])}


async def _quit(to: Dispatcher, given: Arguments) -> Any:
    await to.backend.quit(force=given["force"])
    return {}


async def _negotiated(_: Dispatcher, __: Arguments) -> Any:
    raise AssertionError("the session answers qmp_capabilities")


def describe(command: Command) -> dict[str, Any]:
    """A row of the table as query-commands shows it; QEMU's has `name` alone."""
    arguments = []
    for argument in command.arguments:
        row: dict[str, Any] = {"name": argument.name, "type": argument.type, "required": argument.required}
        if not argument.required and argument.default is not None:
            row["default"] = argument.default
        if argument.choices:
            row["choices"] = list(argument.choices)
        arguments.append({**row, "help": argument.help})
    return {"name": command.name, "help": command.help, "arguments": arguments}


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
                Argument(
                    "max-pause-ms",
                    "number",
                    "How long one try may hold the guest's requests.",
                    default=MAX_PAUSE_MS,
                    least=1,
                    most=60_000,
                ),
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
            "quit",
            "End the backend, after the mirror was brought up to date.",
            _quit,
            (Argument("force", "boolean", "Do not bring the mirror up to date.", default=False),),
        ),
    )
}
