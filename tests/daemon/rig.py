# SPDX-License-Identifier: Apache-2.0
"""`vhostsync serve` as a process on real files, with a control client and a guest at hand."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import pytest

from tests.frontend import DEFAULT_FEATURES, Frontend, Request
from tests.guest.backends import vhostsync_command
from tests.guest.images import fill_random, new_image
from tests.guest.processes import Process, ProcessError, wait_listening
from tests.guest.qmp_client import Qmp
from tests.guest_ring import GuestMemory
from tests.sizes import MIB
from tests.vhost_client import VhostUserTransport
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord

BLOCK = 4096
WAIT_S = 30.0
STAMP = struct.Struct("<QQ")


def block_of(number: int, seed: int) -> bytes:
    """A block that tells which block and which write it belongs to."""
    return STAMP.pack(number, seed) * (BLOCK // STAMP.size)


def image(path: Path, mib: int = 16, *, filled_mib: int = 4) -> Path:
    """An image whose first `filled_mib` MiB are random; the rest is a hole."""
    new_image(path, mib)
    if filled_mib:
        fill_random(path, 0, filled_mib * MIB)
    return path


def same_content(one: Path, other: Path) -> bool:
    """Whether both disks read alike over the length of the shorter one."""
    with one.open("rb") as first, other.open("rb") as second:
        while True:
            a, b = first.read(MIB), second.read(MIB)
            length = min(len(a), len(b))
            if a[:length] != b[:length]:
                return False
            if not length:
                return True


def refused_start(
    *arguments: str | Path, env: dict[str, str] | None = None, before: Sequence[str] = ()
) -> tuple[int, str]:
    """The exit code and stderr of a `vhostsync` that must end by itself, run by the command `before`."""
    done = subprocess.run(
        [*before, *vhostsync_command(), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
        env={**os.environ, **(env or {})},
    )
    return done.returncode, done.stderr


def await_true(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """For what has no event of its own: looked at every 10 ms."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)


