# SPDX-License-Identifier: Apache-2.0
"""Opening disks: what is refused and how it is said, and that QEMU's locks and these keep each other out."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.rig import loop_device
from tests.sizes import MIB
from vhostsync.errors import DiskError
from vhostsync.mirror.destination import Place, check_destination, check_distinct, open_destination
from vhostsync.mirror_target import MirrorTarget
from vhostsync.storage import local as disks
from vhostsync.storage.file import create_image
from vhostsync.storage.identify import identify
from vhostsync.storage.identity import Likeness
from vhostsync.storage.layers import layers
from vhostsync.storage.local import LocalDisk, open_disk
from vhostsync.storage.native import DiskProbe

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="block devices need root")
needs_qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io and qemu-img")


def probe(fd: int, direct: bool) -> DiskProbe:
    return DiskProbe(os.lseek(fd, 0, os.SEEK_END), False, 512, 4096, 512 if direct else 1, False, 0)


def opened(path: Path, *, read_only: bool = False, lock_timeout_s: float = 0) -> LocalDisk:
    return open_disk(path, read_only=read_only, cache="writeback", lock_timeout_s=lock_timeout_s, probe=probe)


def place_of(path: Path) -> Place:
    return Place.of_identity(disks.LOCAL.identify(str(path)))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    create_image(path, MIB)
    return path


# ---- opening --------------------------------------------------------------------


def test_an_image_file_is_opened(image: Path) -> None:
    with contextlib.closing(opened(image)) as disk:
        assert (disk.bytes, disk.direct, disk.path) == (MIB, False, image)
        assert not os.get_inheritable(disk.fd.fileno())


def test_direct_io_by_default_where_there_is_some(image: Path) -> None:
    disk = open_disk(image, read_only=False, cache="none", lock_timeout_s=0, probe=probe)
    with contextlib.closing(disk):
        has = bool(os.O_DIRECT & int(flags_of(disk.fd.fileno())))
        assert disk.direct == has


def test_a_file_system_without_direct_io_is_buffered(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", without_direct)
    disk = open_disk(image, read_only=False, cache="none", lock_timeout_s=0, probe=probe)
    with contextlib.closing(disk):
        assert not disk.direct


def flags_of(fd: int) -> int:
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("flags:")).split()[1], 8)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "it does not exist"),
        (Path.mkdir, "is a directory, and a disk is an image file or a block device"),
        (make_fifo, "is a FIFO"),
        (make_socket, "is a socket"),
        (lambda path: path.symlink_to("/dev/null"), "is a character device"),
        (lambda path: path.symlink_to("nowhere"), "it does not exist"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
        (lambda path: path.write_bytes(b"x" * 511), "has 511 bytes, less than one block of 512"),
    ],
)
def test_what_is_no_disk_is_refused(tmp_path: Path, make: "object", sentence: str) -> None:
    path = tmp_path / "d"
    make(path)  # type: ignore[operator]
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DiskError, match=sentence):
        opened(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=f"there is no directory {tmp_path}/x"):
        opened(tmp_path / "x" / "d")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_permission_denied(image: Path) -> None:
    image.chmod(0o400)
    with pytest.raises(DiskError, match=r"cannot be opened for writing: Permission denied.*read-only"):
        opened(image)
    opened(image, read_only=True).close()


def test_a_failed_probe_closes_the_disk(image: Path) -> None:
    def fail(fd: int, direct: bool) -> DiskProbe:
        raise OSError(5, "Input/output error")

    with pytest.raises(DiskError, match="cannot be examined: Input/output error"):
        open_disk(image, read_only=False, cache="none", lock_timeout_s=0, probe=fail)
    opened(image).close()


def test_an_image_that_somebody_else_has_taken_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two mirrors are started to it in the same moment; the one that made it comes too late."""
    source, path = tmp_path / "a.img", tmp_path / "b.img"
    create_image(source, MIB)
    taken: list[LocalDisk] = []

    def create_and_lose(image: Path, size_bytes: int) -> os.stat_result:
        made = create_image(image, size_bytes)
        taken.append(opened(image))
        return made

    monkeypatch.setattr(disks, "create_image", create_and_lose)
    target = MirrorTarget(str(path), create=True, cache="writeback")
    with pytest.raises(DiskError, match="is in use"):
        open_destination(target, place_of(source), MIB, 512, 0)
    assert path.exists()
    taken.pop().close()
    path.unlink()
    monkeypatch.setattr(disks, "create_image", lambda image, _: create_image(image, MIB))
    with pytest.raises(DiskError, match="too small"):
        open_destination(target, place_of(source), 2 * MIB, 512, 0)
    assert not path.exists()


