# SPDX-License-Identifier: Apache-2.0
"""The wire that qemu-storage-daemon's monitor and vhostsync's control socket share."""

import json
import socket
import time
from pathlib import Path
from typing import Any

from bench.sample import BenchError

CONNECT_S = 15


class Qmp:
    """One connection; events are passed over."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BenchError(f"nobody listens at {path}") from error
                time.sleep(0.02)
        # For reading alone: a text file that is read and written forgets what it has read ahead.
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while line := self._file.readline():
            reply = json.loads(line)
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise BenchError(f"{command}: {reply['error']['desc']}")
        raise BenchError(f"{command}: the backend hung up")

    def close(self) -> None:
        self._file.close()
        self._socket.close()
