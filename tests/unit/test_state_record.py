# SPDX-License-Identifier: Apache-2.0
"""The state record: which disk may serve, and that a crash at any step leaves the old record or the new
one."""

import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostsync.errors import StateRecordError
from vhostsync.state_file import RealFileSystem, StateFile
from vhostsync.state_index import default_directory, open_state_file
from vhostsync.state_record import (
    SUPERSEDED_MAX,
    DiskIdentity,
    Likeness,
    StateRecord,
    Wanted,
    Worth,
    check_start,
    decode_record,
    encode_checked,
    encode_record,
)


def disk(
    name: str, inode: int = 0, *, generation: int | None = None, ctime_ns: int | None = None
) -> DiskIdentity:
    number = inode or sum(name.encode())
    return DiskIdentity(f"/disks/{name}", "file", 7, number, 1 << 30, ctime_ns, generation)


A, B, C = disk("a"), disk("b"), disk("c")

identities = st.builds(
    DiskIdentity,
    path=st.text(min_size=1, max_size=20).map(lambda name: f"/{name}"),
    kind=st.sampled_from(["file", "block"]),
    device=st.integers(0, 3),
    inode=st.integers(0, 3),
    bytes=st.integers(0, 1 << 63),
    ctime_ns=st.none() | st.integers(0, 1 << 63),
    generation=st.none() | st.integers(0, 3),
    serial=st.none() | st.sampled_from("xyz"),
    wwn=st.none() | st.sampled_from("xyz"),
    partuuid=st.none() | st.sampled_from("xyz"),
)


@st.composite
def records(draw: st.DrawFn) -> StateRecord:
    peer = draw(st.none() | identities)
    worth = None if peer is None else draw(st.sampled_from(Worth))
    return StateRecord(
        epoch=draw(st.integers(1, 1 << 40)),
        current=draw(identities),
        peer=peer,
        peer_worth=worth,
        outdated_since="2026-01-02T03:04:05Z" if worth is Worth.OUTDATED and draw(st.booleans()) else None,
        clean=draw(st.booleans()),
        superseded=tuple(draw(st.lists(identities, max_size=SUPERSEDED_MAX))),
        doubt=tuple(draw(st.lists(st.tuples(st.integers(0), st.integers(1)), max_size=3))),
        wanted=Wanted(peer.path, "none", draw(st.integers(0, 9))) if peer and draw(st.booleans()) else None,
    )


# ---- the text ---------------------------------------------------------------


@given(records())
def test_a_record_survives_its_text(record: StateRecord) -> None:
    assert decode_record(encode_record(record)) == record


@given(records(), st.data())
def test_any_damage_is_seen(record: StateRecord, data: st.DataObject) -> None:
    text = encode_record(record)
    if data.draw(st.booleans(), label="cut"):
        damaged = text[: data.draw(st.integers(0, len(text) - 3))]
    else:
        at = data.draw(st.integers(0, len(text) - 1))
        damaged = text[:at] + bytes([text[at] ^ (1 << data.draw(st.integers(0, 7)))]) + text[at + 1 :]
    try:
        again = decode_record(damaged)
    except ValueError:
        return
    assert again == record, "white space alone may change"


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (b"", "empty"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "not of this program"),
        (b'{"body": {}}', "checksum"),
    ],
)
def test_a_damaged_record_is_refused_with_a_sentence(tmp_path: Path, text: bytes, phrase: str) -> None:
    path = tmp_path / "record"
    path.write_bytes(text)
    with pytest.raises(StateRecordError, match=rf"record is damaged \(.*{phrase}.*move it away"):
        StateFile(path).load()


def test_a_record_of_a_later_version_is_refused(tmp_path: Path) -> None:
    from vhostsync import state_record

    content = json.loads(encode_record(StateRecord.first(A)))
    content.pop("sha256")
    content["version"] = 2
    content["sha256"] = state_record._checksum(dict(content))
    with pytest.raises(ValueError, match="version 2"):
        decode_record(json.dumps(content).encode())


