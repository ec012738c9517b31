# SPDX-License-Identifier: Apache-2.0
"""The worst day: a disk is lost, or another file lies in its place, and somebody starts what there is."""

from __future__ import annotations

from pathlib import Path

from tests.daemon.rig import Served, block_of, flush, image, refused_start, write_block

BLOCK = 4096


def refusal(work: Path, disk: Path, *answer: str) -> str:
    code, stderr = refused_start(
        "serve", "--blk-file", disk, "--socket-path", work / "x.sock", *answer,
        env={"STATE_DIRECTORY": str(work / "state")},
    )  # fmt: skip
    assert code == 1 and "Traceback" not in stderr, stderr
    return stderr


def killed_in_steady(work: Path) -> tuple[Path, Path]:
    """Source and destination of a mirror whose backend is gone; the guest has flushed a block."""
    source, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served, served.guest() as guest:
        served.start_mirror(other)
        write_block(guest, 1, 1)
        flush(guest)
        served.kill()
    return source, other


def test_an_old_backup_at_the_sources_path_is_a_question(work: Path) -> None:
    """The destination has all that was flushed, and nothing says otherwise before the operator does."""
    source, other = killed_in_steady(work)
    source.unlink()
    image(source)
    records = {path: path.read_bytes() for path in (work / "state").glob("*.json")}
    question = refusal(work, source)
    assert "lacks nothing that was flushed" in question and f"--blk-file {other} --promote" in question
    assert {path: path.read_bytes() for path in (work / "state").glob("*.json")} == records
    with Served(work, other, "--promote") as served, served.guest() as guest:
        assert guest.read_now(BLOCK, BLOCK) == block_of(1, 1)
        guest.close()
        served.stop()
    assert f"the current disk is {other}" in refusal(work, source)


def test_a_lost_disk_that_comes_back_is_told_so(work: Path) -> None:
    source, other = killed_in_steady(work)
    away = source.rename(work / "away.img")
    assert "up-to-date" in refusal(work, other)
    with Served(work, other, "--promote") as served, served.guest() as guest:
        write_block(guest, 2, 2)
        flush(guest)
        served.kill()
    for name in (away, source):
        away = away.rename(name)
        assert "was given up as lost" in refusal(work, away)
    with Served(work, other) as served, served.guest() as guest:
        assert guest.read_now(2 * BLOCK, BLOCK) == block_of(2, 2)
        served.start_mirror(source)
        guest.close()
        served.stop()


def test_the_old_disk_under_a_new_name_is_refused(work: Path) -> None:
    """mv a a.old; mv b a: the name is kept, and the pointer of the one does not replace that of the other."""
    source, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served:
        served.start_mirror(other)
        served.qmp.execute("switch")
        served.stop()
    old = source.rename(work / "a.old")
    other.rename(source)
    with Served(work, source) as served:
        assert served.qmp.execute("query-status")["epoch"] == 2
        served.stop()
    assert "was superseded by a switch" in refusal(work, old)


def test_a_record_that_is_missing_is_no_licence(work: Path) -> None:
    """Moved away or lost: neither disk is served on trust, for both would be."""
    source, other = killed_in_steady(work)
    (record,) = (work / "state").glob("*.record.json")
    kept = record.rename(work / "kept")
    for disk in (source, other):
        assert f"the state record {record}, which knows {disk} and another disk, is missing" in refusal(
            work, disk
        )
    kept.rename(record)
    with Served(work, source, "--resume-mirror", "off") as served:
        served.stop()
    record.unlink()
    with Served(work, source, "--promote") as served:
        assert served.qmp.execute("query-status")["epoch"] == 1
        served.stop()
    assert "--promote" in refusal(work, other)
