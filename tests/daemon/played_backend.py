# SPDX-License-Identifier: Apache-2.0
"""A backend's control socket, played: `python played_backend.py CONTROL dies|older`. Asked to hand over, it
dies once it has met its successor, or it is of a version that does not know how, and obeys `quit`."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path


def main(control: Path, manner: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(control))
    listener.listen()
    client, _ = listener.accept()
    control.unlink()
    lines = client.makefile("rw")

    def say(what: object) -> None:
        lines.write(json.dumps(what) + "\n")
        lines.flush()

    say({"QMP": {}})
    for line in lines:
        told = json.loads(line)
        if told["execute"] == "hand-over" and manner == "older":
            error = {"class": "CommandNotFound", "desc": "The command hand-over has not been found"}
            say({"error": error, "id": told["id"]})
            continue
        if told["execute"] == "hand-over":
            successor = socket.socket(socket.AF_UNIX)
            successor.connect(str(control.with_name(control.name + ".successor")))
        say({"return": {"disk": sys.argv[3]}, "id": told["id"]})
        if told["execute"] in ("hand-over", "quit"):
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