def test_a_file_that_has_taken_the_place_of_a_new_image_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = tmp_path / "a.img", tmp_path / "b.img"
    create_image(source, MIB)

    def create_and_lose(image: Path, size_bytes: int) -> os.stat_result:
        made = create_image(image, size_bytes)
        (tmp_path / "precious").write_bytes(b"precious" * MIB)
        (tmp_path / "precious").rename(image)
        return made

    monkeypatch.setattr(disks, "create_image", create_and_lose)
    with pytest.raises(DiskError, match="another file has taken the place"):
        target = MirrorTarget(str(path), create=True, cache="writeback")
        open_destination(target, place_of(source), MIB, 512, 0)
    assert path.read_bytes() == b"precious" * MIB


# ---- the locks -------------------------------------------------------------------


def test_one_writer_alone(image: Path) -> None:
    with contextlib.closing(opened(image)):
        with pytest.raises(DiskError, match="is in use"):
            opened(image, lock_timeout_s=0.03)
        with pytest.raises(DiskError, match="is in use"):
            opened(image, read_only=True)
    opened(image).close()


def test_readers_together_and_no_writer(image: Path) -> None:
    with (
        contextlib.closing(opened(image, read_only=True)),
        contextlib.closing(opened(image, read_only=True)),
        pytest.raises(DiskError, match="is in use"),
    ):
        opened(image)
    opened(image).close()


def test_the_lock_outlives_the_process_as_long_as_the_description(image: Path) -> None:
    disk = opened(image)
    named = image.with_name(os.fsdecode(b"caf\xc3"))  # the kernel cuts names off, also amid a character
    named.symlink_to(shutil.which("cat") or "cat")
    with subprocess.Popen([named], stdin=subprocess.PIPE, pass_fds=[disk.fd.fileno()]) as child:
        disk.close()
        with pytest.raises(DiskError, match=rf"open by caf\ufffd \(pid {child.pid}\)"):
            opened(image)
        child.kill()
        child.wait()
        opened(image, lock_timeout_s=10).close()