def test_no_record_yet(tmp_path: Path) -> None:
    assert StateFile(tmp_path / "record").load() is None


# ---- likeness -----------------------------------------------------------------


@given(identities)
def test_a_disk_is_like_itself(identity: DiskIdentity) -> None:
    assert identity.likeness(identity) is Likeness.SAME


@given(identities, identities)
def test_likeness_is_symmetric(one: DiskIdentity, other: DiskIdentity) -> None:
    assert one.likeness(other) is other.likeness(one)


def test_an_inode_number_used_again_is_another_disk() -> None:
    assert disk("a", 5, generation=1).likeness(disk("a", 5, generation=2)) is Likeness.OTHER


def test_a_file_system_numbered_anew_at_boot() -> None:
    before, after = disk("a", 5, generation=1), replace(disk("a", 5, generation=1), device=8)
    assert before.likeness(after) is Likeness.SAME
    assert disk("a", 5).likeness(replace(disk("a", 5), device=8)) is Likeness.UNSURE


def test_block_devices_are_known_by_their_hardware_not_their_copied_uuids() -> None:
    sda1 = DiskIdentity("/dev/sda1", "block", 0x801, 0, 1, wwn="naa.1", partuuid="u")
    assert sda1.likeness(replace(sda1, path="/dev/sdb1", device=0x811)) is Likeness.SAME
    assert sda1.likeness(replace(sda1, device=0x811, wwn="naa.2")) is Likeness.OTHER
    bare = replace(sda1, wwn=None)
    assert bare.likeness(replace(bare, path="/dev/sdb1", device=0x811)) is Likeness.OTHER


# ---- who may serve --------------------------------------------------------------


def test_the_superseded_disk_is_refused_and_the_current_one_named() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False)
    assert record.epoch == 2
    assert check_start(record, B) == record
    with pytest.raises(StateRecordError, match=r"/disks/a was superseded.*--blk-file /disks/b"):
        check_start(record, A)


def test_failback() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=True)
    assert (record.peer, record.peer_worth) == (A, Worth.UP_TO_DATE)
    with pytest.raises(StateRecordError, match=r"other half of a mirror \(up-to-date\)"):
        check_start(record, A)
    back = record.switched(keep_mirror=False)
    assert check_start(back, A) == back
    with pytest.raises(StateRecordError, match="/disks/b was superseded"):
        check_start(back, B)


def test_the_peer_is_refused_with_what_it_is_worth() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.OUTDATED, "2026-01-02T03:04:05Z")
    with pytest.raises(
        StateRecordError, match=r"outdated since 2026-01-02.*without what the guest wrote since"
    ):
        check_start(record, B)


def test_a_renamed_current_disk_is_accepted_and_called_by_its_new_name() -> None:
    renamed = replace(A, path="/disks/new")
    assert check_start(StateRecord.first(A).with_peer(B), renamed).current == renamed


def test_an_old_disk_moved_to_the_current_path_is_refused() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False)
    with pytest.raises(StateRecordError, match="superseded"):
        check_start(record, replace(A, path=B.path))


def test_a_new_file_at_the_current_path_is_accepted_and_the_peer_void() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE)
    restored = replace(A, inode=999)
    after = check_start(record.with_wanted(Wanted(B.path, "none")), restored)
    assert (after.current, after.peer_worth) == (restored, Worth.INCONSISTENT)
    assert after.wanted is None, "the peer may be all that is left: nothing overwrites it unasked"


def test_a_mirror_is_wanted_until_a_switch_that_keeps_none() -> None:
    wanted = Wanted(B.path, "writeback", 7)
    record = StateRecord.first(A).with_peer(B).with_wanted(wanted).with_worth(Worth.UP_TO_DATE)
    record = record.with_doubt(((512, 4096),), ())
    assert check_start(record.detached(A, B), A).wanted == wanted
    assert record.switched(keep_mirror=True).wanted == replace(wanted, path=A.path)
    for without in (record.switched(keep_mirror=False), record.without_peer(), record.promoted(B)):
        assert without.wanted is None
    assert check_start(record.detached(A, B), A).doubt == ((512, 4096),)
    assert record.switched(keep_mirror=False).doubt == (), "they spoke of the disk that was left"
    with pytest.raises(ValueError, match="has a peer"):
        StateRecord.first(A).with_wanted(wanted)


