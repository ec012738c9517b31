# SPDX-License-Identifier: Apache-2.0
"""The server of one generation: a qemu-nbd of its own, with a key of its own.

It gets the listening socket as a service manager would hand it over, and the key in a file that only this
user can read. It ends by itself when its last client has gone; with this process (PR_SET_PDEATHSIG), whatever
ends that; and when it is told. It was asked to die is not that it is dead: `end` returns when the kernel says
so. Whoever goes on with the image takes its lock first, which the kernel gives back only when the I/O of a
dead process is over.
"""

import os
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import structlog

from vhostsync.errors import DiskError
from vhostsync.host.kernel import why_denied
from vhostsync.printable import printable
from vhostsync.receive.seldom import Seldom

log = structlog.get_logger(__name__)

PROGRAMS: Final = ("qemu-nbd", "setpriv", "sh")
EXPORT: Final = "disk"
USER: Final = "owner"
READY_S: Final = 60.0
CLOSE_S: Final = 10.0  # for writing back what it has in memory, before it is killed
DEATH_S: Final = 30.0  # after that its disk hangs
LOOK_S: Final = 0.01
LINE_BYTES_MAX: Final = 4096
FIRST_SOCKET: Final = 3  # sd_listen_fds(3)
# setpriv has it killed with its parent, which must not have died before that; the shell says which process
# the socket is for.
LAUNCH: Final = '[ "$PPID" = "$1" ] || exit 1; shift; LISTEN_PID=$$ exec "$@"'


@dataclass(frozen=True)
class Export:
    """What is served, and how."""

    image: Path
    direct: bool
    folder: Path  # of the key, for this server alone


def check_programs() -> None:
    """DiskError where one is missing, with the package that has it."""
    packages = {"qemu-nbd": "qemu-utils", "setpriv": "util-linux", "sh": "dash"}
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise DiskError(f"there is no {program} here, which serves the disk; install {packages[program]}")


class NbdServer:
    """One process. `start` makes it; then somebody has to `watch` it."""

    def __init__(self, pid: int, stderr: int, export: Export) -> None:
        self.pid = pid
        self._stderr = stderr
        self._export = export
        self._pidfd = os.pidfd_open(pid)
        self._over = anyio.Event()
        self.code: int | None = None  # how it ended; less than 0: by that signal
        self.last_words = ""
        self._say = Seldom(log.warning)  # it has a line for each client that cannot show the key

    @classmethod
    async def start(
        cls, export: Export, key: str, listener: socket.socket, watched: Callable[["NbdServer"], None]
    ) -> "NbdServer":
        """Ready for its owner on return, and `watched` was called. DiskError: there is none."""
        try:
            await anyio.to_thread.run_sync(_prepare, export.folder, key)
        except OSError as error:
            raise DiskError(f"the key cannot be kept in {export.folder}: {error.strerror}") from error
        try:
            server, ready = cls(*_spawn(export, listener), export), False
        except OSError as error:
            raise DiskError(f"qemu-nbd cannot be started: {error.strerror}") from error
        watched(server)
        try:
            with anyio.move_on_after(READY_S):
                while not (ready := await _is_ready(export.folder)) and not server.over:  # noqa: ASYNC110
                    await anyio.sleep(LOOK_S)  # a file appears, and nothing tells of it
        except BaseException:
            with anyio.CancelScope(shield=True):
                await server.end(kill=True)
            raise
        if not ready:
            late = not server.over
            await server.end(kill=True)
            reason = f"not ready after {READY_S:.0f} s" if late else server.last_words or "no reason given"
            raise DiskError(f"qemu-nbd cannot serve {export.image}: {reason}")
        return server

    @property
    def over(self) -> bool:
        return self._over.is_set()

    async def watch(self) -> None:
        """Until it is dead; what it says is logged."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._log)
            await anyio.wait_readable(self._pidfd)
            tasks.cancel_scope.cancel()
        _, status = os.waitpid(self.pid, os.WNOHANG)  # noqa: ASYNC222 it is dead
        self.code = os.waitstatus_to_exitcode(status)
        self._log_rest()
        self._say.end()
        os.close(self._pidfd)
        os.close(self._stderr)
        await anyio.to_thread.run_sync(_empty, self._export.folder)
        self._over.set()
        log.info("the disk's server has ended", pid=self.pid, code=self.code)

    async def _log(self) -> None:
        while True:
            await anyio.wait_readable(self._stderr)
            if not self._log_rest():
                return

    def _log_rest(self) -> bool:
        """False at its end."""
        while True:
            try:
                said = os.read(self._stderr, LINE_BYTES_MAX)
            except BlockingIOError:
                return True
            if not said:
                return False
            for line in said.decode(errors="replace").splitlines():
                self.last_words = printable(line.strip()).removeprefix("qemu-nbd: ")
                self._say("qemu-nbd says", pid=self.pid, line=self.last_words)

    async def end(self, *, kill: bool = False) -> None:
        """It is dead on return: told to write back and close first, unless `kill`. DiskError: it does not "
        "die."""
        if not kill:
            self._signal(signal.SIGTERM)
            with anyio.move_on_after(CLOSE_S):
                await self._over.wait()
        self._signal(signal.SIGKILL)
        with anyio.move_on_after(DEATH_S):
            await self._over.wait()
        if not self._over.is_set():
            raise DiskError(
                f"the former server of {self._export.image} (qemu-nbd, pid {self.pid}) was killed "
                f"{DEATH_S:.0f} s ago "
                "and is not dead: a request of it hangs in the disk, and could still be carried out; mend "
                "the disk"
            )

    def _signal(self, number: int) -> None:
        if not self._over.is_set():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)  # not waited for yet, so the number is its own

    def bytes_written(self) -> int | None:
        """To the image, since it began."""
        try:
            lines = Path(f"/proc/{self.pid}/io").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), None)


