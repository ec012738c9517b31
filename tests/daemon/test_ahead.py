# SPDX-License-Identifier: Apache-2.0
"""`--on-congestion pull-ahead`: a destination that stands still holds nobody up, and catches up later."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.daemon.rig import Served, await_true, ext4, flush, image, same_content, write_block
from tests.guest.images import new_image
from tests.guest.qmp_client import QmpError
from vhostsync.record.state_record import Worth

OPTIONS = ("--on-congestion", "pull-ahead", "--max-lag-ms", "100", "--destination-timeout", "60s")
REGION = 64 << 10


def test_it_gets_ahead_and_catches_up(work: Path) -> None:
    source = image(work / "a.img")
    with ext4(work) as slow:
        other = new_image(slow.folder / "b.img", 16)
        with Served(work, source, *OPTIONS) as served, served.guest() as guest:
            served.start_mirror(other)
            await_true(lambda: served.mirror()["differing-bytes"] == 0, "all is settled")
            slow.freeze()
            write_block(guest, 0, 1)
            change = served.await_state("ahead")
            assert change["former"] == "steady" and "too slow" in change["reason"]
            flush(guest)  # confirmed by the source alone: the record must say so already
            record = served.record()
            assert record is not None and record.peer_worth is Worth.OUTDATED
            for number in range(100, 110):
                write_block(guest, number * 16, 2)
            flush(guest)
            found = served.mirror()
            assert (found["state"], found["worth"]) == ("ahead", "outdated")
            assert found["outdated-since"] == record.outdated_since
            assert found["lag-writes"] >= 10 and found["lag-ms"] > 100
            assert found["differing-bytes"] >= 10 * REGION
            with pytest.raises(QmpError, match="catches up by itself"):
                served.qmp.execute("switch")
            with pytest.raises(QmpError, match="is ahead already"):
                served.qmp.execute("mirror-start", destination=str(work / "c.img"))
            slow.thaw()
            change = served.await_state("syncing")
            assert change["former"] == "ahead"
            served.await_state("steady")
            served.await_worth("up-to-date")
            found = served.mirror()
            assert 10 * REGION <= found["copy-bytes-total"] <= 12 * REGION
            assert found["outdated-since"] is None
            guest.close()
            served.stop()
        assert same_content(source, other)


def test_cancel_while_ahead_leaves_the_moment(work: Path) -> None:
    source = image(work / "a.img")
    with ext4(work) as slow:
        other = new_image(slow.folder / "b.img", 16)
        with Served(work, source, *OPTIONS) as served, served.guest() as guest:
            served.start_mirror(other)
            slow.freeze()
            write_block(guest, 0, 1)
            served.await_state("ahead")
            moment = source.read_bytes()
            write_block(guest, 100, 2)
            flush(guest)
            client = served.client()
            with ThreadPoolExecutor() as pool:
                cancelled = pool.submit(client.execute, "mirror-cancel")  # waits for what is on its way
                with pytest.raises(TimeoutError):
                    cancelled.result(timeout=0.2)
                slow.thaw()
                cancelled.result()
            assert served.state == "passthrough"
            record = served.record()
            assert record is not None and record.peer_worth is Worth.OUTDATED
            guest.close()
            served.stop()
        assert other.read_bytes() == moment


def test_the_end_while_ahead_leaves_the_moment(work: Path) -> None:
    """SIGTERM waits for what is on its way, and does not catch up any more."""
    source = image(work / "a.img")
    with ext4(work) as slow:
        other = new_image(slow.folder / "b.img", 16)
        with Served(work, source, *OPTIONS) as served, served.guest() as guest, ThreadPoolExecutor() as pool:
            served.start_mirror(other)
            slow.freeze()
            write_block(guest, 0, 1)
            served.await_state("ahead")
            moment = source.read_bytes()
            write_block(guest, 100, 2)
            guest.close()
            ending = pool.submit(served.stop)
            served.qmp.wait_closed()  # from here on it waits for the destination, and for nothing else
            slow.thaw()
            ending.result()
            record = served.record()
            assert record is not None and record.clean and record.peer_worth is Worth.OUTDATED
        assert other.read_bytes() == moment


def test_a_switch_that_the_destination_is_too_slow_for(work: Path) -> None:
    options = ("--on-congestion", "pull-ahead", "--max-lag-ms", "1500", "--destination-timeout", "60s")
    with ext4(work) as slow:
        other = new_image(slow.folder / "b.img", 16)
        with Served(work, image(work / "a.img"), *options) as served, served.guest() as guest:
            served.start_mirror(other)
            slow.freeze()
            write_block(guest, 0, 1)
            with pytest.raises(QmpError, match=r"still on .*a\.img: .* did not stay steady"):
                served.qmp.execute("switch")
            assert served.state == "ahead"
            slow.thaw()
            await_true(lambda: served.state == "steady", "it has caught up")
            served.qmp.execute("switch")
            guest.close()
            served.stop()
