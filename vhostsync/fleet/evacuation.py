# SPDX-License-Identifier: Apache-2.0
"""Moves many disks of this host to another place, so many at a time. It holds no state: what a disk's mirror
does, its backend and its record say. So whoever starts it again goes on where the last one was. Of one place,
and to one place, there is one evacuation at a time (`alone`): two would undo each other's mirrors and limits.

A backend may have been taken over by its guest: what it answers is held against what it should be, and costs
no disk but its own. Files are looked at by threads that nobody has to wait for."""

import errno
import fcntl
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio

from vhostsync.control.client import ControlClient, RefusedError, connect
from vhostsync.errors import ControlError, DiskError, MirrorError, UnreachableError, VhostsyncError
from vhostsync.fleet.disks import MIRROR, not_in_form
from vhostsync.fleet.evacuation_plan import Move, is_same_place
from vhostsync.fleet.host_disk import HostDisk
from vhostsync.fleet.speed_budget import SpeedBudget
from vhostsync.host.errands import ask_unless_cancelled, bring_unless_cancelled
from vhostsync.host.flocks import Flocks, lock_holders
from vhostsync.host.owned_fd import OwnedFd
from vhostsync.record.state_file import StateFile
from vhostsync.storage.identity import same
from vhostsync.storage.kinds import identify
from vhostsync.typed_fields import is_text

LOOK_EVERY_S: Final = 0.5
COME_BACK_S: Final = 30.0
"""A backend that is restarted meanwhile is waited for so long."""
ANSWER_S: Final = 10.0
"""For what a backend says at once; one that says nothing (it is stopped, or its machine waits) is as good as
gone, and holds up no other disk."""
COMMAND_S: Final = 120.0
"""For what it has to do first: to make and open the destination, to switch."""
SWITCH_DEADLINE_MS: Final = 30_000
ATTACHED: Final = ("syncing", "steady", "ahead")

