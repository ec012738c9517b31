# SPDX-License-Identifier: Apache-2.0
"""The option of `serve` by which the disks of one machine stay together (mirror/group_cut.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import ConfigError
from .lineage_name import control_of
from .option import FLAG, option

GROUP: Final = "the group of the disk"


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Part of ServeConfig."""

    group_freeze: bool = option(
        "--group-freeze", GROUP, FLAG,
        "before a flush is confirmed without the destination, let go of those of the group at one instant",
        False,
        detail="With `--name`, of a disk that `vhostsync create --group` has made, and on all disks of that "
        "group. See [node.md](node.md).",
    )  # fmt: skip
    group: str | None = None  # that of the disk, once its name was followed (record/names.py)

    def check_group(self) -> None:
        """ConfigError."""
        config: Any = self
        if not self.group_freeze:
            return
        if config.no_state_file or config.state_file is not None or not config.name:
            raise ConfigError("--group-freeze needs --name, and the state record where names are kept.")
        control: Path | None = config.control_socket
        if control is None or (control.name, control.parent.name) != ("control", config.name):
            raise ConfigError(
                f"With --group-freeze the other disks of the group look for this one's control socket by its "
                f"name; leave out --control or, where there is --socket-path or --fd, give it: --control "
                f"{control_of(config.name)}"
            )
        if config.on_congestion != "block" or config.on_destination_error != "degrade":
            raise ConfigError(
                "With --group-freeze a destination that fails or is too slow is let go of, with those of the "
                "group; leave out --on-congestion pull-ahead and --on-destination-error pause."
            )