def test_a_record_from_before_there_was_a_resumed_mirror() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE)
    body = asdict(record)
    del body["wanted"], body["doubt"], body["spared"]
    assert decode_record(encode_checked("state-record", body)) == record


def test_what_the_peer_holds_better_is_known_while_it_is_up_to_date_and_after_a_clean_end() -> None:
    spared = ((512, 4096),)
    steady = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).with_doubt(spared, spared)
    assert decode_record(encode_record(steady)) == steady and steady.spared == spared
    for record in (
        steady.with_worth(Worth.OUTDATED, "then"), steady.with_worth(Worth.INCONSISTENT), steady.with_peer(B),
        steady.without_peer(), steady.detached(A, B),
    ):  # fmt: skip
        assert (record.doubt, record.spared) == (spared, ())
    outdated = steady.with_worth(Worth.OUTDATED, "then")
    assert outdated.with_doubt(spared, spared).spared == (), "a write may have healed it before this is told"
    assert outdated.detached(A, B, spared).spared == spared, "there is no write any more"


def test_the_peer_is_as_it_was_left_or_not() -> None:
    record, left = StateRecord.first(A).with_peer(B), replace(B, ctime_ns=5)
    assert record.peer_is(left) and not record.peer_is(A)
    assert record.detached(A, left).peer_is(left)
    assert not record.detached(A, left).peer_is(replace(left, ctime_ns=6))


def test_a_new_file_at_a_superseded_path_is_refused_and_said_to_be_new() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False)
    with pytest.raises(StateRecordError, match="not the one that was recorded"):
        check_start(record, replace(A, inode=999))


def test_a_foreign_disk_is_refused() -> None:
    with pytest.raises(StateRecordError, match="belongs to other disks"):
        check_start(StateRecord.first(A), C)


def test_promotion_makes_the_peer_the_truth() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.OUTDATED).promoted(B)
    assert check_start(record, B) == record
    with pytest.raises(StateRecordError):
        check_start(record, A)


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=40))
def test_through_any_switches_only_the_current_disk_may_serve(steps: list[tuple[int, bool]]) -> None:
    disks = [disk(f"d{number}", number + 1) for number in range(31)]
    record, epochs = StateRecord.first(disks[0]), 1
    for number, keep in steps:
        if disks[number] == record.current:
            continue
        record = record.with_peer(disks[number]).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=keep)
        epochs += 1
    assert record.epoch == epochs
    for each in disks:
        if each == record.current:
            assert check_start(record, each).current == each
        else:
            with pytest.raises(StateRecordError):
                check_start(record, each)


def test_a_change_after_a_clean_detach_is_seen() -> None:
    detached = disk("a", ctime_ns=5)
    assert detached.changed_since(detached) is None
    assert "ctime" in (replace(detached, ctime_ns=6).changed_since(detached) or "")
    assert "size" in (replace(detached, bytes=1).changed_since(detached) or "")
    assert "another disk" in (C.changed_since(detached) or "")
    assert disk("a").changed_since(disk("a")), "never cleanly detached"


# ---- crashes ---------------------------------------------------------------------


class CrashError(BaseException):
    """The power went."""


