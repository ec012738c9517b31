# SPDX-License-Identifier: Apache-2.0
"""What test_lineage.py plays in: three image files with a test disk each, the boots of the machine, which
number its devices anew, and what must be true of the disks whenever everything stops.

How a disk looks is said here and not asked of this machine: `Storage` has the kinds, of which some cannot
tell after a boot which disk is which."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.engine_driver import Cut, MemoryDisk
from tests.model.random_guest import BLOCKS, SIZE, check_flushed, sector, sectors_found
from vhostsync.errors import StateRecordError
from vhostsync.host import kernel
from vhostsync.option_values import Answer
from vhostsync.record import bitmap, who_may_serve
from vhostsync.record.files import RealFileSystem
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_index import Index
from vhostsync.record.state_record import StateRecord, Worth
from vhostsync.record.who_may_serve import check_start
from vhostsync.storage import identify
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.local import LocalDisk


@dataclass(frozen=True)
class Storage:
    """A kind of disk, as far as it can be recognised."""

    name: str
    kind: Literal["file", "block"] = "file"
    named: bool = False  # the file system, or the place of the device, by what lasts
    generations: bool = False
    marks: bool = False

    @property
    def bears_names(self) -> bool:
        """Whether anything but the name outlasts a boot: else a disk that is renamed is a new one."""
        return self.named or self.marks

    @property
    def is_certain(self) -> bool:
        """Neither a boot nor a new name makes it doubtful which disk this is."""
        return self.named and (self.kind == "block" or self.generations or self.marks)


STORAGES = (
    Storage("ext", named=True, generations=True, marks=True),
    Storage("ext without attributes", named=True, generations=True),
    Storage("a network file system", named=True),
    Storage("fuse with marks", marks=True),
    Storage("fuse without attributes"),
    Storage("block devices with a place", kind="block", named=True),
    Storage("block devices", kind="block"),
)


@dataclass(frozen=True)
class Boot:
    id: str
    devices: tuple[int, ...]  # their numbers: of file systems, or of block devices
    began_ns: int


@dataclass(eq=False)
class Image:
    """A file of its own, and the test disk that is in its place."""

    letter: str
    path: Path
    memory: MemoryDisk
    volume: int  # the file system it lies in; of block devices each is one
    number: int  # of the inode: those of two file systems may be the same
    used: bool = False  # it was a disk of this guest
    lost: bool = False  # another file has its name, and its inode number

    def __str__(self) -> str:
        return f"{self.letter} ({self.path.name})"


LOOKING: ContextVar[Boot | None] = ContextVar("LOOKING", default=None)  # as it will look after the next boot

Allowed = dict[int, list[int]]


@dataclass
class World:
    folder: Path
    chance: random.Random
    storage: Storage
    with_bitmap: bool
    images: dict[int, Image] = field(default_factory=dict)  # by what they are: the file's true inode
    seen: dict[tuple[str | None, int, int, int | None], Image] = field(default_factory=dict)
    marks: dict[str, Image] = field(default_factory=dict)  # who bears it, or has borne it
    killed: bool = False  # this run ends without a word
    record_fails: bool = False
    allowed: Allowed = field(default_factory=lambda: {block: [0] for block in range(BLOCKS)})
    moments: list[dict[int, tuple[int, ...]]] = field(default_factory=list)  # what was allowed, one by one
    seeds: list[int] = field(default_factory=lambda: [0])
    names: int = 0
    boots: int = 0
    story: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "disks").mkdir()
        self.state.mkdir()
        for letter, volume, number in (("a", 0, 12), ("b", 1, 12), ("c", 1, 13)):
            path = self.folder / "disks" / f"{letter}.img"
            path.write_bytes(bytes(SIZE))
            block = self.storage.kind == "block"
            image = Image(letter, path, MemoryDisk(SIZE), len(self.images) if block else volume, number)
            self.images[path.stat().st_ino] = image
        self.boot, self.next_boot = self._another_boot(), self._another_boot()
        self.note_moment()

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def bits(self) -> Path | None:
        return self.folder / "bits" if self.with_bitmap else None

    def close(self) -> None:
        for image in self.images.values():
            image.memory.drop()

    # ---- names and numbers ------------------------------------------------------

    def _another_boot(self) -> Boot:
        self.boots += 1
        numbers = [7, 8, 9]
        self.chance.shuffle(numbers)
        return Boot(f"boot {self.boots}", tuple(numbers), time.time_ns())

    def reboot(self) -> None:
        """The power goes: what was not flushed is lost, or some of it."""
        for image in self.images.values():
            content = image.memory.read(0, SIZE, Cut.SUBSET, self.chance.getrandbits(32))
            image.memory.load(0, content)
        self.boot, self.next_boot = self.next_boot, self._another_boot()

    def at(self, path: Path) -> Image:
        return self.images[path.stat().st_ino]

    def rename(self) -> str:
        """One of the disks, or two of them each other's name."""
        if not self.storage.bears_names:
            return "-"
        one, other = self.chance.sample(self.there, 2)
        swapped = self.chance.random() < 0.5
        former = one.path
        self.move(one, self._new_name())
        if swapped:
            there = other.path
            self.move(other, former)
            self.move(one, there)
        return f"{one.letter} is called {one.path.name}" + (
            f" and {other.letter} {other.path.name}" if swapped else ""
        )

    @property
    def there(self) -> list[Image]:
        return [image for image in self.images.values() if not image.lost]

    def would_be_missed(self, image: Image) -> bool:
        """Whether another file with its name and its inode number could be told from it."""
        if self.storage.kind == "block" or self.storage.generations:
            return self.storage.generations
        return any(disk.mark_is_set and self.is_of(disk) is image for disk in self.record().disks)

    def replace(self, image: Image) -> Image:
        """Another file in its place: a backup that was restored, one that was made anew."""
        path, image.lost = image.path, True
        self.move(image, self.folder / f"lost {len(self.images)}.img")
        path.write_bytes(bytes(SIZE))
        letter = f"{image.letter}'"
        other = Image(letter, path, MemoryDisk(SIZE), image.volume, image.number)
        self.images[path.stat().st_ino] = other
        return other

    def put_back(self, image: Image, other: Image) -> None:
        path, other.lost, image.lost = other.path, True, False
        self.move(other, self.folder / f"lost {len(self.images)}'.img")
        self.move(image, path)

    def _new_name(self) -> Path:
        self.names += 1
        return self.folder / "disks" / f"{self.names}.img"

    def move(self, image: Image, path: Path) -> None:
        image.path.rename(path)
        image.path = path

    def identity(
        self, path: str, kind: str, device: int, inode: int, size: int, *, mark: str | None = None,
        ctime_ns: int | None = None, **_: Any,
    ) -> DiskIdentity:
        """In the place of what is to be seen of a file of this machine."""
        image, boot, storage = self.images[inode], LOOKING.get() or self.boot, self.storage
        device, number = boot.devices[image.volume], image.number if storage.kind == "file" else 0
        generation = 1000 + inode if storage.generations else None
        self.seen[boot.id, device, number, generation] = image
        if mark is not None:
            self.marks[mark] = image
        if storage.kind == "block":
            place = f"slot {image.volume}" if storage.named else None
            return DiskIdentity(path, "block", device, 0, size, boot_id=boot.id, place=place)
        return DiskIdentity(
            path, "file", device, number, size, ctime_ns, generation, mark=mark, mark_is_set=mark is not None,
            file_system=f"fs {image.volume}" if storage.named else None, boot_id=boot.id,
        )  # fmt: skip

    def is_of(self, identity: DiskIdentity) -> Image:
        """Whatever it is called now."""
        number = (identity.boot_id, identity.device, identity.inode, identity.generation)
        return self.marks.get(identity.mark or "") or self.seen[number]

    def look(self, image: Image) -> DiskIdentity:
        with image.path.open("rb") as file:
            return identify.identify(file.fileno(), image.path)

    # ---- what must be true ------------------------------------------------------

    def note_moment(self) -> None:
        self.moments.append({block: tuple(seeds) for block, seeds in self.allowed.items()})

    def check(self) -> None:
        """This process is killed now; or the power goes."""
        left = self._left()
        for boot, what, cut in (
            (self.boot, "a kill", Cut.NONE), (self.next_boot, "a power cut", Cut.EVERYTHING),
        ):  # fmt: skip
            with looking(boot):
                self._check_left(left, f"after {what}", cut)

    @property
    def source(self) -> Image:
        """The disk that the guest is on, as the operator knows it, whether or not it is recognised."""
        return self.is_of(self.record().current)

    def record(self) -> StateRecord:
        left = self._left()
        record = next((self._record(path) for path in sorted(left.glob("*.record.json"))), None)
        assert record is not None
        return record

    def _left(self) -> Path:
        """The state directory at one instant, copied."""
        left, texts = self.folder / "left", None
        while texts != (texts := self._texts()):
            pass
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
        for name, text in texts.items():
            (left / name).write_bytes(text)
        return left

    def _texts(self) -> dict[str, bytes]:
        texts = {}
        for path in self.state.iterdir():
            with suppress(FileNotFoundError):
                texts[path.name] = path.read_bytes()
        return texts

    def _record(self, path: Path) -> StateRecord:
        record = StateFile(path).load()
        assert record is not None
        return record

    def _check_left(self, left: Path, what: str, cut: Cut) -> None:
        records = sorted(left.glob("*.record.json"))
        assert len(records) <= 1, f"{what} there are two records: {records}"
        if not records:
            return
        record = self._record(records[0])
        may = [image for image in self.there if image.used and self._may_serve(left, image)]
        assert len(may) <= 1, f"{what} two disks may serve: {may}"
        assert may or not self.storage.is_certain, f"{what} no disk may serve; the record has {record}"
        for image in may:
            check_flushed(image.memory, self.allowed, f"{what} the disk that may serve, {image},", cut)
        if record.peer_worth is Worth.UP_TO_DATE:
            assert record.peer is not None
            peer = self.is_of(record.peer)
            what_it_is = f"{what} the peer that is up to date, {peer},"
            check_flushed(peer.memory, self.allowed, what_it_is, cut)
        for image in self.there:
            if image.used and image not in may and self._may_serve(left, image, Answer.PROMOTE):
                self._check_whole(image, what, cut)

    def _may_serve(self, left: Path, image: Image, answer: Answer | None = None) -> bool:
        try:
            self.would_start(image, answer, left)
        except StateRecordError:
            return False
        return True

    def would_start(self, image: Image, answer: Answer | None, state: Path | None = None) -> None:
        """Nothing is changed. StateRecordError where a start would be refused."""
        identity = self.look(image)
        path = Index(state or self.state, RealFileSystem()).record_of(identity, answer)
        record = StateFile(path).load()
        if record is not None:
            check_start(record, identity, path, answer)

    def _check_whole(self, image: Image, what: str, cut: Cut) -> None:
        """`--promote` is never of a copy that did not end: it is what the guest's disk was once."""
        found = {block: sectors_found(image.memory, block, cut) for block in self.allowed}
        assert any(
            all(found[block] <= {sector(seed) for seed in seeds} for block, seeds in moment.items())
            for moment in reversed(self.moments)
        ), f"{what} {image} could be promoted, and is of no moment of the guest's disk"

    def promote(self, image: Image) -> None:
        """From here on the guest has what is on this disk."""
        for block, seeds in self.allowed.items():
            cuts = (Cut.NONE, Cut.EVERYTHING)
            found = set().union(*(sectors_found(image.memory, block, cut) for cut in cuts))
            seeds[:] = [seed for seed in range(self.seeds[0] + 1) if sector(seed) in found]
        self.note_moment()


