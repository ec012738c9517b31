# SPDX-License-Identifier: Apache-2.0
"""The steps in which a client switches, or takes a snapshot of, several disks at once: each on all of their
backends before the next one (cli/group.py does so). Bound to the connection: when it ends, what was not
opened is taken back."""

from typing import Any, Final, Protocol

from .command import Argument, Arguments, Command, dashed

MAX_PAUSE_MS: Final = 500

MAX_PAUSE_ARGUMENT: Final = Argument(
    "max-pause-ms", "number", "How long one try may hold the guest's requests.", default=MAX_PAUSE_MS,
    least=1, most=60_000,
)  # fmt: skip


class GroupMember(Protocol):
    """What one client has begun (group_member.py). Each raises VhostsyncError: then all is as it was."""

    async def prepare_switch(self, *, max_pause_ms: float, keep_mirror: bool) -> None: ...
    async def prepare_snapshot(self, *, max_pause_ms: float, cut: str | None) -> None: ...
    async def cut(self, step: str, group: str | None, record: str | None) -> Any: ...
    async def take(self, name: str) -> Any: ...


async def _prepare(to: Any, given: Arguments) -> Any:
    group: GroupMember = to.group
    pause_ms = given["max-pause-ms"]
    if given["action"] == "switch":
        await group.prepare_switch(max_pause_ms=pause_ms, keep_mirror=given["keep-mirror"])
    else:
        await group.prepare_snapshot(max_pause_ms=pause_ms, cut=given["cut"])
    return {}


async def _cut(to: Any, given: Arguments) -> Any:
    return await to.group.cut(given["step"], given["group"], given["record"])


def _step(name: str, text: str) -> Command:
    async def take(to: Any, _: Arguments) -> Any:
        return dashed(await to.group.take(name))

    return Command(f"group-{name}", text, take)


GROUP_COMMANDS: Final = (
    Command(
        "group-prepare",
        "The first step for several disks at once: from here on this connection has the mirror's turn.",
        _prepare,
        (
            Argument(
                "action",
                "string",
                "Move the guest to the destination, or let the destination go as a copy of one instant.",
                required=True,
                choices=("switch", "snapshot"),
            ),
            MAX_PAUSE_ARGUMENT,
            Argument(
                "keep-mirror", "boolean", "Of a switch: the old source becomes the new destination.",
                default=False,
            ),
            Argument("cut", "string", "Of a snapshot: what all copies of this instant are called."),
        ),
    ),
    _step("close", "The second: hold the guest, until the destination has all that it has written."),
    _step(
        "carry-out",
        "The third: exchange the disks, or flush the destination. The guest is held still.",
    ),
    _step("open", "The last: let the guest go on. Returns what was done."),
    _step("take-back", "Instead of any but the first: all becomes as it was."),
    Command(
        "group-cut",
        "Another disk of the group loses its destination (--group-freeze): whether this one could let go of "
        "its own, too; or let go, and confirm no flush without it before the record is written.",
        _cut,
        (
            Argument("step", "string", "Each is taken on all before the next one.", required=True,
                     choices=("ask", "let-go")),
            Argument("group", "string", "For which group. A disk of another one refuses."),
            Argument("record", "string", "Which disk is meant: the file name of its record. Others refuse."),
        ),
    ),
)  # fmt: skip
