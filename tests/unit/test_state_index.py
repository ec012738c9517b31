# SPDX-License-Identifier: Apache-2.0
"""Either disk of a lineage finds its record, whatever it is called by now."""

from collections.abc import Hashable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.disk_fakes import A, B, C, CrashError, VolatileFileSystem
from vhostsync.errors import DamagedRecordError, StateRecordError
from vhostsync.option_values import Answer
from vhostsync.record import files as record_files
from vhostsync.record.files import RealFileSystem
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_index import Index, default_directory, open_state_file
from vhostsync.record.state_record import StateRecord, Worth, encode_checked
from vhostsync.record.who_may_serve import check_start
from vhostsync.storage.identity import DiskIdentity


def start(directory: Path, identity: DiskIdentity) -> tuple[StateFile, StateRecord | None]:
    """As `serve` does it."""
    state_file = open_state_file(None, identity, lock_timeout_s=0, directory=directory)
    try:
        record = state_file.load()
        return state_file, None if record is None else check_start(record, identity, state_file.path)
    except BaseException:
        state_file.close()
        raise


def run(
    directory: Path, source: DiskIdentity, destination: DiskIdentity, *, keep: bool = False
) -> StateRecord:
    """Serves the source, mirrors and switches to the destination."""
    state_file, record = start(directory, source)
    with state_file:
        record = record or StateRecord.first(source)
        state_file.change(record)
        record = record.with_peer(destination)
        state_file.change(record)
        record = record.with_worth(Worth.UP_TO_DATE).switched(keep_mirror=keep)
        state_file.change(record)
    return record


def test_the_record_is_found_from_either_disk(tmp_path: Path) -> None:
    record = run(tmp_path, A, B)
    with pytest.raises(StateRecordError, match=r"--blk-file /disks/b"):
        start(tmp_path, A)
    state_file, found = start(tmp_path, B)
    state_file.close()
    assert found == record


def test_nothing_accumulates(tmp_path: Path) -> None:
    """A switch that is cut off may forget what it has prepared, any number of times."""
    with start(tmp_path, A)[0] as state_file:
        state_file.change(StateRecord.first(A).with_peer(B))
        for _ in range(20):
            state_file.prepare(StateRecord.first(C))
            state_file.announce(StateRecord.first(A), StateRecord.first(B))
        assert len(list(tmp_path.glob("*.new*"))) == 1
        state_file.change(StateRecord.first(A))
        assert not list(tmp_path.glob("*.new*"))


def test_failback_through_the_index(tmp_path: Path) -> None:
    run(tmp_path, A, B)
    record = run(tmp_path, B, A)
    assert record.epoch == 3
    with pytest.raises(StateRecordError, match=r"--blk-file /disks/a"):
        start(tmp_path, B)
    start(tmp_path, A)[0].close()
    assert len(list(tmp_path.glob("*.record.json"))) == 1


def test_a_renamed_superseded_disk_is_still_refused(tmp_path: Path) -> None:
    run(tmp_path, A, B)
    with pytest.raises(StateRecordError, match=r"--blk-file /disks/b"):
        start(tmp_path, replace(A, path="/elsewhere/x"))


def test_a_renamed_current_disk_finds_its_record(tmp_path: Path) -> None:
    record = run(tmp_path, A, B)
    renamed = replace(B, path="/elsewhere/x")
    state_file, found = start(tmp_path, renamed)
    state_file.close()
    assert found == replace(record, current=renamed)


def test_a_superseded_disk_is_refused_although_the_current_one_has_taken_its_name(tmp_path: Path) -> None:
    record = run(tmp_path, A, B)
    old, current = replace(A, path="/disks/a.old"), replace(B, path=A.path)
    for _ in range(2):
        state_file, found = start(tmp_path, current)
        with state_file:
            assert found == replace(record, current=current)
            state_file.change(found)
        with pytest.raises(StateRecordError, match="superseded"):
            start(tmp_path, old)


def test_the_old_disk_renamed_to_the_current_path_is_refused(tmp_path: Path) -> None:
    run(tmp_path, A, B)
    with pytest.raises(StateRecordError, match="superseded"):
        start(tmp_path, replace(A, path=B.path))


