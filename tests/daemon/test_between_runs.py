# SPDX-License-Identifier: Apache-2.0
"""What happened between two runs, by kind of disk and by what the last run has left: the table of
docs/durability.md, "Which disk is which". Each cell is a start as `serve` makes it, on real files, file
systems and devices, with a boot of the machine in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.daemon.rig import ext4_image, loop_device, mounted, overlay
from tests.sizes import MIB
from vhostsync.config import ServeConfig
from vhostsync.device.opening import Opened, open_device
from vhostsync.errors import DiskError, StateRecordError
from vhostsync.host import kernel
from vhostsync.option_values import Answer
from vhostsync.record import heartbeat
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import StateRecord, Wanted, Worth
from vhostsync.storage import identify
from vhostsync.storage.file import create_image
from vhostsync.storage.identity import DiskIdentity, Likeness

SIZE = 4 * MIB
DOUBT = ((4096, 512),)
THEN = "2026-01-02T03:04:05Z"

# What the last run has left of a mirror from a to b. All but "ended" were killed.
LEFT = ("alone", "copying", "outdated", "steady", "ended", "switched")
MIRRORED = ("copying", "outdated", "steady", "ended")
OFFERS = {
    "copying": "is a copy that did not end, and of no use",
    "outdated": f"as of {THEN}",
    "steady": "lacks nothing that was flushed",
    "ended": "lacks nothing that was flushed",
}


@dataclass
class Machine:
    """Two disks, and the state directory beside them."""

    a: Path
    b: Path
    state: Path
    monkeypatch: pytest.MonkeyPatch
    boots: int = 0

    def __post_init__(self) -> None:
        # What a test does to the files passes for the last run's last writes, however slow this machine is.
        self.monkeypatch.setattr(heartbeat, "LANDING_NS", 3600 * 10**9)

    def boot(self) -> None:
        self.boots += 1
        self.monkeypatch.setattr(kernel, "this_boot", lambda: f"boot {self.boots}")

    @contextmanager
    def serve(self, disk: Path, answer: Answer | None = None, *, bits: str = "bits") -> Iterator[Opened]:
        config = ServeConfig(
            blk_file=str(disk), socket_path=self.state / "x.sock", bitmap=self.state / bits, answer=answer
        )
        opened = open_device(config, self.state, lambda: None)
        try:
            yield opened
        finally:
            opened.close()

    def leave(self, left: str) -> None:
        """A run on a, which mirrors to b."""
        with self.serve(self.a) as opened:
            record, state_file, bitmap = opened.record, opened.store, opened.bitmap
            assert record is not None and state_file is not None and bitmap is not None
            if left == "alone":
                return
            peer = seen(self.b, mark=True)
            bitmap.new_peer((record.current, peer))
            record = record.with_peer(peer, bitmap.token).with_wanted(Wanted(str(self.b), "none"))
            record = record.with_doubt(DOUBT, ())
            state_file.change(record)
            if left == "copying":
                return
            record = record.with_worth(Worth.UP_TO_DATE)
            if left == "outdated":
                record = record.with_worth(Worth.OUTDATED, THEN)
            if left == "switched":
                record = record.switched(keep_mirror=False, since=THEN)
            if left == "ended":
                record = record.detached(seen(self.a, clean=True), seen(self.b, clean=True))
            state_file.change(record)

    def current(self, left: str) -> Path:
        return self.b if left == "switched" else self.a

    def goes_on(
        self, disk: Path, left: str, answer: Answer | None = None, *, bits: bool = True, records: int = 1
    ) -> None:
        """With all that was known, and the bitmap, if that is believed (`bits`)."""
        with self.serve(disk, answer) as opened:
            record = opened.record
            assert record is not None and record.current.path == str(disk)
            assert len(self.records()) == records
            if left in MIRRORED:
                worth = Worth.INCONSISTENT if left == "copying" else Worth.OUTDATED
                assert record.peer is not None and record.peer_worth is worth
                assert (record.doubt, record.wanted) == (DOUBT, Wanted(str(self.b), "none"))
                assert opened.peer_known is bits
            else:
                assert record.peer is None and len(record.superseded) == (left == "switched")

    def refusal(self, disk: Path, answer: Answer | None = None) -> str:
        """The sentence; and nothing durable was written."""
        before = self.written()
        with pytest.raises(StateRecordError) as refused, self.serve(disk, answer):
            pass
        assert self.written() == before
        return str(refused.value)

    def written(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.state.glob("*.json")}

    def records(self) -> list[StateRecord]:
        found = [StateFile(path).load() for path in sorted(self.state.glob("*.record.json"))]
        return [record for record in found if record is not None]


def seen(path: Path, *, clean: bool = False, mark: bool = False) -> DiskIdentity:
    fd = os.open(path, os.O_RDWR)
    try:
        found = identify.identify(fd, path, with_ctime=clean)
        return identify.bear_mark(fd, identify.with_mark(fd, found, found.mark)) if mark else found
    finally:
        os.close(fd)


def replaced_by(path: Path, content: bytes) -> None:
    """Another file under that name; the old one is gone."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.rename(path)


