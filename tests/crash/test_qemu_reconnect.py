# SPDX-License-Identifier: Apache-2.0
"""A real guest goes on while its disk's backend is killed and started again: QEMU reconnects, the guest's
kernel notices nothing, and nothing that it synced is lost.

VHOSTSYNC_QEMU_KILLS is the number of kills of each test (3 unless told)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.guest.assets import GuestAssets
from tests.guest.backends import Vhostsync
from tests.guest.harness import Guest, GuestDisk, machine_command, rings_are_packed, verify_blocks
from tests.guest.images import new_image

KILLS = int(os.environ.get("VHOSTSYNC_QEMU_KILLS", "3"))

pytestmark = [pytest.mark.guest, pytest.mark.timeout(180 + 20 * KILLS)]


@pytest.mark.parametrize(
    ("mirrored", "properties"),
    [(False, ""), (True, ""), (False, "packed=on")],
    ids=["alone", "mirrored", "packed"],
)
def test_backend_killed_under_a_guest(
    assets: GuestAssets, work: Path, mirrored: bool, properties: str
) -> None:
    """With `mirrored` the first backend dies in steady, and the last one copies all anew."""
    image, destination = new_image(work / "disk.img", 64), new_image(work / "destination.img", 64)
    backend = Vhostsync(work, image, queues=2)
    try:
        disk = GuestDisk(backend.socket, queues=2, chardev="reconnect=1", properties=properties)
        with Guest(assets, work, machine_command([disk])) as guest:
            assert rings_are_packed(guest) == bool(properties)
            load = guest.start_load("/dev/vda", blocks=8192, threads=8)
            load.next_report()
            if mirrored:
                backend.start_mirror(destination)
                backend.wait_steady()
            for _ in range(KILLS):
                before = load.fresh_report()
                backend.process.kill()
                backend.__exit__(None, None, None)
                # What was synced is there; the load waits now, or will as soon as it asks for the disk.
                verify_blocks(assets, image, load, synced=before.synced)
                backend = Vhostsync(work, image, queues=2)
                load.fresh_report(timeout_s=90)
            if mirrored:
                backend.wait_steady()  # by itself
                steady = load.fresh_report()
                verify_blocks(assets, destination, load, synced=steady.synced)
            last = guest.stop_load(load)
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            guest.run(f"vhs-load verify /dev/vda {load.options} --synced {last.synced}")
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()
    finally:
        backend.__exit__(None, None, None)
    verify_blocks(assets, image, load, synced=last.synced, issued=last.issued)
    if mirrored:
        verify_blocks(assets, destination, load, synced=last.synced, issued=last.issued)
