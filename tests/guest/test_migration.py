# SPDX-License-Identifier: Apache-2.0
"""A running guest moves from one QEMU to another on the same disk, under load; nothing is lost, not even what
the backend wrote into the guest's memory meanwhile."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.guest.assets import GuestAssets
from tests.guest.backends import Vhostsync, storage_daemon_wanted
from tests.guest.harness import (
    Guest,
    GuestDisk,
    GuestOptions,
    machine_command,
    rings_are_packed,
    verify_blocks,
)
from tests.guest.images import digest, fill_random, new_image
from tests.guest.migration import Migration
from tests.sizes import MIB

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(600),
    pytest.mark.skipif(storage_daemon_wanted(), reason="QEMU cannot migrate on qemu-storage-daemon"),
]
READ_MIB = 64
READ = f"dd if=/dev/vda bs=1M skip=32 count={READ_MIB} 2>/dev/null"
HASH = f"{READ} | md5sum"


def reads_so_far(guest: Guest) -> int:
    """Read requests of the disk, as the guest counts them."""
    return int(guest.run("cat /sys/block/vda/stat").split()[0])


LAYOUTS = pytest.mark.parametrize("properties", ["", "packed=on"], ids=["split", "packed"])


@LAYOUTS
def test_there_and_back_under_load_with_a_mirror(assets: GuestAssets, work: Path, properties: str) -> None:
    """Two migrations, each with both QEMUs connected at once, while the load writes and the mirror is steady.

    What the guest reads during a migration goes from the backend straight into its page cache, and is more
    than the memory that was not sent yet: for the rest only the dirty log tells QEMU to send it again."""
    source, destination = new_image(work / "source.img", 128), new_image(work / "destination.img", 128)
    fill_random(source, 32 * MIB, READ_MIB * MIB)  # the load writes the first 32 MiB
    with Vhostsync(work, source, queues=2) as backend:
        disk = GuestDisk(backend.socket, queues=2, properties=properties)
        machine = machine_command([disk], GuestOptions(memory_mib=256))
        with Guest(assets, work, machine, name="home") as guest:
            assert rings_are_packed(guest) == bool(properties)
            load = guest.start_load("/dev/vda", blocks=8192, threads=8)
            load.next_report()
            backend.start_mirror(destination)
            backend.wait_steady()
            for name in ("away", "home-again"):
                with Migration(guest, machine, name) as migration:
                    assert backend.qmp.execute("query-status")["frontends"] == 2
                    assert migration.begin() < READ_MIB * MIB // 2
                    guest.run("echo 3 >/proc/sys/vm/drop_caches")  # of the first trip
                    guest.run(f"{READ} of=/dev/null")
                    report = load.fresh_report()
                    verify_blocks(assets, source, load, synced=report.synced)
                    assert migration.still_active(), "what was read then was not read during the migration"
                    figures = migration.complete()
                print(f"to {name}: {figures}")
                assert backend.qmp.wait_event("FRONTEND_DISCONNECTED")["reason"] is None
                reads = reads_so_far(guest)
                # Without the load for so long: on a busy host the guest has a tenth of a processor as it is.
                arrived = guest.run(f"killall -STOP vhs-load; {HASH}; killall -CONT vhs-load")
                assert reads_so_far(guest) == reads, "not from the page cache: this has checked nothing"
                assert arrived.split()[0] == digest(source, 32 * MIB, READ_MIB * MIB, hashlib.md5())
                after = load.fresh_report()
                assert after.synced > report.issued
                verify_blocks(assets, destination, load, synced=after.synced)
                assert backend.status()["state"] == "steady"
            last = guest.stop_load(load)
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()
    verify_blocks(assets, source, load, synced=last.synced, issued=last.issued)
    assert digest(source) == digest(destination)


@LAYOUTS
def test_a_migration_that_is_called_off(assets: GuestAssets, work: Path, properties: str) -> None:
    """The incoming QEMU goes away again; the guest never noticed, and can migrate later."""
    image = new_image(work / "disk.img", 64)
    with Vhostsync(work, image, queues=2) as backend:
        machine = machine_command([GuestDisk(backend.socket, queues=2, properties=properties)])
        with Guest(assets, work, machine, name="home") as guest:
            assert rings_are_packed(guest) == bool(properties)
            load = guest.start_load("/dev/vda", blocks=4096)
            load.next_report()
            with Migration(guest, machine, "nowhere") as migration:
                migration.begin()
                migration.cancel()
            before = load.fresh_report()
            verify_blocks(assets, image, load, synced=before.synced)
            with Migration(guest, machine, "away") as migration:
                migration.begin()
                migration.complete()
            assert load.fresh_report().synced > before.issued
            last = guest.stop_load(load)
            assert guest.io_trouble() == []
            guest.power_off()
        backend.stop()
    verify_blocks(assets, image, load, synced=last.synced, issued=last.issued)
