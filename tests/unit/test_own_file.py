# SPDX-License-Identifier: Apache-2.0
"""What lies at a path that is written to and is not of this program stays as it is, byte for byte."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.sizes import MIB
from tests.unit.disk_fakes import A, B
from vhostsync.config import ServeConfig
from vhostsync.engine.engine import bitmap_file_bytes
from vhostsync.errors import BitmapError, ConfigError, DamagedRecordError, DiskError, StateRecordError
from vhostsync.host.own_file import ForeignFileError, beginning, remove_leftover
from vhostsync.record.bitmap import KIND, BitmapFile, Shape
from vhostsync.record.state_file import MARK_BYTES, StateFile
from vhostsync.record.state_index import open_state_file
from vhostsync.record.state_record import StateRecord, encode_checked, encode_record
from vhostsync.storage import local as disks
from vhostsync.storage.native import probe

SHAPE = Shape(16 * MIB, 65536, 4 * MIB, 1024)
RECORD = encode_record(StateRecord.first(A))


def sector_disk(path: Path) -> None:
    path.write_bytes(bytes(510) + b"\x55\xaa" + os.urandom(MIB))


def qcow2(path: Path) -> None:
    path.write_bytes(b"QFI\xfb" + bytes(MIB))


def empty_disk(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(16 * MIB)


def process_id(path: Path) -> None:
    path.write_text("12345\n")


def link_to_a_disk(path: Path) -> None:
    sector_disk(path.with_name("behind the link"))
    path.symlink_to(path.with_name("behind the link"))


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


FOREIGN: list[tuple[Callable[[Path], object], str]] = [
    (sector_disk, "a disk with a boot sector of 1.0 MiB"),
    (qcow2, "a qcow2 image of 1.0 MiB"),
    (empty_disk, "a file of 16.0 MiB of zeros"),
    (process_id, "a file of 6 B of unknown content"),
    (Path.mkdir, "a directory"),
    (os.mkfifo, "a FIFO"),
    (unix_socket, "a socket"),
]
foreign = pytest.mark.parametrize(("make", "what"), FOREIGN)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[path.name] = (status.st_ino, path.read_bytes() if path.is_file() else b"")
    return found


@contextmanager
def untouched(folder: Path, *but: str) -> Iterator[None]:
    before = content(folder)
    yield
    after = content(folder)
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) <= set(but)


# ---- the state record -------------------------------------------------------------


def test_a_start_removes_nobody_elses_file(tmp_path: Path) -> None:
    for name in ("vm.newer.img", "vm.new1-1", "vm.new.img", "vm.news"):
        sector_disk(tmp_path / name)
    with untouched(tmp_path, "vm", "vm.lock"), open_state_file(tmp_path / "vm", A, lock_timeout_s=0) as file:
        file.change(StateRecord.first(A))
        file.prepare(StateRecord.first(B)).discard()


@pytest.mark.parametrize("left", [b"", bytes(700), RECORD[:9], RECORD[:300] + bytes(400), RECORD])
def test_what_a_crash_has_left_is_removed(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "vm.new").write_bytes(left)
    with open_state_file(tmp_path / "vm", A, lock_timeout_s=0):
        assert not (tmp_path / "vm.new").exists()


@foreign
@pytest.mark.parametrize("name", ["vm.new", "vm.lock"])
def test_a_name_that_is_taken_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object], what: str
) -> None:
    make(tmp_path / name)
    with untouched(tmp_path, "vm.lock"), pytest.raises(StateRecordError, match=f"{name}.*{what}.*left alone"):
        open_state_file(tmp_path / "vm", A, lock_timeout_s=0)


@pytest.mark.parametrize("name", ["vm.new", "vm.lock"])
def test_a_link_at_a_name_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    link_to_a_disk(tmp_path / name)
    with untouched(tmp_path, "vm.lock"), pytest.raises(StateRecordError, match="is a symbolic link"):
        open_state_file(tmp_path / "vm", A, lock_timeout_s=0)


def test_what_takes_the_name_later_is_left_alone(tmp_path: Path) -> None:
    with open_state_file(tmp_path / "vm", A, lock_timeout_s=0) as file:
        file.change(StateRecord.first(A))
        sector_disk(tmp_path / "vm.new")
        with untouched(tmp_path), pytest.raises(StateRecordError, match="cannot be written: it is a disk"):
            file.change(StateRecord.first(B))


def test_a_disk_is_no_record_and_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "vm").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(StateRecordError, match=r"cannot be read: it is a file of 4[.]0 TiB of zeros"):
        StateFile(tmp_path / "vm").load()


def test_what_is_no_record_is_not_called_a_damaged_one(tmp_path: Path) -> None:
    """A damaged one may be replaced, on the operator's word (--promote)."""
    path = tmp_path / "notes"
    path.write_text("12345\n")
    with pytest.raises(StateRecordError, match=r"notes is no state record: it is .*move it away") as refused:
        StateFile(path).load()
    assert not isinstance(refused.value, DamagedRecordError)


@pytest.mark.parametrize("text", [b"", bytes(17), bytes(MARK_BYTES), b"\7" * 8 + bytes(MARK_BYTES - 8)])
def test_a_lock_of_ours_is_taken(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "vm.lock").write_bytes(text)
    with open_state_file(tmp_path / "vm", A, lock_timeout_s=0):
        assert (tmp_path / "vm.lock").read_bytes() == text.ljust(MARK_BYTES, b"\0")


