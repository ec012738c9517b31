# SPDX-License-Identifier: Apache-2.0
"""mirror-start, mirror-cancel, mirror-set-speed: what is refused, in which words, and that a refusal changes
nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.rig import (
    Served,
    fingerprint,
    flush,
    image,
    loop_device,
    same_content,
    write_block,
)
from tests.guest.images import new_image
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB


@contextmanager
def nothing_changes(served: Served) -> Iterator[None]:
    """Neither the mirror's state, nor the record, nor any file (but for what a guest writes)."""
    before = fingerprint(served.folder), {**served.mirror(), "record-error": None}
    yield
    assert (fingerprint(served.folder), {**served.mirror(), "record-error": None}) == before


def refused(served: Served, destination: Path | str, match: str, **arguments: Any) -> None:
    with nothing_changes(served), pytest.raises(QmpError, match=match):
        served.qmp.execute("mirror-start", destination=str(destination), **arguments)


def test_destinations_that_are_refused(work: Path) -> None:
    source, good = image(work / "a.img"), image(work / "good.img")
    (work / "link.img").symlink_to(source)
    os.link(source, work / "hard.img")
    small = new_image(work / "small.img", 15)
    # Who holds a disk is seen only by a backend that has kept its capabilities.
    off = ("--sandbox", "off")
    busy = image(work / "busy.img")
    with (
        Served(work, source, *off) as served,
        Served(work, busy, "--no-state-file", name="other") as other,
    ):
        other_disk = work / "busy.img"
        refused(served, work / "missing.img", "does not exist")
        refused(served, work / "nowhere" / "b.img", "no directory")
        refused(served, work, "a directory")
        refused(served, "relative.img", "must be an absolute path")
        refused(served, small, rf"too small: {15 * MIB} bytes, the guest's disk has {16 * MIB}")
        refused(served, other_disk, rf"in use.*pid {other.process.pid}")
        for same in ("a.img", "link.img", "hard.img"):
            refused(served, work / same, "the same storage")
        refused(served, good, "exists already and is not overwritten", create=True)
        refused(served, work / "nowhere" / "b.img", "cannot be created", create=True)
        refused(served, good, "Invalid parameter type", speed="fast")
        refused(served, good, "expects none or writeback", cache="maybe")
        with pytest.raises(QmpError, match="no mirror to cancel"), nothing_changes(served):
            served.qmp.execute("mirror-cancel")
        with pytest.raises(QmpError, match="needs the mirror in the steady state"), nothing_changes(served):
            served.qmp.execute("switch")
        # After all that it works, with the disk that was refused only for how it was asked for.
        with served.guest() as guest:
            write_block(guest, 1, 1)
            served.start_mirror(good)
        served.stop()
        other.stop()
    assert same_content(source, good)


def test_blocks_larger_than_the_guests_are_refused(work: Path) -> None:
    source, backing = image(work / "a.img"), image(work / "b.img")
    with loop_device(backing, 4096) as device, Served(work, source) as served:
        refused(served, device, "logical blocks of 4096 bytes and the guest writes blocks of 512")
        served.stop()
    with loop_device(backing, 512) as device, Served(work, source) as served:
        served.start_mirror(device)
        served.stop()
    assert same_content(source, backing)


def test_a_guest_of_larger_blocks_may_have_either(work: Path) -> None:
    source, backing = image(work / "a.img"), image(work / "b.img")
    with loop_device(backing, 4096) as device, Served(work, source, "--block-size", "4096") as served:
        served.start_mirror(device)
        served.stop()
    assert same_content(source, backing)


def test_a_loop_device_of_the_source_is_the_source(work: Path) -> None:
    source = image(work / "a.img")
    with Served(work, source) as served:
        with loop_device(source, 512) as device:
            refused(served, device, "the same storage")
        served.stop()


def test_an_image_that_is_created(work: Path) -> None:
    source, made = image(work / "a.img"), work / "made.img"
    with Served(work, source) as served:
        served.start_mirror(made, create=True)
        assert made.stat().st_size == 16 * MIB
        assert made.stat().st_mode & 0o777 == 0o600
        assert made.stat().st_blocks * 512 < 6 * MIB, "what is sparse on the source stays sparse"
        assert served.mirror()["copy-bytes-sparse"] >= 11 * MIB
        served.stop()
    assert same_content(source, made)


