# SPDX-License-Identifier: Apache-2.0
"""The state record: its text, its transitions, and that a crash at any step leaves the old record or the new
one."""

import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.disk_fakes import A, B, C, CrashError, VolatileFileSystem, disk, identities
from vhostsync.errors import StateRecordError, SupersededError, UnsettledRecordError
from vhostsync.record import state_record
from vhostsync.record.files import RealFileSystem
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import (
    SUPERSEDED_MAX,
    GuestDisk,
    StateRecord,
    Superseded,
    Wanted,
    Worth,
    decode_record,
    encode_checked,
    encode_record,
)

superseded = st.builds(
    Superseded, identities, st.none() | st.just("2026-01-02T03:04:05.678+00:00"), st.booleans()
)
guests = st.builds(GuestDisk, st.integers(0, 1 << 63), *[st.integers(0, (1 << 32) - 1)] * 3)
offsets = st.integers(0, (1 << 64) - 1)
lengths = st.integers(1, (1 << 64) - 1)


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
        superseded=tuple(draw(st.lists(superseded, max_size=SUPERSEDED_MAX))),
        guest=draw(st.none() | guests),
        unfenced=tuple(draw(st.lists(identities, max_size=2))),
        doubt=tuple(draw(st.lists(st.tuples(offsets, lengths), max_size=3))),
        cut="1f" if worth is Worth.OUTDATED and draw(st.booleans()) else None,
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
        (bytes(4096), "no JSON"),
        (b'{\n "kind": "state-record' + b"[" * 100_000, "no JSON"),
        (b'{\n "kind": "state-record", "body": []}', "not of this program"),
        (b'{\n "kind": "state-record", "body": {}}', "checksum"),
    ],
)
def test_a_damaged_record_is_refused_with_a_sentence(tmp_path: Path, text: bytes, phrase: str) -> None:
    path = tmp_path / "record"
    path.write_bytes(text)
    with pytest.raises(StateRecordError, match=rf"record is damaged \(.*{phrase}.*restore the record"):
        StateFile(path).load()


def of_version(version: int) -> bytes:
    content = json.loads(encode_record(StateRecord.first(A)))
    content.pop("sha256")
    content["version"] = version
    content["sha256"] = state_record._checksum(dict(content))
    return json.dumps(content).encode()


def test_a_record_of_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"version 4.*a newer vhostsync wrote it"):
        decode_record(of_version(state_record.RECORD_VERSION + 1))


def test_a_program_that_does_not_know_what_a_superseded_disk_is_worth_refuses_the_record() -> None:
    """It would call a copy that did not end a disk to start from. Its records are read on."""
    assert json.loads(encode_record(StateRecord.first(A)))["version"] > 2
    assert decode_record(of_version(2)) == StateRecord.first(A)


def test_no_record_yet(tmp_path: Path) -> None:
    assert StateFile(tmp_path / "record").load() is None


# ---- transitions ---


def test_a_mirror_is_wanted_until_a_switch_that_keeps_none() -> None:
    wanted = Wanted(B.path, "writeback", 7)
    record = StateRecord.first(A).with_peer(B).with_wanted(wanted).with_worth(Worth.UP_TO_DATE)
    record = record.with_doubt(((512, 4096),), ())
    assert record.switched(keep_mirror=True).wanted == replace(wanted, path=A.path)
    for without in (record.switched(keep_mirror=False), record.without_peer(), record.promoted(B)):
        assert without.wanted is None
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


# ---- crashes ---------------------------------------------------------------------


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
            prepared.settle()
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


@pytest.mark.parametrize("step", ["write_durable", "rename"])
def test_a_failed_write_leaves_the_old_record(tmp_path: Path, step: str) -> None:
    path = tmp_path / "record"
    StateFile(path).change(StateRecord.first(A))
    with pytest.raises(StateRecordError, match="No space left"):
        StateFile(path, files=failing(step, 28)).change(StateRecord.first(B))
    assert StateFile(path).load() == StateRecord.first(A)
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_a_record_that_somebody_else_has_put_there_is_left_to_them(tmp_path: Path) -> None:
    path = tmp_path / "record"
    state_file = StateFile(path)
    state_file.change(StateRecord.first(A))
    prepared = state_file.prepare(StateRecord.first(A).with_peer(B))
    StateFile(path).change(StateRecord.first(C))
    with pytest.raises(SupersededError, match=r"changed by somebody else while .*; find out which disk"):
        prepared.settle()
    assert not list(tmp_path.glob("*.new"))
    path.unlink()
    with pytest.raises(SupersededError):  # for good
        state_file.change(StateRecord.first(B))