def test_the_record_behind_a_link_is_the_record(tmp_path: Path) -> None:
    real, link = tmp_path / "safe" / "vm", tmp_path / "vm"
    link.symlink_to(real)
    for record in (StateRecord.first(A), StateRecord.first(B)):  # the first time it leads nowhere yet
        with open_state_file(link, A, lock_timeout_s=0) as file:
            file.change(record)
            with pytest.raises(StateRecordError, match="in use by another process"):
                open_state_file(real, A, lock_timeout_s=0)
        assert link.is_symlink() and StateFile(real).load() == StateFile(link).load() == record


def test_a_leftover_is_known_by_how_it_begins(tmp_path: Path) -> None:
    for kind in ("state-record", "state-pointer", KIND):
        assert encode_checked(kind, {}).startswith(beginning(kind))
    path = tmp_path / "x"
    path.write_bytes(encode_checked(KIND, {}))
    with pytest.raises(ForeignFileError, match="a dirty bitmap"):
        remove_leftover(path, "state-")


# ---- the bitmap --------------------------------------------------------------------


def bitmap(path: Path, record: StateRecord | None = None) -> BitmapFile:
    return BitmapFile.open(path, SHAPE, bitmap_file_bytes(SHAPE), record)


@foreign
def test_a_bitmap_is_made_of_nothing_else(tmp_path: Path, make: Callable[[Path], object], what: str) -> None:
    make(tmp_path / "bits")
    with untouched(tmp_path), pytest.raises(BitmapError, match=f"bits is no dirty bitmap: it is {what}"):
        bitmap(tmp_path / "bits")


def test_nor_of_what_a_link_leads_to(tmp_path: Path) -> None:
    link_to_a_disk(tmp_path / "bits")
    with untouched(tmp_path), pytest.raises(BitmapError, match="a disk with a boot sector"):
        bitmap(tmp_path / "bits")


@pytest.mark.parametrize("kind", ["state-record", "state-pointer"])
def test_nor_of_another_file_of_ours(tmp_path: Path, kind: str) -> None:
    (tmp_path / "bits").write_bytes(encode_checked(kind, {}))
    with untouched(tmp_path), pytest.raises(BitmapError, match=r"is no dirty bitmap: it is a .*state record"):
        bitmap(tmp_path / "bits")


@pytest.mark.parametrize("text", [None, b"", bytes(4096), encode_checked(KIND, {})])
def test_a_bitmap_is_made_where_nothing_is_lost(tmp_path: Path, text: bytes | None) -> None:
    path = tmp_path / "bits"
    if text is not None:
        path.write_bytes(text)
    bitmap(path).close(clean=False)
    assert path.stat().st_size == bitmap_file_bytes(SHAPE)
    bitmap(path).close(clean=False)


def test_one_that_was_just_being_made_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room for the bits is had after the file can be known."""

    def full(fd: int, at: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(BitmapError, match="No space left"):
            bitmap(tmp_path / "bits")
    bitmap(tmp_path / "bits").close(clean=False)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_the_disk_that_is_served_is_no_bitmap(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """Not even one that begins like a bitmap: it is locked."""
    disk = tmp_path / "a.img"
    disk.write_bytes(encode_checked(KIND, {}).ljust(MIB, b"\0"))
    link(disk, tmp_path / "bits")
    with closing(disks.open_disk(disk, read_only=False, cache="writeback", lock_timeout_s=0, probe=probe)):
        for name in ("a.img", "bits"):
            with untouched(tmp_path), pytest.raises(BitmapError, match="or as a disk"):
                bitmap(tmp_path / name)


def test_a_bitmap_that_is_used_is_no_disk(tmp_path: Path) -> None:
    file = bitmap(tmp_path / "bits")
    with untouched(tmp_path), pytest.raises(DiskError, match="in use"):
        disks.open_disk(
            tmp_path / "bits", read_only=False, cache="writeback", lock_timeout_s=0, probe=probe
        )
    file.close(clean=False)


# ---- names that meet ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bitmap": "a"}, "--bitmap and --blk-file"),
        ({"state_file": "a"}, "--state-file and --blk-file"),
        ({"state_file": "s"}, "--state-file and --socket-path"),
        ({"state_file": "r", "bitmap": "r.lock"}, "the file .lock of --state-file and --bitmap"),
        ({"state_file": "r", "blk_file": "r.new"}, "the file .new of --state-file and --blk-file"),
        ({"state_file": "r", "bitmap": "r.backend"}, "the file .backend of --state-file and --bitmap"),
        ({"blk_file": "s.control"}, "--blk-file and --control"),
    ],
)
def test_one_path_for_two_purposes_is_refused(options: dict[str, str], named: str) -> None:
    paths = {"blk_file": "a", "socket_path": "s", **options}
    with pytest.raises(ConfigError, match=f"{named} both name"):
        disk = f"/x/{paths.pop('blk_file')}"
        ServeConfig(blk_file=disk, **{name: Path("/x") / path for name, path in paths.items()})  # type: ignore[arg-type]
