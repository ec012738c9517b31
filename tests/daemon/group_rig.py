# SPDX-License-Identifier: Apache-2.0
"""Two disks of one guest, each with a backend of its own; a guest that writes to them in turn; and a
go-between at a control socket, which holds a step of a coordinator for as long as the test wants."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from tests.daemon.rig import BLOCK, STAMP, Served, block_of, image
from tests.frontend import Frontend
from tests.guest.backends import vhostsync_command

WAIT_S = 30.0


@contextlib.contextmanager
def two_disks(work: Path, *options: str, mib: int = 16) -> Iterator[tuple[Served, Served]]:
    """Each in a folder of its own: a.img, its steady mirror b.img, the state."""
    served = []
    with contextlib.ExitStack() as stack:
        for name in ("one", "two"):
            folder = work / name
            folder.mkdir()
            source = image(folder / "a.img", mib, filled_mib=1)
            other = image(folder / "b.img", mib, filled_mib=0)
            served.append(stack.enter_context(Served(folder, source, *options)))
            served[-1].start_mirror(other)
        yield served[0], served[1]


class HasGuest(Protocol):
    def guest(self) -> Frontend: ...


class Counter:
    """A guest that writes 1, 2, 3 … to the first blocks of two disks in turn, each confirmed before the next;
    now and then it flushes, too. So at any instant the disks hold n and n - 1."""

    def __init__(self, served: Sequence[HasGuest], *, flush_every: int = 16) -> None:
        self._guests = [each.guest() for each in served]
        self._flush_every = flush_every
        self._end = threading.Event()
        self._turn = threading.Condition()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="counter")
        self._errand: Callable[[Sequence[Frontend]], None] | None = None
        self.written = 0

    def do(self, errand: Callable[[Sequence[Frontend]], None]) -> None:
        """Once, between two writes. It is under way on return."""
        self._errand = errand

    def __enter__(self) -> Self:
        for guest in self._guests:
            guest.start()
        self._thread.start()
        self.go_on(2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        for guest in self._guests:
            guest.close()
        if kind is None and self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            number = 0
            while not self._end.is_set():
                number += 1
                if (errand := self._errand) is not None:
                    self._errand = None
                    errand(self._guests)
                guest = self._guests[number % 2]
                request = guest.write_now(0, block_of(0, number))
                assert request.ok, f"write {number}: status {request.status}"
                guest.recycle(request)
                if number % self._flush_every < 2:
                    assert guest.flush_now().ok
                with self._turn:
                    self.written = number
                    self._turn.notify_all()
        except BaseException as failure:
            with self._turn:
                self._failure = failure
                self._turn.notify_all()

    def go_on(self, count: int = 20) -> int:
        """Returns when the guest has written that many more: the last of them."""
        with self._turn:
            wanted = self.written + count
            done = self._turn.wait_for(lambda: self._failure or self.written >= wanted, WAIT_S)
            if self._failure is not None:
                raise self._failure
            assert done, f"the guest wrote {self.written - wanted + count} of {count}"
            return self.written

    def stop(self) -> int:
        """The last number, which is on the disks that the guest has."""
        self._end.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self.written


def counted(disk: Path) -> int:
    """What the counter has left there; 0: nothing."""
    with disk.open("rb") as file:
        content = file.read(BLOCK)
    _, number = STAMP.unpack(content[: STAMP.size])
    whole = number == 0 or content == block_of(0, number)
    if not whole and content[: STAMP.size] != struct.pack("<QQ", 0, number):
        return 0  # nothing was written yet, and the image was filled with something else
    assert whole, f"{disk} holds a torn block"
    return int(number)


class Coordinator:
    """`vhostsync switch` or `snapshot` on these control sockets."""

    def __init__(self, action: str, *controls: Path, options: Sequence[str] = ()) -> None:
        words = [*vhostsync_command(), action, "--json", *options]
        for control in controls:
            words += ["--control", str(control)]
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def outcome(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=2 * WAIT_S)
        return self.process.returncode, out, err

    def result(self) -> Any:
        code, out, err = self.outcome()
        assert code == 0, err
        return json.loads(out)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)


class GoBetween:
    """At `path`, in front of the control socket `to`. Once a client sends `command`, that is held back before
    it reaches the backend, or its answer is."""

    def __init__(self, path: Path, to: Path, command: str, when: Literal["before", "after"]) -> None:
        self.path = path
        self._to = to
        self._command = command
        self._when = when
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._go = threading.Event()
        self.reached = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in (self._listener, *self._ends):  # first: what is held now is not to come through any more
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.release()
        for thread in self._threads:
            thread.join()
        for end in (*self._ends, self._listener):
            end.close()

    def release(self) -> None:
        """What is held goes on, and nothing is held any more."""
        self._go.set()

    def await_reached(self) -> None:
        assert self.reached.wait(WAIT_S), f"no {self._command} came"

    def _start(self, work: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._to))
            self._ends += [client, server]
            held: set[int] = set()
            self._start(self._pass_on, client, server, held, True)
            self._start(self._pass_on, server, client, held, False)

    def _pass_on(self, source: socket.socket, sink: socket.socket, held: set[int], asking: bool) -> None:
        with contextlib.suppress(OSError), source.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if asking and message.get("execute") == self._command:
                    held.add(message["id"])
                concerned = message.get("id") in held and asking == (self._when == "before")
                if concerned and not self._go.is_set():
                    self.reached.set()
                    self._go.wait()
                sink.sendall(line)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