class VolatileFileSystem:
    """Files in memory with what a power cut may do: names and contents are kept apart; content that was not
    fsynced may be lost in part, names changed since the directory's fsync may be old or new, each by itself.
    Every step, within a call too, is a place to crash."""

    def __init__(self) -> None:
        self.names_now: dict[PurePath, int] = {}
        self.contents: dict[int, bytes] = {}
        self.durable: dict[int, bytes] = {}
        self.changes: list[dict[PurePath, int]] = [{}]  # the directory, oldest (durable) first
        self.steps_left = 1 << 30

    def _step(self) -> None:
        if self.steps_left == 0:
            raise CrashError
        self.steps_left -= 1

    def _changed(self) -> None:
        self.changes.append(dict(self.names_now))

    def read(self, path: Path) -> bytes:
        if path not in self.names_now:
            raise FileNotFoundError(path)
        return self.contents[self.names_now[path]]

    def write_durable(self, path: Path, text: bytes) -> None:
        self._step()
        inode = len(self.contents)
        self.contents[inode] = self.durable[inode] = b""
        self.names_now[path] = inode
        self._changed()
        for at in range(0, len(text), max(1, len(text) // 3)):
            self._step()
            self.contents[inode] = text[: at + max(1, len(text) // 3)]
        self._step()
        self.durable[inode] = self.contents[inode]
        self._step()

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        self.names_now[new] = self.names_now.pop(old)
        self._changed()
        self._step()

    def unlink(self, path: Path) -> None:
        self._step()
        del self.names_now[path]
        self._changed()

    def sync_directory(self, path: Path) -> None:
        self._step()
        self.changes = [dict(self.names_now)]
        self._step()

    def names(self, path: Path) -> list[str]:
        return sorted(name.name for name in self.names_now)

    def power_cut(self, data: st.DataObject) -> None:
        self.steps_left = 1 << 30
        cut: dict[PurePath, int] = {}
        for name in sorted({name for state in self.changes for name in state}):
            inodes = list(dict.fromkeys(state.get(name) for state in self.changes))
            inode = inodes[0] if len(inodes) == 1 else data.draw(st.sampled_from(inodes), label=f"{name}")
            if inode is not None:
                cut[name] = inode
        self.names_now = cut
        self.changes = [dict(self.names_now)]
        for inode in set(self.names_now.values()):
            durable, volatile = self.durable[inode], self.contents[inode]
            length = data.draw(st.integers(len(durable), max(len(durable), len(volatile))), label="content")
            self.contents[inode] = self.durable[inode] = (
                volatile[:length] if length > len(durable) else durable
            )


@given(st.data())
def test_a_crash_at_any_step_leaves_the_old_record_or_the_new_one(data: st.DataObject) -> None:
    files = VolatileFileSystem()
    history: list[StateRecord | None] = [None]
    committed = 0
    while data.draw(st.integers(0, 3), label="go on") > 0:
        state_file = StateFile(Path("/state/record"), files=files)
        record = replace(data.draw(records()), epoch=len(history))
        history.append(record)
        files.steps_left = data.draw(st.integers(0, 14), label="steps to the crash")
        try:
            prepared = state_file.prepare(record)
            prepared.commit()
        except CrashError:
            files.power_cut(data)
            found = StateFile(Path("/state/record"), files=files).load()
            assert found in history[committed:]
            committed = history.index(found, committed)
            history = [*history[: committed + 1]]
        else:
            committed = len(history) - 1
            files.steps_left = 1 << 30
            assert state_file.load() == record
            if data.draw(st.booleans(), label="cut after the commit"):
                files.power_cut(data)
                assert StateFile(Path("/state/record"), files=files).load() == record


def failing(name: str, error: int) -> RealFileSystem:
    files = RealFileSystem()

    def fail(*_: object) -> None:
        raise OSError(error, "No space left on device")

    setattr(files, name, fail)
    return files


def test_nothing_accumulates(tmp_path: Path) -> None:
    """A switch that is cut off may forget what it has prepared, any number of times."""
    with start(tmp_path, A)[0] as state_file:
        state_file.write(StateRecord.first(A).with_peer(B))
        for _ in range(20):
            state_file.prepare(StateRecord.first(C))
            state_file.prepare_announcement(StateRecord.first(A), StateRecord.first(B))
        assert len(list(tmp_path.glob("*.new*"))) == 1
        state_file.write(StateRecord.first(A))
        assert not list(tmp_path.glob("*.new*"))


@pytest.mark.parametrize("step", ["write_durable", "rename"])
def test_a_failed_write_leaves_the_old_record(tmp_path: Path, step: str) -> None:
    path = tmp_path / "record"
    StateFile(path).write(StateRecord.first(A))
    with pytest.raises(StateRecordError, match="No space left"):
        StateFile(path, files=failing(step, 28)).write(StateRecord.first(B))
    assert StateFile(path).load() == StateRecord.first(A)
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_a_failed_directory_sync_is_said(tmp_path: Path) -> None:
    with pytest.raises(StateRecordError, match="power cut is unknown"):
        StateFile(tmp_path / "record", files=failing("sync_directory", 5)).write(StateRecord.first(A))


def test_prepared_is_not_seen_until_committed_and_may_be_discarded(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "record")
    state_file.write(StateRecord.first(A))
    state_file.prepare(StateRecord.first(B)).discard()
    prepared = state_file.prepare(StateRecord.first(C))
    assert state_file.load() == StateRecord.first(A)
    prepared.commit()
    prepared.discard()
    assert state_file.load() == StateRecord.first(C)
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_what_is_void_takes_nothing_with_it(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "record")
    first = state_file.prepare(StateRecord.first(A))
    second = state_file.prepare(StateRecord.first(B))
    first.discard()
    second.commit()
    assert state_file.load() == StateRecord.first(B)


def test_what_was_prepared_before_a_later_record_is_void(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "record")
    prepared = state_file.prepare(StateRecord.first(B))
    state_file.write(StateRecord.first(A))
    with pytest.raises(StateRecordError, match="void"):
        prepared.commit()
    assert state_file.load() == StateRecord.first(A)


# ---- the lock ------------------------------------------------------------------------


def test_two_do_not_use_one_record(tmp_path: Path) -> None:
    with StateFile(tmp_path / "record") as first, StateFile(tmp_path / "record") as second:
        first.lock(0)
        with pytest.raises(StateRecordError, match="in use by another process"):
            second.lock(0.03)
        first.close()
        second.lock(0)


def _lock_and_tell(path: Path, locked: "multiprocessing.synchronize.Event") -> None:
    state_file = StateFile(path)
    state_file.lock(0)
    locked.set()
    multiprocessing.Event().wait()


def test_the_lock_of_a_killed_process_is_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    locked = context.Event()
    process = context.Process(target=_lock_and_tell, args=(tmp_path / "record", locked))
    process.start()
    assert locked.wait(30)
    (tmp_path / "record.new").write_bytes(encode_record(StateRecord.first(A))[:40])  # left by it
    process.kill()
    with StateFile(tmp_path / "record") as state_file:
        state_file.lock(10)
    process.join()
    assert not (tmp_path / "record.new").exists()


# ---- found from either disk --------------------------------------------------------------


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
        record = (record or StateRecord.first(source)).with_peer(destination)
        state_file.write(record)
        record = record.with_worth(Worth.UP_TO_DATE).switched(keep_mirror=keep)
        state_file.write(record)
    return record


def test_the_record_is_found_from_either_disk(tmp_path: Path) -> None:
    record = run(tmp_path, A, B)
    with pytest.raises(StateRecordError, match=r"--blk-file /disks/b"):
        start(tmp_path, A)
    state_file, found = start(tmp_path, B)
    state_file.close()
    assert found == record


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


def test_a_record_moved_away_starts_anew(tmp_path: Path) -> None:
    run(tmp_path, A, B)
    for path in tmp_path.glob("*.record.json"):
        path.rename(tmp_path / "kept")
    state_file, found = start(tmp_path, A)
    state_file.close()
    assert found is None


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
        state_file.write(StateRecord.first(A))
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
    from vhostsync.state_index import Index

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
        state_file.write(record)
        attached = True
        prepared = state_file.prepare(record.with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False))
        prepared.commit()
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
