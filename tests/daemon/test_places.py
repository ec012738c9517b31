# SPDX-License-Identifier: Apache-2.0
"""Whatever lies at the places that a start uses, it serves or ends with one sentence: each file and each
directory missing, of another owner, read-only, full, of another kind, a link to nowhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.daemon.rig import WAIT_S, fill, image, tmpfs
from vhostsync import daemon
from vhostsync.cli import main as cli
from vhostsync.record.state_index import open_state_file
from vhostsync.record.state_record import StateRecord
from vhostsync.storage.identify import identify
from vhostsync.storage.identity import DiskIdentity

NOBODY: Final = 65534
FORKED: Final = multiprocessing.get_context("fork")  # a start is a moment then, and there are many

# All that runs as this user shares one limit of locked memory: one test at a time.
pytestmark = pytest.mark.xdist_group("nobody")


def _serve(words: list[str], said: Path, environment: dict[str, str], user: int | None) -> None:
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    daemon.load_modules()  # the user may not be let through to them
    os.environ.update(environment)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    sys.exit(cli.main(words))


class Place:
    """The folder of one machine. Everything belongs to the user that serves it, who is not root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = NOBODY if os.geteuid() == 0 else None
        self.said = folder / "said"
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind(f"\0vhostsync-test-{os.getpid()}")
        self._notified.settimeout(0.02)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._notified.close()

    def lay_out(self, name: str) -> dict[str, Path]:
        """A place where all is well, after a run in which a mirror was attached."""
        at = self.folder / name
        for folder in ("disks", "state", "files", "sockets", "bits"):
            (at / folder).mkdir(parents=True)
        paths = {
            "disk": image(at / "disks" / "a.img", 1, filled_mib=0), "disk's": at / "disks",
            "state": at / "state", "record": at / "files" / "vm", "record's": at / "files",
            "lock": at / "files" / "vm.lock",
            "bitmap": at / "bits" / "vm", "bitmap's": at / "bits", "sockets": at / "sockets",
            "socket": at / "sockets" / "s", "control": at / "sockets" / "s.control",
            "metrics": at / "sockets" / "m",
        }  # fmt: skip
        fd = os.open(paths["disk"], os.O_RDONLY)
        identity = identify(fd, paths["disk"])
        os.close(fd)
        peer = DiskIdentity(str(at / "b.img"), "file", 1, 2, 1 << 20)
        for explicit in (None, paths["record"]):
            with open_state_file(explicit, identity, lock_timeout_s=0, directory=paths["state"]) as file:
                file.change(StateRecord.first(identity).with_peer(peer))
                if explicit is None:
                    paths["indexed record"] = file.path
        paths["pointer"] = next(paths["state"].glob("a*.disk.json"))
        self._give(at)
        return paths

    def _give(self, top: Path) -> None:
        if self.user is not None:
            for path in (top, *top.rglob("*")):
                os.chown(path, self.user, self.user, follow_symlinks=False)

    def start(self, paths: dict[str, Path], *, explicit: bool) -> tuple[bool, int, str]:
        """Whether it served, its exit code, its last words."""
        words = ["serve", "--blk-file", str(paths["disk"]), "--socket-path", str(paths["socket"])]
        words += ["--metrics", str(paths["metrics"]), "--bitmap", str(paths["bitmap"]), "--sandbox", "off"]
        words += ["--log-level", "error", "--log-format", "text", "--cache", "writeback"]
        words += ["--log-size", "8M", "--num-queues", "1"]
        if explicit:
            words += ["--state-file", str(paths["record"])]
        environment = {
            "STATE_DIRECTORY": str(paths["state"]), "NOTIFY_SOCKET": f"@vhostsync-test-{os.getpid()}"
        }
        process = FORKED.Process(target=_serve, args=(words, self.said, environment, self.user))
        process.start()
        served = False
        while process.is_alive():
            try:
                served = b"READY=1" in self._notified.recv(4096) or served
            except TimeoutError:
                continue
            if served:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGTERM)
        process.join(WAIT_S)
        assert process.exitcode is not None
        return served, process.exitcode, self.said.read_text()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    # Not in pytest's own folder, which other users may not pass through.
    with tempfile.TemporaryDirectory() as folder, Place(Path(folder)) as it:
        Path(folder).chmod(0o755)
        yield it


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.away"))
    else:
        path.unlink(missing_ok=True)


def a_file(path: Path) -> None:
    remove(path)
    path.write_bytes(b"something else\n" * 1000)


def a_directory(path: Path) -> None:
    remove(path)
    path.mkdir()


def a_fifo(path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def a_link_to_nowhere(path: Path) -> None:
    remove(path)
    path.symlink_to(path.parent / "nowhere" / "at all")


def a_link_to_itself(path: Path) -> None:
    remove(path)
    path.symlink_to(path)


def without_rights(path: Path) -> None:
    exists(path)
    path.chmod(0)


def read_only_mode(path: Path) -> None:
    exists(path)
    path.chmod(0o555 if path.is_dir() else 0o444)


def anothers(path: Path) -> None:
    exists(path)
    os.chown(path, 0, 0)
    path.chmod(0o700)


def exists(path: Path) -> None:
    if not path.exists():
        path.touch()


Way = Callable[[Path], None]
OF_BOTH: Final[tuple[Way, ...]] = (a_file, a_link_to_nowhere, without_rights, read_only_mode, anothers)
OF_A_FILE: Final[tuple[Way, ...]] = (*OF_BOTH, a_directory, a_fifo, a_link_to_itself)
OF_A_DIRECTORY: Final[tuple[Way, ...]] = (*OF_BOTH, remove)
DIRECTORIES: Final = ("disk's", "record's", "bitmap's", "sockets", "state")
OF_THE_INDEX: Final = ("state", "indexed record", "pointer")
PLACES: Final = (
    "disk", "disk's", "record", "record's", "lock", "bitmap", "bitmap's", "sockets", "socket", "control",
    *OF_THE_INDEX,
)  # fmt: skip


def check_end(served: bool, code: int, said: str, where: str) -> None:
    assert "Traceback" not in said, f"{where}:\n{said}"
    sentences = [line for line in said.splitlines() if line.startswith("vhostsync: ")]
    if served:
        assert (code, sentences) == (0, []), f"{where}: ended with {code}:\n{said}"
    else:
        assert code in (1, 2) and len(sentences) == 1, f"{where}: ended with {code}:\n{said}"


@pytest.mark.parametrize("what", PLACES)
def test_a_start_serves_or_says_why_not(place: Place, what: str) -> None:
    for way in OF_A_DIRECTORY if what in DIRECTORIES else OF_A_FILE:
        if way is anothers and os.geteuid() != 0:
            continue
        where = f"{what} {way.__name__}".replace("'", "")
        paths = place.lay_out(where)
        way(paths[what])
        served, code, said = place.start(paths, explicit=what not in OF_THE_INDEX)
        check_end(served, code, said, where)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("way", ["full", "read-only"])
def test_on_a_file_system_that_is_full_or_read_only(place: Place, way: str, explicit: bool) -> None:
    folder = place.folder / f"{way} {explicit}"
    folder.mkdir()
    with tmpfs(folder, 4096) as files:
        paths = place.lay_out(os.fspath(files.folder.relative_to(place.folder) / "x"))
        if way == "full":
            fill(files.folder / "ballast")
        else:
            files.remount_read_only()
        served, code, said = place.start(paths, explicit=explicit)
    check_end(served, code, said, way)
