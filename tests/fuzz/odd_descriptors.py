# SPDX-License-Identifier: Apache-2.0
"""Descriptors that nobody would send: by name, how to make one."""

from __future__ import annotations

import fcntl
import os
import select
import socket
from collections.abc import Callable, Mapping

SIZE_BYTES = 2 << 20


def memory(size: int, seals: int = 0) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _one_end(pair: tuple[int, int], end: int) -> int:
    os.close(pair[1 - end])
    return pair[end]


def _ready() -> int:
    return os.eventfd(1, os.EFD_CLOEXEC)


def _lonely_socket() -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def _epoll() -> int:
    with select.epoll() as poll:
        return os.dup(poll.fileno())


ODD: Mapping[str, Callable[[], int]] = {
    "memory of a page": lambda: memory(4096),
    "empty memory": lambda: memory(0),
    "huge sparse memory": lambda: memory(1 << 46),
    "memory sealed against writing": lambda: memory(SIZE_BYTES, fcntl.F_SEAL_WRITE),
    "memory sealed against all": lambda: memory(
        SIZE_BYTES, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    ),
    "a folder": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    "a path": lambda: os.open("/", os.O_PATH),
    "a file to read": lambda: os.open("/proc/self/status", os.O_RDONLY),
    "the null device": lambda: os.open("/dev/null", os.O_RDWR),
    "the zero device": lambda: os.open("/dev/zero", os.O_RDWR),
    "a pipe's end to read, closed at the other": lambda: _one_end(os.pipe(), 0),
    "a pipe's end to write, closed at the other": lambda: _one_end(os.pipe(), 1),
    "a socket without its peer": _lonely_socket,
    "a socket that listens to nobody": lambda: socket.socket(socket.AF_UNIX).detach(),
    "an epoll": _epoll,
    "a process": lambda: os.pidfd_open(os.getpid()),
    "an eventfd that is ready": _ready,
    "a blocking eventfd": lambda: os.eventfd(0, os.EFD_CLOEXEC),
    "a semaphore": lambda: os.eventfd(1000, os.EFD_CLOEXEC | os.EFD_SEMAPHORE),
}  # fmt: skip
