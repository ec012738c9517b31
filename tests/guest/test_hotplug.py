# SPDX-License-Identifier: Apache-2.0
"""A disk is taken out of a running machine and put in again, on the connection that there is already.

QEMU's chardev stays connected, and the second device negotiates anew on it, without a word about the end of
the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.guest.assets import GuestAssets
from tests.guest.backends import Vhostsync
from tests.guest.harness import Guest, GuestDisk, GuestOptions, machine_command
from tests.guest.images import digest, new_image
from tests.sizes import MIB

pytestmark = [pytest.mark.guest, pytest.mark.timeout(180)]

PC = GuestOptions(machine="pc")  # its root bus takes devices while it runs
APPEARS = "for i in $(seq 600); do test -b /dev/vda && exit; sleep 0.1; done; exit 1"
DIGEST = "dd if=/dev/vda bs=1M count=4 iflag=direct 2>/dev/null | sha256sum"


def test_device_del_and_device_add_on_one_connection(assets: GuestAssets, work: Path) -> None:
    image, mirror = new_image(work / "disk.img", 64), new_image(work / "mirror.img", 64)
    with (
        Vhostsync(work, image) as backend,
        Guest(assets, work, machine_command([GuestDisk(backend.socket)], PC)) as guest,
        guest.qmp() as monitor,
    ):
        backend.start_mirror(mirror)
        backend.wait_steady()
        for turn in range(2):
            guest.run(f"head -c 4194304 /dev/urandom >/tmp/data{turn}")
            guest.run(f"dd if=/tmp/data{turn} of=/dev/vda bs=64k oflag=direct conv=fsync 2>&1")
            # The next driver finds the device as at the start, not as the one before has left it.
            assert guest.run("cat /sys/block/vda/cache_type") == "write back"
            guest.run("echo 'write through' >/sys/block/vda/cache_type")
            monitor.execute("device_del", id=f"disk{turn}")
            monitor.wait_event("DEVICE_DELETED", device=f"disk{turn}")
            device: dict[str, Any] = {"id": f"disk{turn + 1}", "chardev": "backend0", "num-queues": 1}
            monitor.execute("device_add", driver="vhost-user-blk-pci", **device)
            guest.run(APPEARS)
            assert guest.run(DIGEST).split() == guest.run(f"sha256sum </tmp/data{turn}").split()
            assert backend.status()["state"] == "steady"
        monitor.execute("stop")
        monitor.execute("cont")
        assert guest.run(DIGEST).split()[0] == digest(image, 0, 4 * MIB)
        assert guest.io_trouble() == []
        guest.power_off()
        backend.stop()
        log = (work / "disk.log").read_text()
    assert log.count("frontend connected") == 1
    assert "does not get on" not in log
    assert digest(image) == digest(mirror)
