# SPDX-License-Identifier: Apache-2.0
"""A disk of an NBD server as the destination of a mirror: real servers, `serve` as a process, and a guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon.rig import Load, Served, image, same_content
from tests.network.servers import Nbdkit, QemuNbd, Server, StorageDaemon

MIB = 1 << 20
MIBS = 16
BLOCKS = 256


def servers(folder: Path, raw: Path) -> dict[str, Server]:
    return {
        "nbdkit": Nbdkit(folder, "file", str(raw)),
        "qemu-nbd": QemuNbd(folder, raw),
        "qemu-storage-daemon": StorageDaemon(folder, raw),
    }


@pytest.mark.parametrize("program", ["nbdkit", "qemu-nbd", "qemu-storage-daemon"])
def test_it_is_mirrored_to_and_holds_what_the_guest_has_written(tmp_path: Path, program: str) -> None:
    disk, raw = image(tmp_path / "a.img", MIBS), image(tmp_path / "b.img", MIBS, filled_mib=0)
    with servers(tmp_path, raw)[program] as server, Served(tmp_path, disk) as served:
        with Load(served, blocks=BLOCKS) as load:
            load.go_on()
            served.start_mirror(server.uri)
            load.go_on()
            load.stop()
        served.stop()
    assert same_content(disk, raw)
