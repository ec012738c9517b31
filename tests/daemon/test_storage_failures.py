# SPDX-License-Identifier: Apache-2.0
"""What lies below the disks: a file system that goes down or is read-only, swap space, btrfs; and a repair
that is killed. What the backend then does, and says."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.daemon.rig import (
    Load,
    Mounted,
    Served,
    _root,
    await_true,
    ext4,
    flush,
    image,
    lacking,
    loop_device,
    mounted,
    same_content,
    write_block,
)
from tests.daemon.test_start import refusal
from tests.frontend import Status
from tests.guest.images import new_image
from tests.guest.qmp_client import QmpError
from tests.sizes import MIB
from vhostsync.host.flocks import lock_holder, lock_holders

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), fs/ext4/ext4.h
WITHOUT_LOG = struct.pack("=I", 2)


def go_down(files: Mounted) -> None:
    """As after an error of its device that cannot be mended: all that is asked of it fails with EIO."""
    fd = os.open(files.folder, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, WITHOUT_LOG)
    finally:
        os.close(fd)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_file_system_of_the_destination_goes_down(work: Path, threads: str) -> None:
    source = image(work / "a.img")
    with ext4(work) as files:
        other = image(files.folder / "b.img")
        with Served(work, source, "--threads", threads) as served, Load(served) as load:
            served.start_mirror(other)
            load.go_on()
            go_down(files)
            change = served.await_state("degraded")
            assert "Input/output error" in change["error"]
            load.go_on()
            served.await_worth("outdated")
            with pytest.raises(QmpError, match="cannot be opened: Input/output error"):
                served.qmp.execute("mirror-start", destination=str(other))
            expected = load.stop()
            served.stop()
        assert lacking(source, expected) == []


@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_file_system_of_the_source_goes_down(work: Path, threads: str) -> None:
    other = image(work / "b.img")
    with ext4(work) as files:
        source = image(files.folder / "a.img")
        options = ("--on-source-error", "switch", "--threads", threads)
        with Served(work, source, *options) as served, Load(served) as load:
            served.start_mirror(other)
            load.go_on()
            go_down(files)
            load.go_on()  # and sees no error
            assert served.mirror()["source"] == str(other)
            expected = load.stop()
            served.stop()
        assert lacking(other, expected) == []


def test_the_file_system_of_the_record_goes_down(work: Path) -> None:
    """Alone it hurts nobody; when the destination is lost besides, the guest's flushes fail, as is said."""
    source = image(work / "a.img")
    (work / "records").mkdir()
    with ext4(work / "records") as records, ext4(work) as files:
        other = image(files.folder / "b.img")
        record = records.folder / "r.json"
        with Served(work, source, "--state-file", record) as served, served.guest() as guest:
            served.qmp.execute("mirror-start", destination=str(other))
            served.await_steady()
            await_true(lambda: b'"up-to-date"' in record.read_bytes(), "the record says so")
            go_down(records)
            write_block(guest, 1, 1)
            flush(guest)
            go_down(files)
            write_block(guest, 2, 1)
            assert guest.flush_now().status == Status.IOERR
            found = served.mirror()
            assert found["flushes-fail"] and "Input/output error" in found["record-error"]
            guest.close()
            served.stop()


def test_the_file_system_of_the_bitmap_goes_down(work: Path) -> None:
    source, other = image(work / "a.img"), image(work / "b.img")
    with ext4(work) as files:
        with Served(work, source, "--bitmap", files.folder / "bits") as served, served.guest() as guest:
            served.start_mirror(other)
            write_block(guest, 1, 1)
            go_down(files)
            write_block(guest, 3000, 1)  # in another extent, which the bitmap has to know durably before
            assert "Input/output error" in served.qmp.wait_event("BITMAP_FAILED")["error"]
            flush(guest)
            assert (served.state, served.mirror()["bitmap"]) == ("steady", None)
            guest.close()
            served.stop()
        assert same_content(source, other)


def test_a_read_only_file_system_is_named_as_the_cause(work: Path) -> None:
    source = image(work / "a.img")
    with ext4(work) as files:
        other = image(files.folder / "b.img")
        _root("mount", "-o", "remount,ro", files.folder)
        with Served(work, source) as served:
            with pytest.raises(QmpError, match=r"its file system is read-only; .*mount it for writing"):
                served.qmp.execute("mirror-start", destination=str(other))
            with pytest.raises(QmpError, match="cannot be created: Read-only file system"):
                served.qmp.execute("mirror-start", destination=str(files.folder / "c.img"), create=True)
            served.stop()


