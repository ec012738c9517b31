# SPDX-License-Identifier: Apache-2.0
"""A FUSE file system of one file that hangs in the operations that it is told to: a disk on storage that does
not answer, for tests. Straight on /dev/fuse (linux/fuse.h): its few operations are less than a binding.

    with hanging_disk(folder, size) as disk:
        disk.hang(Op.LSEEK); ...; disk.go_on()
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Final

ROOT, FILE = 1, 2
NAME: Final = b"disk"
HEADER = struct.Struct("<IIQQIIIHH")
ANSWER = struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
REQUEST_BYTES_MAX: Final = (1 << 20) + 8192


class Op(IntEnum):
    """enum fuse_opcode: what is answered; all else is ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46


class HangingDisk:
    """The server, on a thread; the kernel's requests wait where `hang` says so, until `go_on`."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.path = folder / NAME.decode()
        self._backing = os.memfd_create("hanging-disk", os.MFD_CLOEXEC)
        os.ftruncate(self._backing, size_bytes)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._lock = threading.Condition()
        self._hangs: set[Op] = set()
        self._held: list[tuple[Op, int, int, bytes]] = []
        self.attributes: dict[bytes, bytes] = {}
        self.remembered_s = 1  # so long the kernel asks for no name or attribute again
        self.killable = False  # who waits can be killed, as on NFS; else is waited for, too
        self._mount(folder)
        self._thread = threading.Thread(target=self._serve, name="hanging-disk")
        self._thread.start()

    def _mount(self, folder: Path) -> None:
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"hanging", os.fsencode(folder), b"fuse", 0, options.encode()) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))

    def close(self, folder: Path) -> None:
        self.go_on()
        # By force: whoever still waits for an answer gets an error.
        subprocess.run(["umount", "--force", "--lazy", folder], check=True)
        self._thread.join()
        os.close(self._device)
        os.close(self._backing)

    # -- the test's side -------------------------------------------------------------

    def fill(self) -> None:
        """No hole is left."""
        os.pwrite(self._backing, b"\xa5" * os.fstat(self._backing).st_size, 0)

    def write(self, offset: int, data: bytes) -> None:
        """As somebody else would, at the server."""
        os.pwrite(self._backing, data, offset)

    def content(self) -> bytes:
        return os.pread(self._backing, os.fstat(self._backing).st_size, 0)

    def hang(self, *ops: Op) -> None:
        with self._lock:
            self._hangs |= set(ops)

    def go_on(self) -> None:
        with self._lock:
            self._hangs.clear()
        self.answer_held()

    def answer_held(self) -> None:
        """What hangs goes on; the next of its kind hangs again."""
        with self._lock:
            held, self._held = self._held, []
        for request in held:
            self._answer(*request)

    @contextmanager
    def goes_on_at_the_end(self) -> Iterator[None]:
        """Before anybody who waits for it is killed: that would be waited for, too."""
        try:
            yield
        finally:
            self.go_on()

    def holds(self, op: Op) -> bool:
        with self._lock:
            return any(held[0] is op for held in self._held)

    def await_hanging(self, op: Op, timeout_s: float) -> None:
        with self._lock:
            assert self._lock.wait_for(lambda: any(held[0] is op for held in self._held), timeout_s), op.name

    # -- the kernel's ------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, REQUEST_BYTES_MAX)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                raise
            _, opcode, unique, node, *_ = HEADER.unpack_from(request)
            self._take(opcode, unique, node, request[HEADER.size :])

    def _take(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        try:
            op = Op(opcode)
        except ValueError:
            self._reply(unique, -errno.ENOSYS)
            return
        if op is Op.INTERRUPT and self.killable:
            self._interrupt(*struct.unpack_from("<Q", body))
            return
        with self._lock:
            if op in self._hangs:
                self._held.append((op, unique, node, body))
                self._lock.notify_all()
                return
        self._answer(op, unique, node, body)

    def _interrupt(self, unique: int) -> None:
        with self._lock:
            before, self._held = self._held, [held for held in self._held if held[1] != unique]
            was_held = len(self._held) < len(before)
        if was_held:
            self._reply(unique, -errno.EINTR)

    def _reply(self, unique: int, error: int, body: bytes = b"") -> None:
        with contextlib.suppress(OSError):  # ENOENT: it was interrupted meanwhile
            os.write(self._device, ANSWER.pack(ANSWER.size + len(body), error, unique) + body)

    def _attributes(self, node: int) -> bytes:
        is_file = node == FILE
        size = os.fstat(self._backing).st_size if is_file else 0
        mode = 0o100600 if is_file else 0o040700
        blocks = os.fstat(self._backing).st_blocks if is_file else 0
        times_s, times_ns = self._times()
        return ATTRIBUTES.pack(node, size, blocks, *times_s, *times_ns, mode, 1, 0, 0, 0, 4096, 0)

    def _times(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the last access, and of the last change of content and attributes: seconds, and the rest."""
        status = os.fstat(self._backing)
        times_ns = status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns
        return tuple(each // 10**9 for each in times_ns), tuple(each % 10**9 for each in times_ns)

    def _answer(self, op: Op, unique: int, node: int, body: bytes) -> None:
        if op in (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT):
            return  # these have none
        try:
            self._reply(unique, 0, self._perform(op, node, body))
        except OSError as error:
            self._reply(unique, -(error.errno or errno.EIO))

    def _perform(self, op: Op, node: int, body: bytes) -> bytes:
        if op is Op.INIT:
            major, minor, ahead, _ = struct.unpack_from("<IIII", body)
            told = (major, min(minor, 31), ahead, 0, 16, 12, 1 << 20, 1, 256, 0, 0)
            return struct.pack("<IIIIHHIIHHI28x", *told)
        if op is Op.LOOKUP:
            if body.rstrip(b"\0") != NAME:
                raise OSError(errno.ENOENT, "")
            times_s = self.remembered_s, self.remembered_s
            return struct.pack("<QQQQII", FILE, 0, *times_s, 0, 0) + self._attributes(FILE)
        if op in (Op.GETATTR, Op.SETATTR):
            return struct.pack("<QII", self.remembered_s, 0, 0) + self._attributes(node)
        if op is Op.OPEN:
            return struct.pack("<QII", 1, 0, 0)
        if op is Op.STATFS:
            return struct.pack("<QQQQQIIII24x", 1 << 20, 1 << 20, 1 << 20, 64, 64, 4096, 255, 4096, 0)
        if op is Op.READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return os.pread(self._backing, size, offset)
        if op is Op.WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            return struct.pack("<II", os.pwrite(self._backing, body[40 : 40 + size], offset), 0)
        if op is Op.FALLOCATE:
            _, offset, length, mode = struct.unpack_from("<QQQI", body)
            self._fallocate(mode, offset, length)
        if op is Op.LSEEK:
            _, offset, whence = struct.unpack_from("<QQI", body)
            return struct.pack("<Q", os.lseek(self._backing, offset, whence))
        if op is Op.SETXATTR:
            (size,) = struct.unpack_from("<I", body)
            name, value = body[8:].split(b"\0", 1)
            self.attributes[name] = value[:size]
        if op is Op.GETXATTR:
            return self._attribute(body)
        return b""

    def _attribute(self, body: bytes) -> bytes:
        (room,) = struct.unpack_from("<I", body)
        value = self.attributes.get(body[8:].rstrip(b"\0"))
        if value is None:
            raise OSError(errno.ENODATA, "")
        return value if room else struct.pack("<II", len(value), 0)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if libc.fallocate(self._backing, mode, offset, length) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")


@contextmanager
def hanging_disk(folder: Path, size_bytes: int) -> Iterator[HangingDisk]:
    """Mounted on `folder`, which is made."""
    folder.mkdir()
    disk = HangingDisk(folder, size_bytes)
    try:
        yield disk
    finally:
        disk.close(folder)