def test_other_disks_have_other_records(tmp_path: Path) -> None:
    run(tmp_path, A, B)
    state_file, found = start(tmp_path, C)
    state_file.close()
    assert found is None
    same_name = replace(C, path="/other/a", inode=77)
    other, found = start(tmp_path, same_name)
    other.close()
    assert found is None and other.path != state_file.path


def test_a_disk_overwritten_by_another_lineage_belongs_to_that(tmp_path: Path) -> None:
    run(tmp_path, A, B)
    record = run(tmp_path, C, replace(A, path="/symlink/to/a"))
    state_file, found = start(tmp_path, A)
    state_file.close()
    assert found == replace(record, current=A)
    start(tmp_path, B)[0].close()


def test_a_record_that_is_missing_is_no_licence_to_serve(tmp_path: Path) -> None:
    """Both disks would be served. A record of one disk alone takes nothing with it."""
    run(tmp_path, A, B)
    (record,) = tmp_path.glob("*.record.json")
    record.rename(tmp_path / "kept")
    for disk in (A, B):
        with pytest.raises(StateRecordError, match=r"is missing.*restore it or.*--promote"):
            start(tmp_path, disk)
    with open_state_file(None, B, lock_timeout_s=0, directory=tmp_path, answer=Answer.PROMOTE) as promoted:
        assert promoted.path == record and promoted.load() is None
        promoted.change(StateRecord.first(B))
    with pytest.raises(StateRecordError, match="does not know /disks/a"):
        start(tmp_path, A)

    with start(tmp_path, C)[0] as alone:
        alone.change(StateRecord.first(C))
        alone.change(StateRecord.first(C))
        alone.path.unlink()
    start(tmp_path, C)[0].close()


def test_a_damaged_record_does_not_stand_in_the_way_of_what_its_refusal_advises(tmp_path: Path) -> None:
    """Also where a backup has taken the current disk's place, and no pointer is certainly its own."""
    state_file, _ = start(tmp_path, A)
    with state_file:
        state_file.change(StateRecord.first(A).with_peer(B))
        path = state_file.path
    path.write_bytes(path.read_bytes()[:-20])
    backup = replace(A, inode=999)
    for answer in (None, Answer.PROMOTE):
        with open_state_file(None, backup, lock_timeout_s=0, directory=tmp_path, answer=answer) as found:
            assert found.path == path
            with pytest.raises(DamagedRecordError, match="--promote"):
                found.load()


def test_the_damaged_pointer_of_this_disk_is_refused_and_others_are_passed_over(tmp_path: Path) -> None:
    run(tmp_path, A, B)
    next(tmp_path.glob("a-*.disk.json")).write_text("{")
    with pytest.raises(StateRecordError, match=r"a-\w+\.disk\.json.*is damaged"):
        start(tmp_path, A)
    start(tmp_path, B)[0].close()


def test_the_running_backend_keeps_its_record(tmp_path: Path) -> None:
    run(tmp_path, A, B)
    with start(tmp_path, B)[0], pytest.raises(StateRecordError, match="in use"):
        start(tmp_path, A)


def test_an_explicit_state_file_gets_its_directory(tmp_path: Path) -> None:
    with open_state_file(tmp_path / "x" / "y" / "record", A, lock_timeout_s=0) as state_file:
        state_file.change(StateRecord.first(A))
    assert (tmp_path / "x" / "y" / "record").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(StateRecordError, match="--no-state-file"):
        open_state_file(tmp_path / "x" / "y" / "record", A, lock_timeout_s=0)


