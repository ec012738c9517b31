# SPDX-License-Identifier: Apache-2.0
"""What an owner may ask of a receiver, on its connection: one JSON object a line each way, as on the control
socket (`execute`, `arguments`; `return` or `error`), with no negotiation and no events.

    query    what disk is here, and whether somebody owns it
    begin    a new generation: the former one is over, and here are port and key for the next
    own      from here on only this token is let in
    end      this generation is over
    create   make the image          remove   and take it back, as long as nobody owns it
    grow     make the image larger
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from vhostsync.control.command import Argument, Arguments, Command
from vhostsync.quantities import BYTES_MAX
from vhostsync.receive.receiver import Receiver

GENERATION_MAX: Final = 1 << 62


@dataclass(frozen=True)
class Asked:
    """The receiver, and who asks: a name for the operator."""

    receiver: Receiver
    owner: str


async def _query(of: Asked, _: Arguments) -> Any:
    return await of.receiver.query()


async def _begin_generation(of: Asked, given: Arguments) -> Any:
    begun = await of.receiver.begin(
        disk=given["disk"], token=given["token"], instance=given["instance"], generation=given["generation"],
        owner=of.owner,
    )  # fmt: skip
    return asdict(begun)


async def _own(of: Asked, given: Arguments) -> Any:
    await of.receiver.own(
        disk=given["disk"], generation=given["generation"], token=given["token"], former=given["former"]
    )
    return {}


async def _end(of: Asked, given: Arguments) -> Any:
    await of.receiver.end(disk=given["disk"], token=given["token"], generation=given["generation"])
    return {}


async def _create(of: Asked, given: Arguments) -> Any:
    return {"disk": await of.receiver.create(given["bytes"])}


async def _remove(of: Asked, given: Arguments) -> Any:
    await of.receiver.remove(given["disk"])
    return {}


async def _grow(of: Asked, given: Arguments) -> Any:
    return {"bytes": await of.receiver.grow(given["bytes"], disk=given["disk"], token=given["token"])}


_DISK: Final = Argument("disk", "string", "The disk's name, as `query` tells it.", required=True)
_TOKEN: Final = Argument("token", "string", "The owner's secret; none as long as nobody owns the disk.")
_BYTES: Final = Argument("bytes", "integer", "The size.", required=True, least=1, most=BYTES_MAX)
_GENERATION: Final = Argument(
    "generation", "integer", "Which one, as `begin` has told it.", required=True, most=GENERATION_MAX
)

OWNER_COMMANDS: Final[Mapping[str, Command]] = {
    command.name: command
    for command in (
        Command("query", "What disk is here.", _query),
        Command(
            "begin",
            "End the former generation, and begin the next one.",
            _begin_generation,
            (
                Argument("disk", "string", "The disk that is meant; none: whichever is here."),
                _TOKEN,
                Argument("instance", "string", "A random name of the process that asks.", required=True),
                Argument(
                    "generation", "integer", "The last that this process has begun here.", most=GENERATION_MAX
                ),
            ),
        ),
        Command(
            "own",
            "Let in only this token from here on.",
            _own,
            (
                _DISK,
                _GENERATION,
                Argument("token", "string", "The secret, which the owner has recorded.", required=True),
                Argument("former", "string", "The one before, where it is changed."),
            ),
        ),
        Command("end", "End this generation.", _end, (_DISK, _GENERATION, _TOKEN)),
        Command("create", "Make the image.", _create, (_BYTES,)),
        Command("remove", "Remove an image that was made and has no owner.", _remove, (_DISK,)),
        Command("grow", "Make the image larger; ends the generation.", _grow, (_DISK, _TOKEN, _BYTES)),
    )
}
