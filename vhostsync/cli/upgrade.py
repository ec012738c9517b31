# SPDX-License-Identifier: Apache-2.0
"""`vhostsync upgrade`: a backend of this version goes on for the one that runs, as that was started."""

import argparse
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

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
    with anyio.fail_after(options.timeout), _Said() as said:
        successor = await _start(former, words, said if knows else None)
        await _until_it_serves(options.control, successor, said)
    sys.stdout.write(f"process {successor} serves in the place of {former}\n")
    return EXIT_OK


class _Said:
    """What the successor says before it serves: for whoever has given the command."""

    def __enter__(self) -> Self:
        self._read, self.fd = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read)
        self.ends()

    def ends(self) -> None:
        """On this side: from here on the successor alone has it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def text(self) -> str:
        """All of it; once the successor has ended."""
        self.ends()
        with open(self._read, "rb", closefd=False) as said:
            return said.read().decode(errors="replace").strip().removeprefix("vhostsync: ")


_START_AND_END: Final = (
    "import os, signal, sys;"
    "nothing = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0);"
    "usual = (signal.SIGPIPE, signal.SIGXFSZ);"
    "print(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[nothing], setsigdef=usual))"
)
"""A process that starts another one, says which, and ends."""


async def _start(former: int, words: Sequence[str], said: _Said | None) -> int:
    """The process. In a session of its own: it outlives this command, and the terminal. `said`: it has a log
    to go on with once it serves.

    By another process, which ends at once. So the successor is the service manager's own child when it says
    that it is the main process: of anybody else's, systemd would not notice that it has crashed, and send
    SIGKILL right after the SIGTERM with which it stops it."""
    what = TakeOver.GUEST_AND_LOG if said is not None else TakeOver.GUEST
    command = [sys.executable, "-P", "-m", "vhostsync", "serve", *words, "--take-over", what]
    try:
        starting = await anyio.run_process(
            [sys.executable, "-I", "-S", "-c", _START_AND_END, *command], check=False,
            stdin=subprocess.DEVNULL, stderr=said.fd if said is not None else None, cwd=_folder_of(former),
            start_new_session=True, **_credentials(former, words),
        )  # fmt: skip
    except OSError as error:
        raise HandOverError(f"No new backend could be started: {error.strerror or error}.") from error
    if not starting.stdout.strip().isdigit():
        why = said.text().rpartition("\n")[2] if said is not None else ""
        raise HandOverError(f"No new backend could be started: {why or 'the attempt was killed'}.")
    return int(starting.stdout)


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


async def _until_it_serves(control: Control, successor: int, said: _Said) -> None:
    with _watched(successor) as has_ended:
        while not has_ended():
            try:
                async with connect(control) as client:
                    if client.process == successor:
                        return
            except UnreachableError:  # between the two
                pass
            await anyio.sleep(LOOK_S)
    raise HandOverError(
        f"The new backend has ended; `vhostsync status` tells whether the former one still serves. It has "
        f"said: {said.text() or 'nothing'}"
    )


@contextmanager
def _watched(process: int) -> Iterator[Callable[[], bool]]:
    """Whether it has ended. It is another one's child."""
    try:
        fd = os.pidfd_open(process)
    except ProcessLookupError:
        yield lambda: True
        return
    try:
        yield lambda: bool(select.select([fd], [], [], 0)[0])
    finally:
        os.close(fd)
