# SPDX-License-Identifier: Apache-2.0
"""Frontends of Debian 13: libblkio (through qemu-io and nbdkit), and QEMU 10 as a guest's host."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path

import pytest

from tests.guest.assets import AssetError, GuestAssets
from tests.guest.backends import Vhostsync, start_backend
from tests.guest.debian13 import inside, run_inside, tree
from tests.guest.harness import Guest, GuestDisk, GuestOptions, machine_command, verify_blocks
from tests.guest.images import digest, new_image
from tests.sizes import MIB

pytestmark = [pytest.mark.guest, pytest.mark.debian13, pytest.mark.timeout(600)]  # the tree is made


@pytest.fixture(scope="session")
def trixie(request: pytest.FixtureRequest) -> Path:
    if not request.config.getoption("--debian13"):
        pytest.skip(
            "NOT TESTED: frontends of Debian 13; `./run test --debian13` makes the tree and tests them"
        )
    try:
        return tree()
    except AssetError as error:
        pytest.fail(str(error), pytrace=False)


# Some of everything that libblkio can ask for; each read states the byte that it must find.
IO = (
    "write -P 0xa1 0 4k",
    "write -P 0xb2 1M 2M",
    "write -P 0xc3 12345856 512",
    "flush",
    "write -z 2M 512k",
    "discard 1M 256k",
    "read -P 0xa1 0 4k",
    "read -P 0xb2 1310720 786432",
    "read -P 0 2M 512k",
    "read -P 0xb2 2621440 524288",
    "read -P 0xc3 12345856 512",
    "aio_write -P 0xd4 5M 1M",
    "aio_write -P 0xd5 6M 1M",
    "aio_write -P 0xd6 7M 1M",
    "aio_flush",
    "read -P 0xd5 6M 1M",
)


def check_image(image: Path) -> None:
    """What IO leaves behind."""
    content = image.read_bytes()
    assert content[:4096] == b"\xa1" * 4096
    assert content[12345856 : 12345856 + 513] == b"\xc3" * 512 + b"\0"
    assert content[2 * MIB : 2 * MIB + MIB // 2] == bytes(MIB // 2)
    assert content[5 * MIB : 8 * MIB] == b"\xd4" * MIB + b"\xd5" * MIB + b"\xd6" * MIB


def commands(*lines: str) -> list[str]:
    return [word for line in lines for word in ("-c", line)]


@pytest.mark.usefixtures("assets")
def test_qemu_io_through_libblkio(trixie: Path, work: Path) -> None:
    image = new_image(work / "disk.img", 16)
    with start_backend(work, image, queues=2) as backend:
        disk = f"driver=virtio-blk-vhost-user,path={backend.socket},cache.direct=on,discard=unmap"
        run_inside(trixie, "qemu-io", "--image-opts", *commands(*IO), disk)
        check_image(image)
        # A second frontend after the first, on the same backend.
        run_inside(trixie, "qemu-io", "--image-opts", *commands("read -P 0xd4 5M 1M"), disk)
        backend.stop()


def test_nbdkit_through_libblkio_while_mirrored(trixie: Path, work: Path) -> None:
    image, destination = new_image(work / "disk.img", 16), new_image(work / "destination.img", 16)
    with start_backend(work, image) as backend:
        backend.start_mirror(destination)
        backend.wait_steady()
        quoted = " ".join(f"-c '{line}'" for line in IO)
        through_nbd = f'qemu-io -f raw {quoted} "$uri"'
        plugin = ("blkio", "virtio-blk-vhost-user", f"path={backend.socket}")
        run_inside(trixie, "nbdkit", "-U", "-", *plugin, "--run", through_nbd)
        check_image(image)
        backend.stop()
    assert digest(image) == digest(destination)


def machine(trixie: Path, assets: GuestAssets, work: Path, disk: GuestDisk) -> Guest:
    """The cache folder is not there inside the tree; the work folder is."""
    kernel, initramfs = Path(shutil.copy(assets.kernel, work)), Path(shutil.copy(assets.initramfs, work))
    here = dataclasses.replace(assets, kernel=kernel, initramfs=initramfs)
    options = GuestOptions(qemu=(*inside(trixie), "qemu-system-x86_64"))
    return Guest(here, work, machine_command([disk], options))


def test_guest_under_qemu_10(trixie: Path, assets: GuestAssets, work: Path) -> None:
    """The main job in small: write, mirror, switch under load, stop and continue, power off, compare."""
    source, destination = new_image(work / "source.img", 64), new_image(work / "destination.img", 64)
    with start_backend(work, source, queues=2) as backend:
        with machine(trixie, assets, work, GuestDisk(backend.socket, queues=2, queue_size=64)) as guest:
            load = guest.start_load("/dev/vda", blocks=8192, threads=8)
            load.next_report()
            backend.start_mirror(destination)
            backend.wait_steady()
            before = load.fresh_report()
            backend.switch()
            after = load.fresh_report()
            verify_blocks(assets, source, load, synced=before.synced, issued=after.issued)
            with guest.qmp() as monitor:
                monitor.execute("stop")
                monitor.execute("cont")
            load.fresh_report()
            last = guest.stop_load(load)
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()
    verify_blocks(assets, destination, load, synced=last.synced, issued=last.issued)


def test_restarted_under_qemu_10_that_connects_again_within_milliseconds(
    trixie: Path, assets: GuestAssets, work: Path
) -> None:
    """A stop in order and a start, under load: nothing is copied again, the guest's kernel notices nothing.
    What its slowest write took is printed."""
    source, destination = new_image(work / "source.img", 64), new_image(work / "destination.img", 64)
    bitmap = ("--bitmap", str(work / "bitmap"))
    with contextlib.ExitStack() as backends:
        backend = backends.enter_context(Vhostsync(work, source, queues=2, options=bitmap))
        disk = GuestDisk(backend.socket, queues=2, chardev="reconnect-ms=20")
        with machine(trixie, assets, work, disk) as guest:
            load = guest.start_load("/dev/vda", blocks=8192, threads=8)
            load.next_report()
            backend.start_mirror(destination)
            backend.wait_steady()
            before_ms = load.fresh_report().slowest_ms
            paused_ms = []
            for _ in range(3):
                load.drain()
                backend.stop()
                backend = backends.enter_context(Vhostsync(work, source, queues=2, options=bitmap))
                paused_ms.append(max(load.next_report().slowest_ms, load.fresh_report().slowest_ms))
                backend.wait_steady()
                assert backend.status()["full-copy-reason"] is None
            print(f"slowest write: {before_ms:.0f} ms before, restarts {[round(ms) for ms in paused_ms]} ms")
            last = guest.stop_load(load)
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()
    for image in (source, destination):
        verify_blocks(assets, image, load, synced=last.synced, issued=last.issued)
