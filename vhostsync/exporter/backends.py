# SPDX-License-Identifier: Apache-2.0
"""The backends of this host, found by the disks' records and by control sockets, and asked for their figures.

A backend may hang, or have been taken over by its guest. So

* each is asked by a task of its own, which no scrape waits for beyond the deadline, and which a later one
  does not wait for at all: a backend that hangs delays one page, by the deadline, and no other;
* so much is read of it, and no more (`ask_once`): one that sends on and on is down until the next scrape;
* what it answers becomes numbers under names that are known here. What is anything else costs that backend
  its figures, and nobody else's."""

import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import structlog

from vhostsync.control.client import RefusedError, ask_once, may_come_back
from vhostsync.control.found_socket import AGAIN_S, Control, FoundSocket
from vhostsync.errors import ControlError, StateRecordError, VhostsyncError
from vhostsync.fleet.known_disks import settled_disks
from vhostsync.host.errands import ask_unless_cancelled
from vhostsync.lineage_name import runtime_directory
from vhostsync.metrics import page_of
from vhostsync.metrics_page import COARSE_BUCKETS, Page
from vhostsync.receive_metrics import receiver_page

log = structlog.get_logger(__name__)

GIVE_UP_S: Final = 300.0
"""After this long a backend that does not answer is asked anew."""
PATIENCE: Final = 0.25
"""Which part of the deadline is waited for disks that are between two backends."""
SAMPLES_MAX: Final = 20_000
"""Of one backend: 64 queues have a quarter of it."""


@dataclass(frozen=True)
class Place:
    """A control socket, and what its disk is called here."""

    name: str
    control: Control

    def is_of(self, other: "Place") -> bool:
        """The same disk's. Of one record there is one question at a time, wherever its link leads by now."""
        lock, others = _lock_of(self.control), _lock_of(other.control)
        return self == other if lock is None else lock == others


def _lock_of(control: Control) -> Path | None:
    return control.lock if isinstance(control, FoundSocket) else None


@dataclass(frozen=True)
class Found:
    """Who listens; and the names of the disks that are known here and whose backends do not run."""

    places: list[Place]
    stopped: list[str]


RECEIVERS: Final = Path("/run/vhostsync-receive")


def look_around(directories: Iterable[Path] = (), patience_s: float = 0) -> Found:
    """In these directories alone; where there are none, all disks of this host that records or sockets tell
    of, and its receivers. `patience_s`: for those that are between two backends. Blocks."""
    if directories := list(directories):
        return Found(find_places(directories), [])
    try:
        disks = settled_disks(patience_s)
    except StateRecordError as error:
        log.warning("the disks of this host cannot be told by their records", reason=str(error))
        return Found(find_places([runtime_directory(), RECEIVERS]), [])
    given = {disk.name for disk in disks if disk.name}
    listening = [
        Place(disk.name or _label_of(disk.control, given), disk.control) for disk in disks if disk.control
    ]
    places = _told_apart(_each_once([*listening, *find_places([RECEIVERS])]))
    names = {place.name for place in places}
    return Found(places, sorted({disk.name for disk in disks if disk.name and not disk.control} - names))


def find_places(directories: Iterable[Path]) -> list[Place]:
    """In the order of their names. Blocks. Two of one name are called by their sockets."""
    paths = {path for each in directories for path in _sockets_in(each)}
    return _told_apart([Place(_name_of(path), path) for path in paths])


def _each_once(found: Iterable[Place]) -> list[Place]:
    """A record may have the name of another one, which is somebody else's or was left behind."""
    once: dict[tuple[str, str], Place] = {}
    for place in found:
        key, control = (place.name, str(place.control)), place.control
        before = once[key].control if key in once else None
        if isinstance(before, FoundSocket) and isinstance(control, FoundSocket):
            place = replace(place, control=before.claimed_too(control))
        once[key] = place
    return list(once.values())


def _told_apart(found: list[Place]) -> list[Place]:
    often = Counter(place.name for place in found)
    places = sorted(found, key=lambda place: (place.name, str(place.control)))
    return [each if often[each.name] == 1 else replace(each, name=str(each.control)) for each in places]


def _sockets_in(directory: Path) -> Iterable[Path]:
    for path in (*directory.glob("*/control"), *directory.glob("*.control")):
        with suppress(OSError):
            if stat.S_ISSOCK(path.stat().st_mode):
                yield path


def _label_of(control: Control, given: Set[str]) -> str:
    """Of a disk without a name: what its socket is called, but not as one that has been given that name."""
    name = _name_of(Path(control))
    return str(control) if name in given else name


