# SPDX-License-Identifier: Apache-2.0
"""What older versions have left is read: records and bitmaps in tests/older, written by the programs of their
time. `b.img` was the current disk, `a.img` its mirror after a switch that kept it; the end was clean."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.rig import Served, await_true, refused_start, same_content, write_block
from tests.guest.images import fill_random, new_image
from vhostsync.record.bitmap import HEADER_BYTES, TEXT_BYTES, Header
from vhostsync.record.state_file import StateFile
from vhostsync.record.state_record import RECORD_VERSION, StateRecord, Worth, _checksum, decode_record
from vhostsync.storage.identify import identify

OLDER = Path(__file__).parents[1] / "older"
RECORDS = range(1, RECORD_VERSION + 1)
BITMAP_OF = {1: 1, 2: 2, 3: 2}
"""The version of the bitmap that a program had, by the version of its record."""


def of_version(version: int, moment: str = "") -> StateRecord:
    return decode_record((OLDER / f"record-{version}{moment}.json").read_bytes())


def test_every_version_of_a_record_is_kept_here() -> None:
    assert {int(path.stem.split("-")[1]) for path in OLDER.glob("record-*.json")} == set(RECORDS)


@pytest.mark.parametrize("version", RECORDS)
def test_a_record_says_what_it_said(version: int) -> None:
    record = of_version(version)
    assert (record.epoch, record.current.path, record.clean) == (2, "/disks/b.img", True)
    assert record.peer is not None and record.peer.path == "/disks/a.img"
    assert record.peer_worth is Worth.UP_TO_DATE
    assert [old.disk.path for old in record.superseded] == ["/disks/a.img"]
    assert record.wanted is not None and record.wanted.path == "/disks/a.img"
    assert (record.guest is None) == (version == 1)
    assert not of_version(version, "-steady").clean
    assert of_version(version, "-steady").current.path == "/disks/a.img"


class Machine:
    """Two disks that hold the same, the second one the current, with what a program of `version` left."""

    def __init__(self, work: Path, version: int) -> None:
        self.current, self.mirror = new_image(work / "b.img", 8), new_image(work / "a.img", 8)
        fill_random(self.current, 0, 1 << 20)
        self.mirror.write_bytes(self.current.read_bytes())
        self.record, self.bitmap, self.work = work / "record.json", work / "bitmap", work
        old = json.loads((OLDER / f"record-{version}.json").read_text())
        self.record.write_text(json.dumps(self._here(old), indent=1) + "\n")
        file = bytearray((OLDER / f"bitmap-{BITMAP_OF[version]}").read_bytes())
        header = self._here(json.loads(file[:TEXT_BYTES].rstrip(b"\0")))
        header["body"]["token"] = old["body"]["bitmap"]  # versions 2 and 3 of a record had the same bitmap
        header["sha256"] = _checksum({key: header[key] for key in ("kind", "version", "body")})
        file[:TEXT_BYTES] = json.dumps(header, indent=1).encode().ljust(TEXT_BYTES, b"\0")
        self.bitmap.write_bytes(file)

    def _here(self, content: dict[str, Any]) -> dict[str, Any]:
        """As the program would have written it of these disks: each number and name is theirs."""

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(each) for each in value]
            if not isinstance(value, dict):
                return value
            if "inode" not in value:
                return {key: moved(each) for key, each in value.items()}
            path = self.current if value["path"] == "/disks/b.img" else self.mirror
            with path.open("rb") as file:
                disk = identify(file.fileno(), path, with_ctime=value["ctime_ns"] is not None)
            return {key: asdict(disk)[key] for key in value}

        body = moved(content["body"])
        if body.get("wanted"):
            body["wanted"]["path"] = str(self.mirror)
        content = {"kind": content["kind"], "version": content["version"], "body": body}
        return {**content, "sha256": _checksum(content)}

    def worth(self) -> Worth | None:
        record = StateFile(self.record).load()
        return None if record is None or record.clean else record.peer_worth

    @property
    def options(self) -> tuple[str | Path, ...]:
        return "--state-file", self.record, "--bitmap", self.bitmap


@pytest.mark.parametrize("version", RECORDS)
def test_a_mirror_goes_on_where_an_older_version_left_it(version: int, tmp_path: Path) -> None:
    """Nothing is copied again, and the files are of this version from then on."""
    machine = Machine(tmp_path, version)
    with Served(tmp_path, machine.current, *machine.options) as served:
        await_true(lambda: machine.worth() is Worth.UP_TO_DATE, "the mirror goes on")
        mirror = served.mirror()
        assert (mirror["copy-bytes-total"], mirror["full-copy-reason"]) == (0, None)
        assert (mirror["worth"], mirror["destination"]) == ("up-to-date", str(machine.mirror))
        with served.guest() as guest:
            write_block(guest, 3, seed=version)
        served.stop()
    assert same_content(machine.current, machine.mirror)
    assert json.loads(machine.record.read_text())["version"] == RECORD_VERSION
    after = StateFile(machine.record).load()
    assert after is not None and (after.epoch, after.guest is not None) == (2, True)
    assert Header.decode(machine.bitmap.read_bytes()[:HEADER_BYTES]).token == after.bitmap


@pytest.mark.parametrize("version", RECORDS)
def test_the_old_disk_of_an_older_record_is_refused(version: int, tmp_path: Path) -> None:
    machine = Machine(tmp_path, version)
    code, said = refused_start(
        "serve", "--blk-file", machine.mirror, "--socket-path", tmp_path / "s", "--state-file", machine.record
    )
    assert code == 1 and str(machine.current) in said
    assert json.loads(machine.record.read_text())["version"] == version


def test_a_bitmap_of_a_later_version_begins_anew(tmp_path: Path) -> None:
    machine = Machine(tmp_path, RECORD_VERSION)
    file = bytearray(machine.bitmap.read_bytes())
    content = json.loads(file[:TEXT_BYTES].rstrip(b"\0"))
    del content["sha256"]
    content["version"] += 1
    text = json.dumps({**content, "sha256": _checksum(content)}, indent=1).encode()
    file[:TEXT_BYTES] = text.ljust(TEXT_BYTES, b"\0")
    machine.bitmap.write_bytes(file)
    with Served(tmp_path, machine.current, *machine.options) as served:
        await_true(lambda: machine.worth() is Worth.UP_TO_DATE, "the mirror goes on")
        assert served.mirror()["copy-bytes-total"] == 8 << 20
    assert "a newer vhostsync wrote it" in served.process.last_output(60)


def test_a_record_of_a_later_version_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """And stays as it is."""
    machine = Machine(tmp_path, RECORD_VERSION)
    content = json.loads(machine.record.read_text())
    del content["sha256"]
    content["version"] = RECORD_VERSION + 1
    machine.record.write_text(json.dumps({**content, "sha256": _checksum(content)}))
    before = machine.record.read_bytes()
    code, said = refused_start(
        "serve", "--blk-file", machine.current, "--socket-path", tmp_path / "s", *machine.options
    )
    assert code == 1 and "a newer vhostsync wrote it; use that one" in said
    assert machine.record.read_bytes() == before
