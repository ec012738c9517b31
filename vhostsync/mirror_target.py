# SPDX-License-Identifier: Apache-2.0
"""What a mirror-start asks for, each value checked once."""

from dataclasses import dataclass
from typing import Final, get_args

from .errors import ConfigError
from .option_values import Cache, within
from .quantities import BYTES_MAX
from .storage.kinds import absolute_name, is_absolute

SPEED_BYTES_PER_S_MAX: Final = BYTES_MAX


@dataclass(frozen=True)
class MirrorTarget:
    """The destination of `mirror-start`. `speed_bytes_per_s` bounds the bulk copy; 0 is no bound. Raises
    ConfigError."""

    name: str  # of the disk
    create: bool = False  # make it, at the right size; it must not exist
    cache: Cache = "none"
    speed_bytes_per_s: int = 0
    full: bool = False  # copy everything, even where less would do
    force: bool = False  # overwrite what it seems to hold
    fenced: bool = False  # the operator says that nothing of a lost connection is under way there any more

    def __post_init__(self) -> None:
        if not is_absolute(self.name):
            raise ConfigError(f"The destination {self.name!r} must be an absolute path.")
        object.__setattr__(self, "name", absolute_name(self.name, "The destination"))
        if self.cache not in get_args(Cache):
            raise ConfigError(f"cache {self.cache} is not known here; write none or writeback.")
        check_speed(self.speed_bytes_per_s)


def check_speed(bytes_per_s: int) -> int:
    """`bytes_per_s` if it is a speed limit (0: none); else ConfigError."""
    within("speed", bytes_per_s, 0, SPEED_BYTES_PER_S_MAX, " bytes per second")
    return bytes_per_s
