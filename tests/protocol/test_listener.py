# SPDX-License-Identifier: Apache-2.0
"""--socket-path and --fd: what is taken, what is refused, what is left alone."""

import os
import socket
from pathlib import Path

import pytest

from vhostsync.errors import ConfigError
from vhostsync.vhost_user.listener import adopt, listen_at

pytestmark = pytest.mark.usefixtures("no_leak")


def unix(kind: int = socket.SOCK_STREAM) -> socket.socket:
    return socket.socket(socket.AF_UNIX, kind)


def test_a_new_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    endpoint = listen_at(path)
    assert endpoint.listening
    assert not endpoint.sock.get_inheritable()
    with unix() as client:
        client.connect(str(path))
    endpoint.close()
    assert not path.exists()
    endpoint.close()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unix() as old:
        old.bind(str(path))
        old.listen()
    assert path.is_socket()
    endpoint = listen_at(path)
    with unix() as client:
        client.connect(str(path))
    endpoint.close()


def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen_at(path)
    with pytest.raises(ConfigError, match="another process listens on it"):
        listen_at(path)
    with unix() as client:
        client.connect(str(path))
    first.close()


def test_a_live_socket_whose_backlog_is_full_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unix() as busy:
        busy.bind(str(path))
        busy.listen(0)
        with unix() as client:
            client.connect(str(path))
            with pytest.raises(ConfigError, match="another process listens on it"):
                listen_at(path)
    assert path.is_socket()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, make: object) -> None:
    path = tmp_path / "s"
    assert callable(make)
    make(path)
    with pytest.raises(ConfigError, match="no socket"):
        listen_at(path)
    assert path.exists()


def test_a_dangling_link_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no socket"):
        listen_at(path)


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "s", tmp_path / ("x" * 200)):
        with pytest.raises(ConfigError, match="Cannot make the socket"):
            listen_at(path)


def test_another_s_socket_is_not_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen_at(path)
    path.rename(tmp_path / "aside")
    second = listen_at(path)
    first.close()
    assert path.is_socket()
    second.close()


def test_an_inherited_listening_socket(tmp_path: Path) -> None:
    with unix() as parent:
        parent.bind(str(tmp_path / "s"))
        parent.listen()
        number = os.dup(parent.fileno())
        os.set_inheritable(number, True)
    endpoint = adopt(number)
    assert endpoint.listening
    assert endpoint.sock.fileno() == number
    assert not os.get_inheritable(number)
    endpoint.close()
    assert (tmp_path / "s").exists()  # its maker removes it


def test_an_inherited_connection() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    endpoint = adopt(ours.detach())
    assert not endpoint.listening
    assert endpoint.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 0
    endpoint.close()
    theirs.close()


def test_descriptors_that_are_no_use() -> None:
    fd = os.eventfd(0)
    with pytest.raises(ConfigError, match="no socket"):
        adopt(fd)
    os.close(fd)
    with pytest.raises(ConfigError, match="Bad file descriptor"):
        adopt(fd)
    for sock, why in (
        (unix(socket.SOCK_DGRAM), "Unix stream"),
        (socket.socket(socket.AF_INET, socket.SOCK_STREAM), "Unix stream"),
        (unix(), "neither listening nor connected"),
    ):
        with sock, pytest.raises(ConfigError, match=why):
            adopt(sock.fileno())