WAITING: Final = "waiting"
COPYING: Final = "copying"
STEADY: Final = "up to date"
SWITCHING: Final = "switching"
MOVED: Final = "moved"
FAILED: Final = "failed"
ENDS: Final = (STEADY, MOVED, FAILED)

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Of one disk. `phase` is one of the words above; STEADY is an end only where nothing is switched."""

    label: str
    destination: str | None
    phase: str
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_per_s: float = 0.0
    error: str | None = None
    pause_us: int | None = None  # of the guest, at the switch


class Evacuation:
    """`tell` is called with the progress of a disk whenever it has made some."""

    def __init__(
        self, moves: Sequence[Move], *, parallel: int, total_speed: int, switch: bool,
        tell: Callable[[Progress], None],
    ) -> None:
        self._budget = SpeedBudget(total_speed, parallel)
        self._limit = anyio.CapacityLimiter(parallel)
        self._switch = switch
        self._tell = tell
        self.progress: dict[int, Progress] = {
            at: Progress(move.label, move.destination, WAITING, bytes_total=move.bytes)
            for at, move in enumerate(moves)
        }
        self._moves = dict(enumerate(moves))
        self._answered_s: dict[int, float] = {}  # when each backend has last said something

    async def run(self) -> None:
        """Until each has ended. Cancelled, it leaves the copies to their backends."""
        async with anyio.create_task_group() as tasks:
            for at, move in self._moves.items():
                if move.why_not is not None:
                    self._note(at, phase=FAILED, error=move.why_not)
                else:
                    tasks.start_soon(self._move, at)

    def _note(self, at: int, **changes: Any) -> None:
        changed = replace(self.progress[at], **changes)
        if changed != self.progress[at]:
            self.progress[at] = changed
            self._tell(changed)

    async def _move(self, at: int) -> None:
        """One that fails ends here, and no other with it."""
        control = self._moves[at].disk.control
        assert control is not None
        async with self._limit:
            speed = await self._budget.join(control)
            try:
                await self._to_the_end(at, speed)
            except VhostsyncError as error:
                self._note(at, phase=FAILED, error=str(error), bytes_per_s=0.0)
            finally:
                with anyio.move_on_after(COME_BACK_S):
                    await self._budget.leave(control)

    async def _to_the_end(self, at: int, speed: int) -> None:
        """Also if the backend is restarted meanwhile, however often: what it was at, it goes on with."""
        gone_s = 0.0
        while True:
            try:
                return await self._mirror_and_switch(at, speed)
            except UnreachableError:
                if self._answered_s.get(at, 0.0) >= gone_s:
                    gone_s = time.monotonic()
                if time.monotonic() - gone_s > COME_BACK_S:
                    raise
                await anyio.sleep(LOOK_EVERY_S)

    async def _mirror_and_switch(self, at: int, speed: int) -> None:
        move = self._moves[at]
        assert move.disk.control is not None and move.destination is not None
        async with connect(move.disk.control) as client:
            mirror = await _query_mirror(client)
            self._answered_s[at] = time.monotonic()
            if await _is_same(mirror["source"], move.destination):
                self._note(at, phase=MOVED, bytes_done=self.progress[at].bytes_total)
                return
            await self._begin_mirror(client, mirror, move, speed)
            await self._budget.settle(move.disk.control)
            await self._until_steady(at, client, move.destination)
            if not self._switch:
                self._note(at, phase=STEADY, bytes_per_s=0.0)
                return
            self._note(at, phase=SWITCHING, bytes_per_s=0.0)
            pause_us = await _switch(client, move.destination)
            self._note(at, phase=MOVED, pause_us=pause_us)

    async def _begin_mirror(
        self, client: ControlClient, mirror: Mapping[str, Any], move: Move, speed: int
    ) -> None:
        destination = move.destination
        assert destination is not None
        if mirror["state"] not in ATTACHED:
            create = await _told_in_time(partial(_must_be_made, move.disk, destination), destination)
            arguments = {"destination": destination, "create": create} | ({"speed": speed} if speed else {})
            try:
                await _execute(client, "mirror-start", arguments, COMMAND_S)
                return
            except RefusedError:
                # Somebody else may have been quicker: another evacuation, or the backend, which resumes.
                mirror = await _query_mirror(client)
                if mirror["state"] not in ATTACHED:
                    raise
        if not await _is_same(str(mirror["destination"]), destination):
            raise MirrorError(f"it is mirrored to {mirror['destination']}; cancel that mirror first")

    async def _until_steady(self, at: int, client: ControlClient, destination: str) -> None:
        """MirrorError where it will not become steady."""
        while True:
            mirror = await _query_mirror(client)
            self._answered_s[at] = time.monotonic()
            state = mirror["state"]
            if state not in ATTACHED or not await _is_same(str(mirror["destination"]), destination):
                why = mirror["last-error"] or mirror["reason"] or "another command has ended it"
                raise MirrorError(f"the mirror to {destination} failed: {why}")
            total = mirror["copy-bytes-total"] or self.progress[at].bytes_total
            done = total if state == "steady" else mirror["copy-bytes-done"]
            self._note(
                at, phase=COPYING, bytes_done=done, bytes_total=total,
                bytes_per_s=0.0 if state == "steady" else mirror["copy-rate-bytes-per-s"],
            )  # fmt: skip
            if state == "steady":
                return
            with anyio.move_on_after(LOOK_EVERY_S):
                while (await client.next_event())["event"] != "MIRROR_STATE_CHANGE":
                    pass


async def _execute(
    client: ControlClient, command: str, arguments: Mapping[str, Any] | None = None,
    patience_s: float | None = None,
) -> Any:
    """UnreachableError, too, where no answer comes: not to be used again then."""
    limit_s = ANSWER_S if patience_s is None else patience_s
    try:
        with anyio.fail_after(limit_s):
            return await client.execute(command, arguments)
    except TimeoutError as error:
        raise UnreachableError(f"The backend does not answer ({command}, for {limit_s:g} s).") from error


async def _query_mirror(client: ControlClient) -> Mapping[str, Any]:
    """ControlError where it is no such answer."""
    mirror = await _execute(client, "query-mirror")
    if (wrong := not_in_form(mirror, MIRROR)) is not None or not is_text(mirror.get("source")):
        raise ControlError(f"The backend answers with what is no {wrong or 'source'}.")
    assert isinstance(mirror, Mapping)
    return mirror


async def _told_in_time(ask: Callable[[], T], what: str) -> T:
    """What `ask` returns or raises. MirrorError where its file system hangs."""
    try:
        with anyio.fail_after(ANSWER_S):
            return await ask_unless_cancelled(ask)
    except TimeoutError as error:
        raise MirrorError(f"the file system of {what} does not answer") from error
    except ValueError as error:  # of a name that no file can have
        raise MirrorError(f"{what!r} is no name of a disk") from error


async def _is_same(one: str, other: str) -> bool:
    return one == other or await _told_in_time(partial(is_same_place, one, other), one)


@asynccontextmanager
async def alone(*places: str) -> AsyncIterator[None]:
    """Those of them that are directories are locked meanwhile. MirrorError: another evacuation has one, or
    what that lies in, or something in it."""
    async with AsyncExitStack() as stack:
        for place in dict.fromkeys(each for each in places if each.startswith("/")):
            lock = partial(_locked, place)
            with anyio.move_on_after(ANSWER_S):
                locked: ExitStack = await bring_unless_cancelled(lock, ExitStack.close)
                stack.enter_context(locked)
        yield


def _locked(place: str) -> ExitStack:
    """Blocks. Of two that begin at once, each sees the other: first the lock, then the look."""
    here = Path(os.path.realpath(place))
    with ExitStack() as held:
        _lock(held, here)
        for process in filter(_may_evacuate, Flocks().processes):
            for other in _locked_by(process):
                if here.is_relative_to(other) or other.is_relative_to(here):
                    raise _locked_error(other, str(process))
        return held.pop_all()


def _lock(held: ExitStack, directory: Path) -> None:
    """One that cannot be locked (there are file systems without locks, and places without a directory) is
    taken as it is, and so is one that somebody else holds than an evacuation could: whoever may read a
    directory may lock it."""
    try:
        fd = OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        return
    held.enter_context(fd)
    try:
        fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holders = lock_holders(directory) if error.errno == errno.EWOULDBLOCK else ()
        if ours := [str(process) for process in holders if _may_evacuate(process)]:
            raise _locked_error(directory, ", ".join(ours)) from error


def _locked_error(directory: Path, processes: str) -> MirrorError:
    return MirrorError(
        f"{directory} is locked by process {processes}: another evacuation of it, or to it, is under way, it "
        f"seems; wait until that has ended, or end it and start again."
    )


def _locked_by(process: int) -> Iterator[Path]:
    """Directories, as the kernel tells of its descriptors: no file system is asked. Nothing is known of a
    process that one may not look at (a user of root's), or that has other mounts."""
    folder = Path(f"/proc/{process}")
    with suppress(OSError):  # it has ended
        if (folder / "ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink():
            return
        for info in (folder / "fdinfo").iterdir():
            text = info.read_bytes()
            flags = re.search(rb"^flags:\s*([0-7]+)$", text, re.MULTILINE)
            if b"FLOCK" in text and flags is not None and int(flags[1], 8) & os.O_DIRECTORY:
                yield (folder / "fd" / info.name).readlink()


def _may_evacuate(process: int) -> bool:
    """By its user, whom not the owner of its folder tells (that may be root's, whoever it is), and by its
    command: others lock directories for a moment as well, to clean them up."""
    folder = Path(f"/proc/{process}")
    try:
        if b"evacuate" not in (folder / "cmdline").read_bytes().split(b"\0"):
            return False
        lines = (folder / "status").read_bytes().splitlines()
    except OSError:
        return False  # it has ended, or is not of this host
    [users] = [line.split()[1:] for line in lines if line.startswith(b"Uid:")]
    return process != os.getpid() and int(users[1]) in (0, os.geteuid())


def _must_be_made(disk: HostDisk, destination: str) -> bool:
    """Whether the image has to be made. What is there already may be this disk's own, which an earlier
    mirror has made; nothing else is written to. Blocks. DiskError, StateRecordError."""
    if not destination.startswith("/"):
        return not _is_own(disk, destination)
    if not os.path.lexists(destination):
        return True
    if _is_own(disk, destination):
        return False
    raise DiskError(
        f"{destination} exists already, and is not known as a mirror of this disk; move it away, or move "
        f"this disk by hand"
    )


def _is_own(disk: HostDisk, destination: str) -> bool:
    """Whether the disk there is the one that the record, as it is now, has for the other one."""
    record = StateFile(disk.record_path).load() if disk.record_path is not None else None
    if record is None or record.peer is None:
        return False
    try:
        return same(record.peer, identify(destination))
    except OSError:
        return False


async def _switch(client: ControlClient, destination: str) -> int | None:
    """For how long the guest was paused; None: it was there already."""
    try:
        result = await _execute(client, "switch", {"deadline-ms": SWITCH_DEADLINE_MS}, COMMAND_S)
    except RefusedError:
        if await _is_same((await _query_mirror(client))["source"], destination):
            return None  # somebody else has done it
        raise
    pause_us = result.get("pause-us") if isinstance(result, Mapping) else None
    return pause_us if isinstance(pause_us, int) else None


async def needed_and_free(moves: Sequence[Move], to: str) -> tuple[int, int | None]:
    """How many bytes they need at most, and are free in the target; 0 and None where a file system hangs."""
    with anyio.move_on_after(ANSWER_S):
        needed = await ask_unless_cancelled(partial(_needed_bytes, moves))
        return needed, await ask_unless_cancelled(partial(_free_bytes, to))
    return 0, None


def _free_bytes(to: str) -> int | None:
    """Of a directory. Blocks."""
    if not to.startswith("/"):
        return None
    status = os.statvfs(to)
    return status.f_bavail * status.f_frsize


def _needed_bytes(moves: Sequence[Move]) -> int:
    """At most: what is allocated of image files, and all of other disks; of those that have to be made yet.
    Blocks."""
    return sum(_allocated(move) for move in moves if move.destination and not _is_there(move.destination))


def _is_there(destination: str) -> bool:
    return destination.startswith("/") and os.path.lexists(destination)


def _allocated(move: Move) -> int:
    path = Path(move.disk.disk or "")
    try:
        return path.stat().st_blocks * 512 if path.is_file() else move.bytes
    except OSError:
        return move.bytes
