# SPDX-License-Identifier: Apache-2.0
"""The process of `node`: everything that a backend needs is loaded here, and a backend is a fork of it.

It has no event loop, and beside this thread one that writes its log (log_writer.py), so that a log which
nobody reads holds up nobody. A fork copies this thread alone: a child begins a log of its own before it says
anything, and takes no lock that the other thread may have had. What its children need not write to they share
with it, so all that is loaded is taken out of the garbage collector's sight (gc.freeze), which would write to
it. It opens no disk, and keeps nothing of a request: a child has the descriptors, the environment and the
directory of whoever asked, and nothing of the node's but its memory as it was before the first request.

A child is the node's user, with a session of its own; its sandbox it makes itself, as every backend. It
belongs to the cgroups of whoever asked, where this user may put it there. It outlives the node.
"""

import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import re
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import structlog

import vhostsync
from vhostsync import daemon
from vhostsync import log as logging
from vhostsync.errors import ConfigError
from vhostsync.host.cgroups import Cgroup, groups_apart
from vhostsync.host.owned_fd import OwnedFd, close_all
from vhostsync.host.parcel import receive_parcel, send_parcel
from vhostsync.host.peer import peer_process, peer_uid
from vhostsync.host.unix_socket import bind_unix_socket
from vhostsync.node.node_config import NodeConfig
from vhostsync.node.request import DESCRIPTORS_MAX, OPTION, REQUEST_BYTES_MAX, Request, node_of

log = structlog.get_logger(__name__)

NO_DESCRIPTORS_S: Final = 0.1
REQUEST_S: Final = 2.0
"""How long whoever has connected may take to send a request: meanwhile nobody else is served."""

Serve = Callable[[Sequence[str]], int]

_BACKENDS_NEED: Final = (
    "confine", "control", "device", "engine", "host", "mirror", "record", "storage", "vhost_user",
)  # fmt: skip
_WRITABLE: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ \S+\s*(\S*)")
_MADV_MERGEABLE: Final = 12


def run(config: NodeConfig, serve: Serve) -> int:
    """Fork until told to stop; the exit code. `serve`: the command line of a backend, without the program's
    name."""
    logging.configure(config.log_format, config.log_level)
    return logging.run_to_its_end(lambda: _run(config, serve))


def _run(config: NodeConfig, serve: Serve) -> None:
    _load_modules()
    if config.merge_memory:
        _offer_memory()
    logging.write_in_background()
    node = _Node(config, serve)
    gc.collect()
    gc.freeze()
    log.info("node ready", socket=str(config.listen), modules=len(sys.modules))
    node.serve()


def _load_modules() -> None:
    """All that a backend loads when it is first used."""
    for folder in _BACKENDS_NEED:
        for found in pkgutil.iter_modules([str(Path(vhostsync.__file__).parent / folder)]):
            importlib.import_module(f"vhostsync.{folder}.{found.name}")
    daemon.load_modules()


