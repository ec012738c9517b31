# SPDX-License-Identifier: Apache-2.0
"""What `serve` costs: no wake-ups of the data plane while nothing happens, and bounded memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.daemon.rig import BLOCK, Served, await_true, block_of, ext4, flush, image, write_block
from tests.sizes import MIB

IDLE_S = 3.0
"""What is measured here is that nothing happens: this time has to be waited."""


def wakeups_while_idle(served: Served) -> int:
    """Beyond those that the two queries cause themselves."""
    served.wakeups()
    first = served.wakeups()
    by_a_query = served.wakeups() - first
    begin = served.wakeups()
    time.sleep(IDLE_S)
    return served.wakeups() - begin - by_a_query


def sleeps_of_io_threads(served: Served) -> int:
    every = [path.read_text() for path in Path(f"/proc/{served.process.pid}/task").glob("*/status")]
    statuses = [status for status in every if status.startswith("Name:\tvhostsync-io\n")]
    assert statuses
    return sum(int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0]) for status in statuses)


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_idle_guest_wakes_nobody(work: Path, mirrored: bool) -> None:
    with (
        Served(work, image(work / "a.img"), "--threads", "3") as served,
        served.guest(queues=4) as guest,
    ):
        if mirrored:
            served.start_mirror(image(work / "b.img"))
        for number in range(50):
            write_block(guest, number, 1)
        flush(guest)
        await_true(lambda: served.mirror()["lag-writes"] == 0, "all is mirrored")
        if mirrored:
            await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        slept = sleeps_of_io_threads(served)
        assert wakeups_while_idle(served) <= 2
        assert sleeps_of_io_threads(served) - slept <= 2
        guest.close()
        served.stop()


def test_no_frontend_wakes_nobody(work: Path) -> None:
    with Served(work, image(work / "a.img")) as served:
        served.start_mirror(image(work / "b.img"))
        await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
        assert wakeups_while_idle(served) <= 2
        served.stop()


def test_memory_after_the_log_was_full(work: Path) -> None:
    """A destination that hangs for a while fills the log of 64 MiB; the guest's further writes wait."""
    with ext4(work, 256) as files:
        other = image(files.folder / "b.img", 160)
        options = ("--destination-timeout", "60", "--max-lag-ms", "60000")
        with (
            Served(work, image(work / "a.img", 160), *options) as served,
            served.guest(queues=2, queue_size=256, memory_bytes=160 * MIB) as guest,
        ):
            served.start_mirror(other)
            files.freeze()
            blocks = 256 * 1024 // BLOCK
            writes = []
            for number in range(300):  # 75 MiB
                data = b"".join(block_of(number * blocks + each, 1) for each in range(blocks))
                writes.append(guest.write(number * blocks * BLOCK, data, queue=number % 2))
            await_true(
                lambda: served.qmp.execute("query-stats")["engine"]["log-bytes-used"] > 30 * MIB,
                "the log is full",
            )
            guest.poll()
            assert not all(write.done for write in writes), "a full log makes writes wait"
            files.thaw()
            guest.wait(*writes)
            assert all(write.ok for write in writes)
            flush(guest)
            # The guest's own memory is the guest's, wherever it is mapped.
            own_kib = served.memory_kib() - served.memory_kib("RssShmem")
            assert served.state == "steady"
            assert own_kib <= (60 + 64) * 1024, f"{own_kib / 1024:.0f} MiB, a log of 64 MiB among them"
            print({what: served.memory_kib(what) for what in ("VmRSS", "RssAnon", "RssFile", "RssShmem")})
            guest.close()
            served.stop()
