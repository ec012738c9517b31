# SPDX-License-Identifier: Apache-2.0
"""Commands as a table: what one is called, its arguments with their types and bounds, what it does. Requests
are checked against the table, carried out and described by it.

A refusal is a VhostsyncError, whose sentence becomes the reply's text. Anything else that a command raises is
a defect: it is logged with its traceback, the client is told so, and the server goes on."""

import dataclasses
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import structlog

from ..errors import VhostsyncError
from . import qmp

log = structlog.get_logger(__name__)


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
Handler = Callable[[Any, Arguments], Awaitable[Any]]
"""Of what the table's dispatcher works on, and the checked arguments."""


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
    """Carries out requests by a table, on what its handlers work on."""

    def __init__(self, commands: Mapping[str, Command], subject: Any) -> None:
        self._commands = commands
        self._subject = subject

    @asynccontextmanager
    async def conversation(self, is_there: Callable[[], bool]) -> AsyncIterator["Dispatcher"]:
        """For the requests of one client, until it is gone. `is_there`: whether it is not."""
        yield self

    async def execute(self, request: qmp.Request) -> bytes:
        """The line to answer with; never raises but when cancelled."""
        command = self._commands.get(request.command)
        if command is None:
            return qmp.error_line(
                f"The command {request.command} has not been found", request.id, qmp.COMMAND_NOT_FOUND
            )
        try:
            result = await command.handler(self._subject, command.check(request.arguments))
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


_PLAIN: Final = (int, str, float, bool, type(None))


def dashed(value: Any) -> Any:
    """A dataclass, or a container of them, as JSON has it: names with dashes."""
    if type(value) in _PLAIN:
        return value
    if type(value) is not dict and dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, (dict, Mapping)):  # the first answers at once
        return {
            str(key).replace("_", "-"): each if type(each) in _PLAIN else dashed(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [each if type(each) in _PLAIN else dashed(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return value


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
