# SPDX-License-Identifier: Apache-2.0
"""A record whose checksum fits, and whose fields are not of their types, as a person with an editor or a
program with a mistake may leave it: refused with a sentence, whichever field it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

import pytest

from tests.unit.disk_fakes import A, B, C
from vhostsync.errors import StateRecordError
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import (
    GuestDisk,
    StateRecord,
    Superseded,
    Wanted,
    Worth,
    decode_record,
    encode_announcement,
    encode_checked,
    encode_record,
)
from vhostsync.storage.identity import DiskIdentity

BOOT = "this boot"

SAMPLES: Final[dict[str, Any]] = {
    "null": None, "boolean": True, "number": 7, "fraction": 1.5, "string": "x", "list": [], "object": {},
    "a zero byte": "a\0b", "no text": "\ud800",
    "huge": 1 << 64, "infinite": float("inf"), "far below": -(1 << 64), "nested": [[]], "filled": {"x": 1},
}  # fmt: skip

# What each may be; "null" where it may be missing.
DISK: Final = {
    "path": "string", "kind": "string", "device": "number", "inode": "number", "bytes": "number",
    "ctime_ns": "number null", "generation": "number null", "serial": "string null", "wwn": "string null",
    "partuuid": "string null", "file_system": "string null", "boot_id": "string null", "mark": "string null",
    "place": "string null", "mark_is_set": "boolean", "disk_sequence": "number null",
}  # fmt: skip
WANTED: Final = {"path": "string", "cache": "", "speed_bytes_per_s": "number"}
GUEST: Final = {each.name: "number" for each in fields(GuestDisk)}
SUPERSEDED: Final = {"disk": "", "since": "string null", "lost": "boolean", "worth": "null"}
RECORD: Final = {
    "epoch": "number", "current": "", "peer": "null", "peer_worth": "null", "outdated_since": "string null",
    "clean": "boolean", "superseded": "list", "bitmap": "string null", "doubt": "list", "spared": "list",
    "different_since": "string null", "wanted": "null", "guest": "null", "unfenced": "list",
    "cut": "string null",
}  # fmt: skip
ANNOUNCED: Final = {"former": "", "boot_id": "string", "mark": "number"}

OBJECTS: Final = {
    (): RECORD, ("current",): DISK, ("peer",): DISK, ("superseded", 0): SUPERSEDED,
    ("superseded", 0, "disk"): DISK, ("unfenced", 0): DISK, ("wanted",): WANTED, ("guest",): GUEST,
    ("announced",): ANNOUNCED, ("announced", "former"): RECORD, ("announced", "former", "current"): DISK,
    ("announced", "former", "wanted"): WANTED,
}  # fmt: skip
RANGES: Final = ("doubt", "spared")
"""Of which each row is an offset and a length."""


def full() -> StateRecord:
    """With something in every field that may be of more than one type."""
    guest = GuestDisk(1 << 30, 512, 4096, 512)
    record = StateRecord.first(A, guest).with_peer(B, "7e57").with_wanted(Wanted(B.path, "none", 7))
    record = record.with_unfenced(C).with_difference("then").with_worth(Worth.OUTDATED, "then")
    gone = (Superseded(C, "then", worth=Worth.OUTDATED),)
    ranges = ((512, 4096),)
    return replace(record, doubt=ranges, spared=ranges, superseded=gone, cut="1f")


def announced() -> Any:
    former = full()
    switched = replace(former, epoch=former.epoch + 1)
    return json.loads(encode_announcement(former, switched, BOOT, 7))["body"]


def with_value(place: tuple[str | int, ...], value: Any) -> bytes:
    body = there = announced()
    for step in place[:-1]:
        there = there[step]
    there[place[-1]] = value
    return encode_checked("state-record", body)


def places() -> Iterator[tuple[tuple[str | int, ...], str]]:
    yield ("announced",), ""
    for place, table in OBJECTS.items():
        yield from (((*place, name), right) for name, right in table.items())
    for name in RANGES:
        yield (name, 0), ""
        yield from (((name, 0, which), "number") for which in (0, 1))
    yield ("superseded", 0), ""
    yield ("unfenced", 0), ""


PLACES: Final = dict(places())


def refused(folder: Path, text: bytes) -> str:
    """With this sentence; the text is that of a record in this boot, and in the next."""
    (folder / "record").write_bytes(text)
    with pytest.raises(StateRecordError) as found:
        StateFile(folder / "record").load()
    for boot_id in (None, BOOT):
        with pytest.raises(ValueError, match=r"^fields are missing, unknown or of the wrong type$"):
            decode_record(text, boot_id)
    return str(found.value)


def test_the_table_has_every_field() -> None:
    assert {each.name for each in fields(DiskIdentity)} == DISK.keys()
    assert {each.name for each in fields(Wanted)} == WANTED.keys()
    assert {each.name for each in fields(Superseded)} == SUPERSEDED.keys()
    assert {each.name for each in fields(StateRecord)} == RECORD.keys()
    whole = with_value(("announced", "mark"), 7)
    assert decode_record(whole, BOOT, 7).epoch == full().epoch + 1 and decode_record(whole, BOOT) == full()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_a_field_of_the_wrong_type_is_damage(tmp_path: Path, place: tuple[str | int, ...]) -> None:
    for name, sample in SAMPLES.items():
        if name in PLACES[place].split():
            continue
        sentence = refused(tmp_path, with_value(place, sample))
        assert "record is damaged (fields are missing, unknown or of the wrong type)" in sentence, name
        assert "restore the record" in sentence


@pytest.mark.parametrize(
    "rows", [[1], [[1]], [[1, 2, 3]], [["1", "2"]], [[512, None]], ["12"], [{"1": 2, "3": 4}], [[0, True]]]
)
@pytest.mark.parametrize("name", RANGES)
def test_rows_that_are_no_ranges_are_damage(tmp_path: Path, name: str, rows: list[Any]) -> None:
    refused(tmp_path, with_value((name,), rows))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("peer_worth",), "good"),
        (("superseded", 0, "worth"), "good"),
        (("wanted", "cache"), "sometimes"),
        (("current", "inode"), -1),
        (("current", "device"), -1),
        (("peer", "bytes"), -1),
        (("peer", "colour"), "blue"),
        (("wanted", "colour"), "blue"),
    ],
)
def test_a_value_that_there_is_not_is_damage(tmp_path: Path, place: tuple[str, ...], value: Any) -> None:
    refused(tmp_path, with_value(place, value))


@pytest.mark.parametrize("missing", [name for name in RECORD if name in list(RECORD)[:7]])
def test_a_field_that_was_always_there_is_not_missing(tmp_path: Path, missing: str) -> None:
    body = asdict(full())
    del body[missing]
    refused(tmp_path, encode_checked("state-record", body))


def test_fields_of_a_later_program_are_passed_over() -> None:
    body = {**asdict(full()), "colour": "blue"}
    assert decode_record(encode_checked("state-record", body)) == full()


@pytest.mark.parametrize("member", ["block_bytes", "physical_block_bytes", "discard_bytes"])
def test_blocks_that_no_disk_has_are_damage(member: str) -> None:
    body = json.loads(encode_record(full()))["body"]
    body["guest"][member] = 1 << 32
    with pytest.raises(ValueError, match="blocks of the guest's disk are out of range"):
        decode_record(encode_checked("state-record", body))
