# SPDX-License-Identifier: Apache-2.0
"""Names of lineages: what one may be, where it lies, which record it finds, and which disk a start by it
serves."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sizes import MIB
from tests.unit.test_record_report import seen
from vhostsync.config import ServeConfig
from vhostsync.errors import ConfigError, StateRecordError
from vhostsync.lineage_name import check_lineage_name, control_of, runtime_directory, socket_of
from vhostsync.option_values import Answer
from vhostsync.record import names, record_report
from vhostsync.record.names import KIND, Lineage, Names, find_name, follow_name, state_directories
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_index import open_state_file
from vhostsync.record.state_record import StateRecord, Worth, encode_checked
from vhostsync.storage.file import create_image


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("VHOSTSYNC_RUNTIME_DIRECTORY", str(tmp_path / "run"))


def recorded(folder: Path, name: str | None = "vm1", worth: Worth | None = None) -> Path:
    """A record of a.img, and of b.img if it has a worth, to which the name leads."""
    for each in ("a.img", "b.img"):
        create_image(folder / each, MIB)
    record = StateRecord.first(seen(folder / "a.img"))
    if worth is not None:
        record = record.with_peer(seen(folder / "b.img")).with_worth(worth)
    with open_state_file(None, record.current, lock_timeout_s=0, directory=folder) as file:
        file.change(record)
    if name is not None:
        Names(folder).give(Lineage(name, file.path))
    return file.path


# ---- what a name may be ----------------------------------------------------------


@pytest.mark.parametrize("name", ["vm1", "a", "VM_1.data-2", "_x", "0", "a" * 64])
def test_names(name: str) -> None:
    assert check_lineage_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "a/b", "/a", "a b", "a\n", "ä", "a\0", "a" * 65, "a:b", "a@b", "$(x)"]
)
def test_what_is_no_name_is_a_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match="write 1 to 64 letters"):
        check_lineage_name(name)


def test_the_places_of_a_name() -> None:
    assert runtime_directory({}, user=0) == Path("/run/vhostsync")
    assert runtime_directory({"XDG_RUNTIME_DIR": "/run/user/0"}, user=0) == Path("/run/vhostsync")
    assert runtime_directory({"XDG_RUNTIME_DIR": "/run/user/7"}, user=7) == Path("/run/user/7/vhostsync")
    assert runtime_directory({}, user=7) == Path("/run/vhostsync")
    assert runtime_directory({"VHOSTSYNC_RUNTIME_DIRECTORY": "/x"}, user=7) == Path("/x")
    assert (socket_of("vm1").name, control_of("vm1").name) == ("vm.sock", "control")
    assert socket_of("vm1").parent == control_of("vm1").parent == runtime_directory() / "vm1"


# ---- the files -------------------------------------------------------------------


def test_a_name_leads_to_its_record(tmp_path: Path) -> None:
    one, other = tmp_path / "a-1.record.json", tmp_path / "b-2.record.json"
    of = Names(tmp_path)
    assert (of.all(), of.find("vm1"), Names(tmp_path / "none").all()) == ([], None, [])
    of.give(Lineage("vm2", other, "vm"))
    of.give(Lineage("vm1", one))
    assert of.all() == [Lineage("vm1", one), Lineage("vm2", other, "vm")]
    assert of.of_record(other) == [Lineage("vm2", other, "vm")]
    with pytest.raises(StateRecordError, match="there is a disk named vm1 already"):
        of.give(Lineage("vm1", tmp_path / "c.record.json"))
    with pytest.raises(StateRecordError, match="has a name already, vm2"):
        of.give(Lineage("vm3", other))
    of.forget_record(other)
    assert [each.name for each in of.all()] == ["vm1"]


def test_of_many_that_want_one_name_or_one_record_one_wins(tmp_path: Path) -> None:
    won: list[str] = []

    def give(name: str, record: str) -> None:
        try:
            Names(tmp_path).give(Lineage(name, tmp_path / record))
        except StateRecordError:
            return
        won.append(name)

    for wanted in ([("vm1", f"{at}.record.json") for at in range(8)],
                   [(f"vm{at}", "x.record.json") for at in range(2, 10)]):  # fmt: skip
        won.clear()
        threads = [threading.Thread(target=give, args=each) for each in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
    assert len(Names(tmp_path).all()) == 2


def test_what_a_crash_has_left_is_replaced_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    of, record = Names(tmp_path), tmp_path / "a.record.json"
    leftover = tmp_path / "vm1.name.json.new"
    leftover.write_text('{\n "kind": "state-na')
    of.give(Lineage("vm1", record))
    assert not leftover.exists()
    foreign = tmp_path / "vm2.name.json.new"
    foreign.write_text("precious")
    with pytest.raises(StateRecordError, match="is left alone"):
        of.give(Lineage("vm2", tmp_path / "b.record.json"))
    assert foreign.read_text() == "precious"


def test_a_damaged_name_is_said_to_be_one(tmp_path: Path) -> None:
    of = Names(tmp_path)
    of.give(Lineage("vm1", tmp_path / "a.record.json"))
    path = tmp_path / "vm1.name.json"
    path.write_text(path.read_text().replace("a.record", "b.record"))
    assert of.all() == []
    with pytest.raises(StateRecordError, match=r"is damaged .*checksum.*vhostsync create vm1"):
        of.find("vm1")
    with pytest.raises(StateRecordError, match="is damaged"):
        of.give(Lineage("vm1", tmp_path / "c.record.json"))


@pytest.mark.parametrize("body", [{"record": "a\0b"}, {"record": "\ud800"}, {"record": "a", "group": 5}])
def test_a_name_that_means_no_file_is_damaged(tmp_path: Path, body: dict[str, object]) -> None:
    (tmp_path / "vm1.name.json").write_bytes(encode_checked(KIND, body))
    with pytest.raises(StateRecordError, match=r"says what vm1 means, is damaged.*remove it"):
        Names(tmp_path).find("vm1")
    assert len(Names(tmp_path).damaged()) == 1


def test_what_is_no_file_of_anybodys_is_read_as_none(tmp_path: Path) -> None:
    """By a link of another user's; of some files of the kernel's there is nothing to read at the moment."""
    (tmp_path / "vm1.name.json").symlink_to("/proc/kmsg")
    with pytest.raises(StateRecordError, match=r"cannot be read|is damaged"):
        Names(tmp_path).find("vm1")


def test_a_record_never_lies_outside_of_the_directory(tmp_path: Path) -> None:
    Names(tmp_path).give(Lineage("vm1", Path("/etc/x.record.json")))
    found = Names(tmp_path).find("vm1")
    assert found is not None and found.record == tmp_path / "x.record.json"


def test_a_name_is_found_where_its_backend_has_a_directory_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "vm1").mkdir()
    Names(tmp_path / "vm1").give(Lineage("vm1", tmp_path / "vm1" / "a.record.json"))
    assert find_name("vm1", tmp_path).record == tmp_path / "vm1" / "a.record.json"
    assert state_directories(tmp_path) == [tmp_path, tmp_path / "vm1"]
    with pytest.raises(StateRecordError, match=r"no disk is named vm2 in .*vhostsync create vm2"):
        find_name("vm2", tmp_path)


def test_the_name_goes_with_the_record(tmp_path: Path) -> None:
    record = recorded(tmp_path)
    assert record_report.run(None, "vm1", as_json=False, remove=True) == 0
    assert not record.exists() and Names(tmp_path).all() == []


def test_the_advice_speaks_of_the_name(tmp_path: Path) -> None:
    record = recorded(tmp_path, worth=Worth.UP_TO_DATE)
    found = record_report.report(record)
    assert found is not None and found.name == "vm1"
    assert found.advice.command == ("vhostsync", "serve", "--name", "vm1")
    (tmp_path / "a.img").unlink()
    found = record_report.report(record)
    assert found is not None
    promoting = ("--name", "vm1", "--blk-file", str(tmp_path / "b.img"), "--promote")
    assert found.advice.command == ("vhostsync", "serve", *promoting)


# ---- what a start by the name serves ---------------------------------------------


def by_name(**given: object) -> ServeConfig:
    return ServeConfig(**{"name": "vm1", **given})  # type: ignore[arg-type]


def test_a_start_by_the_name_has_its_sockets_by_it() -> None:
    config = by_name()
    assert (config.socket_path, config.control_socket) == (socket_of("vm1"), control_of("vm1"))
    assert by_name(socket_path=Path("/s")).control_socket == Path("/s.control")
    inherited = by_name(fd=3)
    assert (inherited.socket_path, inherited.control_socket) == (None, control_of("vm1"))
    assert by_name(fd=3, control_path=Path("/c")).control_socket == Path("/c")
    assert config.label == "vm1"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": ""}, "Give --blk-file, or the --name that"),
        ({"name": "../x"}, "--name '../x' is none that a disk can have"),
        ({"no_state_file": True}, "with --no-state-file no record says"),
        ({"name": "", "state_file": Path("/r")}, "exactly one of --socket-path and --fd"),
    ],
)
def test_a_start_by_no_name_is_a_sentence(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        by_name(**given)


def test_the_name_finds_the_current_disk(tmp_path: Path) -> None:
    record = recorded(tmp_path, worth=Worth.UP_TO_DATE)
    config = follow_name(by_name())
    assert (config.disk, config.record_of_name) == (str(tmp_path / "a.img"), record)
    with StateFile(record) as file:
        found = file.load()
        assert found is not None
        file.change(found.switched(keep_mirror=False))
    assert follow_name(by_name()).disk == str(tmp_path / "b.img")
    # A disk that is named beside it is that of the name, for --promote, or for who is careful.
    given = follow_name(by_name(blk_file="/c.img", socket_path=Path("/s")))
    assert (given.disk, given.record_of_name) == ("/c.img", record)


def test_a_state_file_alone_names_its_disk(tmp_path: Path) -> None:
    record = recorded(tmp_path, None)
    config = follow_name(by_name(name="", state_file=record, socket_path=Path("/s")))
    assert (config.disk, config.record_of_name) == (str(tmp_path / "a.img"), None)


def test_a_name_that_no_disk_has_is_a_label_where_a_disk_is_named(tmp_path: Path) -> None:
    config = by_name(name="Ä machine/1", blk_file="/a.img", socket_path=Path("/s"))
    assert follow_name(config) is config
    with pytest.raises(StateRecordError, match="no disk is named vm1"):
        follow_name(by_name())


def test_a_name_whose_record_is_missing(tmp_path: Path) -> None:
    recorded(tmp_path).unlink()
    with pytest.raises(StateRecordError, match="should name the disk of vm1, is missing"):
        follow_name(by_name())


def test_promoting_by_the_name_leaves_no_disk_that_answers(tmp_path: Path) -> None:
    recorded(tmp_path, worth=Worth.UP_TO_DATE)
    with pytest.raises(StateRecordError, match="is there and answers: start without --promote"):
        follow_name(by_name(answer=Answer.PROMOTE))
    (tmp_path / "a.img").unlink()
    assert follow_name(by_name(answer=Answer.PROMOTE)).disk == str(tmp_path / "b.img")


def test_promoting_by_the_name_needs_another_disk(tmp_path: Path) -> None:
    recorded(tmp_path)
    (tmp_path / "a.img").unlink()
    with pytest.raises(StateRecordError, match="knows no other one"):
        follow_name(by_name(answer=Answer.PROMOTE))


def test_a_disk_that_another_record_has_taken_is_refused(tmp_path: Path) -> None:
    """By its path a start would find the other record, which refuses it. By the name, too."""
    record = recorded(tmp_path)
    disk = seen(tmp_path / "a.img")
    create_image(tmp_path / "c.img", MIB)
    with open_state_file(None, seen(tmp_path / "c.img"), lock_timeout_s=0, directory=tmp_path) as other:
        other.change(StateRecord.first(seen(tmp_path / "c.img")).with_peer(disk))
    with pytest.raises(StateRecordError, match=f"belongs to the state record {other.path} by now"):
        open_state_file(None, disk, lock_timeout_s=0, directory=tmp_path, of_name=record)


def test_a_device_that_has_another_name_since_the_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = recorded(tmp_path)
    with StateFile(record) as file:
        found = file.load()
        assert found is not None
        file.change(replace(found, current=replace(found.current, path="/dev/nobody", kind="block")))
    monkeypatch.setattr(names, "name_today", lambda disk: f"{disk.path}, as it is called today")
    assert follow_name(by_name()).disk == "/dev/nobody, as it is called today"
