# SPDX-License-Identifier: Apache-2.0
"""What backends say of themselves, which may have been taken over by their guests, costs no other disk its
line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vhostsync.cli.host_commands import _json
from vhostsync.control.found_socket import FoundSocket
from vhostsync.fleet import disks
from vhostsync.fleet.host_disk import HostDisk

pytestmark = pytest.mark.anyio

STATUS = {"name": "", "disk": "/a", "active": False, "frontends": 0, "capacity": 1, "record": None}
FIGURES = ("lag-bytes", "lag-ms", "copy-bytes-done", "copy-bytes-total", "copy-rate-bytes-per-s")
MIRROR: dict[str, Any] = {
    **dict.fromkeys(FIGURES, 0), "state": "steady", "destination": "/b", "worth": "up-to-date", "counts": {},
    "copy-remaining-s": None, "reason": None, "last-error": None,
}  # fmt: skip


async def ask(monkeypatch: pytest.MonkeyPatch, known: list[HostDisk]) -> list[HostDisk]:
    monkeypatch.setattr(disks, "known_disks", lambda *_: known)
    return await disks.host_disks()


@pytest.mark.parametrize(
    ("status", "mirror"),
    [
        ([], {}),
        (5, None),
        ({}, MIRROR),
        (STATUS, {}),
        ({**STATUS, "record": "a\0b"}, MIRROR),
        ({**STATUS, "record": "\ud800"}, MIRROR),
        ({**STATUS, "record": 5}, MIRROR),
        ({**STATUS, "name": None}, MIRROR),
        (STATUS, {**MIRROR, "worth": "best"}),
        (STATUS, {**MIRROR, "lag-ms": "much"}),
        (STATUS, {**MIRROR, "lag-bytes": 10**4000}),
        (STATUS, {**MIRROR, "lag-ms": float("nan")}),
        (STATUS, {**MIRROR, "counts": {"source-generation": float("inf")}}),
    ],
)
async def test_an_answer_that_is_none_is_told_of_that_disk(
    monkeypatch: pytest.MonkeyPatch, status: Any, mirror: Any
) -> None:
    async def ask_found(path: Path, *_: str) -> tuple[Path, list[Any]]:
        return path, [status, mirror] if path.name == "bad" else [STATUS, MIRROR]

    monkeypatch.setattr(disks, "ask_found", ask_found)
    found = await ask(monkeypatch, [HostDisk(control=Path("/run/bad")), HostDisk(control=Path("/run/good"))])
    bad, good = _json(found)
    assert bad["problem"].startswith("the backend at /run/bad answers with what is no ")
    assert (bad["state"], good["state"], good["problem"]) == ("unknown", "steady", None)


async def test_one_that_was_found_in_two_ways_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It began while the disks were looked for: its socket was seen, and then its record once more."""
    record, control = tmp_path / "vm1.record.json", FoundSocket(tmp_path / "control")

    async def ask_found(control: FoundSocket, *_: str) -> tuple[FoundSocket, list[Any]]:
        return control, [{**STATUS, "record": str(record)}, MIRROR]

    monkeypatch.setattr(disks, "ask_found", ask_found)
    held = replace(control, lock=tmp_path / "lock", holders=frozenset({1}))
    known = HostDisk(name="vm1", record_path=record, control=held, in_use=True)
    found = await ask(monkeypatch, [known, HostDisk(control=control)])
    assert [(each.name, each.running) for each in found] == [("vm1", True)]


async def test_no_answer_is_that_of_a_record_that_nobody_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """But in its own place: there it may be that the lock cannot be seen."""
    answers = {"vm1": "/r/vm1", "vm2": "/r/vm3"}

    async def ask_found(control: Path, *_: str) -> tuple[Path, list[Any]]:
        return control, [{**STATUS, "record": answers[control.name]}, MIRROR]

    monkeypatch.setattr(disks, "ask_found", ask_found)
    asked = [HostDisk(name=name, record_path=Path(f"/r/{name}"), control=Path(name)) for name in answers]
    found = await ask(monkeypatch, [*asked, HostDisk(name="vm3", record_path=Path("/r/vm3"))])
    assert [(each.name, each.running) for each in found] == [
        ("vm1", True), ("vm2", False), (None, True), ("vm3", False),
    ]  # fmt: skip


async def test_no_answer_is_that_of_a_record_whose_lock_another_one_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else its commands would go to whoever says that it is its backend."""
    records = {name: tmp_path / f"{name}.record.json" for name in ("vm1", "vm2", "vm3")}

    async def ask_found(control: FoundSocket, *_: str) -> tuple[FoundSocket, list[Any]]:
        name = control.path.parent.name
        said = "vm1" if name in ("vm2", "vm3") else name
        return control, [{**STATUS, "record": str(records[said])}, {**MIRROR, "destination": f"/{name}"}]

    monkeypatch.setattr(disks, "ask_found", ask_found)
    places = {name: tmp_path / name / "control" for name in records}
    locks = {name: Path(f"{record}.lock") for name, record in records.items()}
    found = await ask(
        monkeypatch,
        [
            HostDisk(
                name=name,
                record_path=records[name],
                in_use=lock is not None,
                control=FoundSocket(places[name], lock, holders),
            )
            for name, lock, holders in (
                ("vm1", locks["vm1"], frozenset({1})),
                ("vm2", locks["vm2"], frozenset({2})),
                ("vm3", None, frozenset()),  # which has let go of its lock
            )
        ],
    )
    shown = [(each.name, each.other, str(each.control)) for each in found]
    assert shown == [
        ("vm1", "/vm1", str(places["vm1"])),
        ("vm2", "/vm2", str(places["vm2"])),
        ("vm3", None, "None"),
        (None, "/vm3", str(places["vm3"])),
    ]
