# SPDX-License-Identifier: Apache-2.0
"""How long, how large, how often, and where: what the command line says, the same for all rows."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.sample import BenchError

GIB = 1 << 30
COLUMNS = ("raw", "rival", "rival blocking", "rival background", "ours", "ours mirrored")
WITH_DESTINATION = ("rival blocking", "rival background", "ours mirrored")


@dataclass(frozen=True)
class Plan:
    pairs: int
    seconds: float
    ramp_s: float
    mirrored_ramp_s: float
    bytes_of: dict[str, int]
    directory_of: dict[str, Path]
    without: frozenset[str]
    quick: bool

    def direct(self, place: str) -> bool:
        return place == "disk"

    def check_room(self, place: str, contenders: Iterable[str]) -> None:
        mirrored = [name in WITH_DESTINATION for name in set(contenders) - self.without]
        files = 2 * any(mirrored) + (not all(mirrored))
        need, directory = files * self.bytes_of[place], self.directory_of[place]
        free = shutil.disk_usage(directory).free
        if need > free * 0.9:
            raise BenchError(
                f"{directory} has {free / GIB:.1f} GiB free and {files} files of "
                f"{self.bytes_of[place] / GIB:g} GiB are needed; name another directory, or smaller files"
            )