def test_a_swap_device_is_no_destination(work: Path) -> None:
    source, backing = image(work / "a.img"), new_image(work / "b.img", 16)
    with loop_device(backing, 512) as device:
        _root("mkswap", device)
        try:
            _root("swapon", "-p", "0", device)
        except OSError as error:
            pytest.skip(f"THIS TEST IS LEFT OUT, as there is no swap here: {error}")
        try:
            with Served(work, source) as served:
                with pytest.raises(QmpError, match=f"{device} is in use: it is swap space"):
                    served.qmp.execute("mirror-start", destination=str(device), force=True)
                served.stop()
        finally:
            _root("swapoff", device)


def test_a_repair_that_is_killed_is_gone_on_with_by_the_next(work: Path) -> None:
    """What was repaired is durable or copied again; what was not reached is still different, and is found."""
    source, other = image(work / "a.img"), image(work / "b.img")
    bits = ("--bitmap", work / "bits")
    with Served(work, source, *bits) as served, served.guest() as guest:
        served.start_mirror(other)
        write_block(guest, 1, 1)
        flush(guest)
        with other.open("r+b") as file:  # behind its back
            for mib in range(16):
                file.seek(mib * MIB)
                file.write(b"damage" * 100)
        served.qmp.execute("verify", repair=True, speed=4 * MIB)
        await_true(lambda: served.qmp.execute("query-verify")["bytes-repaired"] > 0, "it repairs")
        served.kill()
    with Served(work, source, *bits) as served:
        served.await_resumed()
        served.qmp.execute("verify", repair=True)
        assert served.qmp.wait_event("VERIFY_COMPLETED")["state"] in ("repaired", "equal")
        served.stop()
    assert same_content(source, other)


@contextmanager
def btrfs(work: Path) -> Iterator[Mounted]:
    """Checksums, copies on write, and device numbers of its own."""
    if shutil.which("mkfs.btrfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        pytest.skip("THIS TEST IS LEFT OUT, as there is no mkfs.btrfs here")
    backing = new_image(work / "btrfs.img", 256)
    _root("mkfs.btrfs", "-q", backing)
    with mounted(work / "btrfs", "-o", "loop", backing) as files:
        yield files


def test_who_holds_a_lock_on_btrfs(work: Path) -> None:
    """Its files tell another device number than the list of locks has."""
    with btrfs(work) as files:
        lock = files.folder / "lock"
        with lock.open("wb") as file:
            assert lock_holder(lock) is None
            fcntl.flock(file, fcntl.LOCK_EX)
            assert lock_holder(lock) == os.getpid()


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"


def test_who_holds_one_of_two_locks_of_one_number(work: Path) -> None:
    """Two subvolumes of a btrfs have files of one number, and the list of locks does not tell which is which:
    the holder is among those that are told, and no other is told for it."""
    with btrfs(work) as files, ExitStack() as stack:
        holders = []
        for name in ("one", "two"):
            _root("btrfs", "subvolume", "create", files.folder / name)
            holder = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", HOLD, files.folder / name / "lock"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )
            )  # fmt: skip
            assert holder.stdin is not None and holder.stdout is not None
            stack.callback(holder.stdin.close)
            assert holder.stdout.readline() == b"held\n"
            holders.append(holder.pid)
        locks = [files.folder / name / "lock" for name in ("one", "two")]
        assert len({lock.stat().st_ino for lock in locks}) == 1
        for lock in locks:
            assert lock_holders(lock) == set(holders) and lock_holder(lock) == 0


def test_disks_on_btrfs(work: Path) -> None:
    bits = ("--bitmap", work / "bits")
    with btrfs(work) as files:
        source, other = image(files.folder / "a.img"), image(files.folder / "b.img")
        with Served(work, source, *bits) as served, Load(served) as load:
            served.start_mirror(other)
            load.go_on()
            served.qmp.execute("switch", keep_mirror=True)
            load.go_on()
            expected = load.stop()
            served.stop()
        assert lacking(other, expected) == [] and same_content(source, other)
        with Served(work, other, *bits) as served:
            served.await_resumed()
            assert served.mirror()["full-copy-reason"] is None
            served.stop()
        with loop_device(other, 512) as device:
            assert f"{device} shows it" in refusal(work, other)
