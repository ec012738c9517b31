# SPDX-License-Identifier: Apache-2.0
"""`vhostsync record` without any backend: which disk it calls good, and which command comes next."""

import fcntl
import os
import re
import threading
import time
from pathlib import Path

import pytest

from tests.sizes import MIB
from tests.unit.test_disks import opened
from vhostsync.errors import StateRecordError
from vhostsync.host.flocks import lock_holder
from vhostsync.record import record_report
from vhostsync.record.record_report import (
    advise,
    find,
    forget,
    good_copy,
    linked_socket,
    report,
    socket_by_command,
)
from vhostsync.record.state_file import backend_link
from vhostsync.record.state_index import open_state_file
from vhostsync.record.state_record import StateRecord, Worth
from vhostsync.storage import signatures
from vhostsync.storage.condition import Condition, Look
from vhostsync.storage.file import create_image
from vhostsync.storage.identify import identify
from vhostsync.storage.identity import DiskIdentity
from vhostsync.storage.local import look_here
from vhostsync.storage.look import look

THERE, GONE = Look(Condition.THERE), Look(Condition.MISSING)
DEAD = Look(Condition.FAILING, "Input/output error")


def recorded(folder: Path, worth: Worth | None, since: str | None = None) -> tuple[Path, StateRecord]:
    """A record of a.img, and of b.img if it has a worth."""
    for name in ("a.img", "b.img"):
        if not (folder / name).exists():
            create_image(folder / name, MIB)
    one, other = (seen(folder / name) for name in ("a.img", "b.img"))
    record = StateRecord.first(one)
    if worth is not None:
        record = record.with_peer(other).with_worth(worth, since)
    with open_state_file(None, one, lock_timeout_s=0, directory=folder / "state") as file:
        file.change(record)
        return file.path, record


def seen(path: Path) -> DiskIdentity:
    fd = os.open(path, os.O_RDONLY)
    try:
        return identify(fd, path)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("worth", "current", "peer", "words", "command"),
    [
        (Worth.UP_TO_DATE, THERE, THERE, "start with the current disk", "a.img"),
        (Worth.UP_TO_DATE, GONE, THERE, "lacks nothing that was flushed", "b.img --promote"),
        (Worth.UP_TO_DATE, DEAD, THERE, "lacks nothing that was flushed", "b.img --promote"),
        (Worth.OUTDATED, DEAD, THERE, "as of 2026-01-01, without what", "b.img --promote"),
        (Worth.INCONSISTENT, DEAD, THERE, "of no use", "BACKUP --promote"),
        (Worth.UP_TO_DATE, DEAD, GONE, "bring back .*b.img, which is up to date", "b.img --promote"),
        (None, GONE, None, "promote a backup", "BACKUP --promote"),
        (Worth.OUTDATED, Look(Condition.UNSURE), THERE, "is the one", "a.img --same-disk"),
        (None, Look(Condition.THERE, users=("locked by qemu (pid 7)",)), None, "end what uses", "a.img"),
    ],
)
def test_what_comes_next(
    tmp_path: Path, worth: Worth | None, current: Look, peer: Look | None, words: str, command: str
) -> None:
    _, record = recorded(tmp_path, worth, "2026-01-01" if worth is Worth.OUTDATED else None)
    found = advise(tmp_path, record, current, peer, None)
    assert re.search(words, found.text), found.text
    assert " ".join(found.command).endswith(command)
    assert found.command[:3] == ("vhostsync", "serve", "--blk-file")


def test_a_look_at_disks_as_they_are(tmp_path: Path) -> None:
    _, record = recorded(tmp_path, Worth.UP_TO_DATE)
    path = tmp_path / "a.img"
    assert look(record.current) == THERE
    disk = opened(path)
    assert look_here(record.current).users[0].startswith("locked by ")
    disk.close()
    path.rename(tmp_path / "moved")
    assert look(record.current) == GONE
    create_image(path, MIB)
    assert look(record.current).condition is Condition.OTHER
    path.unlink()
    path.mkdir()
    assert look(record.current).condition is Condition.FAILING


