# SPDX-License-Identifier: Apache-2.0
"""`vhostsync exporter` as a process."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.daemon.rig import await_true
from tests.guest.backends import vhostsync_command
from tests.guest.processes import Process


class Exporter:
    def __init__(
        self, folder: Path, *options: str | Path, before: Sequence[str] = (), log: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """`env`: of a host of the test's own, whose disks it finds by itself."""
        where = () if env is not None else ("--sockets", folder)
        words = [*before, *vhostsync_command(), "exporter", *where, "--listen", "127.0.0.1:0", *options]
        self.process = Process("vhostsync exporter", words, log or folder / "exporter.log", env=env)
        try:
            await_true(lambda: self.address is not None, "the exporter listens")
        except BaseException:
            self.process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    @property
    def lines(self) -> list[dict[str, object]]:
        """Of its log."""
        assert self.process.running, self.process.last_output()
        return [
            json.loads(line) for line in self.process.log.read_text().splitlines() if line.startswith("{")
        ]

    @property
    def address(self) -> str | None:
        ready = [each for each in self.lines if each["message"] == "metrics ready"]
        return str(ready[0]["where"]) if ready else None

    def page(self) -> str:
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=30) as answer:
            assert answer.status == 200
            return str(answer.read().decode())

    def up(self) -> dict[str, int]:
        return up(self.page())


def up(page: str) -> dict[str, int]:
    return {
        name: int(value)
        for name, value in re.findall(r'^vhostsync_up\{vm="(.*)"\} (\d)$', page, re.MULTILINE)
    }