@pytest.mark.parametrize(
    ("environment", "user", "expected"),
    [
        ({"STATE_DIRECTORY": "/var/lib/private/v:/x", "HOME": "/h"}, 0, "/var/lib/private/v"),
        ({"HOME": "/root"}, 0, "/var/lib/vhostsync"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/s"}, 5, "/s/vhostsync"),
        ({"HOME": "/h", "XDG_STATE_HOME": "relative"}, 5, "/h/.local/state/vhostsync"),
        ({"HOME": "/h"}, 5, "/h/.local/state/vhostsync"),
    ],
)
def test_the_default_directory(environment: dict[str, str], user: int, expected: str) -> None:
    assert default_directory(environment, user) == Path(expected)


@given(st.data())
def test_a_crash_anywhere_in_a_switch_lets_exactly_the_recorded_disk_serve(data: st.DataObject) -> None:
    """The whole sequence with the index: whatever step the power goes at, one of the two disks may serve, the
    other is refused or was never mentioned, and after the commit it is the new one."""
    files = VolatileFileSystem()
    directory = Path("/state")

    def opened(identity: DiskIdentity) -> StateFile:
        index = Index(directory, files)
        path = index.record_of(identity)
        return StateFile(path, files=files, before_write=lambda record: index.point(record, path))

    def may_serve(identity: DiskIdentity) -> bool:
        record = opened(identity).load()
        try:
            return record is None or check_start(record, identity).current == identity
        except StateRecordError:
            return False

    switched = attached = False
    files.steps_left = data.draw(st.integers(0, 60), label="steps to the crash")
    try:
        state_file = opened(A)
        record = StateRecord.first(A).with_peer(B)
        state_file.change(record)
        attached = True
        prepared = state_file.prepare(record.with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False))
        prepared.settle()
        switched = True
    except CrashError:
        pass
    files.power_cut(data)
    serving = {identity.path for identity in (A, B) if may_serve(identity)}
    if switched:
        assert serving == {B.path}
    elif attached:
        assert serving in ({A.path}, {B.path})
    else:
        assert A.path in serving


class CountedFiles(RealFileSystem):
    def __init__(self) -> None:
        self.read_names: list[str] = []

    def read_version(self, path: Path) -> tuple[bytes, Hashable]:
        self.read_names.append(path.name)
        return super().read_version(path)


def test_a_pointer_is_read_again_only_once_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node has thousands of them, and each start looks at all of them several times."""

    def seen() -> tuple[list[Path], list[str]]:
        files = CountedFiles()
        return [pointer.path for pointer in Index(tmp_path, files).pointers()], files.read_names

    run(tmp_path, A, B)
    names = sorted(path.name for path in tmp_path.glob("*.disk.json"))
    paths = [tmp_path / name for name in names]
    monkeypatch.setattr(record_files, "SETTLED_NS", 1 << 60)
    assert seen() == (paths, names)
    assert seen() == (paths, names), "changed just now, they may do so again within a tick of the clock"
    monkeypatch.setattr(record_files, "SETTLED_NS", 0)
    assert seen() == (paths, names)
    assert seen() == (paths, [])
    text = paths[0].read_bytes()
    paths[0].unlink()
    assert seen() == (paths[1:], [])
    paths[0].write_bytes(text)
    assert seen() == (paths, names[:1])
    (tmp_path / names[1]).write_bytes(b"damaged")
    assert seen() == (paths[:1], names[1:])
    assert seen() == (paths[:1], names[1:]), "what is damaged is looked at each time"


class SwitchedLink(RealFileSystem):
    """The link leads elsewhere between the look at it and the reading, and back afterwards."""

    def __init__(self, link: Path, elsewhere: Path) -> None:
        self._link, self._elsewhere = link, elsewhere

    def versions(self, path: Path, suffix: str) -> dict[str, Hashable]:
        found = super().versions(path, suffix)
        self._home = self._link.readlink()
        self._link.unlink()
        self._link.symlink_to(self._elsewhere)
        return found

    def read_version(self, path: Path) -> tuple[bytes, Hashable]:
        try:
            return super().read_version(path)
        finally:
            self._link.unlink()
            self._link.symlink_to(self._home)


def test_what_is_known_of_a_pointer_is_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_files, "SETTLED_NS", 0)
    place, targets = tmp_path / "state", tmp_path / "targets"
    place.mkdir()
    targets.mkdir()
    run(targets, A, B)
    home, elsewhere = sorted(targets.glob("*.disk.json"))
    link = place / home.name
    link.symlink_to(home)
    [misled] = Index(place, SwitchedLink(link, elsewhere)).pointers()
    [found] = Index(place, RealFileSystem()).pointers()
    assert (misled.disk.path, found.disk.path) == (B.path, A.path)


@pytest.mark.parametrize("name", ["", "..", "/", "a\0b", 7, None])
def test_a_pointer_that_names_no_record_is_damaged(tmp_path: Path, name: object) -> None:
    body = {"disk": asdict(A), "record": name, "kept": False}
    (tmp_path / "odd.disk.json").write_bytes(encode_checked("state-pointer", body))
    assert Index(tmp_path, RealFileSystem()).pointers() == []
