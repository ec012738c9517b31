# SPDX-License-Identifier: Apache-2.0
"""A host whose disks are to leave a place: its backends by name, and `vhostsync evacuate` on it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.daemon.named_host import Host
from tests.guest.backends import vhostsync_command
from tests.guest.processes import wait_listening


class Evacuated(Host):
    """Disks in old/, which are to go to new/."""

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.old, self.new = work / "old", work / "new"
        self.old.mkdir()
        self.new.mkdir()

    @contextmanager
    def serve_all(self, *disks: str | Path) -> Iterator[None]:
        """vm0, vm1, …: by their labels, and all started at once, for that is what takes time."""
        with ExitStack() as stack:
            started = []
            for at, disk in enumerate(disks):
                started.append(self.start(f"vm{at}", "--blk-file", disk))
                stack.callback(started[-1].kill)
            for at, process in enumerate(started):
                wait_listening(process, self.run / f"vm{at}" / "control")
            yield

    def begin(
        self, *options: str | Path, where: str | Path | None = None, to: str | Path | None = None, **more: Any
    ) -> subprocess.Popen[str]:
        words = [*vhostsync_command(), "evacuate", where or self.old, "--to", to or self.new, *options]
        return subprocess.Popen(
            [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **self.environment}, **more,
        )  # fmt: skip

    def evacuate(
        self, *options: str | Path, where: str | Path | None = None, to: str | Path | None = None,
        code: int = 0,
    ) -> tuple[str, str]:  # fmt: skip
        with self.begin(*options, where=where, to=to) as program:
            out, err = program.communicate(timeout=120)
        assert program.returncode == code, out + err
        return out, err


def lines_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]
