# SPDX-License-Identifier: Apache-2.0
"""A disk of this host, and the generations of its owner.

A generation is one server process (nbd_server.py) with one key. The next one begins only when the process of
the former is dead and the image's lock was had, so nothing that the former was sent lands later: that is the
fence. As long as no generation is there, this process has the lock itself.

What is said no to, before anything is ended: who shows another token than the first owner's; a process of the
owner that another one has followed; anybody, where the image is not the one that the owner knows, or somebody
else has changed it since. Only the operator of this host gives the disk away (`rededicate`).
"""

import os
import secrets
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from vhostsync.errors import DiskError, ReceiverError, VhostsyncError
from vhostsync.receive.nbd_server import EXPORT, USER, Export, NbdServer
from vhostsync.receive.ownership import Ownership, OwnershipFile
from vhostsync.record.state_record import timestamp
from vhostsync.storage import kinds
from vhostsync.storage.disk import Disk
from vhostsync.storage.identity import DiskIdentity, same

log = structlog.get_logger(__name__)

LOCK_S: Final = 10.0
KEY_BYTES: Final = 32
NAME_BYTES: Final = 16
GIVE_AWAY: Final = "if a new owner may overwrite it, say so on its host: vhostsync --control … rededicate"


@dataclass(frozen=True)
class Begun:
    """What an owner needs for its connections."""

    disk: str
    generation: int
    port: int
    export: str
    user: str
    key: str
    bytes: int


@dataclass(frozen=True)
class Figures:
    """For status and metrics, since this process began."""

    generations: int = 0
    refused: int = 0
    lost_servers: int = 0  # that ended otherwise than by their owner or by us