def _offer_memory() -> None:
    """Of the heap, the data of libraries and this stack: forks inherit that. ConfigError."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if found := _WRITABLE.match(line):
            start, end = int(found[1], 16), int(found[2], 16)
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_MERGEABLE):
                why = os.strerror(ctypes.get_errno())
                raise ConfigError(f"--merge-memory: this kernel merges no memory ({why}); leave it out.")


@dataclass
class _Child:
    """`asker`: None, whoever asked waits no more."""

    process: int
    asker: socket.socket | None


class _Node:
    """poll(2) and no epoll: a child inherits no descriptor that it does not know of."""

    def __init__(self, config: NodeConfig, serve: Serve) -> None:
        """ConfigError: it cannot listen there."""
        self._config, self._serve = config, serve
        self._children: dict[int, _Child] = {}
        self._stopping = False
        self._woken, self._waker = socket.socketpair()
        for each in (self._woken, self._waker):
            each.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # it wakes; _reap does the rest
        self._bound = bind_unix_socket(config.listen)
        self._listener = self._bound.listener

    def serve(self) -> None:
        """Until SIGTERM or SIGINT. Who was forked goes on."""
        try:
            self._serve_requests()
        finally:
            self._bound.close()
        log.info("node ends", backends_that_go_on=len(self._children))

    def _serve_requests(self) -> None:
        while not self._stopping:
            watched = select.poll()
            askers = {each.asker.fileno(): each for each in self._children.values() if each.asker is not None}
            for fd in (self._listener.fileno(), self._woken.fileno(), *askers):
                watched.register(fd, select.POLLIN)
            ready = {fd for fd, _ in watched.poll()}
            if self._woken.fileno() in ready:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
            self._reap()
            for fd in ready & askers.keys():
                self._dismiss(askers[fd])
            if self._listener.fileno() in ready and not self._stopping:
                self._accept()

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopping = True

    @staticmethod
    def _dismiss(child: _Child) -> None:
        """Whoever asked has nothing more to say: it has gone, or it says what nobody understands."""
        if child.asker is not None:
            child.asker.close()
            child.asker = None

    def _reap(self) -> None:
        while self._children:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            child = self._children.pop(process, None)
            code = os.waitstatus_to_exitcode(status)
            log.info("backend has ended", process=process, exit_code=code)
            if child is not None and child.asker is not None:
                _tell(child.asker, {"exit-code": code})
                self._dismiss(child)

    def _accept(self) -> None:
        try:
            asker, _ = self._listener.accept()
        except OSError as error:  # it has gone again; or there are no descriptors, and it is tried again
            log.warning("nobody can be answered", error=error.strerror or str(error))
            time.sleep(NO_DESCRIPTORS_S)  # whoever waits is still there, and would be tried without a pause
            return
        asker.settimeout(REQUEST_S)
        fds: list[OwnedFd] = []
        try:
            if peer_uid(asker) not in (0, os.geteuid()):
                raise ValueError("only the node's own user and root may ask")
            data, fds = receive_parcel(asker, REQUEST_BYTES_MAX, DESCRIPTORS_MAX, REQUEST_S)
            request = Request.decoded(data, len(fds))
            if node_of(request.words)[0] is not None:
                raise ValueError(f"{OPTION} stands in it once more")
            if _has_gone(asker):
                raise ValueError("whoever asked has given up")
            child = self._fork(request, fds, asker)
        except (EOFError, OSError, ValueError) as error:
            log.warning("request refused", error=str(error))
            _tell(asker, {"error": f"The node refuses the request: {str(error) or 'it is not whole'}."})
            asker.close()
            return
        finally:
            close_all(fds)
        self._children[child.process] = child
        _tell(asker, {"process": child.process})
        asker.setblocking(False)

    def _fork(self, request: Request, fds: Sequence[OwnedFd], asker: socket.socket) -> _Child:
        """OSError."""
        cgroups = _cgroups_of(peer_process(asker))
        process = os.fork()
        if process == 0:
            self._be_backend(request, fds, asker, cgroups)
        log.info("backend forked", process=process, asked_by=peer_process(asker))
        return _Child(process, asker)

    def _be_backend(
        self, request: Request, fds: Sequence[OwnedFd], asker: socket.socket, cgroups: Sequence[Cgroup]
    ) -> NoReturn:
        """In the child, which never comes back from here."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # By objects that live on a number would be closed once more, when it is a disk's.
            others = [each.asker for each in self._children.values() if each.asker is not None]
            for each in (self._listener, self._woken, self._waker, asker, *others):
                each.detach()
            self._children.clear()
            _take_descriptors([fd.take() for fd in fds], request.descriptors)
            logging.configure(self._config.log_format, self._config.log_level)
            os.setsid()
            for cgroup in cgroups:
                _enter(cgroup)
            os.chdir(request.directory)
            os.umask(request.umask)
            os.environ.clear()
            os.environ.update(request.environment)
            code = self._serve(["serve", *request.words])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):  # of a node without a stdout there is None
                sys.stdout.flush()
            os._exit(code & 0xFF)


def _take_descriptors(arrived: Sequence[int], numbers: Sequence[int]) -> None:
    """Under these numbers, and nothing else is open."""
    kept = dict(zip(arrived, numbers, strict=True))
    for each in list(Path("/proc/self/fd").iterdir()):
        if int(each.name) not in kept:
            with suppress(OSError):  # that of the listing itself
                os.close(int(each.name))
    # Some may have a number that another is to have.
    above = {fcntl.fcntl(fd, fcntl.F_DUPFD, DESCRIPTORS_MAX): number for fd, number in kept.items()}
    for fd in kept:
        os.close(fd)
    for fd, number in above.items():
        os.dup2(fd, number)
        os.close(fd)


def _cgroups_of(process: int) -> list[Cgroup]:
    """Of whoever asked, if they are others than the node's; it waits for the answer, so it is still that
    process."""
    try:
        return groups_apart(process)
    except (OSError, ValueError) as error:
        log.warning("stays in the node's cgroup", error=str(error), asked_by=process)
        return []


def _enter(cgroup: Cgroup) -> None:
    try:
        cgroup.enter()
    except OSError as error:
        asked_for = str(cgroup.folder or cgroup.path)
        log.warning("stays in the node's cgroup", error=error.strerror or str(error), asked_for=asked_for)


def _has_gone(asker: socket.socket) -> bool:
    """It has waited too long, and takes it as not begun: by now the disk may be served elsewhere."""
    asker.settimeout(0)
    try:
        return not asker.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        asker.settimeout(REQUEST_S)


def _tell(asker: socket.socket, answer: dict[str, Any]) -> None:
    with suppress(OSError):  # it has gone
        send_parcel(asker, json.dumps(answer).encode())
