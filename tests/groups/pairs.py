# SPDX-License-Identifier: Apache-2.0
"""Two disks of one machine, each served by its name and mirrored, in a group."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.daemon.named_host import Host

DISKS = ("vm1-log", "vm1-data")
GROUP = "vm1"


class Pair:
    """`make` makes a disk at a path."""

    def __init__(self, host: Host, make: Callable[[Path], Any], *options: str) -> None:
        self.host = host
        self.disks = tuple(host.work / f"{name}.img" for name in DISKS)
        self.others = tuple(host.work / f"{name}.copy" for name in DISKS)
        self._options = options
        self._stack = ExitStack()
        for name, disk in zip(DISKS, self.disks, strict=True):
            make(disk)
            host.tell("create", name, "--disk", disk, "--group", GROUP)

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            for name, other in zip(DISKS, self.others, strict=True):
                undo.enter_context(self.host.serve(name, *self._options))
                self.host.mirror(name, other)
            self._stack = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def snapshot(self) -> Any:
        return json.loads(self.host.tell("snapshot", "--group", GROUP, "--json", "--max-pause", "2s"))

    def mirror_again(self) -> None:
        """What differs is copied."""
        for name, other in zip(DISKS, self.others, strict=True):
            self.host.ask(name, "mirror-start", destination=str(other))
        for name in DISKS:
            self.host.await_state(name, "steady")