@contextmanager
def looking(boot: Boot) -> Iterator[None]:
    token = LOOKING.set(boot)
    try:
        yield
    finally:
        LOOKING.reset(token)


def arrange(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """This world in the place of the machine."""

    def test_disk(disk: LocalDisk) -> Any:
        image = world.at(Path(f"/proc/self/fd/{disk.fd.fileno()}"))
        image.used = True
        disk.fd.close()
        return image.memory.hand_over()

    class Silent:
        """No log line for what is only looked at."""

        def __getattr__(self, level: str) -> Any:
            return (lambda *_, **__: None) if LOOKING.get() else getattr(log, level)

    log = who_may_serve.log
    write_durable = RealFileSystem.write_durable

    def write_if_there_is_room(self: RealFileSystem, path: Path, text: bytes) -> None:
        if world.record_fails:
            raise OSError(28, "No space left on device")
        write_durable(self, path, text)

    monkeypatch.setattr(LocalDisk, "to_engine", test_disk)
    monkeypatch.setattr(RealFileSystem, "write_durable", write_if_there_is_room)
    monkeypatch.setattr(kernel, "this_boot", lambda: (LOOKING.get() or world.boot).id)
    monkeypatch.setattr(bitmap, "this_boot_began_ns", lambda: world.boot.began_ns)
    monkeypatch.setattr(identify, "DiskIdentity", world.identity)
    monkeypatch.setattr(who_may_serve, "log", Silent())
    if not world.storage.marks:
        monkeypatch.setattr(identify, "MARK_NAME", "no.such.attribute")
