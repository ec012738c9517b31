# SPDX-License-Identifier: Apache-2.0
"""A thread that serves a disk and does harm to its backend, beside a load (tests/crash/load.py)."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from tests.guest.backends import Vhostsync


class BackendThread(ABC):
    """`start` begins; the load sets `connecting` and `recovered`, and is woken by `news`; `over` is set once
    the last backend is to stay. After `deadline_s` nothing more is done to it."""

    def __init__(self, name: str, *, news: Callable[[], None], deadline_s: float) -> None:
        self.connecting = threading.Event()
        self.recovered = threading.Event()
        self.over = threading.Event()
        self.failure: BaseException | None = None
        self.backend: Vhostsync | None = None
        self._news = news
        self._deadline = time.monotonic() + deadline_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and the backend, whatever they do."""
        self._stop.set()
        self.connecting.set()
        self.recovered.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.backend is not None:
            self.backend.__exit__(None, None, None)

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    @abstractmethod
    def _work(self) -> None:
        """From the first backend to the last one."""

    @property
    def _time_is_up(self) -> bool:
        return self._stop.is_set() or time.monotonic() > self._deadline

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failure = error
        self.over.set()
        self._news()
        self._stop.wait()  # the kernel ends a backend with the thread that started it

    def _served(self) -> Vhostsync:
        assert self.backend is not None
        return self.backend

    def _serve_with(self, start: Callable[[], Vhostsync]) -> None:
        """The next backend; the load is told."""
        self.connecting.clear()
        self.recovered.clear()
        self.backend = start()
        self._news()

    def _await_recovered(self) -> None:
        if not self.recovered.wait(60):
            raise AssertionError("the load has not recovered within 60 s")

    def _kill_backend(self) -> None:
        backend = self._served()
        backend.process.kill()
        backend.__exit__(None, None, None)
