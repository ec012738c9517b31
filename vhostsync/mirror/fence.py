# SPDX-License-Identifier: Apache-2.0
"""The fence around a disk whose server is not ours (docs/durability.md, rule 8).

A server whose connection was lost may still carry out what it had read from it, also after it has accepted
the next connection. So nothing is written to such a disk again before it is certain that the former
connection's requests are over. Kinds that make this certain by themselves (`Kind.fences_itself`) need none of
this; of the others the state record lists those at which requests may be under way (`StateRecord.unfenced`),
and the operator says what makes it certain.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

import structlog

from vhostsync.config import ServeConfig
from vhostsync.errors import ConfigError, FenceError
from vhostsync.host.command_runner import CommandError, CommandRunner
from vhostsync.host.errands import ask_unless_cancelled

log = structlog.get_logger(__name__)

DISK_VARIABLE: Final = "VHOSTSYNC_DISK"
COMMAND_S: Final = 30.0
"""How long --fence-command may take."""


class Means(StrEnum):
    """What makes it certain."""

    HAND = "hand"  # the operator says so, each time
    LIMIT = "limit"  # the server lets nobody in before the former connection's last request is over
    COMMAND = "command"  # a command of the operator's: exit code 0, the former server process is gone


@dataclass(frozen=True)
class Fence:
    """What `serve` was told. `command`: of Means.COMMAND."""

    means: Means = Means.HAND
    command: CommandRunner | None = None

    @classmethod
    def of(cls, config: ServeConfig) -> "Fence":
        """Before the process is confined. ConfigError."""
        if not config.fence_words:
            return cls(Means(config.fence))
        try:
            return cls(Means.COMMAND, CommandRunner(config.fence_words, COMMAND_S, DISK_VARIABLE))
        except OSError as error:
            raise ConfigError(
                f"The process that runs --fence-command cannot be started: {error.strerror}."
            ) from error

    async def make_certain(self, disk: str) -> None:
        """`make_certain_blocking`, in a thread."""
        await ask_unless_cancelled(partial(self.make_certain_blocking, disk))

    def make_certain_blocking(self, disk: str) -> None:
        """Before the disk is opened. With Means.LIMIT that it can be opened is the proof. FenceError."""
        if self.means is Means.HAND:
            raise FenceError(sentence(disk, self.means))
        if self.command is None:
            return
        try:
            self.command.run(disk)
        except CommandError as error:
            raise FenceError(f"{sentence(disk, self.means)}; {error}") from error
        log.info("fenced by --fence-command", disk=disk)

    def close(self) -> None:
        if self.command is not None:
            self.command.close()


def sentence(disk: str, means: Means) -> str:
    """What the disk waits for."""
    begin = f"requests of a lost connection may still be carried out at {disk}"
    match means:
        case Means.LIMIT:
            return f"{begin}: it is attached once its server lets us in (--fence limit)"
        case Means.COMMAND:
            return f"{begin}: it is attached once --fence-command succeeds"
        case Means.HAND:
            return (
                f"{begin}, and nothing says when they are over: end that server's process (or wait until it "
                f"has none of them left), then: vhostsync mirror start {disk} --fenced; or start the backend "
                f"with --fence-command or --fence limit"
            )