class Receiver:
    """`run` must run as long as it is used. Whatever is refused is a VhostsyncError."""

    def __init__(
        self, image: Path, file: OwnershipFile, ownership: Ownership | None, data: socket.socket, *,
        may_create: bool,
    ) -> None:
        self.image = image
        self._file = file
        self._ownership = ownership
        self._data = data
        self._may_create = may_create
        self._turn = anyio.Lock()
        self._held: Disk | None = None
        self._made: DiskIdentity | None = None  # the image that this process has made
        self._server: NbdServer | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self.figures = Figures()
        self.why_not: str | None = None  # nobody can have it now

    # ---- the image ----------------------------------------------------------------

    def open(self) -> None:
        """Take the image and see whose it is, before anybody is let in. Blocks. VhostsyncError: it is in "
        "use."""
        if not self.image.exists() and self._may_create:
            log.info("there is no image yet; an owner may have it made", path=str(self.image))
            return
        self._take_back()

    def _hold(self) -> Disk:
        """The image, locked by this process: the I/O of whoever had it is over. `why_not` says whether its
        owner may have it. Blocks. DiskError."""
        held = self._held
        if held is None or not kinds.is_named(str(self.image), held.identity):
            self._let_go()
            held = kinds.open_disk(str(self.image), read_only=False, cache="none", lock_timeout_s=LOCK_S)
        self._held = held
        known = self._ownership
        if known is None or (known.token is None and not _is(known.image, held)):
            held = self._held = self._dedicate(held)
        self.why_not = self._why_not_its_owners(held)
        if self.why_not is not None:
            log.warning("the disk is not what its owner has left", path=held.name, why=self.why_not)
        return held

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _why_not_its_owners(self, disk: Disk) -> str | None:
        known = self._ownership
        if known is None or known.token is None:
            return None
        if not _is(known.image, disk):
            return f"another disk has taken the place of the owner's one at {self.image}; {GIVE_AWAY}"
        changed = disk.as_it_is().changed_since(known.left) if known.left is not None else None
        if changed is None:
            return None
        return f"somebody else has changed {self.image} since its owner has left it ({changed}); {GIVE_AWAY}"

    def _dedicate(self, disk: Disk) -> Disk:
        """To nobody yet, under a new name. Blocks."""
        generation = self._ownership.generation if self._ownership is not None else 0
        marked = disk.with_mark(disk.identity.mark)
        self._save(Ownership(secrets.token_hex(NAME_BYTES), marked.identity, generation=generation))
        borne = marked.bear_mark()
        if borne.identity != marked.identity:
            assert self._ownership is not None
            self._save(replace(self._ownership, image=borne.identity))
        return borne

    def _save(self, ownership: Ownership) -> None:
        self._file.save(ownership)
        self._ownership = ownership

    def _take_back(self) -> None:
        """Nobody writes to it any more: how it looks now is noted, so that a change by somebody else shows.
        Blocks. VhostsyncError."""
        disk = self._hold()
        known = self._ownership
        if known is not None and known.left is None and self.why_not is None:
            self._save(replace(known, left=disk.as_it_is()))

    # ---- the owner ------------------------------------------------------------------

    async def begin(
        self, *, disk: str | None, token: str | None, instance: str, generation: int | None, owner: str
    ) -> Begun:
        """The next generation, for an owner that shows `token` (None: it has none yet). `generation`: the
        last one that this process of the owner has begun. The former one is over on return."""
        async with self._alone():
            self._check(disk, token, instance, generation)
            await self._end_server(kill=True)
            held = await anyio.to_thread.run_sync(self._hold)
            self._check(disk, token, instance, generation)  # what was held may have been another disk
            assert self._ownership is not None
            begun = self._ownership.begun(instance, owner, timestamp(), token)
            await anyio.to_thread.run_sync(self._save, begun)
            return await self._serve(held, begun)

    def _check(self, disk: str | None, token: str | None, instance: str, generation: int | None) -> None:
        known = self._ownership
        if known is None:
            raise ReceiverError(
                f"there is no image {self.image} yet; have it made: vhostsync mirror start … --create"
                if self._may_create
                else f"there is no image {self.image}; make it there, or start the receiver with --create"
            )
        if disk is not None and disk != known.disk:
            raise ReceiverError(
                "the disk that was mirrored to is not here any more: another one has taken its place, or "
                "was "
                f"given to a new owner ({self.image}); mirror to it anew if that is meant"
            )
        if known.token is not None and token is None:
            raise ReceiverError(
                f"{self.image} belongs to another owner ({known.owner}, since {known.since}); {GIVE_AWAY}"
            )
        if known.token is not None and token is not None and not secrets.compare_digest(known.token, token):
            raise ReceiverError(
                f"{self.image} belongs to another owner ({known.owner}, since {known.since}): the token "
                "that was "
                f"shown is not its; {GIVE_AWAY}"
            )
        if generation is not None and generation != known.generation and instance != known.instance:
            raise ReceiverError(
                f"{self.image} has gone on without this backend: {known.owner} has begun generation "
                f"{known.generation} on {known.since}, and this one's last was {generation}; end this backend"
            )
        taking = known.token is None and self._server is not None and not self._server.over
        if taking and instance != known.instance:
            raise ReceiverError(f"{self.image} is being attached by {known.owner} at this moment; try again")
        if self.why_not is not None:
            raise ReceiverError(self.why_not)

    async def _serve(self, held: Disk, begun: Ownership) -> Begun:
        key, size = secrets.token_hex(KEY_BYTES), held.bytes
        export = Export(self.image, held.direct, self._file.key_folder)
        _refuse_all(self._data)
        self._let_go()  # for the server, which takes the lock before it serves
        try:
            self._server = await NbdServer.start(export, key, self._data, self._watch)
        except VhostsyncError:
            await self._keep()
            raise
        self.figures = replace(self.figures, generations=self.figures.generations + 1)
        log.info("generation begun", generation=begun.generation, owner=begun.owner, server=self._server.pid)
        port = self._data.getsockname()[1]
        return Begun(begun.disk, begun.generation, port, EXPORT, USER, key, size)

    async def own(self, *, disk: str, generation: int, token: str, former: str | None) -> None:
        """From here on only who shows this token is let in. It is durable on return; the owner has recorded
        it before it asks. To ask again does no harm."""
        async with self._alone():
            known = self._ownership
            if known is None or known.disk != disk or known.generation != generation:
                raise ReceiverError(f"{self.image}: that generation is over; start the mirror again")
            if known.token not in (None, former, token):
                raise ReceiverError(f"{self.image} belongs to another owner ({known.owner}); {GIVE_AWAY}")
            await anyio.to_thread.run_sync(self._save, replace(known, token=token))
            log.info("the disk has an owner", owner=known.owner, generation=generation)

    async def end(self, *, disk: str, token: str | None, generation: int) -> None:
        """The owner wants no more of this generation. One that is over already, or has been followed by
        another, is left alone."""
        async with self._alone():
            known = self._ownership
            current = known is not None and (known.disk, known.generation) == (disk, generation)
            if not current or known is None or known.token not in (None, token):
                return
            await self._end_server(kill=False)
            await self._keep()

    async def create(self, size_bytes: int) -> str:
        """An image of this size, where there is none; the name of the disk."""
        async with self._alone():
            if not self._may_create:
                raise ReceiverError(f"{self.image} is not made here: its receiver has no --create")
            await anyio.to_thread.run_sync(self._make, size_bytes)
            assert self._ownership is not None
            return self._ownership.disk

    def _make(self, size_bytes: int) -> None:
        kind, name = kinds.kind_of(str(self.image)), str(self.image)
        made = kind.create(name, size_bytes)
        disk = None
        try:
            disk = kinds.open_disk(name, read_only=False, cache="none", lock_timeout_s=LOCK_S)
            if not kind.is_made(disk, made):
                raise ReceiverError(f"another file has taken the place of {self.image}; try again")
            disk = self._dedicate(disk)
        except BaseException:
            if disk is not None:
                disk.close()
            kind.remove(name, made)
            raise
        self._let_go()
        self._held = disk
        self._made = disk.identity
        log.info("image made", path=name, bytes=size_bytes)

    async def remove(self, disk: str) -> None:
        """One that this process has made and that nobody owns."""
        async with self._alone():
            known = self._ownership
            if known is None or known.disk != disk or known.token is not None or self._made is None:
                return
            await self._end_server(kill=True)
            held = await anyio.to_thread.run_sync(self._hold)
            if self._ownership == known and _is(known.image, held) and _is(self._made, held):
                await anyio.to_thread.run_sync(self.image.unlink)
                self._let_go()
                self._made = None
                log.info("image removed", path=str(self.image))

    async def grow(self, size_bytes: int, *, disk: str | None = None, token: str | None = None) -> int:
        """The image file is made larger, durably. A server serves the size with which it has begun, so a
        generation that runs is ended: its owner begins the next one, and sees the rest."""
        async with self._alone():
            known = self._ownership
            if known is None:
                raise ReceiverError(f"there is no image {self.image} that could grow")
            if disk is not None and (disk != known.disk or known.token is None or known.token != token):
                raise ReceiverError(f"{self.image} belongs to another owner ({known.owner})")
            await self._end_server(kill=False)
            await anyio.to_thread.run_sync(self._grow, size_bytes)
            log.info("the image has grown", path=str(self.image), bytes=size_bytes)
            return size_bytes

    def _grow(self, size_bytes: int) -> None:
        self._take_back()
        assert self._held is not None and self._ownership is not None
        if self.why_not is not None:
            raise ReceiverError(self.why_not)
        if size_bytes < self._held.bytes:
            raise ReceiverError(f"{self.image} has {self._held.bytes} bytes and cannot shrink")
        _lengthen(self.image, size_bytes)
        self._let_go()
        self._save(replace(self._ownership, left=None))
        self._take_back()

    # ---- the operator ----------------------------------------------------------------

    async def rededicate(self) -> None:
        """The disk is for whoever attaches it next, whoever had it before; a running generation is ended."""
        async with self._alone():
            await self._end_server(kill=False)
            former = self._ownership
            self._ownership = replace(former, token=None) if former is not None else None
            try:
                await anyio.to_thread.run_sync(self._give_away)
            except BaseException:
                self._ownership = former
                raise
            log.warning("the disk was given away", former=former.owner if former else None)

    def _give_away(self) -> None:
        held = self._hold()
        self._held = self._dedicate(held)

    def report(self) -> dict[str, Any]:
        """For query-status. Pure."""
        known, server = self._ownership, self._server
        running = server is not None and not server.over
        return {
            "disk": known.disk if known is not None else None,
            "owned": known is not None and known.token is not None,
            "owner": known.owner if known is not None else None,
            "since": known.since if known is not None else None,
            "generation": known.generation if known is not None else 0,
            "attached": running,
            "server": server.pid if server is not None and running else None,
            "bytes-written": server.bytes_written() if server is not None and running else None,
            "why-not": self.why_not,
        }

    async def query(self) -> dict[str, Any]:
        """For an owner that looks before it asks for anything. Nothing secret, and nothing changes."""
        return await anyio.to_thread.run_sync(self._look)

    def _look(self) -> dict[str, Any]:
        report, (size, _) = self.report(), sizes_of(self.image)
        shown = ("disk", "owned", "generation", "attached", "why-not")
        return {key: report[key] for key in shown} | {"bytes": size}

    # ---- the server ---------------------------------------------------------------------

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled, after `close`."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            task_status.started()
            await anyio.sleep_forever()

    def _watch(self, server: NbdServer) -> None:
        assert self._tasks is not None
        self._tasks.start_soon(self._see_to, server)

    async def _see_to(self, server: NbdServer) -> None:
        await server.watch()
        async with self._alone():
            if self._server is server:  # nobody has ended it: its owner has gone, or something has killed it
                self._server = None
                if server.code != 0:
                    self.figures = replace(self.figures, lost_servers=self.figures.lost_servers + 1)
                await self._keep()

    async def _end_server(self, *, kill: bool) -> None:
        """DiskError: it is not over."""
        if self._server is not None:
            await self._server.end(kill=kill)
            self._server = None

    async def _keep(self) -> None:
        try:
            await anyio.to_thread.run_sync(self._take_back)
        except VhostsyncError as error:
            log.error("the disk is not held", path=str(self.image), reason=str(error))

    async def close(self) -> None:
        """The end: what the owner has written is written back, and the disk is free."""
        async with self._alone():
            try:
                await self._end_server(kill=False)
            except VhostsyncError as error:
                log.error("the end does not wait any longer", reason=str(error))
                return
            if self._ownership is not None:
                await self._keep()
            self._let_go()
            await anyio.to_thread.run_sync(self._file.close)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """One at a time, and nothing is left half done: whoever has asked may go away meanwhile."""
        with anyio.CancelScope(shield=True):
            async with self._turn:
                try:
                    yield
                except ReceiverError:
                    self.figures = replace(self.figures, refused=self.figures.refused + 1)
                    raise


def _is(known: DiskIdentity, disk: Disk) -> bool:
    return same(known, disk.identity)


def _refuse_all(listener: socket.socket) -> None:
    """Who has connected while nobody answered is of no generation."""
    while True:
        try:
            listener.accept()[0].close()
        except OSError:
            return


def _lengthen(image: Path, size_bytes: int) -> None:
    """A block device is enlarged by whoever made it, before this. Blocks. DiskError."""
    try:
        fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.ftruncate(fd, size_bytes)
                os.fsync(fd)
            elif (found := os.lseek(fd, 0, os.SEEK_END)) < size_bytes:
                raise DiskError(f"{image} has {found} bytes, not {size_bytes}; enlarge the device first")
        finally:
            os.close(fd)
    except OSError as error:
        raise DiskError(f"{image} cannot be made {size_bytes} bytes long: {error.strerror}") from error


def sizes_of(image: Path) -> tuple[int | None, int | None]:
    """All bytes, and how many of them the file system keeps (of an image file); None: it cannot be told.
    Blocks."""
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None, None
    try:
        status = os.fstat(fd)
        kept = status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else None
        return os.lseek(fd, 0, os.SEEK_END), kept
    except OSError:
        return None, None
    finally:
        os.close(fd)