class Served:
    """A `vhostsync serve` that is up. The state record is found by the index in `<folder>/state`."""

    def __init__(
        self, folder: Path, disk: Path | str, *options: str | Path, name: str = "vm",
        pass_fds: Sequence[int] = (), before: Sequence[str | Path] = (), control: Path | None = None,
        state_directory: Path | None = None,
    ) -> None:
        """`before`: a command that becomes `serve`, whose words are its last arguments. `control`,
        `state_directory`: instead of NAME.control and state in the folder."""
        self.folder = folder
        self.socket = folder / f"{name}.sock"
        self.control = control if control is not None else folder / f"{name}.control"
        self.state_directory = state_directory if state_directory is not None else folder / "state"
        words = [*before, *vhostsync_command(), "serve", "--blk-file", disk, "--control", self.control]
        words += options
        if "--fd" not in options:
            words += ["--socket-path", self.socket]
        self._words, self._log = words, folder / f"{name}.log"
        self.process = self.start(words, pass_fds=pass_fds)
        self._clients: list[Qmp] = []
        try:
            if "--fd" not in options:
                wait_listening(self.process, self.socket)
            wait_listening(self.process, self.control)
            self.qmp = self.client()
        except BaseException:
            self.process.kill()
            raise

    def start(self, words: Sequence[str | Path], *, pass_fds: Sequence[int] = ()) -> Process:
        environment = {"STATE_DIRECTORY": str(self.state_directory)}
        return Process("vhostsync serve", words, self._log, env=environment, pass_fds=pass_fds)

    def hand_over(self, *options: str | Path) -> int:
        """To a successor with the same options and these, which this stands for from then on; how the former
        has ended."""
        former, self.process = self.process, self.start([*self._words, *options, "--take-over"])
        code = former.wait(WAIT_S)
        self._close_clients()
        wait_listening(self.process, self.control)
        self.qmp = self.client()
        return code

    def client(self) -> Qmp:
        """One more connection to the control socket."""
        self._clients.append(Qmp(self.control))
        return self._clients[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_clients()
        Mounted.thaw_all()
        self.process.kill()
        if kind is not None:
            print(f"--- the last output of serve:\n{self.process.last_output(60)}")

    def _close_clients(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()

    def stop(self, timeout_s: float = 15.0) -> float:
        """SIGTERM; exit code 0 is required. Returns how long it took, in seconds."""
        began = time.monotonic()
        code = self.process.terminate(timeout_s)
        took = time.monotonic() - began
        self._close_clients()
        if code != 0:
            raise ProcessError(f"serve ended with {code}:\n{self.process.last_output()}")
        return took

    def kill(self) -> None:
        """SIGKILL, and no wait for what the kernel still does for it but its end."""
        self._close_clients()
        self.process.kill()

    # -- the mirror -----------------------------------------------------------

    def mirror(self) -> dict[str, Any]:
        found: dict[str, Any] = self.qmp.execute("query-mirror")
        return found

    @property
    def state(self) -> str:
        return str(self.mirror()["state"])

    def start_mirror(self, destination: Path | str, **arguments: Any) -> None:
        """Returns in the steady state, when the record says so too."""
        self.qmp.events.clear()
        self.qmp.execute("mirror-start", destination=str(destination), **arguments)
        self.await_steady()
        self.await_worth("up-to-date")

    def await_resumed(self) -> None:
        """The mirror of the last run has come back by itself: steady, and the record says so."""
        await_true(lambda: self.state == "steady", "the mirror is resumed")
        self.await_worth("up-to-date")

    def await_steady(self) -> None:
        while (data := self.qmp.wait_event("MIRROR_STATE_CHANGE", WAIT_S))["state"] != "steady":
            assert data["state"] == "syncing", data

    def await_state(self, state: str, timeout_s: float = WAIT_S) -> dict[str, Any]:
        """The data of the event that reports this state."""
        return self.qmp.wait_event("MIRROR_STATE_CHANGE", timeout_s, state=state)

    def counts(self) -> dict[str, int | None]:
        counts: dict[str, int | None] = self.mirror()["counts"]
        return counts

    def wakeups(self) -> int:
        return int(self.qmp.execute("query-stats")["engine"]["wakeups"])

    def in_flight(self) -> int:
        """Requests of the guest that are taken up and not answered."""
        return sum(int(queue["in-flight"]) for queue in self.qmp.execute("query-stats")["queues"])

    # -- the record -----------------------------------------------------------

    def record(self) -> StateRecord | None:
        records = list(self.state_directory.glob("*.record.json"))
        assert len(records) <= 1, records
        return StateFile(records[0]).load() if records else None

    def await_worth(self, worth: str) -> None:
        def says_so() -> bool:
            record = self.record()
            return record is not None and record.peer_worth is not None and record.peer_worth.value == worth

        await_true(says_so, f"the record says {worth}")

    def memory_kib(self, what: str = "VmRSS") -> int:
        """From /proc/PID/status."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1])
        raise AssertionError(f"no {what}")

    # -- the guest ------------------------------------------------------------

    def guest(
        self,
        *,
        queues: int = 1,
        queue_size: int = 128,
        memory_bytes: int = 32 * MIB,
        features: int = DEFAULT_FEATURES,
        timeout_s: float = WAIT_S,
    ) -> Frontend:
        """Not started yet: use it as a context manager."""
        return Frontend(
            VhostUserTransport(self.socket, timeout_s=timeout_s),
            queues=queues,
            queue_size=queue_size,
            memory=GuestMemory((memory_bytes,)),
            features=features,
            timeout_s=timeout_s,
        )


def write_block(guest: Frontend, number: int, seed: int) -> Request:
    """Written and answered with success; not flushed."""
    request = guest.write_now(number * BLOCK, block_of(number, seed))
    assert request.ok, f"write of block {number}: status {request.status}"
    return request


def answered(guest: Frontend, request: Request) -> bool:
    """Waits for it; whether it went well."""
    guest.wait(request)
    return request.ok


def flush(guest: Frontend) -> None:
    assert guest.flush_now().ok


class Load:
    """A guest that writes blocks and flushes without end, in a thread of its own.

    `blocks` from `first` on are written; after `stop`, `expected` has the seed of each block's last write,
    all of them flushed."""

    def __init__(self, served: Served, *, first: int = 0, blocks: int = 512, depth: int = 8) -> None:
        self._guest = served.guest(queues=2)
        self._range = range(first, first + blocks)
        self._depth = depth
        self._end = threading.Event()
        self._turn = threading.Condition()
        self._rounds = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load")
        self.expected: dict[int, int] = {}
        self.longest_round_s = 0.0

    def __enter__(self) -> Self:
        self._guest.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._guest.close()
        if kind is None and self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        chance = random.Random(1)
        seed = 0
        try:
            while not self._end.is_set():
                began = time.monotonic()
                numbers = chance.sample(self._range, self._depth)
                requests = []
                for number in numbers:
                    seed += 1
                    self.expected[number] = seed
                    data = block_of(number, seed)
                    requests.append(self._guest.write(number * BLOCK, data, queue=seed % 2))
                self._guest.wait(*requests)
                flushed = self._guest.flush()
                self._guest.wait(flushed)
                for request in requests:
                    assert request.ok, f"write at {request.offset}: status {request.status}"
                    self._guest.recycle(request)
                assert flushed.ok, f"flush: status {flushed.status}"
                with self._turn:
                    self.longest_round_s = max(self.longest_round_s, time.monotonic() - began)
                    self._rounds += 1
                    self._turn.notify_all()
        except BaseException as failure:
            with self._turn:
                self._failure = failure
                self._turn.notify_all()

    def go_on(self, rounds: int = 5, timeout_s: float = WAIT_S) -> None:
        """Returns when the guest has done that many more rounds of writes and a flush."""
        with self._turn:
            wanted = self._rounds + rounds
            done = self._turn.wait_for(lambda: self._failure or self._rounds >= wanted, timeout_s)
            if self._failure is not None:
                raise self._failure
            assert done, f"the guest did {self._rounds - wanted + rounds} of {rounds} rounds"

    def widen(self, blocks: int) -> None:
        """From here on so many are written: the disk has grown."""
        self._range = range(self._range.start, self._range.start + blocks)

    def stop(self) -> dict[int, int]:
        """Ends after the current round; what each block must hold."""
        self._end.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self.expected


def lacking(disk: Path, expected: dict[int, int]) -> list[int]:
    """The blocks of the image that do not hold what the guest wrote there."""
    with disk.open("rb") as file:
        wrong = []
        for number, seed in expected.items():
            file.seek(number * BLOCK)
            if file.read(BLOCK) != block_of(number, seed):
                wrong.append(number)
    return wrong


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file in the folder by name, with size, times and content; logs and sockets are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".log", ".sock", ".control", ".lock"):
            continue
        status = path.lstat()
        if path.is_symlink() or not path.is_file():
            found[str(path)] = f"{status.st_mode:o}"
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = f"{status.st_size} {status.st_mtime_ns} {digest}"
    return found


# ---- file systems that fail -----------------------------------------------------


def _root(*command: str | Path) -> None:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise OSError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stdout}{done.stderr}")


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("THIS TEST NEEDS ROOT (it mounts a file system): run the tests as root to have it")


class Mounted:
    """A mounted file system of a test. `freeze` makes every write to it hang until `thaw`.

    No program can be ended as long as it writes to a frozen file system. So whoever ends one thaws them all
    first (`thaw_all`), and a guard does it should the tests be killed."""

    frozen: ClassVar[list[Mounted]] = []

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = 'read _; fsfreeze -u "$1"; umount --lazy "$1"'
        self._guard = subprocess.Popen(
            ["sh", "-c", words, "guard", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        self.thaw()
        self._guard.kill()
        self._guard.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    def freeze(self) -> None:
        _root("fsfreeze", "-f", self.folder)
        self.frozen.append(self)

    def thaw(self) -> None:
        if self in self.frozen:
            self.frozen.remove(self)
            _root("fsfreeze", "-u", self.folder)

    def remount_read_only(self) -> None:
        _root("mount", "-o", "remount,ro", self.folder)

    @classmethod
    def thaw_all(cls) -> None:
        for each in tuple(cls.frozen):
            each.thaw()


@contextlib.contextmanager
def mounted(folder: Path, *mount: str | Path) -> Iterator[Mounted]:
    need_root()
    folder.mkdir(exist_ok=True)
    try:
        _root("mount", *mount, folder)
    except OSError as error:
        pytest.skip(f"THIS TEST IS LEFT OUT, as root may not mount here: {error}")
    it = Mounted(folder)
    try:
        yield it
    finally:
        it.close()
        _unmount(folder)


def _unmount(folder: Path) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            return _root("umount", folder)
        except OSError:  # a process that was killed may still be ending
            if time.monotonic() > deadline:
                _root("umount", "--lazy", folder)
                raise
            time.sleep(0.05)


def ext4_image(backing: Path, mib: int = 64) -> None:
    need_root()
    _root("mkfs.ext4", "-q", "-F", new_image(backing, mib))


@contextlib.contextmanager
def ext4(work: Path, mib: int = 64) -> Iterator[Mounted]:
    """A small ext4 on a loop device, which can be frozen."""
    backing = work / "ext4.img"
    ext4_image(backing, mib)
    with mounted(work / "ext4", "-o", "loop", backing) as it:
        yield it


@contextlib.contextmanager
def tmpfs(work: Path, kib: int) -> Iterator[Mounted]:
    """A file system of that size in memory."""
    with mounted(work / "tmpfs", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs") as it:
        yield it


@contextlib.contextmanager
def overlay(work: Path) -> Iterator[Mounted]:
    """A file system without a name of its own."""
    layers = [work / name for name in ("lower", "upper", "work")]
    for layer in layers:
        layer.mkdir()
    options = "lowerdir={},upperdir={},workdir={}".format(*layers)
    with mounted(work / "overlay", "-t", "overlay", "overlay", "-o", options) as it:
        yield it


def fill(path: Path) -> None:
    """A file that takes all the room that is left."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


@contextlib.contextmanager
def loop_device(backing: Path, block_bytes: int = 512, *options: str) -> Iterator[Path]:
    need_root()
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    words = ["losetup", "--find", "--show", *options, "-b", str(block_bytes), str(backing)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        pytest.skip(f"THIS TEST IS LEFT OUT, as there are no loop devices here: {done.stderr}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        _root("losetup", "--detach", device)
        # Whoever looks through the block devices just now (other tests do) keeps it for a moment.
        ends_s = time.monotonic() + 20
        while Path(f"/sys/block/{device.name}/loop").exists() and time.monotonic() < ends_s:
            time.sleep(0.01)
