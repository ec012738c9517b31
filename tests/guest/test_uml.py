# SPDX-License-Identifier: Apache-2.0
"""Linux's user-mode kernel reads and writes through the backend: a frontend with habits of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.guest.assets import GuestAssets
from tests.guest.backends import start_backend
from tests.guest.harness import IO_TROUBLE
from tests.guest.images import digest, fill_random, new_image
from tests.guest.uml import run_uml, uml_missing
from tests.sizes import MIB

# It takes whatever is offered, and sends 0 as the base of a packed ring, where a new one's wrap counter is 1.
BEGINS_PACKED_RINGS_WRONGLY = ("--packed-rings", "off")

pytestmark = [
    pytest.mark.guest,
    pytest.mark.uml,
    pytest.mark.timeout(120),
    pytest.mark.skipif(uml_missing() is not None, reason=str(uml_missing())),
]


def test_write_sync_read_back(assets: GuestAssets, work: Path) -> None:
    image = new_image(work / "disk.img", 64)
    fill_random(image, 32 * MIB, 8 * MIB)
    with start_backend(work, image, options=BEGINS_PACKED_RINGS_WRONGLY) as backend:
        said, kernel_log = run_uml(
            assets,
            work,
            [backend.socket],
            """
            cat /sys/block/vda/size
            dd if=/dev/vda bs=1M skip=32 count=8 iflag=direct 2>/dev/null | sha256sum
            vhs-load write /dev/vda --blocks 4096 --count 2000
            vhs-load verify /dev/vda --blocks 4096 --synced 2000
            """,
        )
        size, read = said.split()[:2]
        assert int(size) == 64 * MIB // 512
        assert read == digest(image, 32 * MIB, 8 * MIB)
        assert "verified" in said
        assert not IO_TROUBLE.search(kernel_log)
        backend.stop()


def test_mirror_in_small(assets: GuestAssets, work: Path) -> None:
    """Steady before the guest comes, so every flush of the guest goes through the count check."""
    source, destination = new_image(work / "source.img", 16), new_image(work / "destination.img", 16)
    with start_backend(work, source, options=BEGINS_PACKED_RINGS_WRONGLY) as backend:
        backend.start_mirror(destination)
        backend.wait_steady()
        said, kernel_log = run_uml(
            assets,
            work,
            [backend.socket],
            "vhs-load write /dev/vda --blocks 2048 --count 1500 --sync-every 16",
        )
        assert len(re.findall(r"^synced=", said, re.MULTILINE)) > 10
        assert not IO_TROUBLE.search(kernel_log)
        backend.stop()
    assert digest(source) == digest(destination)
