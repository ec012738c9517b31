# SPDX-License-Identifier: Apache-2.0
"""A restart brings the mirror back that was there, unless somebody took it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.daemon.rig import (
    Served,
    await_true,
    flush,
    image,
    lacking,
    same_content,
    write_block,
)
from tests.guest.qmp_client import QmpError

REGION = 64 << 10
NOT_RESUMED = "the mirror of the last run is not resumed"
TAKEN = "the last destination belongs to another state record by now: no mirror is resumed to it"


def logged(served: Served, message: str) -> list[dict[str, str]]:
    entries = [json.loads(line) for line in served.process.log.read_text().splitlines()]
    return [entry for entry in entries if entry["message"] == message]


def killed_while_steady(work: Path, source: Path, other: Path) -> None:
    with Served(work, source) as served:
        served.start_mirror(other)
        served.kill()


def not_resumed(served: Served, run: int = 1) -> str:
    """Why, as the status says. The log is of all the runs so far, this is the one of that number."""
    await_true(lambda: len(logged(served, NOT_RESUMED)) == run, "it is logged")
    found = served.mirror()
    assert (found["state"], found["wanted"]) == ("passthrough", True)
    return str(found["last-error"])


def test_after_a_kill_what_differs_is_copied(work: Path) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    options = ("--bitmap", work / "bits")
    with Served(work, source, *options) as served, served.guest() as guest:
        served.start_mirror(other, speed=1 << 40)
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        for number in (0, 100, 2000):
            write_block(guest, number, 1)
        flush(guest)
        served.kill()
    with Served(work, source, *options) as served, served.guest() as guest:
        served.await_resumed()
        found = served.mirror()
        assert found["full-copy-reason"] is None and found["copy-bytes-total"] <= 3 * REGION
        assert found["speed-bytes-per-s"] == 1 << 40
        write_block(guest, 3, 2)
        flush(guest)
        guest.close()
        served.stop()
    assert same_content(source, other)
    assert lacking(other, {0: 1, 100: 1, 2000: 1, 3: 2}) == []


def test_after_an_end_in_order_it_is_wanted_until_that_is_taken_back(work: Path) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(other)
        served.stop()
    with Served(work, source, "--resume-mirror", "off") as served:
        assert (served.state, served.mirror()["wanted"]) == ("passthrough", True)
        served.stop()
    with Served(work, source) as served:
        served.await_resumed()
        assert served.mirror()["full-copy-reason"].startswith("what the last run's copy lacks is not known")
        assert '"reason": "resumed"' in served.process.last_output()
        served.qmp.execute("mirror-cancel")
        assert not served.mirror()["wanted"]
        served.kill()
    with Served(work, source) as served:
        assert (served.state, served.mirror()["wanted"]) == ("passthrough", False)
        served.start_mirror(other)
        served.stop()
    with Served(work, source, "--resume-mirror", "off") as served:
        served.qmp.execute("mirror-cancel")  # of what a restart would resume
        with pytest.raises(QmpError, match="there is no mirror to cancel"):
            served.qmp.execute("mirror-cancel")
        served.stop()


def test_one_that_is_missing_comes_back_later(work: Path) -> None:
    source, other, away = image(work / "a.img"), image(work / "b.img"), work / "away.img"
    killed_while_steady(work, source, other)
    other.rename(away)
    with Served(work, source) as served:
        assert str(other) in not_resumed(served)
        served.stop()
    with Served(work, source, "--destination-retry", "200ms") as served, served.guest() as guest:
        assert str(other) in not_resumed(served, run=2)
        write_block(guest, 1, 1)
        flush(guest)
        served.qmp.wait_event("DESTINATION_RETRY", 30, what="failed")
        away.rename(other)
        served.await_resumed()
        assert len(logged(served, NOT_RESUMED)) == 2, "once in each run"
        assert served.mirror()["last-error"] is None
        guest.close()
        served.stop()
    assert same_content(source, other) and lacking(other, {1: 1}) == []


def test_another_disk_of_its_name_is_not_overwritten(work: Path) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    killed_while_steady(work, source, other)
    other.rename(work / "away.img")
    untouched = image(other).read_bytes()
    with Served(work, source) as served:
        assert "not known to be the disk that was mirrored to before" in not_resumed(served)
        assert other.read_bytes() == untouched
        served.start_mirror(other)
        served.stop()
    assert same_content(source, other)


def test_a_disk_that_another_guest_is_on_by_now_is_left_alone(work: Path) -> None:
    source, other, third = image(work / "a.img"), image(work / "b.img"), image(work / "c.img")
    with Served(work, source) as served:
        served.start_mirror(other)
        served.stop()
    with Served(work, third, name="second") as served:
        served.qmp.execute("mirror-start", destination=str(other))
        served.await_steady()
        served.qmp.execute("switch")
        served.stop()
    assert same_content(other, third)
    with Served(work, source) as served, served.guest() as guest:
        assert (served.state, served.mirror()["wanted"]) == ("passthrough", False)
        assert logged(served, TAKEN)
        write_block(guest, 1, 1)
        guest.close()
        served.stop()
    assert same_content(other, third)
    with Served(work, other, name="second") as served:
        assert served.qmp.execute("query-status")["epoch"] == 2
        served.stop()
