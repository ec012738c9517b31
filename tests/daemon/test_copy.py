# SPDX-License-Identifier: Apache-2.0
"""The copy of a disk that is written meanwhile: it ends, both are equal, holes stay holes, a limit holds."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.daemon.rig import Load, Served, flush, image, lacking, same_content
from tests.guest.images import fill_random, new_image
from tests.sizes import MIB


def test_the_copy_ends_under_the_guests_writes(work: Path) -> None:
    source, copy = image(work / "a.img", 32, filled_mib=24), image(work / "b.img", 32, filled_mib=32)
    with Served(work, source) as served, Load(served, blocks=8192) as load:
        load.go_on()
        served.start_mirror(copy)
        found = served.mirror()
        assert found["copy-bytes-done"] == found["copy-bytes-total"]
        load.go_on()
        expected = load.stop()
        # Flushed and steady: the destination holds it now, not only after an orderly end.
        assert lacking(copy, expected) == [] == lacking(source, expected)
        assert same_content(source, copy)
        served.qmp.execute("quit")
        assert served.process.wait(15) == 0
    assert same_content(source, copy)


def test_every_kind_of_write_reaches_both_disks(work: Path) -> None:
    source, copy = image(work / "a.img", filled_mib=16), image(work / "b.img", filled_mib=16)
    chance = random.Random(2)
    with Served(work, source) as served, served.guest(queues=2) as guest:
        served.qmp.execute("mirror-start", destination=str(copy), speed=8 * MIB)
        for turn in range(200):
            offset = chance.randrange(0, 16 * MIB - MIB, 512)
            length = 512 * chance.randint(1, 256)
            queue = turn % 2
            match chance.randrange(4):
                case 0:
                    request = guest.discard(offset, length, queue=queue)
                case 1:
                    request = guest.write_zeroes(offset, length, unmap=turn % 3 == 0, queue=queue)
                case _:
                    data = chance.randbytes(length)
                    request = guest.write(offset, data, queue=queue, segments=1 + turn % 3)
            if turn % 4 == 0:
                guest.wait(request)
                guest.recycle(request)
        served.qmp.execute("mirror-set-speed", speed=0)
        served.await_steady()
        flush(guest)
        assert same_content(source, copy)
        guest.close()
        served.stop()


def test_a_sparse_source_stays_sparse(work: Path) -> None:
    source, copy = new_image(work / "a.img", 256), new_image(work / "b.img", 256)
    fill_random(source, 100 * MIB, MIB)
    with source.open("r+b") as file:  # zeroes that are written are as good as a hole
        file.seek(200 * MIB)
        file.write(bytes(4 * MIB))
    with Served(work, source) as served:
        served.start_mirror(copy)
        assert served.mirror()["copy-bytes-sparse"] >= 254 * MIB
        served.stop()
    assert copy.stat().st_blocks * 512 <= 2 * MIB
    assert same_content(source, copy)


def test_a_destination_with_old_content_is_made_equal(work: Path) -> None:
    source, copy = image(work / "a.img", filled_mib=1), image(work / "b.img", 20, filled_mib=20)
    with copy.open("rb") as file:
        file.seek(16 * MIB)
        beyond = file.read()
    with Served(work, source) as served:
        served.start_mirror(copy)
        served.stop()
    assert same_content(source, copy)
    assert copy.stat().st_blocks * 512 <= 6 * MIB
    with copy.open("rb") as file:
        file.seek(16 * MIB)
        assert file.read() == beyond, "what lies beyond the guest's disk is not ours"


def test_the_speed_limit_holds(work: Path) -> None:
    source, copy = image(work / "a.img", filled_mib=12), image(work / "b.img")
    with Served(work, source) as served, Load(served, first=3072, blocks=512) as load:
        began = time.monotonic()
        served.start_mirror(copy, speed=4 * MIB)
        took = time.monotonic() - began
        # 12 MiB at 4 MiB/s, less what may pass at once at the beginning.
        assert took >= 2.0, f"{took:.1f} s for 12 MiB at 4 MiB/s"
        assert served.mirror()["speed-bytes-per-s"] == 4 * MIB
        load.go_on()
        load.stop()
        served.stop()
    assert same_content(source, copy)


def test_progress_is_reported(work: Path) -> None:
    source, copy = image(work / "a.img", filled_mib=12), image(work / "b.img")
    with Served(work, source) as served:
        served.qmp.execute("mirror-start", destination=str(copy), speed=2 * MIB)
        first = served.qmp.wait_event("MIRROR_PROGRESS")
        second = served.qmp.wait_event("MIRROR_PROGRESS")
        assert first["bytes-total"] == second["bytes-total"] == 16 * MIB
        assert first["bytes-done"] < second["bytes-done"] < 16 * MIB
        found = served.mirror()
        assert found["worth"] == "inconsistent" and found["copy-rate-bytes-per-s"] > 0
        assert found["copy-remaining-s"] > 0 and found["destination"] == str(copy)
        served.qmp.execute("mirror-cancel")
        served.stop()
