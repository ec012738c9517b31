# SPDX-License-Identifier: Apache-2.0
"""What a node is asked for, and its answers: one parcel with the request, then a parcel with the process,
and one with its exit code once it has ended, for whoever still waits.

Only what asking needs is imported here: whoever asks is a process that has just been started."""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vhostsync.errors import ControlError, UnreachableError, VhostsyncError
from vhostsync.host.owned_fd import close_all
from vhostsync.host.parcel import receive_parcel, send_parcel
from vhostsync.host.peer import peer_uid

REQUEST_BYTES_MAX: Final = 1 << 20
ANSWER_BYTES_MAX: Final = 1 << 16
DESCRIPTORS_MAX: Final = 16
ANSWER_S: Final = 10.0
TRY_AGAIN_S: Final = 0.02
OPTION: Final = "--from-node"
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3


@dataclass(frozen=True)
class Request:
    """A start: the words after `serve`, and what the backend has of whoever asks. `descriptors`: the
    numbers that it is to have them under, stdin, stdout and stderr among them."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str
    umask: int
    descriptors: tuple[int, ...]

    def encoded(self) -> bytes:
        told = {
            "words": self.words, "environment": dict(self.environment), "directory": self.directory,
            "umask": self.umask, "descriptors": self.descriptors,
        }  # fmt: skip
        return json.dumps(told).encode()

    @classmethod
    def decoded(cls, data: bytes, descriptors: int) -> "Request":
        """Of so many descriptors that have arrived. ValueError."""
        try:
            told: dict[str, Any] = json.loads(data)
            numbers = tuple(int(each) for each in told["descriptors"])
            made = cls(
                tuple(map(str, told["words"])),
                {str(name): str(value) for name, value in told["environment"].items()},
                str(told["directory"]), int(told["umask"]) & 0o777, numbers,
            )  # fmt: skip
        except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"it is no request: {error!r}") from error
        if len(numbers) != descriptors or len(set(numbers)) != descriptors or not {0, 1, 2} <= set(numbers):
            raise ValueError("its descriptors are not those that it names")
        if any(not 0 <= number < DESCRIPTORS_MAX for number in numbers):
            raise ValueError(f"a descriptor is to have a number of {DESCRIPTORS_MAX} or more")
        return made


class Started:
    """A backend that a node has forked. Whoever closes this does not end it."""

    def __init__(self, connection: socket.socket, process: int) -> None:
        self._connection = connection
        self.process = process

    def close(self) -> None:
        self._connection.close()

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code; minus the number of the signal that has ended it. TimeoutError. UnreachableError:
        the node has ended, and the backend perhaps not."""
        self._connection.settimeout(timeout_s)
        return int(_answer(self._connection)["exit-code"])


def start(node: Path, request: Request, fds: Sequence[int] | None = None) -> Started:
    """`fds`: what it is to have as `request.descriptors`; None: what this process has under these numbers.
    Blocks. UnreachableError, ControlError: nothing was started."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(ANSWER_S)
        try:
            _connect(connection, node)
            # It gets the environment and descriptors. Whom root trusts is root's matter.
            if os.geteuid() not in (0, peer_uid(connection)):
                raise ControlError(f"Whoever listens at {node} is another user, who gets nothing.")
            send_parcel(connection, request.encoded(), request.descriptors if fds is None else fds)
        except OSError as error:
            raise UnreachableError(
                f"No node can be reached at {node}: {error.strerror or error}; start one there with "
                f"`vhostsync node --listen {node}`, or leave out {OPTION}."
            ) from error
        try:
            answer = _answer(connection)
        except TimeoutError as error:
            raise UnreachableError(
                f"The node at {node} has not answered in {ANSWER_S:.0f} s; its log says what it has started."
            ) from error
        if "error" in answer:
            raise ControlError(str(answer["error"]))
        return Started(connection, int(answer["process"]))
    except BaseException:
        connection.close()
        raise


def _connect(connection: socket.socket, node: Path) -> None:
    """OSError. Where as many wait as the node's socket lets, the kernel says so at once."""
    until = time.monotonic() + ANSWER_S
    while True:
        try:
            connection.connect(os.fspath(node))
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(TRY_AGAIN_S)


def _answer(connection: socket.socket) -> dict[str, Any]:
    try:
        data, fds = receive_parcel(connection, ANSWER_BYTES_MAX, 0)
    except TimeoutError:
        raise
    except (EOFError, OSError) as error:
        raise UnreachableError(
            "The node has ended before it answered; a backend that it forked goes on."
        ) from error
    close_all(fds)
    answer: dict[str, Any] = json.loads(data)
    return answer


def node_of(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The node that is named, and the words without it."""
    node, left = None, list[str]()
    rest = iter(words)
    for word in rest:
        name, separator, value = word.partition("=")
        if name != OPTION:
            left.append(word)
        else:
            node = Path(value if separator else next(rest, ""))
    return node, left


def _descriptor_of(words: Sequence[str]) -> tuple[int, ...]:
    """Of --fd: of several, the last, which is the one that `serve` takes."""
    value, rest = "", iter(words)
    for word in rest:
        name, separator, given = word.partition("=")
        if name == "--fd":
            value = given if separator else next(rest, "")
    return (int(value),) if value.isascii() and value.isdigit() else ()


def run(words: Sequence[str]) -> int:
    """`serve --from-node`, with the words after `serve`; the exit code. Prints the process, and does not
    wait for it."""
    node, left = node_of(words)
    if node is None or not node.name:
        sys.stderr.write(f"vhostsync: {OPTION} needs the socket of a node\n")
        return EXIT_USAGE
    umask = os.umask(0o077)
    os.umask(umask)
    descriptors = tuple(sorted({0, 1, 2, *_descriptor_of(left)}))
    try:
        for number in descriptors:
            os.fstat(number)
    except OSError as error:
        sys.stderr.write(f"vhostsync: descriptor {number} cannot be handed to the node: {error.strerror}\n")
        return EXIT_USAGE
    try:
        started = start(node, Request(tuple(left), os.environ, str(Path.cwd()), umask, descriptors))
    except UnreachableError as error:
        sys.stderr.write(f"vhostsync: {error}\n")
        return EXIT_UNREACHABLE
    except (VhostsyncError, OSError) as error:
        sys.stderr.write(f"vhostsync: {error}\n")
        return EXIT_FAILED
    started.close()
    sys.stdout.write(f"{started.process}\n")
    return 0


