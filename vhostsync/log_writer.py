# SPDX-License-Identifier: Apache-2.0
"""Lines for a descriptor that may not take them: a pipe that nobody reads, a terminal that is stopped, a file
on a disk that is full or hangs. Nobody who logs waits for it: a thread of its own writes, from a queue of
bounded size, and what finds no room is dropped and counted. O_NONBLOCK would not do: it belongs to the open
file description, which other processes share.
"""

import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

QUEUE_BYTES: Final = 1 << 20
END_PATIENCE_S: Final = 1.0


class LineWriter:
    """Until `start`, whoever writes waits. `idle` is called in the thread whenever all is written, with how
    many lines found no room since and whether it is the last time; it may write, and says after how many
    seconds it wants to be called again (None: when more was written). Safe from any thread."""

    def __init__(
        self, fd: int, idle: Callable[[int, bool], float | None], queue_bytes: int = QUEUE_BYTES
    ) -> None:
        self._fd = fd
        self._idle = idle
        self._room = queue_bytes
        self._lines: deque[bytes] = deque()
        self._turn = threading.Condition()
        self._ending = False
        self._thread: threading.Thread | None = None
        self._untold = 0
        self.dropped = 0

    def start(self) -> None:
        """A thread: to be called when every later one may have what this process may do. RuntimeError: the
        system has no more; whoever writes goes on waiting."""
        if self._thread is None:
            self._ending = False
            self._thread = threading.Thread(target=self._run, name="vhostsync-log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                raise

    def end(self, patience_s: float = END_PATIENCE_S) -> None:
        """What is in the queue is written for so long, and is lost then."""
        thread = self._thread
        if thread is None:
            return
        with self._turn:
            self._ending = True
            self._turn.notify_all()
        thread.join(patience_s)
        if not thread.is_alive():
            self._thread = None  # else nothing more can be said

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")
        if self._thread is None:
            self._put(data)
            return len(text)
        with self._turn:
            own = threading.current_thread() is self._thread  # what is left to say at the end
            if len(data) > self._room or (self._ending and not own):
                self.dropped += 1
                self._untold += 1
            else:
                self._room -= len(data)
                self._lines.append(data)
                self._turn.notify_all()
        return len(text)

    def flush(self) -> None:
        """A line is written as soon as that can be."""

    def _run(self) -> None:
        while not self._ending:
            self._write_all()
            with self._turn:
                untold, self._untold = self._untold, 0
            again_s = self._idle(untold, False)
            with self._turn:
                if not self._lines and not self._ending:
                    self._turn.wait(again_s)
        self._idle(self._untold, True)
        self._write_all()

    def _write_all(self) -> None:
        while True:
            with self._turn:
                if not self._lines:
                    return
                data = self._lines.popleft()
            self._put(data)
            with self._turn:
                self._room += len(data)

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view):]
            except BlockingIOError:  # somebody who shares it has made it so
                select.select([], [self._fd], [])
            except OSError:  # it is full, or gone: nobody can be told, and the guest's disk goes on
                self.dropped += 1
                return


class KindLimit:
    """At most `lines` lines of a kind in `period_s` seconds; the rest is counted, and told in one line. A
    dead disk fails every request, and says the same a thousand times. Safe from any thread."""

    KINDS_MAX: Final = 256

    def __init__(self, lines: int, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = lines
        self._period_s = period_s
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}
        self._turn = threading.Lock()

    def admit(self, kind: str) -> bool:
        """Whether one more line of this kind may be written now."""
        now_s = self._clock()
        with self._turn:
            found = self._kinds.get(kind)
            if found is None or (now_s >= found.ends_s and not found.left_out):
                if found is None and len(self._kinds) >= self.KINDS_MAX:
                    self._forget(now_s)
                found = self._kinds[kind] = _Kind(now_s + self._period_s)
            if found.count < self._lines:
                found.count += 1
                return True
            found.left_out += 1
            return False

    def over(self, at_once: bool = False) -> list[tuple[str, int]]:
        """Kinds whose period is over (or not), with how many lines were left out: to be told now. They begin
        anew."""
        now_s = math.inf if at_once else self._clock()
        with self._turn:
            told = [(kind, each.left_out) for kind, each in self._kinds.items() if each.is_over(now_s)]
            for kind, _ in told:
                del self._kinds[kind]
        return told

    def next_s(self) -> float | None:
        """In how many seconds `over` has something to tell; None: nothing was left out."""
        with self._turn:
            ends = [each.ends_s for each in self._kinds.values() if each.left_out]
        return max(min(ends) - self._clock(), 0.0) if ends else None

    def _forget(self, now_s: float) -> None:
        kept = {kind: each for kind, each in self._kinds.items() if each.left_out or now_s < each.ends_s}
        self._kinds = kept if len(kept) < self.KINDS_MAX else {}


class _Kind:
    def __init__(self, ends_s: float) -> None:
        self.ends_s = ends_s
        self.count = 0
        self.left_out = 0

    def is_over(self, now_s: float) -> bool:
        return bool(self.left_out) and now_s >= self.ends_s
