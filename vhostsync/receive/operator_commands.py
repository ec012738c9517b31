# SPDX-License-Identifier: Apache-2.0
"""The commands of the receiver's control socket, for the operator of its host."""

from collections.abc import Mapping
from typing import Any, Final

from vhostsync.control import qmp
from vhostsync.control.command import Argument, Arguments, Command, dashed, describe
from vhostsync.quantities import BYTES_MAX
from vhostsync.receive.receiving import Receiving


async def _query_status(of: Receiving, _: Arguments) -> Any:
    return dashed(await of.query_status())


async def _query_version(_: Receiving, __: Arguments) -> Any:
    return qmp.version()


async def _query_commands(_: Receiving, __: Arguments) -> Any:
    return [describe(command) for command in OPERATOR_COMMANDS.values()]


async def _resize(of: Receiving, given: Arguments) -> Any:
    return {"capacity": await of.receiver.grow(given["size"])}


async def _rededicate(of: Receiving, _: Arguments) -> Any:
    await of.receiver.rededicate()
    return {}


async def _quit(of: Receiving, given: Arguments) -> Any:
    of.stop(force=given["force"])
    return {}


async def _negotiated(_: Receiving, __: Arguments) -> Any:
    raise AssertionError("the session answers qmp_capabilities")


OPERATOR_COMMANDS: Final[Mapping[str, Command]] = {
    command.name: command
    for command in (
        Command(qmp.CAPABILITIES, "End the negotiation; the first command of every client.", _negotiated),
        Command("query-status", "The disk, its owner, and the generation that runs.", _query_status),
        Command(
            "resize",
            "Make the image larger. The generation that runs is ended; its owner begins the next one.",
            _resize,
            (Argument("size", "integer", "Bytes.", required=True, least=1, most=BYTES_MAX),),
        ),
        Command(
            "rededicate",
            "Give the disk to whoever attaches it next: its owner's token is forgotten.",
            _rededicate,
        ),
        Command("query-version", "This program's version.", _query_version),
        Command("query-commands", "These commands.", _query_commands),
        Command(
            "quit",
            "End the generation that runs, then this process.",
            _quit,
            (Argument("force", "boolean", "Nothing is different here.", default=False),),
        ),
    )
}
