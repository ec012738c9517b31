# SPDX-License-Identifier: Apache-2.0
"""Listening unix sockets: whose file may be replaced, which mode it has, and that one wins."""

import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_own_file import FOREIGN, link_to_a_disk, untouched
from vhostsync.errors import ConfigError
from vhostsync.host import unix_socket
from vhostsync.host.unix_socket import bind_unix_socket
from vhostsync.vhost_user.listener import listen_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


def test_the_socket_never_had_another_mode(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watched(socket.socket):
        def listen(self, backlog: int = 0, /) -> None:
            seen.append(stat.S_IMODE(path.lstat().st_mode))
            super().listen(backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        bind_unix_socket(path).close()
    finally:
        os.umask(before)
    assert seen == [0o600]


def test_a_leftover_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as leftover:
        leftover.bind(str(path))
    bound = bind_unix_socket(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    bound.close()
    assert not path.exists()


def test_a_socket_in_use_is_not_taken(path: Path) -> None:
    bound = bind_unix_socket(path)
    with pytest.raises(ConfigError, match="another process listens on it"):
        bind_unix_socket(path)
    bound.close()


def test_a_busy_socket_is_not_taken_for_a_leftover(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        with pytest.raises(ConfigError, match="another process listens on it"):
            bind_unix_socket(path)


def test_another_kind_of_socket_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(path))
        with pytest.raises(ConfigError, match="another process listens on it"):
            bind_unix_socket(path)


@pytest.mark.parametrize(("make", "what"), FOREIGN[:-1])
@pytest.mark.parametrize("name", ["control", "control.making"])
def test_what_is_no_socket_is_left_alone(
    path: Path, name: str, make: Callable[[Path], object], what: str
) -> None:
    make(path.with_name(name))
    said = "is no socket" if name == "control" else what
    with untouched(path.parent), pytest.raises(ConfigError, match=said):
        bind_unix_socket(path)


@pytest.mark.parametrize("name", ["control", "control.making"])
def test_a_link_is_left_alone(path: Path, name: str) -> None:
    link_to_a_disk(path.with_name(name))
    with untouched(path.parent), pytest.raises(ConfigError, match="a symbolic link"):
        bind_unix_socket(path)


def test_nobody_else_can_keep_a_socket_from_being_made(path: Path) -> None:
    """Whoever may read a directory may lock it."""
    directory = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    bind_unix_socket(path).close()
    os.close(directory)
    assert not list(path.parent.iterdir())


def test_a_lock_that_a_crash_has_left_is_taken(path: Path) -> None:
    lock = path.with_name("control.making")
    lock.touch()
    bind_unix_socket(path).close()
    assert not lock.exists()


def test_a_lock_that_is_held_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = path.with_name("control.making")
    monkeypatch.setattr(unix_socket, "LOCK_S", 0.03)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process is making it and has locked .*\.making"):
            bind_unix_socket(path)
        assert lock.exists()
    bind_unix_socket(path).close()


def test_it_listens_until_its_file_is_gone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another start might put its own there in between, and lose it."""
    bound, remove = bind_unix_socket(path), Path.unlink

    def unlink(file: Path, missing_ok: bool = False) -> None:
        if file == path:
            with pytest.raises(ConfigError, match="another process listens on it"):
                bind_unix_socket(path)
        remove(file, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    bound.close()
    assert not path.exists()


def test_it_is_closed_once(path: Path) -> None:
    bound = bind_unix_socket(path)
    bound.close()
    later = bind_unix_socket(path)  # perhaps with the same inode number
    bound.close()
    assert path.is_socket()
    later.close()


def test_the_file_of_a_successor_is_left_alone(path: Path) -> None:
    bound = bind_unix_socket(path)
    path.unlink()
    path.write_text("another's")
    bound.close()
    assert path.read_text() == "another's"


def test_no_directory_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        bind_unix_socket(tmp_path / "no" / "control")


def by_itself(path: Path) -> Callable[[], None]:
    return bind_unix_socket(path).close


def for_frontends(path: Path) -> Callable[[], None]:
    return listen_at(path).close


@pytest.mark.parametrize("make", [by_itself, for_frontends])
def test_of_many_that_start_at_once_over_a_leftover_one_wins(
    path: Path, make: Callable[[Path], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hesitant(socket.socket):
        def listen(self, backlog: int = 0, /) -> None:
            time.sleep(0.05)  # a moment in which it is bound and does not listen
            super().listen(backlog)

    with socket.socket(socket.AF_UNIX) as leftover:
        leftover.bind(str(path))
    monkeypatch.setattr(socket, "socket", Hesitant)
    won: list[Callable[[], None]] = []
    lost: list[ConfigError] = []
    start = threading.Barrier(4)

    def contend() -> None:
        start.wait()
        try:
            won.append(make(path))
        except ConfigError as error:
            lost.append(error)

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 3)
    won[0]()
    assert not list(path.parent.iterdir())
