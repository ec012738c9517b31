# SPDX-License-Identifier: Apache-2.0
"""A control socket that was found may lie in one of several places: each is tried, and none is waited for at
the cost of the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhostsync.control.client import connect
from vhostsync.control.found_socket import FoundSocket
from vhostsync.errors import UnreachableError

pytestmark = pytest.mark.anyio

US = frozenset({os.getpid()})


class Places:
    """Sockets of this process."""

    def __init__(self, folder: Path, undo: ExitStack) -> None:
        self.lock = folder / "lock"
        self._folder = folder
        self._undo = undo

    def listening(self, name: str, backlog: int = 8) -> Path:
        listener = self._undo.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(self._folder / name))
        listener.listen(backlog)
        return self._folder / name

    def full(self, name: str) -> Path:
        """Who connects there waits."""
        path = self.listening(name, backlog=0)
        waits = self._undo.enter_context(socket.socket(socket.AF_UNIX))
        waits.connect(str(path))
        return path

    def left_over(self, name: str) -> Path:
        with socket.socket(socket.AF_UNIX) as former:
            former.bind(str(self._folder / name))
        return self._folder / name

    def found(self, *paths: Path) -> FoundSocket:
        first, *others = paths
        return FoundSocket(first, self.lock, US, tuple(others))


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    with ExitStack() as undo:
        yield Places(tmp_path, undo)


async def connected_to(found: FoundSocket) -> Path:
    connection, there = await found.connected()
    connection.close()
    return there.path


@pytest.mark.parametrize("first", ["left over", "missing", "full"])
async def test_the_next_place_is_tried(places: Places, tmp_path: Path, first: str) -> None:
    before = tmp_path / "first"
    if first != "missing":
        before = places.full("first") if first == "full" else places.left_over("first")
    second = places.listening("second")
    assert await connected_to(places.found(before, second)) == second


async def test_of_two_the_first_one_is_it(places: Places) -> None:
    first = places.listening("first")
    assert await connected_to(places.found(first, places.listening("second"))) == first


@pytest.mark.parametrize("turned", [False, True])
async def test_what_is_said_is_of_the_place_that_says_most(
    places: Places, tmp_path: Path, turned: bool
) -> None:
    both = [places.left_over("left"), tmp_path / "missing"]
    found = places.found(*reversed(both) if turned else both)
    with pytest.raises(UnreachableError, match=f"Nobody listens on {tmp_path}/left;"):
        async with connect(found):
            pass


async def test_a_disk_that_two_records_claim_may_listen_where_either_says(places: Places) -> None:
    left, listening = places.left_over("left"), places.listening("listening")
    of_both = FoundSocket(left).claimed_too(places.found(left, listening))
    assert of_both.places == (left, listening)
    assert await connected_to(of_both) == listening
