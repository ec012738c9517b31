# SPDX-License-Identifier: Apache-2.0
"""Everything at random under a verified load (tests/crash/chaos.py): nothing lost, nothing answered twice, no
I/O error, both disks equal in the end.

VHOSTSYNC_CHAOS_S is how long (15 s unless told), VHOSTSYNC_CRASH_SEED the seed.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.crash.chaos import Chaos
from tests.crash.habits import HABITS, Unconnected
from tests.crash.load import BLOCK_BYTES, VerifiedLoad
from tests.frontend import Frontend
from tests.guest.images import digest, new_image
from tests.sizes import MIB

TIME_S = float(os.environ.get("VHOSTSYNC_CHAOS_S", "15"))
SEED = int(os.environ.get("VHOSTSYNC_CRASH_SEED", "1"))
DISK_MIB = 16


@pytest.mark.slow
@pytest.mark.timeout(TIME_S + 240)
def test_everything_at_random(work: Path) -> None:
    disks = new_image(work / "a.img", DISK_MIB), new_image(work / "b.img", DISK_MIB)
    frontend = Frontend(Unconnected(), queues=2, queue_size=64)
    blocks = DISK_MIB * MIB // BLOCK_BYTES
    load = VerifiedLoad(frontend, work / "disk.sock", HABITS[0], blocks=blocks, rng=random.Random(SEED))
    rng = random.Random(SEED + 1)
    chaos = Chaos(work, disks, queues=2, rng=rng, news=load.news.set, deadline_s=TIME_S)
    try:
        chaos.start()
        load.run(finished=chaos.over.is_set, connecting=chaos.connecting.set, recovered=chaos.recovered.set)
        chaos.check()
        assert chaos.backend is not None
        load.disconnect()
        chaos.backend.stop()
        load.verify_image(chaos.current)
        assert digest(disks[0]) == digest(disks[1])
        print(f"seed {SEED}: {dict(chaos.done)}; {load.figures} losses 0 duplicates 0")
        assert chaos.done["switch_keeping"] > 0 and load.figures.requests > 0
    finally:
        chaos.close()
        load.close()
        frontend.close()