def test_a_record_that_comes_from_nowhere_is_somebody_elses(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "record")
    assert state_file.load() is None
    StateFile(tmp_path / "record").change(StateRecord.first(C))
    with pytest.raises(SupersededError):
        state_file.change(StateRecord.first(A))


def test_a_record_that_a_newer_program_has_put_there_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "record"
    state_file = StateFile(path)
    state_file.change(StateRecord.first(A))
    path.write_bytes(of_version(state_record.RECORD_VERSION + 1))
    with pytest.raises(SupersededError):
        state_file.change(StateRecord.first(B))
    assert path.read_bytes() == of_version(state_record.RECORD_VERSION + 1)


@pytest.mark.parametrize("text", [None, b"", b"rubbish"])
def test_a_record_that_is_gone_or_not_whole_is_written_anew(tmp_path: Path, text: bytes | None) -> None:
    path = tmp_path / "record"
    StateFile(path).change(StateRecord.first(A))
    state_file = StateFile(path)
    assert state_file.load() == StateRecord.first(A)
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    state_file.change(StateRecord.first(B))
    assert StateFile(path).load() == StateRecord.first(B)


def test_a_rename_that_has_failed_and_taken_place_is_not_somebody_elses(tmp_path: Path) -> None:
    """As on a network file system whose answer was lost."""
    files = RealFileSystem()
    state_file = StateFile(tmp_path / "record", files=files)
    state_file.change(StateRecord.first(A))
    rename = files.rename

    def rename_and_fail(old: Path, new: Path) -> None:
        rename(old, new)
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StateRecordError):
        patch.setattr(files, "rename", rename_and_fail)
        state_file.change(StateRecord.first(B))
    state_file.change(StateRecord.first(C))
    assert StateFile(tmp_path / "record").load() == StateRecord.first(C)


def test_after_a_failed_directory_sync_it_is_not_known_what_holds(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "record", files=failing("sync_directory", 5))
    with pytest.raises(UnsettledRecordError, match="power cut is unknown"):
        state_file.change(StateRecord.first(A))
    assert state_file.late, "nobody writes it again"


def test_prepared_is_not_seen_until_committed_and_may_be_discarded(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "record")
    state_file.change(StateRecord.first(A))
    state_file.prepare(StateRecord.first(B)).discard()
    prepared = state_file.prepare(StateRecord.first(C))
    assert state_file.load() == StateRecord.first(A)
    prepared.settle()
    prepared.discard()
    assert state_file.load() == StateRecord.first(C)
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_what_is_void_takes_nothing_with_it(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "record")
    first = state_file.prepare(StateRecord.first(A))
    second = state_file.prepare(StateRecord.first(B))
    first.discard()
    second.settle()
    assert state_file.load() == StateRecord.first(B)


def test_what_was_prepared_before_a_later_record_is_void(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "record")
    prepared = state_file.prepare(StateRecord.first(B))
    state_file.change(StateRecord.first(A))
    with pytest.raises(StateRecordError, match="void"):
        prepared.settle()
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




def test_disks_that_were_current_are_remembered_longer_than_former_peers() -> None:
    record = StateRecord.first(A).with_peer(B).with_worth(Worth.UP_TO_DATE).switched(keep_mirror=False)
    for number in range(SUPERSEDED_MAX + 5):
        record = record.with_peer(disk(f"spare{number}", 1000 + number)).with_worth(Worth.OUTDATED, "then")
    assert len(record.superseded) == SUPERSEDED_MAX
    assert record.of_disk(A) is not None
    assert record.of_disk(disk("spare0", 1000)) is None
    assert decode_record(encode_record(record)) == record


# ---- where requests may be under way ------------------------------------------


def test_a_disk_is_unfenced_until_it_is_fenced_whatever_becomes_of_its_role() -> None:
    record = StateRecord.first(A).with_peer(B).with_unfenced(B)
    assert record.unfenced == (B,)
    assert record.with_unfenced(B) == record, "once"
    renamed = replace(B, path="/elsewhere")
    for later in (
        record.switched(keep_mirror=True), record.switched(keep_mirror=False), record.without_peer(),
        record.with_peer(C), record.promoted(C), record.detached(A, B),
    ):  # fmt: skip
        assert later.unfenced == (B,)
        assert later.with_fenced(renamed).unfenced == (), "by what it is"
        assert later.with_fenced(A).unfenced == (B,)


def test_a_record_of_before_knows_of_no_unfenced_disk() -> None:
    record = StateRecord.first(A).with_peer(B)
    body = json.loads(encode_record(record))["body"]
    del body["unfenced"]
    assert decode_record(encode_checked("state-record", body)) == record