def _pid_file(folder: Path) -> Path:
    return folder / "pid"


def make_folder(folder: Path) -> None:
    """For keys, for nobody else to look into. Blocks. DiskError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        _empty(folder)
    except OSError as error:
        raise DiskError(f"keys cannot be kept in {folder}: {why_denied(error)}") from error


def _empty(folder: Path) -> None:
    """Without what a former server, or one that was killed, has left."""
    for name in ("keys.psk", "pid"):
        (folder / name).unlink(missing_ok=True)


async def _is_ready(folder: Path) -> bool:
    """qemu-nbd writes its number when it has the image and its lock, and takes connections."""
    return await anyio.to_thread.run_sync(_pid_file(folder).exists)


def _prepare(folder: Path, key: str) -> None:
    _empty(folder)
    fd = os.open(folder / "keys.psk", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(f"{USER}:{key}\n")


def _spawn(export: Export, listener: socket.socket) -> tuple[int, int]:
    """The process, and what it says on stderr. To be called in the thread that lives as long as this process:
    the kernel kills the child when that one ends. OSError."""
    credentials = f"tls-creds-psk,id=key,endpoint=server,dir={str(export.folder).replace(',', ',,')}"
    words = [
        "setpriv", "--pdeathsig", "KILL", "sh", "-c", LAUNCH, "sh", str(os.getpid()),
        "qemu-nbd", "--format=raw", f"--cache={'none' if export.direct else 'writeback'}", "--aio=threads",
        "--discard=unmap", "--detect-zeroes=unmap", f"--export-name={EXPORT}",
        # Any number of clients: who cannot show the key could else take the places of who can.
        "--shared=0", "--object", credentials, "--tls-creds=key", f"--pid-file={_pid_file(export.folder)}",
        str(export.image),
    ]  # fmt: skip
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    said, says = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.posix_spawnp(
            words[0], words, {**environment, "LISTEN_FDS": "1"}, setsid=True,
            file_actions=(
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                (os.POSIX_SPAWN_DUP2, says, 2),
                (os.POSIX_SPAWN_DUP2, listener.fileno(), FIRST_SOCKET),
            ),
        )  # fmt: skip
    except BaseException:
        os.close(said)
        raise
    finally:
        os.close(says)
    os.set_blocking(said, False)
    return pid, said
