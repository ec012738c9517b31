# SPDX-License-Identifier: Apache-2.0
"""The name of a lineage (one guest's disk through all its switches), and where its sockets lie by that
name: each name has a directory of its own there, for a backend may write to all of one that it uses."""

import os
import re
from pathlib import Path
from typing import Final

from .errors import ConfigError

LINEAGE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
"""It becomes part of the names of files, and the instance of a unit."""


def check_lineage_name(name: str, of: str = "the name") -> str:
    """`name` if it is one; else ConfigError."""
    if LINEAGE_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{of} {name!r} is none that a disk can have; write 1 to 64 letters, digits, '_', '-' or '.' of "
            f"ASCII, and no '-' or '.' first"
        )
    return name


def is_lineage_name(name: str) -> bool:
    return LINEAGE_NAME.fullmatch(name) is not None


def runtime_directory(environment: dict[str, str] | None = None, user: int | None = None) -> Path:
    """Below which sockets lie by name: $VHOSTSYNC_RUNTIME_DIRECTORY, else $XDG_RUNTIME_DIR/vhostsync for who
    is not root and has one, else /run/vhostsync."""
    env = dict(os.environ) if environment is None else environment
    if env.get("VHOSTSYNC_RUNTIME_DIRECTORY", "").startswith("/"):
        return Path(env["VHOSTSYNC_RUNTIME_DIRECTORY"])
    user_runtime = env.get("XDG_RUNTIME_DIR", "")
    if (os.geteuid() if user is None else user) != 0 and user_runtime.startswith("/"):
        return Path(user_runtime) / "vhostsync"
    return Path("/run/vhostsync")


def socket_of(name: str) -> Path:
    """The vhost-user socket of a named backend, where nobody says otherwise."""
    return runtime_directory() / name / "vm.sock"


def control_of(name: str) -> Path:
    """Its control socket."""
    return control_below(runtime_directory(), name)


def control_below(runtime: Path, name: str) -> Path:
    return runtime / name / "control"
