# SPDX-License-Identifier: Apache-2.0
"""Kinds of disks that are no part of vhostsync and lie on no file system: `mem:NAME` and `far:NAME`, disks of
a DiskServer.

As a program: `served_disks.py SOCKET [WORDS …] serve …` is `vhostsync serve …` with this kind of disk, of the
server at that socket."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.testing_library import lib
from vhostsync.cli import main as cli
from vhostsync.errors import ConfigError, DiskError
from vhostsync.storage import kinds
from vhostsync.storage.condition import Condition, Look
from vhostsync.storage.disk import CacheMode, Disk, Spot
from vhostsync.storage.identity import DiskIdentity, Likeness
from vhostsync.storage.network import Remote

BLOCK_BYTES = 512


@dataclass(frozen=True)
class ServedDisk:
    """One that this process owns."""

    name: str
    connection: socket.socket
    identity: DiskIdentity
    read_only: bool
    direct: bool = True
    logical_block_bytes: int = BLOCK_BYTES
    physical_block_bytes: int = 4096
    discard_granularity_bytes: int = 4096

    @property
    def bytes(self) -> int:
        return self.identity.bytes

    @property
    def why_no_source(self) -> str | None:
        return "its server cannot make each write durable" if "sink" in self.name else None

    def as_it_is(self) -> DiskIdentity:
        return self.identity

    def with_mark(self, mark: str | None) -> ServedDisk:
        return self  # its token is its own for good

    def bear_mark(self) -> ServedDisk:
        return self

    def image_format(self) -> str | None:
        return None

    def signatures(self) -> list[str]:
        return []

    def end_threads(self) -> None:
        """It has none."""

    def to_engine(self) -> Any:
        return lib.vs_served_disk(self.connection.detach(), self.bytes, BLOCK_BYTES)

    def close(self) -> None:
        self.connection.close()


class Served:
    """The kind."""

    prefix = "mem:"
    identities = frozenset({"mem"})
    over_network = True
    fences_itself = True

    def __init__(self, server: Path) -> None:
        self._server = server

    def _ask(self, name: str, wish: str, **more: Any) -> tuple[dict[str, Any], socket.socket]:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self._server))
            connection.sendall(json.dumps({"name": name, "wish": wish, **more}).encode() + b"\n")
            line = b""
            while not line.endswith(b"\n"):
                line += connection.recv(1) or b"{}\n"
            return json.loads(line), connection
        except BaseException:
            connection.close()
            raise

    def _told(self, name: str, wish: str, **more: Any) -> dict[str, Any]:
        answer, connection = self._ask(name, wish, **more)
        connection.close()
        return answer

    def _identity(self, name: str, answer: dict[str, Any]) -> DiskIdentity:
        if "token" not in answer:
            raise FileNotFoundError(2, "the server has no such disk", name)
        return DiskIdentity(name, self.prefix[:-1], 0, 0, answer["bytes"], serial=answer["token"])

    def keep_files(self) -> None:
        """There are none."""

    def absolute(self, name: str) -> str:
        if not re.fullmatch(self.prefix + "[a-z0-9]+", name):
            letters = f"write {self.prefix} and letters or digits"
            raise ConfigError(f"{name!r} names no disk of a server; {letters}.")
        return name

    def open(
        self, name: str, *, read_only: bool, cache: CacheMode, lock_timeout_s: float
    ) -> ServedDisk:
        deadline = time.monotonic() + lock_timeout_s
        while True:
            try:
                answer, connection = self._ask(name, "own")
                identity = self._identity(name, answer)
            except OSError as error:
                raise DiskError(f"{name} cannot be opened: {error.strerror}") from error
            if not answer["owned"]:
                return ServedDisk(name, connection, identity, read_only)
            connection.close()
            if time.monotonic() >= deadline:
                raise DiskError(f"{name} is in use by another backend; end that one first")
            time.sleep(0.01)

    def create(self, name: str, size_bytes: int) -> object:
        answer = self._told(name, "create", bytes=size_bytes)
        if "token" not in answer:
            raise DiskError(f"{name} exists already and is not overwritten")
        return answer["token"]

    def remove(self, name: str, made: object) -> None:
        self._told(name, "remove", token=made)

    def is_made(self, disk: Disk, made: object) -> bool:
        return disk.identity.serial == made

    def overlap(self, one: str, other: str) -> str | None:
        try:
            same = self.identify(one).likeness(self.identify(other)) is Likeness.SAME
        except FileNotFoundError:
            return None
        return "one disk" if same else None

    def is_named(self, name: str, disk: DiskIdentity) -> bool:
        return self._told(name, "look").get("token") == disk.serial

    def identify(self, name: str) -> DiskIdentity:
        return self._identity(name, self._told(name, "look"))

    def look(self, disk: DiskIdentity) -> Look:
        try:
            answer = self._told(disk.path, "look")
        except OSError as error:
            return Look(Condition.FAILING, error.strerror)
        if "token" not in answer:
            return Look(Condition.MISSING)
        if answer["token"] != disk.serial:
            return Look(Condition.OTHER)
        return Look(Condition.THERE, users=("another backend",) if answer["owned"] else ())

    def spot(self, name: str) -> Spot | None:
        return None

    def remote(self, name: str) -> Remote | None:
        return Remote()

    def places(self, disk: DiskIdentity) -> Iterable[Path]:
        return ()


class Foreign(Served):
    """The same, of a server that nobody vouches for: `far:NAME`."""

    prefix = "far:"
    identities = frozenset({"far"})
    fences_itself = False


if __name__ == "__main__":
    kinds.register(Served(Path(sys.argv[1])))
    kinds.register(Foreign(Path(sys.argv[1])))
    sys.exit(cli.main(sys.argv[sys.argv.index("serve") :]))
