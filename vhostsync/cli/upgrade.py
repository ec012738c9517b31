# SPDX-License-Identifier: Apache-2.0
"""`vhostsync upgrade`: a backend of this version goes on for the one that runs, as that was started."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import anyio

from vhostsync.control.client import ControlClient, connect
from vhostsync.control.found_socket import Control
from vhostsync.errors import HandOverError, UnreachableError
from vhostsync.node.request import OPTION, node_of
from vhostsync.option_values import TakeOver

EXIT_OK: Final = 0
LOOK_S: Final = 0.02
_IDS: Final = ("Uid:", "Gid:", "Groups:")


async def run(options: argparse.Namespace) -> int:
    """HandOverError: the backend goes on, or the sentence says what became of it. UnreachableError."""
    async with connect(options.control) as client:
        former = client.process
        await _check_mirror(client, force=options.force)
        knows = any(each["name"] == "hand-over" for each in await client.execute("query-commands"))
    words = options.words or _words_of(former)
    if node_of(words)[0] is not None:
        raise HandOverError(f"The new backend is started by this command, not by a node: leave out {OPTION}.")
    _check_service(former)
    with anyio.fail_after(options.timeout):
        successor = _start(former, words, log_too=knows)
        await _until_it_serves(options.control, successor)
    sys.stdout.write(f"process {successor.pid} serves in the place of {former}\n")
    return EXIT_OK


def _start(former: int, words: Sequence[str], *, log_too: bool) -> "subprocess.Popen[bytes]":
    """In a session of its own: it outlives this command, and the terminal. What it says before it serves is
    for whoever has given the command, if it has a log to go on with."""
    what = TakeOver.GUEST_AND_LOG if log_too else TakeOver.GUEST
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", "-m", "vhostsync", "serve", *words, "--take-over", what],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if log_too else None,
        cwd=_folder_of(former), start_new_session=True, **_credentials(former, words),
    )  # fmt: skip


async def _check_mirror(client: ControlClient, *, force: bool) -> None:
    mirror = await client.execute("query-mirror")
    if mirror["state"] in ("syncing", "ahead") and mirror["bitmap"] is None and not force:
        raise HandOverError(
            f"The mirror is {mirror['state']}, and without --bitmap it would be copied from the beginning "
            f"again; wait until it is steady, or upgrade with --force."
        )


def _words_of(process: int) -> Sequence[str]:
    """What the backend was started with, after the word `serve`."""
    try:
        words = [each.decode() for each in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[:-1]]
        words = words[words.index("serve") + 1 :]
        return words[:-2] if words[-2:-1] == ["--take-over"] else words
    except (OSError, ValueError) as error:
        raise HandOverError(
            f"What process {process} was started with cannot be told; write the options of `serve` after --, "
            f"as in vhostsync upgrade --control PATH -- --socket-path …"
        ) from error


def _check_service(process: int) -> None:
    """A service manager takes note of a new main process only from within the service."""
    try:
        there, here = (Path(f"/proc/{each}/cgroup").read_text() for each in (process, "self"))
    except OSError:
        return
    service = there.strip().rpartition("/")[2]
    if there != here and service.endswith(".service"):
        raise HandOverError(
            f"Process {process} belongs to {service}, and a new one that is started here would not; let its "
            f"service manager do it: systemctl reload {service}"
        )


def _credentials(process: int, words: Sequence[str]) -> dict[str, Any]:
    """Root starts the new one as whoever the former is; or as root, where that has become its user by
    --user."""
    if os.geteuid() != 0 or any(word.partition("=")[0] == "--user" for word in words):
        return {}
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    named = [line.partition(":") for line in status if line.startswith(_IDS)]
    ids = {name: [int(each) for each in numbers.split()] for name, _, numbers in named}
    return {"user": ids["Uid"][1], "group": ids["Gid"][1], "extra_groups": ids["Groups"]}


def _folder_of(process: int) -> Path:
    """Where relative paths begin; only root may ask that of a backend that is confined."""
    try:
        return Path(f"/proc/{process}/cwd").readlink()
    except OSError:
        return Path.cwd()


async def _until_it_serves(control: Control, successor: "subprocess.Popen[bytes]") -> None:
    while successor.poll() is None:
        try:
            async with connect(control) as client:
                if client.process == successor.pid:
                    return
        except UnreachableError:  # between the two
            pass
        await anyio.sleep(LOOK_S)
    said = successor.stderr.read().decode(errors="replace") if successor.stderr is not None else ""
    raise HandOverError(
        f"The new backend has ended with exit code {successor.returncode}; `vhostsync status` tells whether "
        f"the former one still serves. It has said: {said.strip().removeprefix('vhostsync: ')}"
    )