def test_a_file_replaced_while_it_was_waited_for_is_refused(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    try:
        image.with_suffix(".new").write_bytes(bytes(MIB))
        image.with_suffix(".new").rename(image)
        with pytest.raises(DiskError, match="was replaced by another file"):
            disks._check_not_replaced(fd, image)
    finally:
        os.close(fd)


@needs_qemu
def test_qemu_is_kept_out(image: Path) -> None:
    def qemu_io(*options: str) -> "subprocess.CompletedProcess[str]":
        command = ["qemu-io", "-f", "raw", *options, "-c", "read 0 512", str(image)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with contextlib.closing(opened(image)):
        for options in ((), ("-r",)):
            result = qemu_io(*options)
            assert result.returncode and "lock" in result.stderr, result.stderr
        command = ["qemu-img", "convert", "-f", "raw", "-O", "raw", str(image), f"{image}.copy"]
        convert = subprocess.run(command, capture_output=True, text=True, check=False)
        assert convert.returncode and "lock" in convert.stderr
        subprocess.run(["qemu-img", "info", "--force-share", image], check=True, capture_output=True)
    with contextlib.closing(opened(image, read_only=True)):
        assert qemu_io("-r").returncode == 0
        result = qemu_io()
        assert result.returncode and 'Failed to get "write" lock' in result.stderr
    assert qemu_io().returncode == 0


@contextlib.contextmanager
def qemu_holding(path: Path, *options: str) -> Iterator[None]:
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", *options, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write("read 0 512\n")
        for line in process.stdout:
            if "ops" in line:
                break
        try:
            yield
        finally:
            process.stdin.write("quit\n")


@needs_qemu
def test_qemu_keeps_us_out(image: Path) -> None:
    with qemu_holding(image):
        with pytest.raises(DiskError, match=r"in use \(QEMU's image lock\): open by qemu-io \(pid \d+\)"):
            opened(image)
        with pytest.raises(DiskError, match="is in use"):
            opened(image, read_only=True)
    with qemu_holding(image, "-r"):
        with pytest.raises(DiskError, match="is in use"):
            opened(image)
        opened(image, read_only=True).close()
    opened(image).close()


@needs_root
@needs_qemu
def test_block_devices_are_held_alone(image: Path) -> None:
    with loop_device(image) as device:
        with contextlib.closing(opened(device)) as disk:
            assert (disk.bytes, disk.identity.kind) == (MIB, "block")
            with pytest.raises(DiskError, match="is in use: mounted, part of another device, or open by"):
                opened(device, lock_timeout_s=0.03)
            command = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(device)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode and "lock" in result.stderr, "O_EXCL alone would not stop QEMU"
        with qemu_holding(device), pytest.raises(DiskError, match=r"qemu-io \(pid"):
            opened(device)
        opened(device).close()


# ---- creating ----------------------------------------------------------------------


def test_an_existing_file_is_not_overwritten(image: Path) -> None:
    image.write_bytes(b"precious")
    with pytest.raises(DiskError, match="exists already"):
        create_image(image, MIB)
    assert image.read_bytes() == b"precious"


def test_a_dangling_symlink_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(DiskError, match="exists already"):
        create_image(tmp_path / "link", MIB)
    assert not (tmp_path / "target").exists()


def test_what_cannot_be_created_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be created"):
        create_image(tmp_path / "x" / "d", MIB)
    with pytest.raises(DiskError, match="File too large"):
        create_image(tmp_path / "d", (1 << 63) - 1)
    assert not list(tmp_path.iterdir())


# ---- the destination -----------------------------------------------------------------


def test_a_destination_that_is_too_small(image: Path) -> None:
    with contextlib.closing(opened(image)) as disk:
        check_destination(disk, capacity_bytes=MIB, guest_block_bytes=512)
        with pytest.raises(DiskError, match=r"too small: 1048576 bytes.*1049088 \(512 more\)"):
            check_destination(disk, capacity_bytes=MIB + 512, guest_block_bytes=512)


def test_a_destination_with_larger_blocks(image: Path) -> None:
    def probe_4k(fd: int, direct: bool) -> DiskProbe:
        return DiskProbe(MIB, False, 4096, 4096, 4096, False, 0)

    disk = open_disk(image, read_only=False, cache="none", lock_timeout_s=0, probe=probe_4k)
    with contextlib.closing(disk):
        check_destination(disk, capacity_bytes=MIB, guest_block_bytes=4096)
        with pytest.raises(DiskError, match="blocks of 4096 bytes and the guest writes blocks of 512"):
            check_destination(disk, capacity_bytes=MIB, guest_block_bytes=512)


def test_a_destination_for_reading_only(image: Path) -> None:
    disk = opened(image, read_only=True)
    with contextlib.closing(disk), pytest.raises(DiskError, match="reading only"):
        check_destination(disk, capacity_bytes=MIB, guest_block_bytes=512)


def test_the_source_under_another_name_is_no_destination(image: Path, tmp_path: Path) -> None:
    (tmp_path / "symlink").symlink_to(image)
    (tmp_path / "hardlink").hardlink_to(image)
    create_image(tmp_path / "other", MIB)
    for name in ("image", "symlink", "hardlink"):
        with pytest.raises(DiskError, match="one file under two names"):
            check_distinct(place_of(image), str(tmp_path / name))
    check_distinct(place_of(image), str(tmp_path / "other"))
    check_distinct(place_of(image), str(tmp_path / "missing"))


def test_a_disk_that_has_the_sources_former_name_is_a_destination(image: Path, tmp_path: Path) -> None:
    """The two names were swapped while the source was served. The source itself is none, under any name."""
    source, moved = place_of(image), tmp_path / "moved"
    image.rename(moved)
    create_image(image, MIB)
    disk, _ = open_destination(MirrorTarget(str(image), cache="writeback"), source, MIB, 512, 0)
    disk.close()
    with pytest.raises(DiskError, match=rf"moved is the source, which was {image} when it was opened"):
        open_destination(MirrorTarget(str(moved), cache="writeback"), source, MIB, 512, 0)


@needs_root
def test_loop_devices_of_the_source_are_no_destination(image: Path, tmp_path: Path) -> None:
    half = MIB // 2
    with (
        loop_device(image, 512, "--sizelimit", str(half)) as low,
        loop_device(image, 512, "--offset", str(half)) as high,
        loop_device(image) as whole,
    ):
        for one, other in ((image, whole), (whole, image), (low, whole), (whole, high), (image, low)):
            with pytest.raises(DiskError, match="lies upon the other"):
                check_distinct(place_of(one), str(other))
        check_distinct(place_of(low), str(high))
        (tmp_path / "name").symlink_to(whole)
        with pytest.raises(DiskError, match="one device under two names"):
            check_distinct(place_of(whole), str(tmp_path / "name"))
        assert layers(high)[-1].start == half


# ---- identity --------------------------------------------------------------------------


def test_a_file_is_recognised_after_a_rename_and_not_after_a_replacement(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    before = identify(fd, image)
    os.close(fd)
    moved = image.rename(image.with_suffix(".moved"))
    fd = os.open(moved, os.O_RDWR)
    assert identify(fd, moved).likeness(before) is Likeness.SAME
    os.close(fd)
    moved.unlink()
    create_image(image, MIB)
    fd = os.open(image, os.O_RDWR)
    after = identify(fd, image)
    os.close(fd)
    if after.generation is not None or after.inode != before.inode:
        assert after.likeness(before) is Likeness.OTHER


def test_a_write_after_the_detach_is_seen(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    try:
        detached = identify(fd, image, with_ctime=True)
        assert identify(fd, image, with_ctime=True).changed_since(detached) is None
        os.utime(image, ns=(0, 0))
        assert identify(fd, image, with_ctime=True).changed_since(detached)
    finally:
        os.close(fd)


@needs_root
def test_a_loop_device_is_recognised_by_its_file(image: Path, tmp_path: Path) -> None:
    create_image(tmp_path / "other", MIB)
    with loop_device(image) as one, loop_device(image) as again, loop_device(tmp_path / "other") as other:
        found = []
        for device in (one, again, other):
            fd = os.open(device, os.O_RDONLY)
            found.append(identify(fd, device))
            os.close(fd)
        assert found[0].likeness(found[1]) is Likeness.SAME
        assert found[0].likeness(found[2]) is Likeness.OTHER


# ---- who uses a disk and asks for no lock ------------------------------------------------


@needs_root
def test_an_image_that_a_loop_device_shows_is_in_use(image: Path, tmp_path: Path) -> None:
    (tmp_path / "hardlink").hardlink_to(image)
    with loop_device(image) as device:
        for name in ("image", "hardlink"):
            with pytest.raises(DiskError, match=f"in use: {device} shows it.*losetup --detach {device}"):
                opened(tmp_path / name)
        with pytest.raises(DiskError, match="in use"):
            opened(image, read_only=True)  # the loop device writes
    with loop_device(image, 512, "--read-only"):
        opened(image, read_only=True).close()
        with pytest.raises(DiskError, match="in use"):
            opened(image)
    opened(image).close()


@needs_root
def test_a_mount_is_named_as_the_user_of_the_image_and_of_the_device(image: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, env=environment)
    folder = tmp_path / "mounted here"
    folder.mkdir()
    with loop_device(image) as device:
        subprocess.run(["mount", device, folder], check=True)
        try:
            with pytest.raises(DiskError, match=f"{device} shows it, and .* is mounted at {folder}"):
                opened(image)
            with pytest.raises(DiskError, match=f"{device} is in use: it is mounted at {folder}"):
                opened(device)
        finally:
            subprocess.run(["umount", folder], check=True)


@needs_root
def test_a_read_only_device_is_no_disk_to_write_to(image: Path) -> None:
    with loop_device(image) as device:
        subprocess.run(["/sbin/blockdev", "--setro", device], check=True)
        try:
            with pytest.raises(DiskError, match=f"{device} is a read-only device"):
                opened(device)
            opened(device, read_only=True).close()
        finally:  # it would stay so for whoever gets this loop device next
            subprocess.run(["/sbin/blockdev", "--setrw", device], check=True)


@needs_root
def test_swap_space_is_in_use(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swaps = tmp_path / "swaps"
    name = str(image).replace("/image", r"/im\141ge")
    swaps.write_text(f"Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n{name} file\t1020\t0\t-2\n")
    monkeypatch.setattr("vhostsync.storage.users.SWAPS", swaps)
    with pytest.raises(DiskError, match="it is swap space"):
        opened(image)