def test_one_mirror_at_a_time(work: Path) -> None:
    source, first, second = (image(work / name) for name in ("a.img", "b.img", "c.img"))
    with Served(work, source) as served:
        served.qmp.execute("mirror-start", destination=str(first), speed=MIB)
        assert served.state == "syncing"
        untouched = fingerprint(second)
        for _ in range(2):
            with pytest.raises(QmpError, match=r"b\.img is syncing already; cancel it first"):
                served.qmp.execute("mirror-start", destination=str(second))
        with pytest.raises(QmpError, match="needs the mirror in the steady state, and it is syncing"):
            served.qmp.execute("switch")
        assert fingerprint(second) == untouched
        record = served.record()
        assert record is not None and record.peer_worth == "inconsistent"
        served.qmp.execute("mirror-set-speed", speed=0)
        served.await_steady()
        with pytest.raises(QmpError, match=r"b\.img is steady already"):
            served.qmp.execute("mirror-start", destination=str(second))
        served.stop()


def test_cancel_in_steady_leaves_a_copy_of_that_moment(work: Path) -> None:
    source, copy = image(work / "a.img"), image(work / "b.img")
    with Served(work, source) as served, served.guest() as guest:
        served.start_mirror(copy)
        for number in range(40):
            write_block(guest, number, 1)
        served.qmp.execute("mirror-cancel")
        found = served.mirror()
        assert (found["state"], found["worth"]) == ("passthrough", "outdated")
        assert same_content(source, copy)
        record = served.record()
        assert record is not None and record.peer_worth == "outdated" and record.outdated_since
        # The disk is free again.
        write_block(guest, 0, 2)
        flush(guest)
        assert not same_content(source, copy)
        served.start_mirror(copy)
        assert same_content(source, copy)
        guest.close()
        served.stop()


def test_cancel_by_force_during_the_copy(work: Path) -> None:
    source, copy = image(work / "a.img"), image(work / "b.img", filled_mib=0)
    with Served(work, source) as served:
        served.qmp.execute("mirror-start", destination=str(copy), speed=MIB)
        served.qmp.execute("mirror-cancel", force=True)
        found = served.mirror()
        assert (found["state"], found["worth"]) == ("passthrough", "inconsistent")
        served.start_mirror(copy)
        served.qmp.execute("mirror-cancel", force=True)
        assert served.state == "passthrough"
        record = served.record()
        assert record is not None and record.peer_worth == "outdated"
        served.stop()


def test_a_mirror_that_cannot_be_recorded_is_not_begun(work: Path) -> None:
    source, copy = image(work / "a.img"), image(work / "b.img")
    (work / "record").mkdir()
    record = work / "record" / "r.json"
    with Served(work, source, "--state-file", record) as served:
        record.unlink()
        record.mkdir()  # what a rename cannot replace
        (record / "full").touch()
        refused(served, copy, "cannot be replaced")
        (record / "full").unlink()
        record.rmdir()
        served.qmp.execute("mirror-start", destination=str(copy))
        served.await_steady()
        served.stop()


def test_a_speed_without_a_mirror_is_refused(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served:
        with pytest.raises(QmpError, match="no mirror whose copy could be limited"):
            served.qmp.execute("mirror-set-speed", speed=1 << 20)
        served.start_mirror(image(work / "b.img", filled_mib=0))
        served.qmp.execute("mirror-set-speed", speed=1 << 20)
        assert served.mirror()["speed-bytes-per-s"] == 1 << 20
        served.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="ROOT alone is told of the capabilities that it lacks")
def test_root_is_told_why_it_is_denied_a_disk(work: Path) -> None:
    others = image(work / "b.img", filled_mib=0)
    os.chown(others, 65534, 65534)
    others.chmod(0o600)
    with Served(work, image(work / "a.img")) as served:
        with pytest.raises(QmpError, match=r"Permission denied \(it runs as root without capabilities"):
            served.qmp.execute("mirror-start", destination=str(others))
        served.stop()