def _name_of(control: Path) -> str:
    if control.name == "control":
        return control.parent.name
    return control.name.removesuffix(".control").removesuffix(".sock")


class Question:
    """One that is asked again and again, where the answer may hang: at most one is under way, and nobody
    waits beyond a deadline, which runs from when it was asked."""

    def __init__(self, ask: Callable[[], Awaitable[None]], tasks: anyio.abc.TaskGroup) -> None:
        self._ask = ask
        self._tasks = tasks
        self._began = 0.0
        self._answered = anyio.Event()
        self._answered.set()

    def begin(self) -> None:
        """Unless the last one is under way still."""
        if self._answered.is_set():
            self._answered, self._began = anyio.Event(), anyio.current_time()
            self._tasks.start_soon(self._carry_out, self._answered)

    async def _carry_out(self, answered: anyio.Event) -> None:
        try:
            await self._ask()
        finally:
            answered.set()

    async def is_answered(self, deadline_s: float) -> bool:
        """Within so long after it was asked."""
        with anyio.CancelScope(deadline=self._began + deadline_s):
            await self._answered.wait()
        return self._answered.is_set()


class Surroundings:
    """Who is there, over the scrapes. The disk with the records may hang: then all is as it was found
    last."""

    def __init__(self, directories: Iterable[Path], tasks: anyio.abc.TaskGroup) -> None:
        self._directories = directories
        self._patience_s = 0.0
        self._found: Found | None = None
        self._question = Question(self._look, tasks)

    async def found(self, deadline_s: float) -> Found:
        """Within so long after the look began. ControlError: nothing was found before."""
        self._patience_s = deadline_s * PATIENCE
        self._question.begin()
        if not await self._question.is_answered(deadline_s):
            log.warning("the disks of this host cannot be told", reason=f"no answer within {deadline_s:g} s")
        if self._found is None:
            raise ControlError("It cannot be told which disks this host has: to list them hangs, or fails.")
        return self._found

    async def _look(self) -> None:
        try:
            look = partial(look_around, self._directories, self._patience_s)
            self._found = await ask_unless_cancelled(look)
        except Exception:
            log.exception("the disks of this host cannot be told")


class Asked:
    """A backend over the scrapes."""

    def __init__(self, place: Place, tasks: anyio.abc.TaskGroup) -> None:
        self.place = place
        self.page: Page | None = None
        self._question = Question(self._ask, tasks)
        self._was_up: bool | None = None

    def ask(self) -> None:
        """Begin, unless the last question is under way still."""
        self._question.begin()

    async def wait(self, deadline_s: float) -> Page | None:
        """Its figures; None where it did not answer in time: within so long after it was asked."""
        if await self._question.is_answered(deadline_s):
            return self.page
        self._tell(False, f"no answer within {deadline_s:g} s")
        return None

    async def _ask(self) -> None:
        self.page = None
        reason = f"no answer within {GIVE_UP_S:g} s"
        try:
            with anyio.move_on_after(GIVE_UP_S):
                self.page = await self._ask_again()
        except VhostsyncError as error:
            reason = str(error)
        except Exception as error:  # whatever it has answered
            reason = f"it answers with what is none of our figures ({type(error).__name__}: {error})"
        self._tell(self.page is not None, reason)

    async def _ask_again(self) -> Page:
        """It may be between two processes."""
        for pause_s in AGAIN_S:
            try:
                return await _page_from(self.place)
            except ControlError as error:
                if not may_come_back(self.place.control, error):
                    raise
            await anyio.sleep(pause_s)
        return await _page_from(self.place)

    def _tell(self, is_up: bool, reason: str) -> None:
        """Log a change."""
        if is_up == self._was_up:
            return
        if not is_up:
            log.warning("backend is down", vm=self.place.name, reason=reason)
        elif self._was_up is not None:
            log.info("backend is up again", vm=self.place.name)
        self._was_up = is_up


async def _page_from(place: Place) -> Page:
    status, mirror, stats = await ask_once(place.control, "query-status", "query-mirror", "query-stats")
    if isinstance(status, Mapping) and "receiver" in status:
        return receiver_page(status, place.name)
    for answer in (status, mirror, stats):
        if isinstance(answer, RefusedError):
            raise answer
    page = page_of(status, mirror, stats, name=place.name, buckets=COARSE_BUCKETS)
    if page.samples > SAMPLES_MAX:
        raise ControlError(f"it has {page.samples} samples, more than any disk has")
    return page