@contextmanager
def its_inode_again(path: Path) -> Iterator[None]:
    """Another file under that name, which has the inode number of the one that is gone."""
    wanted, others = path.stat().st_ino, ExitStack()
    with others:
        path.unlink()
        for number in range(1000):
            create_image(path, SIZE)
            if path.stat().st_ino == wanted:
                break
            path.rename(other := path.with_suffix(f".{number}"))
            others.callback(other.unlink)
        else:
            pytest.skip("THIS TEST IS LEFT OUT, as this file system gives no inode number again soon")
        yield


@pytest.fixture(params=["file", "overlay"])
def machine(request: pytest.FixtureRequest, work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Image files on a file system that has a lasting name, and on one that has none."""
    with ExitStack() as undo:
        folder = work if request.param == "file" else undo.enter_context(overlay(work)).folder
        it = Machine(folder / "a.img", folder / "b.img", work / "state", monkeypatch)
        for disk in (it.a, it.b):
            create_image(disk, SIZE)
        it.boot()
        yield it


# ---- the same disk -----------------------------------------------------------------


@pytest.mark.parametrize("left", LEFT)
def test_nothing_but_a_boot(machine: Machine, left: str) -> None:
    machine.leave(left)
    machine.boot()
    machine.goes_on(machine.current(left), left)
    if left == "switched":
        assert f"was superseded by a switch at {THEN}" in machine.refusal(machine.a)
    elif left != "alone":
        assert "is the other half of a mirror" in machine.refusal(machine.b)


@pytest.mark.parametrize("left", LEFT)
def test_renamed(machine: Machine, left: str) -> None:
    """And a second time, within the boot."""
    machine.monkeypatch.setattr(heartbeat, "LANDING_NS", 0)
    machine.leave(left)
    disk = machine.current(left)
    for name in ("x.img", "y.img"):
        disk = disk.rename(disk.with_name(name))
        # A rename shows in the ctime, as a write by somebody else does.
        machine.goes_on(disk, left, bits=False)
        if left == "switched":
            machine.a = machine.a.rename(machine.a.with_name(f"old-{name}"))
            assert "was superseded by a switch" in machine.refusal(machine.a)


@pytest.mark.parametrize("left", LEFT)
def test_names_swapped(machine: Machine, left: str) -> None:
    """As an operator does it who wants to keep the name: mv a a.old; mv b a."""
    machine.leave(left)
    machine.a.rename(machine.a.with_name("a.old"))
    machine.b.rename(machine.a)
    one, other = machine.a.with_name("a.old"), machine.a
    if left == "switched":
        machine.goes_on(other, left)
        assert "was superseded by a switch" in machine.refusal(one)
        machine.goes_on(other, left)
    elif left == "alone":
        machine.goes_on(one, left)
    else:
        assert "is the other half of a mirror" in machine.refusal(other)


@pytest.mark.parametrize("left", LEFT)
def test_grown(machine: Machine, left: str) -> None:
    """What was mirrored shows the guest the size that it knows, until a resize."""
    machine.leave(left)
    disk = machine.current(left)
    with disk.open("r+b") as file:
        file.truncate(2 * SIZE)
    with machine.serve(disk) as opened:
        assert opened.shape.capacity_bytes == (2 * SIZE if left == "alone" else SIZE)


@pytest.mark.parametrize("left", LEFT)
def test_written_to_by_somebody_else(machine: Machine, left: str) -> None:
    """Or rolled back in place. It is noticed: everything is copied."""
    machine.monkeypatch.setattr(heartbeat, "LANDING_NS", 0)
    machine.leave(left)
    disk = machine.current(left)
    with disk.open("r+b") as file:
        file.write(b"somebody else")
    machine.goes_on(disk, left, bits=False)


def test_shrunk(machine: Machine) -> None:
    machine.leave("switched")
    with machine.b.open("r+b") as file:
        file.truncate(SIZE // 2)
    with pytest.raises(DiskError, match=r"has 2097152 bytes, and the guest's disk has had 4194304"):
        machine.refusal(machine.b)


# ---- another file ------------------------------------------------------------------


@pytest.mark.parametrize("left", LEFT)
def test_a_backup_restored_at_the_current_disks_path(machine: Machine, left: str) -> None:
    machine.leave(left)
    disk = machine.current(left)
    replaced_by(disk, b"old".ljust(SIZE))
    if left == "alone":
        return machine.goes_on(disk, left)
    question = machine.refusal(disk)
    assert "is not the disk that was there" in question and "--promote" in question
    if left in MIRRORED:
        assert OFFERS[left] in question
        assert (f"--blk-file {machine.b} --promote" in question) is (left != "copying")
    assert "certainly not the disk" in machine.refusal(disk, Answer.SAME_DISK)
    with machine.serve(disk, Answer.PROMOTE) as opened:
        assert opened.record is not None and opened.record.peer is None
    with machine.serve(disk) as opened:
        assert opened.record is not None and opened.record.current.path == str(disk)
    other = machine.a if left == "switched" else machine.b
    assert "the current disk is" in machine.refusal(other)
    return None


@pytest.mark.parametrize("left", LEFT)
def test_another_file_that_has_its_inode_number(machine: Machine, left: str) -> None:
    """Within one boot, on a file system that has no generations (overlay): it lacks the mark."""
    machine.leave(left)
    disk = machine.current(left)
    with its_inode_again(disk):
        if left == "alone":
            return machine.goes_on(disk, left)
        question = machine.refusal(disk)
        assert "--promote" in question
        if seen(disk).generation is None:
            assert "may be the current disk" in question and "--same-disk" in question
            machine.goes_on(disk, left, Answer.SAME_DISK, bits=left != "ended")
            return machine.goes_on(disk, left, bits=left != "ended")
    return None


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("with_mark", [False, True])
def test_a_copy_beside_it(machine: Machine, left: str, with_mark: bool) -> None:
    """One that took the mark along may be the moved disk, if something is at stake; else it is a new one."""
    machine.leave(left)
    disk, copy = machine.current(left), machine.a.with_name("copy.img")
    copied(disk, copy, with_mark=with_mark)
    asked = with_mark and left != "alone"
    if asked:
        question = machine.refusal(copy)
        assert all(f"--{answer}" in question for answer in Answer)
    with machine.serve(copy, Answer.NEW_DISK if asked else None, bits="others"):
        assert len(machine.records()) == 2
    assert seen(copy).likeness(seen(disk)) is Likeness.OTHER, "it has a mark of its own"
    with machine.serve(copy, bits="others"):
        pass
    machine.goes_on(disk, left, records=2)


def test_a_kill_before_a_new_disk_bears_a_mark_of_its_own(machine: Machine) -> None:
    """The copy still bears the original's, and its own record is found all the same."""
    machine.leave("steady")
    copied(machine.a, copy := machine.a.with_name("copy.img"), with_mark=True)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with machine.monkeypatch.context() as kill, pytest.raises(KeyboardInterrupt):
        kill.setattr(os, "setxattr", killed)
        with machine.serve(copy, Answer.NEW_DISK, bits="others"):
            pass
    assert os.getxattr(copy, identify.MARK_NAME) == os.getxattr(machine.a, identify.MARK_NAME)
    with machine.serve(copy, bits="others"):
        assert len(machine.records()) == 2
    assert seen(copy).likeness(seen(machine.a)) is Likeness.OTHER, "it has a mark of its own"
    machine.goes_on(machine.a, "steady", records=2)


@pytest.mark.parametrize("left", LEFT)
def test_moved_to_another_file_system(machine: Machine, left: str) -> None:
    """By a copy that took the mark along."""
    machine.leave(left)
    disk, moved = machine.current(left), machine.state / "moved.img"
    copied(disk, moved, with_mark=True)
    disk.unlink()
    if left == "alone":
        return machine.goes_on(moved, left, records=2)
    assert "--same-disk" in machine.refusal(moved)
    machine.goes_on(moved, left, Answer.SAME_DISK, bits=False)
    return machine.goes_on(moved, left, bits=False)


def copied(source: Path, target: Path, *, with_mark: bool) -> None:
    shutil.copyfile(source, target)
    if with_mark:
        os.setxattr(target, identify.MARK_NAME, os.getxattr(source, identify.MARK_NAME))


# ---- a disk is lost ----------------------------------------------------------------


@pytest.mark.parametrize("left", MIRRORED)
def test_the_source_is_lost_and_comes_back(machine: Machine, left: str) -> None:
    machine.leave(left)
    away = machine.a.rename(machine.a.with_name("away.img"))
    sentence = machine.refusal(machine.b)
    assert OFFERS[left] in sentence and f"the current disk is {machine.a}" in sentence
    if left == "copying":
        assert "--promote" not in sentence
        assert "no disk to start from" in machine.refusal(machine.b, Answer.PROMOTE)
        return machine.goes_on(away, left)
    assert "--promote" in sentence
    with machine.serve(machine.b, Answer.PROMOTE) as opened:
        assert opened.record is not None and opened.record.epoch == 2
    for name in (away, machine.a):
        back = away.rename(name)
        machine.boot()
        assert "was given up as lost" in machine.refusal(back)
        with machine.serve(machine.b) as opened:
            assert opened.record is not None and opened.record.epoch == 2
        away = back
    with machine.serve(machine.b, Answer.PROMOTE) as opened:
        assert opened.record is not None and opened.record.epoch == 2, "it is current already"
    return None


@pytest.mark.parametrize("left", MIRRORED)
def test_the_destination_is_lost(machine: Machine, left: str) -> None:
    machine.leave(left)
    machine.b.unlink()
    machine.goes_on(machine.a, left)
    replaced_by(machine.b, bytes(SIZE))  # it may have the inode number of the lost one
    sentence = machine.refusal(machine.b)
    assert "the file there now is not the one that was recorded" in sentence or "may be" in sentence
    with its_inode_again(machine.b):
        assert machine.refusal(machine.b)


def test_the_current_disk_is_lost_after_a_switch(machine: Machine) -> None:
    machine.leave("switched")
    machine.b.unlink()
    sentence = machine.refusal(machine.a)
    assert f"add --promote: this one is the disk as of {THEN}" in sentence
    with machine.serve(machine.a, Answer.PROMOTE) as opened:
        assert opened.record is not None and opened.record.epoch == 3
    machine.goes_on(machine.a, "switched")


# ---- a host that numbers its devices anew --------------------------------------------


@pytest.mark.parametrize("left", LEFT)
def test_a_file_system_on_a_device_of_another_number(
    work: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    folder, backing = work / "disks", work / "ext4.img"
    ext4_image(backing)
    machine = Machine(folder / "a.img", folder / "b.img", work / "state", monkeypatch)
    machine.boot()
    with loop_device(backing, 512) as one, loop_device(backing, 512) as other:
        with mounted(folder, one):
            for disk in (machine.a, machine.b):
                create_image(disk, SIZE)
            machine.leave(left)
            before = folder.stat().st_dev
        machine.boot()
        with mounted(folder, other):
            assert folder.stat().st_dev != before
            machine.goes_on(machine.current(left), left)
            if left == "switched":
                assert "was superseded by a switch" in machine.refusal(machine.a)


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has neither names nor generations nor attributes."""
    monkeypatch.setattr(identify, "file_system", lambda *_: None)
    monkeypatch.setattr(identify, "_generation", lambda *_: None)
    monkeypatch.setattr(identify, "read_mark", lambda *_: None)
    monkeypatch.setattr(identify, "with_mark", lambda _fd, disk, _mark: disk)


@pytest.mark.alone
@pytest.mark.usefixtures("nameless")
@pytest.mark.parametrize("left", LEFT)
def test_two_file_systems_without_a_name_that_changed_places(
    work: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Device and inode of the one are what the other had: where something is at stake nobody guesses."""
    tries = (work / f"{number}" for number in range(20))  # others may mount something meanwhile
    if not any(changed_places(folder, monkeypatch, left) for folder in tries):
        pytest.skip("the kernel gave the two file systems other numbers, time after time")


def changed_places(work: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> bool:
    """False: the kernel gave the two file systems other numbers, so nothing was looked at."""
    one, two = work / "one", work / "two"
    work.mkdir()
    machine = Machine(one / "d.img", two / "d.img", work / "state", monkeypatch)
    machine.boot()
    with two_mounted(one, two):
        for disk in (machine.a, machine.b):
            create_image(disk, SIZE)
        numbers = [(each.stat().st_dev, each.stat().st_ino) for each in (machine.b, machine.a)]
        machine.leave(left)
    machine.boot()
    with two_mounted(two, one):
        for disk in (machine.a, machine.b):
            create_image(disk, SIZE)
        if numbers != [(each.stat().st_dev, each.stat().st_ino) for each in (machine.a, machine.b)]:
            return False
        disk = machine.current(left)
        if left == "alone":
            machine.goes_on(disk, left)
            return True
        assert "--same-disk" in machine.refusal(disk)
        other = machine.a if left == "switched" else machine.b
        assert "--same-disk" in (question := machine.refusal(other)) or "--promote" in question
        machine.goes_on(disk, left, Answer.SAME_DISK, bits=left != "ended")
        machine.goes_on(disk, left, bits=left != "ended")
    return True


@contextmanager
def two_mounted(first: Path, second: Path) -> Iterator[None]:
    with mounted(first, "-t", "tmpfs", "tmpfs"), mounted(second, "-t", "tmpfs", "tmpfs"):
        yield


@contextmanager
def two_loops(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """On the files a and b."""
    for file in (work / "a", work / "b"):
        create_image(file, SIZE)
    with loop_device(work / "a") as a, loop_device(work / "b") as b:
        machine = Machine(a, b, work / "state", monkeypatch)
        machine.boot()
        yield machine


@pytest.mark.alone
@pytest.mark.parametrize("left", LEFT)
def test_loop_devices_in_another_order(work: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    """A block device is what lies beneath it or names itself."""
    with two_loops(work, monkeypatch) as machine:
        machine.leave(left)
    machine.boot()
    with loop_device(work / "b") as b, loop_device(work / "a") as a:
        machine.a, machine.b = a, b
        disk = machine.current(left)
        with machine.serve(disk) as opened:
            assert opened.record is not None and opened.record.current.path == str(disk)
            assert opened.record.peer is None or opened.record.doubt == DOUBT
        if left == "switched":
            assert "was superseded by a switch" in machine.refusal(a)
        elif left != "alone":
            assert "is the other half of a mirror" in machine.refusal(b)


@pytest.mark.parametrize("left", LEFT)
def test_a_block_device_that_does_not_name_itself(
    work: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setattr(identify, "_loop_file", lambda _device: None)
    monkeypatch.setattr(identify, "lasting_place", lambda _device, _path: None)
    with two_loops(work, monkeypatch) as machine:
        machine.leave(left)
        disk = machine.current(left)
        machine.goes_on(disk, left)
        machine.boot()
        if left == "alone":
            return machine.goes_on(disk, left)
        assert "--same-disk" in machine.refusal(disk)
        machine.goes_on(disk, left, Answer.SAME_DISK)
        return machine.goes_on(disk, left)
