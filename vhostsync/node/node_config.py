# SPDX-License-Identifier: Apache-2.0
"""What `node` is told, checked once, and frozen: as ServeConfig (config.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostsync.option import FLAG, Kind, check_options, option
from vhostsync.option_values import (
    LogFormat,
    LogLevel,
    absolute,
    check_socket_paths,
    log_format_option,
    log_level_option,
)

BACKENDS: Final = "the backends"
OPERATION: Final = "operation"


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """Everything that `node` is told. Raises ConfigError."""

    listen: Path = option(
        "--listen", BACKENDS, Kind("PATH", Path),
        "the unix socket by which `serve --from-node` asks; for this user and root alone", required=True,
    )  # fmt: skip
    merge_memory: bool = option(
        "--merge-memory", BACKENDS, FLAG,
        "let the kernel merge pages of the backends' heaps that are equal (KSM)", False,
        detail="Only what the node had before it forked is offered: no guest's data lies there. It takes "
        "effect where the host runs KSM (/sys/kernel/mm/ksm/run is 1). Whoever has taken over one backend "
        "can then find out by timing whether another holds a page that he guesses.",
    )  # fmt: skip

    log_format: LogFormat = log_format_option(OPERATION)
    log_level: LogLevel = log_level_option(OPERATION)

    def __post_init__(self) -> None:
        object.__setattr__(self, "listen", absolute(self.listen, "--listen"))
        check_options(self)
        check_socket_paths([("--listen", self.listen)])