def test_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = recorded(tmp_path, Worth.UP_TO_DATE)

    def fail(fd: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(signatures, "read_block", fail)
    assert look(record.current) == DEAD
    monkeypatch.setattr(signatures, "read_block", lambda fd, offset: time.sleep(60))
    began = time.monotonic()
    assert look(record.current, 0.2).reason == "no answer within 0.2 s"
    assert time.monotonic() - began < 30


def test_a_record_is_found_by_disk_name_directory_and_by_itself(tmp_path: Path) -> None:
    path, _ = recorded(tmp_path, Worth.UP_TO_DATE)
    state = tmp_path / "state"
    for where in (None, state, path, tmp_path / "a.img", tmp_path / "b.img"):
        assert find(None if where is None else str(where), state) == [path]
    (tmp_path / "b.img").rename(tmp_path / "renamed.img")
    (tmp_path / "a.img").unlink()
    assert find(f"{tmp_path}/renamed.img", state) == find(f"{tmp_path}/a.img", state) == [path]
    assert find(f"{tmp_path}/other.img", state) == []
    assert find(None, tmp_path / "nowhere") == []


def test_a_start_whose_disk_is_gone_is_told_where_the_data_is(tmp_path: Path) -> None:
    path, _ = recorded(tmp_path, Worth.UP_TO_DATE)
    assert good_copy(f"{tmp_path}/a.img", [path]) is None, "it is there"
    (tmp_path / "a.img").unlink()
    words = good_copy(f"{tmp_path}/a.img", [tmp_path / "no.record.json", path])
    assert words is not None and f"vhostsync serve --blk-file {tmp_path}/b.img --promote" in words
    assert good_copy(f"{tmp_path}/x.img", [path]) is None


def test_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = recorded(tmp_path, Worth.OUTDATED, "2026-01-01")
    found = report(path)
    assert found is not None and found.good is not None and found.good.path == str(tmp_path / "a.img")
    text = record_report.in_text(found)
    assert f"Current      {tmp_path}/a.img: there\n" in text
    assert "it is the disk as of 2026-01-01, without what the guest wrote since" in text
    assert record_report.in_json(found)["other"]["outdated-since"] == "2026-01-01"
    path.write_bytes(path.read_bytes().replace(b'"epoch": 1', b'"epoch": 2'))
    assert record_report.run(str(path), as_json=False, remove=False) == 1
    assert "is damaged" in capsys.readouterr().err


def test_who_holds_the_records_lock(tmp_path: Path) -> None:
    path, _ = recorded(tmp_path, None)
    lock = Path(f"{path}.lock")
    assert lock_holder(lock) is None
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock_holder(lock) == os.getpid()
        with pytest.raises(StateRecordError, match="in use by another process"):
            forget(path)
    assert path.exists()


def test_where_the_backend_of_a_record_listens(tmp_path: Path) -> None:
    """As it says itself, whatever its command line is; that of this process names no control socket."""
    path, record = recorded(tmp_path, None)
    disk, control = record.current, tmp_path / "a place" / "control"
    with open_state_file(None, disk, lock_timeout_s=0, directory=tmp_path / "state") as file:
        file.tell_backend(control)
        found = report(path, lambda _: THERE)
        assert found is not None
        assert found.advice.command == ("vhostsync", "status", "--control", str(control))
        left = backend_link(path).readlink()
    assert not backend_link(path).is_symlink()
    backend_link(path).symlink_to(left)  # by one that was killed
    with open_state_file(None, disk, lock_timeout_s=0, directory=tmp_path / "state") as file:
        file.tell_backend(None)
        assert (linked_socket(path), socket_by_command(os.getpid())) == (None, None)
        backend_link(path).write_text("of somebody else")
        file.tell_backend(control)
    assert backend_link(path).read_text() == "of somebody else"


def test_a_record_that_is_forgotten(tmp_path: Path) -> None:
    path, _ = recorded(tmp_path, Worth.UP_TO_DATE)
    state = tmp_path / "state"
    assert len(list(state.iterdir())) == 4
    with Path(f"{path}.lock").open("rb") as former:
        forget(path)
        assert list(state.iterdir()) == []
        # Who waited for the lock meanwhile has one that nobody else looks at.
        fcntl.flock(former, fcntl.LOCK_EX)
        _, record = recorded(tmp_path, None)
    assert record.epoch == 1


def test_what_is_called_as_the_link_to_a_backend_and_is_none_stays(tmp_path: Path) -> None:
    """The record of another disk, say, or a link to it."""
    for number, is_link in enumerate((False, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, record = recorded(folder, None)
        other = folder / "another.record.json" if is_link else backend_link(path)
        other.write_text("of another disk")
        if is_link:
            backend_link(path).symlink_to(other)
        with open_state_file(None, record.current, lock_timeout_s=0, directory=folder / "state") as file:
            file.tell_backend(folder / "control")
        forget(path)
        assert not path.exists()
        assert backend_link(path).read_text() == "of another disk"


def test_a_start_that_waited_for_the_lock_of_a_forgotten_record_takes_the_new_one(tmp_path: Path) -> None:
    path, _ = recorded(tmp_path, None)
    lock = Path(f"{path}.lock")
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        got: list[bool] = []

        def start() -> None:
            with open_state_file(None, seen(tmp_path / "a.img"), lock_timeout_s=30, directory=path.parent):
                got.append(lock.exists() and lock_holder(lock) is not None)

        waiting = threading.Thread(target=start)
        waiting.start()
        while not any(str(lock) in str(each.resolve()) for each in Path("/proc/self/fd").glob("*")):
            time.sleep(0.01)
        lock.unlink()
    waiting.join()
    assert got == [True]
