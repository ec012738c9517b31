# SPDX-License-Identifier: Apache-2.0
"""Whether a disk is found by its name is looked at before a guest is moved to it, and hangs nobody."""

from __future__ import annotations

import threading
from pathlib import Path

import anyio
import pytest

from tests.sizes import MIB
from vhostsync.host.errands import THREADS_MAX
from vhostsync.mirror import disk_names
from vhostsync.mirror.destination import Place
from vhostsync.mirror.disk_names import DiskNames
from vhostsync.storage.file import create_image
from vhostsync.storage.kinds import identify

pytestmark = pytest.mark.anyio


async def test_looks_that_hang_keep_no_other_disk_from_being_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, gone = tmp_path / "hung.img", tmp_path / "gone.img"
    places = []
    for path in (hung, gone):
        create_image(path, MIB)
        places.append(Place(str(path), identify(str(path))))
    gone.unlink()
    released, looks, is_replaced = threading.Event(), [0], disk_names._is_replaced

    def hangs(place: Place) -> bool | None:
        if place.name == str(hung):
            looks[0] += 1
            released.wait(60)
        return is_replaced(place)

    monkeypatch.setattr(disk_names, "_is_replaced", hangs)
    monkeypatch.setattr(disk_names, "CERTAIN_S", 0.05)
    names = DiskNames()
    try:
        for _ in range(2 * THREADS_MAX):
            assert await names.why_not_found(places[0]) is None
        monkeypatch.setattr(disk_names, "CERTAIN_S", 30.0)
        assert "does not lead to" in str(await names.why_not_found(places[1]))
        assert looks == [1]
    finally:
        released.set()
    with anyio.fail_after(30):
        while places[0] in names._hangs:
            await anyio.sleep(0.01)
    assert await names.why_not_found(places[0]) is None
