# SPDX-License-Identifier: Apache-2.0
"""What a disk holds and who uses it: nothing is overwritten unseen, and no container is served as a disk. A
guest that writes a header of such a thing to its own disk is asked nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.daemon.rig import (
    BLOCK,
    Served,
    ext4,
    flush,
    image,
    loop_device,
    same_content,
)
from tests.daemon.test_attach import refused
from tests.daemon.test_start import refusal
from tests.frontend import Frontend
from tests.sizes import MIB
from vhostsync.record.state_record import Worth

QCOW2 = b"QFI\xfb\x00\x00\x00\x03"

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")


def qcow2(path: Path) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
    with path.open("r+b") as file:
        file.truncate(16 * MIB)  # large enough for a destination
    return path


def luks(path: Path) -> Path:
    image(path)
    with path.open("r+b") as file:
        file.write(b"LUKS\xba\xbe\x00\x01")
    return path


def write_header(guest: Frontend, header: bytes) -> None:
    assert guest.write_now(0, header.ljust(BLOCK, b"\0")).ok
    flush(guest)


@needs_qemu
def test_an_image_of_another_format_is_not_served(work: Path) -> None:
    disk = qcow2(work / "a.img")
    sentence = refusal(work, disk)
    assert "is a qcow2 image, and only raw disks can be served" in sentence and "qemu-nbd" in sentence
    assert "is a qcow2 image" in refusal(work, disk, "--no-state-file")
    assert "is a qcow2 image" in refusal(work, disk, "--read-only")
    with Served(work, disk, "--format", "raw") as served:
        served.stop()
    with Served(work, disk) as served:  # the record knows it
        served.stop()


def test_a_guest_that_writes_such_a_header_keeps_its_disk(work: Path) -> None:
    disk, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, disk) as served, served.guest() as guest:
        write_header(guest, QCOW2)
        served.kill()  # in its very first run
    with Served(work, disk) as served, served.guest() as guest:
        assert guest.read_now(0, BLOCK).startswith(QCOW2)
        served.start_mirror(other)
        served.qmp.execute("switch")
        guest.close()
        served.stop()
    with Served(work, other) as served:
        served.start_mirror(disk)  # once its source: nobody is asked
        served.qmp.execute("mirror-cancel")
        served.start_mirror(disk)
        served.stop()
    assert same_content(disk, other)


def test_a_mirror_to_a_disk_with_such_a_header_is_resumed(work: Path) -> None:
    disk, other = image(work / "a.img"), image(work / "b.img")
    with Served(work, disk) as served, served.guest() as guest:
        served.start_mirror(other)
        write_header(guest, QCOW2)
        guest.close()
        served.stop()
    with Served(work, disk) as served:
        served.await_resumed()
        served.stop()
    assert same_content(disk, other)


@needs_qemu
def test_a_destination_that_holds_something_is_not_overwritten_unasked(work: Path) -> None:
    disk, former = image(work / "a.img"), image(work / "former.img")
    with Served(work, disk) as served:
        served.start_mirror(former)
        served.qmp.execute("mirror-cancel")
        for destination, what in (
            (qcow2(work / "b.img"), "qcow2 image"), (luks(work / "c.img"), "crypto_LUKS"),
        ):  # fmt: skip
            refused(served, destination, f"holds something that would be lost: {what}.*--force")
        record = served.record()
        assert record is not None and record.peer is not None
        assert (record.peer.path, record.peer_worth) == (str(former), Worth.OUTDATED)
        served.start_mirror(work / "c.img", force=True)
        served.stop()
    assert same_content(disk, work / "c.img")


def test_an_image_that_is_mounted_is_no_destination(work: Path) -> None:
    disk = image(work / "a.img")
    with Served(work, disk) as served:
        with ext4(work):
            # Not by force either: whoever has mounted it would go on to write.
            for arguments in ({}, {"force": True}):
                refused(served, work / "ext4.img", f"shows it, and .* mounted at {work}/ext4", **arguments)
        refused(served, work / "ext4.img", r"ext4 \(file system\)")
        served.stop()


def test_a_read_only_device_is_refused_before_the_former_destination_is_given_up(work: Path) -> None:
    disk, former, backing = (image(work / name) for name in ("a.img", "former.img", "backing.img"))
    with Served(work, disk) as served:
        served.start_mirror(former)
        served.qmp.execute("mirror-cancel")
        record = served.record()
        with loop_device(backing, 512, "--read-only") as device:
            refused(served, device, "is a read-only device", force=True)
            assert served.record() == record
        served.stop()
    with loop_device(backing, 512, "--read-only") as device:
        assert "is a read-only device" in refusal(work, device)
        with Served(work, device, "--read-only", "--no-state-file") as served:
            served.stop()
