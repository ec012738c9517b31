# SPDX-License-Identifier: Apache-2.0
"""`vhostsync serve` is killed again and again under a verified load, and its frontend goes on: no request is
lost, none is answered twice, every one succeeds, and every block holds what was written last.

VHOSTSYNC_CRASH_KILLS is the number of kills of each frontend's test (12 unless told; these end after
VHOSTSYNC_CRASH_S seconds, 60 unless told, however many it were), VHOSTSYNC_CRASH_SEED the seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.habits import HABITS, Habits, Unconnected
from tests.crash.killer import Killer
from tests.crash.load import BLOCK_BYTES, VerifiedLoad
from tests.frontend import DEFAULT_FEATURES, Feature, Frontend
from tests.guest.images import digest, new_image
from tests.sizes import MIB

KILLS = int(os.environ.get("VHOSTSYNC_CRASH_KILLS", "12"))
TIME_S = float(os.environ.get("VHOSTSYNC_CRASH_S", "60"))
SEED = int(os.environ.get("VHOSTSYNC_CRASH_SEED", "1"))
DISK_MIB = 16

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIME_S + 120)]


@contextlib.contextmanager
def running(
    work: Path,
    habits: Habits,
    *,
    kills: int,
    destination: Path | None,
    bitmap: Path | None = None,
    features: int = DEFAULT_FEATURES,
) -> Iterator[tuple[VerifiedLoad, Killer, Path]]:
    rng = random.Random(SEED)
    disk = new_image(work / "disk.img", DISK_MIB)
    size = 64 if features & Feature.INDIRECT_DESC else 256  # a list takes a descriptor for each of its parts
    frontend = Frontend(Unconnected(), queues=2, queue_size=size, features=features)
    load = VerifiedLoad(frontend, work / "disk.sock", habits, blocks=DISK_MIB * MIB // BLOCK_BYTES, rng=rng)
    killer = Killer(
        work,
        disk,
        queues=2,
        kills=kills,
        rng=random.Random(SEED + 1),
        news=load.news.set,
        destination=destination,
        bitmap=bitmap,
        deadline_s=TIME_S,
    )
    try:
        killer.start()
        yield load, killer, disk
    finally:
        killer.close()
        load.close()
        frontend.close()


PACKED = DEFAULT_FEATURES | Feature.RING_PACKED
LAYOUTS = [
    pytest.param(HABITS[0], DEFAULT_FEATURES, id="qemu"),
    pytest.param(HABITS[1], DEFAULT_FEATURES, id="cloud-hypervisor"),
    pytest.param(HABITS[0], PACKED, id="packed"),
    pytest.param(HABITS[0], PACKED & ~Feature.INDIRECT_DESC, id="packed, lists in the ring"),
]


@pytest.mark.parametrize(("habits", "features"), LAYOUTS)
def test_killed_again_and_again(work: Path, habits: Habits, features: int) -> None:
    began = time.monotonic()
    destination = new_image(work / "destination.img", DISK_MIB)
    ran = running(work, habits, kills=KILLS, destination=destination, features=features)
    with ran as (load, killer, disk):
        load.run(
            finished=killer.over.is_set, connecting=killer.connecting.set, recovered=killer.recovered.set
        )
        killer.check()
        assert killer.backend is not None
        # The destination that was lost so often is of use again after a full copy.
        killer.backend.start_mirror(destination)
        killer.backend.wait_steady()
        load.disconnect()
        killer.backend.stop()
        load.verify_image(disk)
        assert digest(disk) == digest(destination)
        print(f"{habits.name}: {killer.figures} {load.figures} losses 0 duplicates 0", end="")
        print(f" in {time.monotonic() - began:.0f} s")
        assert killer.figures.kills > 0 and load.figures.replayed > 0


def test_killed_with_the_mirror_attached_each_time(work: Path) -> None:
    """The bitmap outlives every kill: after each, the mirror begins again with what differs, and in the end
    both disks hold what was written last."""
    destination = new_image(work / "destination.img", DISK_MIB)
    ran = running(work, HABITS[0], kills=KILLS, destination=destination, bitmap=work / "bits")
    with ran as (load, killer, disk):
        load.run(
            finished=killer.over.is_set, connecting=killer.connecting.set, recovered=killer.recovered.set
        )
        killer.check()
        assert killer.backend is not None
        killer.backend.wait_steady()  # by itself
        assert killer.backend.status()["full-copy-reason"] is None
        load.disconnect()
        killer.backend.stop()
        load.verify_image(disk)
        assert digest(disk) == digest(destination)
        print(f"{killer.figures} {load.figures} losses 0 duplicates 0")
        assert killer.figures.kills > 0 and killer.figures.resynced > 0
